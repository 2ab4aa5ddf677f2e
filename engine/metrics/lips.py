"""Mouth opening and eye closure of real faces from dlib's 68 landmarks (extra `landmarks`).

Axes: T frames, H height, W width. Landmarks are (T, 68, 2), as (x, y) in pixels.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from engine.errors import UserError
from engine.faces.landmarks import load_dlib
from engine.faces.track import DETECT_EVERY

SIDE = 256  # pixels of the shorter side of the images for dlib
# of the 68 landmarks
LIPS = ([61, 62, 63], [67, 66, 65])
EYES = (slice(36, 42), slice(42, 48))
# ratio of an eye's height to its width at which closure begins and is complete, relative to the clip's median: that of
# open eyes varies by 10 %
OPEN_EYE = 0.9
CLOSED_EYE = 0.45


def mouth_opening(points: np.ndarray) -> np.ndarray:
    """Return the distance between the inner lips relative to the distance between the eyes, (T,)."""
    eyes = np.linalg.norm(np.subtract(*(points[:, eye].mean(1) for eye in EYES)), axis=-1)
    return np.linalg.norm(points[:, LIPS[0]] - points[:, LIPS[1]], axis=-1).mean(-1) / eyes


def eye_closure(points: np.ndarray) -> np.ndarray:
    """Return how far the eyes are closed, (T,), from 0 (as far open as they usually are in this clip) to 1.

    It is derived from the ratio of the eye's height to its width (Soukupová and Čech, 2016), averaged over both eyes.
    """
    ratios = []
    for eye in EYES:
        outer, upper1, upper2, inner, lower2, lower1 = points[:, eye].swapaxes(0, 1)
        heights = [np.linalg.norm(upper1 - lower1, axis=-1), np.linalg.norm(upper2 - lower2, axis=-1)]
        ratios.append(np.mean(heights, 0) / np.linalg.norm(outer - inner, axis=-1))
    ratio = np.mean(ratios, 0)
    return ((OPEN_EYE - ratio / np.median(ratio)) / (OPEN_EYE - CLOSED_EYE)).clip(0, 1)


class LandmarkReader:
    """Reads the landmarks of real faces, and with them the mouth opening. Faces are detected in every fifth frame."""

    def __init__(self) -> None:
        self.detect, self.predict = load_dlib()

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return the mouth opening (T,) in frames (T, H, W, 3) uint8 RGB of a clip.

        Raises:
            UserError: If dlib detects no face in the first frame.
        """
        return mouth_opening(self.landmarks(frames))

    def landmarks(self, frames: np.ndarray) -> np.ndarray:
        """Return the landmarks (T, 68, 2), in pixels of the enlarged image; arguments and errors as above."""
        return np.stack([points_of(shape) for shape in self.shapes(frames)])

    def shapes(self, frames: np.ndarray, box: Any = None) -> list[Any]:
        """Return dlib's landmarks of each frame (T, H, W, 3), in pixels of the enlarged image.

        Args:
            box: dlib's bounding box of the face before the first frame. None: it is the largest face in that frame.
        """
        shapes = []
        for number, frame in enumerate(map(enlarge, frames)):
            if number % DETECT_EVERY == 0:
                box = self.find(frame, box)
            shapes.append(self.predict(frame, box))
        return shapes

    def find(self, frame: np.ndarray, last: Any = None) -> Any:
        """Return dlib's bounding box of the largest face in an enlarged frame (H, W, 3).

        Args:
            last: bounding box that contains the centre of the face; it is returned if no face is detected there.

        Raises:
            UserError: If no face is detected and `last` is None.
        """
        boxes = self.detect(frame, 1)
        if last is not None:
            boxes = [box for box in boxes if _contains(last, box)] or [last]
        if not boxes:
            raise UserError("dlib detects no face in the first frame")
        return max(boxes, key=lambda box: box.area())


def _contains(box: Any, other: Any) -> bool:
    """Return whether a bounding box contains the centre of another one."""
    x = (other.left() + other.right()) / 2
    y = (other.top() + other.bottom()) / 2
    return box.left() <= x <= box.right() and box.top() <= y <= box.bottom()


def points_of(shape: Any) -> np.ndarray:
    """Return dlib's 68 landmarks of a face as an array (68, 2)."""
    return np.array([(shape.part(k).x, shape.part(k).y) for k in range(68)], float)


def enlarge(frame: np.ndarray) -> np.ndarray:
    """Scale a frame (H, W, 3) up so that its shorter side has at least `SIDE` pixels."""
    scale = SIDE / min(frame.shape[:2])
    if scale <= 1:
        return frame
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)

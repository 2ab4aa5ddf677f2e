"""Mouth opening of real faces from dlib's 68 landmarks (extra `landmarks`).

Axes: T frames, H height, W width.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from engine.errors import UserError
from engine.faces.landmarks import load_dlib

SIDE = 256  # pixels of the shorter side of the images for dlib
# of the 68 landmarks
LIPS = ([61, 62, 63], [67, 66, 65])
EYES = (slice(36, 42), slice(42, 48))


class LipOpening:
    """Measures the distance between the inner lips, relative to the distance between the eyes."""

    def __init__(self) -> None:
        self.detect, self.predict = load_dlib()

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return the mouth opening (T,) in frames (T, H, W, 3) uint8 RGB of a clip in which the head hardly moves.

        Raises:
            UserError: If dlib detects no face in the first frame.
        """
        box = self.find(frames[0])
        return np.array([self.opening(self.predict(enlarge(frame), box)) for frame in frames])

    def find(self, frame: np.ndarray) -> Any:
        """Return dlib's bounding box of the largest face in a frame (H, W, 3), in pixels of the enlarged image."""
        boxes = self.detect(enlarge(frame), 1)
        if not boxes:
            raise UserError("dlib detects no face in the first frame")
        return max(boxes, key=lambda box: box.area())

    def opening(self, shape: Any) -> float:
        """Return the mouth opening for dlib's 68 landmarks of a face."""
        points = np.array([(shape.part(k).x, shape.part(k).y) for k in range(68)], float)
        eyes = np.linalg.norm(np.subtract(*(points[eye].mean(0) for eye in EYES)))
        return float(np.linalg.norm(points[LIPS[0]] - points[LIPS[1]], axis=1).mean() / eyes)


def enlarge(frame: np.ndarray) -> np.ndarray:
    """Scale a frame (H, W, 3) up so that its shorter side has at least `SIDE` pixels."""
    scale = SIDE / min(frame.shape[:2])
    if scale <= 1:
        return frame
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)

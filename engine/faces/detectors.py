"""Where the faces of one picture are: OpenCV's cascade, YuNet, or what the user says.

Axes: H height, W width, n faces. A face is 14 numbers: a square box (x, y, w, h) from the forehead to the chin, and
five points (x, y): the eye on the picture's left, the eye on its right, nose, mouth corner on the left, on the right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from engine.errors import UserError

DETECT_SIDE = 320  # longer image side that a detector sees
BOX, POINTS = slice(0, 4), slice(4, 14)

# Five points of a frontal face in its box, as the cascade places it: how a detector without points fills them in, and
# how one without such boxes fills in those.
FRONTAL = np.array([[0.31, 0.39], [0.69, 0.39], [0.5, 0.6], [0.36, 0.79], [0.64, 0.79]])


class FaceDetector(Protocol):
    """Finds faces in one frame (H, W, 3) uint8 RGB: (n, 14) float as above, or boxes (n, 4) alone; n may be 0."""

    def __call__(self, frame: np.ndarray) -> np.ndarray: ...


def with_points(faces: np.ndarray) -> np.ndarray:
    """Faces (n, 4) or (n, 14) -> (n, 14); absent points are those of a frontal face."""
    faces = np.asarray(faces, np.float64)
    if faces.shape[-1] == POINTS.stop:
        return faces
    points = faces[:, None, :2] + FRONTAL * faces[:, None, 2:]
    return np.concatenate([faces, points.reshape(len(faces), 10)], 1)


def box_of_points(points: np.ndarray) -> np.ndarray:
    """The square box (4,) in which a frontal face has its eyes and mouth where `points` (5, 2) has them."""
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    where = FRONTAL[:2].mean(0), FRONTAL[3:].mean(0)
    # The larger of two readings of the size: a turned head brings its eyes together, a raised one eyes and mouth.
    side = max(
        np.linalg.norm(points[1] - points[0]) / (FRONTAL[1, 0] - FRONTAL[0, 0]),
        np.linalg.norm(mouth - eyes) / (where[1][1] - where[0][1]),
    )
    corner = (eyes + mouth) / 2 - side * (where[0] + where[1]) / 2
    return np.array([*corner, side, side])


class HaarDetector:
    """OpenCV's frontal-face cascade, which ships with its wheel (Apache-2.0): no download.

    Args:
        every_size: look for small faces also where there is a large one, at twice the time.
    """

    def __init__(self, every_size: bool = False) -> None:
        self.every_size = every_size
        self.cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml"))

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        scale = min(1.0, DETECT_SIDE / max(grey.shape))
        if scale < 1:
            grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        margin = max(grey.shape) // 8  # a face that touches the border is found with room around it
        grey = cv2.copyMakeBorder(grey, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
        found: tuple = ()
        for share in (8,) if self.every_size else (3, 8):  # a large face is found at once, small ones if there is none
            if len(found) == 0:
                least = max(24, min(grey.shape) // share)
                found = self.cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=3, minSize=(least, least))
        boxes = np.asarray(found, dtype=np.float64).reshape(-1, 4)
        boxes[:, :2] -= margin
        boxes /= scale
        return boxes[np.argsort(-boxes[:, 2], kind="stable")]


class YuNetDetector:
    """YuNet (Wu et al. 2023) by OpenCV: smaller, turned and dimmer faces than the cascade finds, and their points.

    Weights: `face_detection_yunet_2023mar.onnx` of the OpenCV Zoo (https://github.com/opencv/opencv_zoo), MIT.

    Raises:
        UserError: the file is missing or is not that network.
    """

    def __init__(self, path: str | Path, score: float = 0.7) -> None:
        if not Path(path).is_file():
            raise UserError(f"no face detector at {path}: give the file face_detection_yunet_2023mar.onnx")
        try:
            self.network = cv2.FaceDetectorYN.create(str(path), "", (DETECT_SIDE, DETECT_SIDE), score, 0.3, 5000)
        except cv2.error as error:
            raise UserError(f"{path} is not the YuNet network that OpenCV runs: {error.err}") from error

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        scale = min(1.0, DETECT_SIDE / max(frame.shape[:2]))
        picture = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if scale < 1:
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        self.network.setInputSize(picture.shape[1::-1])
        found = self.network.detect(picture)[1]
        if found is None:
            return np.zeros((0, POINTS.stop))
        points = found[:, POINTS].astype(np.float64) / scale
        return np.stack([np.concatenate([box_of_points(p.reshape(5, 2)), p]) for p in points])

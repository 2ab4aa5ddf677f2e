"""Face detectors for single images: OpenCV's cascade and YuNet. See also `engine.faces.mtcnn`.

Axes: H height, W width, n faces. A face is 14 numbers: a square box (x, y, w, h) from the forehead to the chin, and
five points (x, y): left eye, right eye, nose, left mouth corner, right mouth corner, where left and right are those of
the image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from engine.errors import UserError

# Values of the settings `detector` and `face_landmarks`, see `engine.faces.source`.
DETECTORS = "cascade (OpenCV's), mtcnn (extra `faces`), or the path of YuNet's file face_detection_yunet_2023mar.onnx"
LANDMARKS = "dlib68 (extra `landmarks`), mtcnn (extra `faces`), yunet (with detector=FILE), or a file or folder"

DETECT_SIDE = 320  # longer side of the image that a detector processes, in pixels
BOX = slice(0, 4)
POINTS = slice(4, 14)

# Five points of a frontal face relative to the cascade's box, to convert between boxes and
# points.
FRONTAL = np.array([[0.31, 0.39], [0.69, 0.39], [0.5, 0.6], [0.36, 0.79], [0.64, 0.79]])


# A detector maps a frame (H, W, 3) uint8 RGB to faces (n, 14) float as above, or to boxes (n, 4); n may be 0.
FaceDetector = Callable[[np.ndarray], np.ndarray]


def with_points(faces: np.ndarray) -> np.ndarray:
    """Add the points of a frontal face to boxes (n, 4). Faces (n, 14) are returned unchanged."""
    faces = np.asarray(faces, np.float64)
    if faces.shape[-1] == POINTS.stop:
        return faces
    points = faces[:, None, :2] + FRONTAL * faces[:, None, 2:]
    return np.concatenate([faces, points.reshape(len(faces), 10)], 1)


def middle_of(boxes: np.ndarray) -> np.ndarray:
    """Return the centres (..., 2) of boxes (..., 4) or of faces (..., 14)."""
    return boxes[..., :2] + boxes[..., 2:4] / 2


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """Reduce landmarks (..., P, 2), either 68 of iBUG 300-W or five, to five points (..., 5, 2)."""
    if landmarks.shape[-2] == 5:
        return landmarks
    eyes = landmarks[..., 36:42, :].mean(-2), landmarks[..., 42:48, :].mean(-2)
    return np.stack([*eyes, *(landmarks[..., i, :] for i in (30, 48, 54))], -2)


def box_of_points(points: np.ndarray) -> np.ndarray:
    """Return the square box (4,) of a frontal face whose eyes and mouth are at `points` (5, 2)."""
    eyes = points[:2].mean(0)
    mouth = points[3:].mean(0)
    frontal = FRONTAL[:2].mean(0), FRONTAL[3:].mean(0)
    # Use the larger of two size estimates: turning the head reduces the eye distance, raising it the eye-mouth
    # distance.
    side = max(
        np.linalg.norm(points[1] - points[0]) / (FRONTAL[1, 0] - FRONTAL[0, 0]),
        np.linalg.norm(mouth - eyes) / (frontal[1][1] - frontal[0][1]),
    )
    corner = (eyes + mouth) / 2 - side * (frontal[0] + frontal[1]) / 2
    return np.array([*corner, side, side])


class HaarDetector:
    """OpenCV's frontal-face cascade, which is included in its wheel (Apache-2.0).

    Args:
        tiny: detect only faces that are too small for the default search, down to 1/20 of the image's longer side.
        angle: rotation of the image in degrees anticlockwise before detection, to find tilted heads.
    """

    def __init__(self, tiny: bool = False, angle: float = 0.0) -> None:
        self.tiny = tiny
        self.angle = angle
        if not hasattr(cv2, "CascadeClassifier"):
            raise UserError(f"OpenCV {cv2.__version__} has no cascade face detector: install opencv-python-headless<5")
        self.cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml"))

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        # Always search all sizes: the cascade's box depends on the sizes that it tries, and crops in
        # training and inference must be the same.
        boxes, _, back = self._look(frame, (8,))
        faces = with_points(boxes[np.argsort(-boxes[:, 2], kind="stable")])
        if self.angle:  # boxes stay upright around their centre
            middle = transform(back, middle_of(faces))
            faces[:, :2] = middle - faces[:, 2:4] / 2
            faces[:, POINTS] = transform(back, faces[:, POINTS].reshape(-1, 2)).reshape(-1, 10)
        return faces

    def evidence(self, frame: np.ndarray) -> int:
        """Return the number of overlapping detections of the most likely face: 4-13 for false positives, 10-90 for
        faces.
        """
        return max(self._look(frame, (3, 8))[1], default=0)

    def _look(self, frame: np.ndarray, fractions: tuple[int, ...]) -> tuple[np.ndarray, list[int], np.ndarray]:
        """Return boxes (n, 4) in the rotated image, the number of overlapping detections of each, and the inverse
        transform (2, 3).

        Args:
            fractions: minimum face sizes as fractions (1/3, 1/8) of the shorter side. The next size is searched only if
                the previous one found nothing.
        """
        picture, scale = at_most(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (1 + self.tiny) * DETECT_SIDE)
        size = max(picture.shape)
        margin = size // 2 if self.angle else size // 8  # pad the image, so that faces at its border are found
        picture = cv2.copyMakeBorder(picture, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
        middle = picture.shape[1] / 2 - 0.5, picture.shape[0] / 2 - 0.5
        turn = cv2.getRotationMatrix2D(middle, self.angle, 1.0)
        if self.angle:
            picture = cv2.warpAffine(picture, turn, picture.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        limits = [{"minSize": (24, 24), "maxSize": (DETECT_SIDE // 4, DETECT_SIDE // 4)}]
        if not self.tiny:
            side = min(picture.shape) - 2 * margin * bool(self.angle)
            limits = [{"minSize": (least, least)} for least in (max(24, side // part) for part in fractions)]
        boxes = ()
        votes = ()
        for limit in limits:
            if len(boxes) == 0:
                boxes, votes = self.cascade.detectMultiScale2(picture, scaleFactor=1.1, minNeighbors=3, **limit)
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        back = cv2.invertAffineTransform(turn)
        back[:, 2] = (back[:, 2] + back[:, :2] @ (margin, margin) - margin) / scale
        boxes[:, :2] -= margin
        return boxes / scale, [int(n) for n in votes], back


def transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points (n, 2) by an affine matrix (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def at_most(picture: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """Scale `picture` down to a longer side of at most `side`. Return the image and the scale factor."""
    scale = min(1.0, side / max(picture.shape[:2]))
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return picture, scale


class YuNetDetector:
    """YuNet (Wu et al. 2023), run by OpenCV. It detects smaller, rotated and darker faces than the cascade, with five
    landmarks.

    Weights: `face_detection_yunet_2023mar.onnx` of the OpenCV Zoo (https://github.com/opencv/opencv_zoo), MIT.
    """

    def __init__(self, path: str | Path, score: float = 0.7) -> None:
        if not Path(path).is_file():
            raise UserError(f"no face detector at {path}: expected the file face_detection_yunet_2023mar.onnx")
        try:
            self.network = cv2.FaceDetectorYN.create(str(path), "", (DETECT_SIDE, DETECT_SIDE), score, 0.3, 5000)
        except cv2.error as error:
            raise UserError(f"{path} is not a YuNet network that OpenCV can run: {error.err}") from error

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        picture, scale = at_most(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), DETECT_SIDE)
        self.network.setInputSize(picture.shape[1::-1])
        faces = self.network.detect(picture)[1]
        if faces is None:
            return np.zeros((0, POINTS.stop))
        points = faces[:, POINTS].astype(np.float64) / scale
        return np.stack([np.concatenate([box_of_points(p.reshape(5, 2)), p]) for p in points])

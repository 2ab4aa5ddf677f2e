"""Crops of mouth and face by bounding box, and the square around a face that a portrait codec encodes.

Axes: T frames, H height, W width. Boxes are (x, y, w, h) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from engine.faces.track import FaceTrack

MOUTH_CENTRE = (0.5, 0.77)  # centre (x, y) of the mouth crop in the detector's box, as fractions of its size
MOUTH_SIDE = 0.56  # side of the mouth crop, as a fraction of the box's width
FACE_SIDE = 1.1

# Head and shoulders, as in the videos LIA-X was trained on. Of a face box from the forehead to the chin: how wide the
# square is, and how far its middle lies above the box's. The published tools take half as much again as a taller box,
# from the hairline on, and more above than below; on the released model's own example this is the same square.
SQUARE_SIDE = 1.78
RAISE = 0.16
CROPPED = 0.85  # fraction of a square image above which the face fills it, so that it is not cropped again


def crop_mouth(frames: np.ndarray, track: FaceTrack, size: int) -> np.ndarray:
    """Crop the mouth, grey (T, size, size) uint8, from frames (T, H, W, 3), upright also if the head is tilted."""
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)
    return _crop(grey, track, MOUTH_CENTRE, MOUTH_SIDE, size)


def crop_face(frames: np.ndarray, track: FaceTrack, size: int) -> np.ndarray:
    """Crop the face, (T, size, size, 3) uint8 RGB, from frames (T, H, W, 3), upright also if the head is tilted."""
    return _crop(frames, track, (0.5, 0.5), FACE_SIDE, size)


def _crop(
    frames: Iterable[np.ndarray], track: FaceTrack, centre: tuple[float, float], side: float, size: int
) -> np.ndarray:
    """Crop squares around `centre` of the boxes; `centre` and `side` are fractions of a box. Borders are replicated."""
    out = []
    for frame, (x, y, w, h), roll in zip(frames, track.boxes, track.roll, strict=True):
        right = (centre[0] - 0.5) * w
        down = (centre[1] - 0.5) * h
        cos = np.cos(roll)
        sin = np.sin(roll)
        middle = np.array([x + w / 2 + cos * right - sin * down, y + h / 2 + sin * right + cos * down])
        scale = size / (side * w)
        turn = scale * np.array([[cos, sin], [-sin, cos]])
        matrix = np.column_stack([turn, size / 2 - turn @ middle - 0.5 * (1 - turn.sum(1))])
        if scale < 0.5:  # reduce the frame first: bilinear sampling alone would skip pixels
            frame = cv2.GaussianBlur(frame, (0, 0), 0.25 / scale)
        out.append(cv2.warpAffine(frame, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE))
    return np.stack(out)


def portrait_square(box: np.ndarray, height: int, width: int) -> tuple[int, int, int]:
    """Return left, top and side of the portrait square in an H x W image, for a face box (x, y, w, h) from forehead to
    chin.
    """
    x, y, w, h = (float(value) for value in box)
    most = min(height, width)
    side = min(most, round(SQUARE_SIDE * max(w, h)))
    if height == width and side >= CROPPED * most:
        return 0, 0, most
    left = x + w / 2 - side / 2
    top = y + h / 2 - RAISE * max(w, h) - side / 2
    return int(np.clip(round(left), 0, width - side)), int(np.clip(round(top), 0, height - side)), side


def centre_square(height: int, width: int) -> tuple[int, int, int]:
    """Return left, top and side of the largest centred square in an H x W image."""
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side

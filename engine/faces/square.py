"""The square round a face that a portrait codec sees: head and shoulders, as in the videos LIA-X was trained on.

Axes: H height, W width, in pixels.
"""

from __future__ import annotations

import numpy as np

# Of a face box from the forehead to the chin: how wide the square is, and how far its middle lies above the box's. The
# published tools take half as much again as a taller box, from the hairline on, and more above than below; on the
# released model's own example this is the same square.
SIDE, RAISE = 1.78, 0.16
CROPPED = 0.85  # share of a square picture from which on the face fills it: it has been cropped already


def portrait_square(box: np.ndarray, height: int, width: int) -> tuple[int, int, int]:
    """Return left, top and side of the square in an H x W picture for a face box (x, y, w, h), forehead to chin."""
    x, y, w, h = (float(value) for value in box)
    most = min(height, width)
    side = min(most, round(SIDE * max(w, h)))
    if height == width and side >= CROPPED * most:
        return 0, 0, most
    left, top = x + w / 2 - side / 2, y + h / 2 - RAISE * max(w, h) - side / 2
    return int(np.clip(round(left), 0, width - side)), int(np.clip(round(top), 0, height - side)), side


def centre_square(height: int, width: int) -> tuple[int, int, int]:
    """Return left, top and side of the largest square in the middle of an H x W picture."""
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side

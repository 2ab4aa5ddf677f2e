"""Pasting of a generated face into the image from which it was cropped.

Axes: F frames, H height, W width, S side of the square.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from talker_t2av.faces import Square, read_square

WHOLE = 2**20  # maximum side of a square in pixels
LONGEST = 960  # maximum longer side of a video in pixels; larger images are scaled down
MARGIN = 0.15  # width of the blended border, as a fraction of the square's side


@dataclass(frozen=True)
class Surroundings:
    """The still image around a talking face.

    Attributes:
        picture: (H, W, 3) uint8. left, top, side: position of the face square in pixels.
    """

    picture: np.ndarray
    left: int
    top: int
    side: int

    @cached_property
    def weight(self) -> np.ndarray:
        """Blending weight (S, S, 1) of the face: 1 inside, falling to 0 at borders that lie within the image."""
        height, width = self.picture.shape[:2]
        across = _fade(self.side, self.left > 0, self.left + self.side < width)
        down = _fade(self.side, self.top > 0, self.top + self.side < height)
        return np.minimum(down[:, None], across[None])[..., None]

    def paste(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the image (H, W, 3) with each frame (s, s, 3) resized and pasted into the square."""
        rows = slice(self.top, self.top + self.side)
        columns = slice(self.left, self.left + self.side)
        behind = self.picture[rows, columns].astype(np.float32)
        for frame in frames:
            face = cv2.resize(frame, (self.side, self.side), interpolation=cv2.INTER_CUBIC)
            whole = self.picture.copy()
            whole[rows, columns] = np.rint(behind + self.weight * (face - behind))
            yield whole


def _fade(side: int, at_start: bool, at_end: bool) -> np.ndarray:
    """Return weights (S,) that rise from 0 at the start and fall to 0 at the end, if requested."""
    position = (np.arange(side) + 0.5) / (MARGIN * side)
    rising = np.clip(position, 0, 1) if at_start else np.ones(side)
    falling = np.clip(position[::-1], 0, 1) if at_end else np.ones(side)
    weight = np.minimum(rising, falling)
    return (weight**2 * (3 - 2 * weight)).astype(np.float32)


def read_surroundings(path: str | Path, square: Square) -> Surroundings | None:
    """Read the image, or the video frame, from which a square was cropped. Return None if the square is the whole
    image.
    """
    whole = replace(square, left=0, top=0, side=WHOLE)
    picture = next(read_square(path, whole, 1, square.first))[0]
    if picture.shape[0] == picture.shape[1] == square.side:
        return None
    scale = min(1.0, LONGEST / max(picture.shape[:2]))
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    height, width = picture.shape[:2]
    side = min(round(square.side * scale), height, width)
    left = min(round(square.left * scale), width - side)
    top = min(round(square.top * scale), height - side)
    return Surroundings(picture, left, top, side)

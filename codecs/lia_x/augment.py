"""Augmentation of portrait pairs, so that few people in one studio suffice to train a general codec.

Both frames of a pair get the same framing, shape, background and colours, so that only the movement between them
remains.

Axes: K frames, H height, W width, S side.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from engine.settings import Group, setting

# HSV range of a studio's blue background, in OpenCV's convention
KEY_HUE = (82, 118)
KEY_SATURATION = 70
KEY_VALUE = 50
CONTROL = 5  # points per side of the warping grid


@dataclass(frozen=True)
class Augment(Group, prefix="data.train.augment."):
    """Augmentation strengths of portrait pairs. 0 disables an augmentation.

    Attributes:
        background: fraction of pairs whose blue background is replaced by random colours.
        zoom, aspect: maximum relative change of size and of aspect ratio.
        shift, bend: maximum translation of the image, and displacement of grid points, as fractions of the side.
        turn: maximum rotation in degrees.
        flip: fraction of mirrored pairs.
        colour: strength of changes in brightness, contrast, gamma, hue and saturation, up to 1.
    """

    background: float = setting(0.7, 0.0, 1.0)
    zoom: float = setting(0.12, 0.0, 0.5)
    aspect: float = setting(0.1, 0.0, 0.5)
    shift: float = setting(0.06, 0.0, 0.5)
    bend: float = setting(0.02, 0.0, 0.1)
    turn: float = setting(6.0, 0.0, 45.0)
    flip: float = setting(0.5, 0.0, 1.0)
    colour: float = setting(1.0, 0.0, 1.0)

    def frame(self, frames: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Augment framing, shape and background of frames (K, H, W, 3) uint8.

        Returns:
            Frames (K, S, S, 3) uint8, and a map (S, S, 2) with the source position of each pixel, as fractions of the
            sides.
        """
        if rng.random() < self.background:
            frames = replace_wall(frames, rng)
        grid = self._grid(size, rng)
        height, width = frames.shape[1:3]
        at = (grid * (width, height) - 0.5).astype(np.float32)
        moved = [cv2.remap(f, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for f in frames]
        return np.stack(moved), grid

    def recolour(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Change the colours of frames (K, H, W, 3) uint8, equally in all frames."""
        if not self.colour:
            return frames
        strength = self.colour
        levels = np.linspace(0, 1, 256)
        gamma = np.exp(strength * rng.uniform(-0.35, 0.35))
        gain = np.exp(strength * (rng.uniform(-0.2, 0.2) + rng.uniform(-0.12, 0.12, 3)))
        offset = strength * rng.uniform(-0.06, 0.06)
        curves = levels[:, None] ** gamma * gain + offset  # (256, 3)
        mix = _hue_and_saturation(strength * rng.uniform(-0.25, 0.25), 1 + strength * rng.uniform(-0.7, 0.35))
        x = np.stack([curves[:, c].astype(np.float32)[frames[..., c]] for c in range(3)], -1)
        return (255 * (x @ mix.T.astype(np.float32))).clip(0, 255).round().astype(np.uint8)

    def _grid(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Return the source position of each pixel, (S, S, 2) as x and y in fractions of the sides."""
        line = (np.arange(size) + 0.5) / size - 0.5
        x, y = np.meshgrid(line, line)
        zoom = np.exp(rng.uniform(-self.zoom, self.zoom))
        aspect = np.exp(rng.uniform(-self.aspect, self.aspect) / 2)
        angle = np.deg2rad(rng.uniform(-self.turn, self.turn))
        cos = np.cos(angle)
        sin = np.sin(angle)
        turned_x = cos * x - sin * y
        turned_y = sin * x + cos * y
        x = turned_x * zoom * aspect
        y = turned_y * zoom / aspect
        if rng.random() < self.flip:
            x = -x
        bend = rng.uniform(-self.bend, self.bend, (CONTROL, CONTROL, 2)).astype(np.float32)
        bend = cv2.resize(bend, (size, size), interpolation=cv2.INTER_CUBIC)
        return np.stack([x, y], -1) + bend + rng.uniform(-self.shift, self.shift, 2) + 0.5


def _hue_and_saturation(turn: float, saturation: float) -> np.ndarray:
    """Return a matrix (3, 3) that rotates the hue of RGB by `turn` radians and scales its saturation; grey is
    unchanged.
    """
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos = saturation * np.cos(turn)
    sin = saturation * np.sin(turn)
    return np.linalg.inv(to_yiq) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ to_yiq


def replace_wall(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replace the blue background in frames (K, H, W, 3) uint8 RGB with a random image."""
    wall = background(frames.shape[1:3], rng)
    out = []
    for frame in frames:
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)
        lowest = (KEY_HUE[0], KEY_SATURATION, KEY_VALUE)
        highest = (KEY_HUE[1], 255, 255)
        alpha = cv2.GaussianBlur(cv2.inRange(hsv, lowest, highest), (0, 0), 0.8)[..., None] / np.float32(255)
        out.append((alpha * wall + (1 - alpha) * frame).round().astype(np.uint8))
    return np.stack(out)


def background(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw smooth or patchy random colours, (H, W, 3) float32 from 0 to 255."""
    cells = int(rng.choice([1, 2, 4, 12]))
    colours = rng.uniform(0, 255, 3) + rng.normal(0, rng.choice([10, 40]), (cells, cells, 3))
    way = cv2.INTER_NEAREST if cells == 12 and rng.random() < 0.5 else cv2.INTER_CUBIC
    return cv2.resize(colours.astype(np.float32), shape[::-1], interpolation=way).clip(0, 255).reshape(*shape, 3)

"""The moving face: eyes, brows and mouth drawn over the still portrait, frame by frame.

Axes: T frames, P mouth parameters. Lengths are in pixels of the 128-pixel picture; drawing is at twice that size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from corpora.synthetic.expression import Pose
from corpora.synthetic.mouth import MouthPainter
from corpora.synthetic.portrait import (
    CANVAS,
    SCALE,
    SIZE,
    Identity,
    backdrop,
    composite,
    ellipse,
    fill,
    fixed,
    head,
    line,
    mix,
    shade,
)
from corpora.synthetic.visemes import FPS, MOUTH


@dataclass(frozen=True)
class Motion:
    """Head and eye motion, one row a frame: `shift` (T, 2) pixels, `turn` (T,) degrees, `blink` (T,) 0 open to
    1 shut, `gaze` (T, 2) pixels, `brow` (T,) extra lift."""

    shift: np.ndarray
    turn: np.ndarray
    blink: np.ndarray
    gaze: np.ndarray
    brow: np.ndarray


def draw_motion(rng: np.random.Generator, frames: int, loudness: np.ndarray) -> Motion:
    """Slow drifts, nods and brow lifts with the loudness (T,) of the speech, blinks every few seconds, glances."""
    t = np.arange(frames) / FPS

    def drift(size: float) -> np.ndarray:
        waves = [np.sin(2 * np.pi * (rng.uniform(0.15, 0.7) * t + rng.random())) for _ in range(3)]
        return size * sum(waves) / 3

    shift = np.stack([drift(3.0), drift(2.0) + 1.3 * loudness], 1)
    blink = np.zeros(frames)
    when = rng.uniform(0.2, 2.5)
    while when < t[-1]:
        blink = np.maximum(blink, np.clip(1.35 - np.abs(t + 0.5 / FPS - when) / 0.075, 0, 1))
        when += rng.uniform(1.4, 4.0)
    gaze, at = np.zeros((frames, 2)), 0
    while at < frames:
        gaze[at:] = rng.normal(0, (0.7, 0.35)) if rng.random() < 0.5 else 0.0
        at += int(rng.integers(12, 45))
    return Motion(shift, drift(2.6), blink, gaze, 0.18 * loudness)


class Face:
    """Draws one identity. `light` (about 1) is the brightness of the scene."""

    def __init__(self, who: Identity, light: float = 1.0) -> None:
        self.who, self.light = who, light
        self._back = backdrop(who, light)
        art, cover = head(who, self._back, light)
        # colour times coverage, and what the backdrop keeps
        self._art = np.dstack([cv2.multiply(art, cv2.merge([cover] * 3), scale=1 / 255), cv2.bitwise_not(cover)])
        self._mouth = MouthPainter(who, light)
        self._y, self._x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
        low, high = (who.mouth_y - 4) * SCALE, (who.chin - 2) * SCALE
        ramp = np.clip((self._y - low) / (high - low), 0, 1)
        near = np.clip((who.half_width * SCALE + 4 - np.abs(self._x - CANVAS / 2)) / 12, 0, 1)
        self._fall = (ramp * ramp * (3 - 2 * ramp)) * near

    def render(self, mouth: np.ndarray, looks: Pose | Sequence[Pose], motion: Motion) -> np.ndarray:
        """Mouth parameters (T, P), and one pose or T of them, to frames (T, 128, 128, 3) uint8 RGB."""
        frames = np.empty((len(mouth), SIZE, SIZE, 3), np.uint8)
        looks = [looks] * len(mouth) if isinstance(looks, Pose) else looks
        for i, (values, look) in enumerate(zip(mouth, looks, strict=True)):
            canvas = self._frame(dict(zip(MOUTH, map(float, values))), look, motion, i)
            cv2.resize(canvas, (SIZE, SIZE), dst=frames[i], interpolation=cv2.INTER_AREA)
        return frames

    def _frame(self, mouth: dict[str, float], look: Pose, motion: Motion, i: int) -> np.ndarray:
        angle = np.radians(motion.turn[i])
        c, s = float(np.cos(angle)), float(np.sin(angle))
        pivot = np.array([64.0, 104.0])
        ox, oy = (float(v) for v in pivot + motion.shift[i])

        def place(points: np.ndarray) -> np.ndarray:
            """Head coordinates to picture coordinates."""
            x, y = points[:, 0] - 64.0, points[:, 1] - 104.0
            placed = np.empty((len(points), 2))
            placed[:, 0], placed[:, 1] = c * x - s * y + ox, s * x + c * y + oy
            return placed

        drop = self._mouth.chin_drop(mouth)
        px, py = ox * SCALE, oy * SCALE
        dx, dy = self._x - np.float32(px), self._y - np.float32(py)
        map_x = c * dx + s * dy + np.float32(pivot[0] * SCALE)
        map_y = c * dy - s * dx + np.float32(pivot[1] * SCALE) - np.float32(drop * SCALE) * self._fall
        map_x, map_y = cv2.convertMaps(map_x, map_y, cv2.CV_16SC2)
        moved = cv2.remap(self._art, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        bare = cv2.cvtColor(cv2.extractChannel(moved, 3), cv2.COLOR_GRAY2RGB)
        canvas = cv2.add(cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB), cv2.multiply(self._back, bare, scale=1 / 255))
        self._eyes(canvas, place, look, motion, i)
        self._brows(canvas, place, look, float(motion.brow[i]))
        self._mouth.paint(canvas, place, mouth, look)
        return canvas

    def _eyes(self, canvas: np.ndarray, place, look: Pose, motion: Motion, i: int) -> None:
        who, y0 = self.who, 61.0
        skin = shade(who.skin, 0.97 * self.light)
        opening = max(0.0, 4.3 * (1 + 0.9 * look.eyes) * (1 - motion.blink[i]))
        mask = np.zeros((CANVAS, CANVAS), np.uint8)
        globe = canvas.copy()
        lids = []
        t = np.linspace(-1, 1, 15)
        for side in (-1, 1):
            x0 = 64 + side * who.eye_gap
            slant = -0.8 * side * t
            top = np.stack([x0 + who.eye_size * t, y0 + slant - opening * (1 - t**2) ** 0.75], 1)
            low = np.stack([x0 + who.eye_size * t, y0 + slant + 0.62 * opening * (1 - t**2)], 1)
            lids.append((place(top), place(low), side))
            if opening < 0.5:
                continue
            shape = place(np.concatenate([top, low[::-1]]))
            fill(mask, shape, 255)
            fill(globe, shape, shade((238, 236, 232), self.light))
            fill(globe, place(np.concatenate([top, top[::-1] + (0, 1.3)])), shade((190, 184, 184), self.light))
            x, y = x0 + motion.gaze[i, 0], y0 - 0.5 + motion.gaze[i, 1]
            fill(globe, place(ellipse(x, y, 3.7, 3.7, n=24)), shade(who.eye, 0.6))
            fill(globe, place(ellipse(x, y, 3.0, 3.0, n=24)), who.eye)
            fill(globe, place(ellipse(x, y, 1.7, 1.7, n=16)), (16, 12, 12))
            fill(globe, place(ellipse(x - 1.1, y - 1.3, 0.8, 0.8, n=10)), (250, 250, 250))
        if opening >= 0.5:
            composite(canvas, globe, mask, (slice(40 * SCALE, 84 * SCALE), slice(None)))
        for top, low, side in lids:
            line(canvas, top, shade(who.hair if max(who.hair) < 120 else (60, 44, 36), 0.7), 1.2)
            line(canvas, low, shade(skin, 0.68), 0.6)
            line(canvas, top[2:-2] - (0, 2.4), shade(skin, 0.76), 0.7)
            if who.glasses:
                ring = place(ellipse(64 + side * who.eye_gap, y0 + 0.6, who.eye_size + 2.6, 7.6))
                cv2.polylines(canvas, [fixed(ring)], True, (44, 40, 44), 2, cv2.LINE_AA, 4)
        if who.glasses:
            inner, outer = who.eye_gap - who.eye_size - 2.6, who.eye_gap + who.eye_size + 2.6
            line(canvas, place(np.array([[64 - inner, y0], [64, y0 - 1.2], [64 + inner, y0]])), (44, 40, 44), 1.0)
            for side in (-1, 1):
                arm = np.array([[64 + side * outer, y0], [64 + side * (who.half_width + 1), y0 - 1]])
                line(canvas, place(arm), (44, 40, 44), 1.0)

    def _brows(self, canvas: np.ndarray, place, look: Pose, lift: float) -> None:
        who = self.who
        colour = shade(mix(who.hair, who.skin, 0.12), 0.78)
        t = np.linspace(0, 1, 12)
        raised = 3.6 * (look.brow + lift)
        for side in (-1, 1):
            x = 64 + side * (who.eye_gap - who.eye_size + 0.4 + (2 * who.eye_size + 0.6) * t)
            x -= side * 1.3 * max(0.0, -look.brow_inner) * (1 - t)
            y = 52.0 - raised - 2.6 * np.sin(np.pi * (0.15 + 0.75 * t)) * (1 + 0.3 * look.brow) + 1.8
            y -= 4.0 * look.brow_inner * (1 - t) ** 1.5 - 1.2 * look.brow_inner * t**2
            thick = who.brow * (1.05 - 0.75 * t**1.5)
            upper, lower = np.stack([x, y - thick * 0.5], 1), np.stack([x, y + thick * 0.6], 1)
            fill(canvas, place(np.concatenate([upper, lower[::-1]])), colour)
        if look.brow_inner < -0.3 or look.sneer > 0.5:
            for side in (-1, 1):
                crease = np.array([[64 + side * 2.2, 50.0], [64 + side * 1.8, 55.5]])
                line(canvas, place(crease), shade(who.skin, 0.76 * self.light), 0.7)

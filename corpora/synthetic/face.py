"""The moving face: eyes, brows and mouth drawn over the still portrait, frame by frame.

Lengths are in pixels of the 128-pixel frame; drawing is at twice that size. Eyes, brows and mouth are drawn in
coordinates of the head; a function `place` maps such points (N, 2) to the frame, according to the head motion.

Axes: T frames, P mouth parameters, N points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from corpora.synthetic.expression import Pose
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

_OPENING = 19.0  # pixels between the lips at open = 1
_T = np.linspace(-1, 1, 25)
_PIVOT = 64.0, 104.0  # where the head turns


def draw_motion(rng: np.random.Generator, frames: int, loudness: np.ndarray) -> dict[str, np.ndarray]:
    """Draw slow head drifts, glances, blinks, and nods and brow lifts that follow the loudness (T,) of the speech.

    Returns:
        Tracks (T,): shift_x, shift_y in pixels, turn in degrees, blink from 0 (open) to 1 (closed), gaze_x, gaze_y in
        pixels, and brow, an additional lift.
    """
    t = np.arange(frames) / FPS

    def drift(size: float) -> np.ndarray:
        waves = [np.sin(2 * np.pi * (rng.uniform(0.15, 0.7) * t + rng.random())) for _ in range(3)]
        return size * sum(waves) / 3

    motion = {"shift_x": drift(3.0), "shift_y": drift(2.0) + 1.3 * loudness}
    blink = np.zeros(frames)
    when = rng.uniform(0.2, 2.5)
    while when < t[-1]:
        blink = np.maximum(blink, np.clip(1.35 - np.abs(t + 0.5 / FPS - when) / 0.075, 0, 1))
        when += rng.uniform(1.4, 4.0)
    gaze = np.zeros((frames, 2))
    at = 0
    while at < frames:
        gaze[at:] = rng.normal(0, (0.7, 0.35)) if rng.random() < 0.5 else 0.0
        at += int(rng.integers(12, 45))
    motion |= {"turn": drift(2.6), "blink": blink}
    return motion | {"gaze_x": gaze[:, 0], "gaze_y": gaze[:, 1], "brow": 0.18 * loudness}


class Face:
    """Draws one identity. `light` (about 1) is the brightness of the scene."""

    def __init__(self, who: Identity, light: float = 1.0) -> None:
        self.who = who
        self.light = light
        self._back = backdrop(who, light)
        art, cover = head(who, self._back, light)
        # colour times coverage, and what the backdrop keeps
        self._art = np.dstack([cv2.multiply(art, cv2.merge([cover] * 3), scale=1 / 255), cv2.bitwise_not(cover)])
        self._lip = shade(who.lip_colour, light)
        self._skin = shade(who.skin, light)
        self._teeth = shade((244, 240, 228), light)
        self._tongue = shade((196, 88, 96), light)
        self._inside = shade((58, 18, 26), light)
        self._y, self._x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
        low = (who.mouth_y - 4) * SCALE
        high = (who.chin - 2) * SCALE
        ramp = np.clip((self._y - low) / (high - low), 0, 1)
        near = np.clip((who.half_width * SCALE + 4 - np.abs(self._x - CANVAS / 2)) / 12, 0, 1)
        self._fall = (ramp * ramp * (3 - 2 * ramp)) * near

    def render(self, mouth: np.ndarray, looks: Pose | Sequence[Pose], motion: Mapping[str, np.ndarray]) -> np.ndarray:
        """Draw frames (T, 128, 128, 3) uint8 RGB of mouth parameters (T, P), one pose or T of them, and motion."""
        frames = np.empty((len(mouth), SIZE, SIZE, 3), np.uint8)
        looks = [looks] * len(mouth) if isinstance(looks, Pose) else looks
        for i, (values, look) in enumerate(zip(mouth, looks, strict=True)):
            moved = {name: float(track[i]) for name, track in motion.items()}
            canvas = self._frame(dict(zip(MOUTH, map(float, values))), look, moved)
            cv2.resize(canvas, (SIZE, SIZE), dst=frames[i], interpolation=cv2.INTER_AREA)
        return frames

    def _frame(self, mouth: dict[str, float], look: Pose, motion: dict[str, float]) -> np.ndarray:
        angle = np.radians(motion["turn"])
        c = float(np.cos(angle))
        s = float(np.sin(angle))
        x0, y0 = _PIVOT
        ox = x0 + motion["shift_x"]
        oy = y0 + motion["shift_y"]

        def place(points: np.ndarray) -> np.ndarray:
            x = points[:, 0] - x0
            y = points[:, 1] - y0
            placed = np.empty((len(points), 2))
            placed[:, 0] = c * x - s * y + ox
            placed[:, 1] = s * x + c * y + oy
            return placed

        drop = 7.5 * mouth["open"] ** 1.1 - 1.2 * mouth["tuck"] - 0.8 * mouth["press"]  # of the chin
        px = ox * SCALE
        py = oy * SCALE
        dx = self._x - np.float32(px)
        dy = self._y - np.float32(py)
        map_x = c * dx + s * dy + np.float32(x0 * SCALE)
        map_y = c * dy - s * dx + np.float32(y0 * SCALE) - np.float32(drop * SCALE) * self._fall
        map_x, map_y = cv2.convertMaps(map_x, map_y, cv2.CV_16SC2)
        moved = cv2.remap(self._art, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        bare = cv2.cvtColor(cv2.extractChannel(moved, 3), cv2.COLOR_GRAY2RGB)
        canvas = cv2.add(cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB), cv2.multiply(self._back, bare, scale=1 / 255))
        self._eyes(canvas, place, look, motion)
        self._brows(canvas, place, look, motion["brow"])
        self._mouth(canvas, place, mouth, look)
        return canvas

    def _eyes(self, canvas: np.ndarray, place, look: Pose, motion: dict[str, float]) -> None:
        who = self.who
        y0 = 61.0
        skin = shade(who.skin, 0.97 * self.light)
        opening = max(0.0, 4.3 * (1 + 0.9 * look.eyes) * (1 - motion["blink"]))
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
            x = x0 + motion["gaze_x"]
            y = y0 - 0.5 + motion["gaze_y"]
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
            inner = who.eye_gap - who.eye_size - 2.6
            outer = who.eye_gap + who.eye_size + 2.6
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
            upper = np.stack([x, y - thick * 0.5], 1)
            lower = np.stack([x, y + thick * 0.6], 1)
            fill(canvas, place(np.concatenate([upper, lower[::-1]])), colour)
        if look.brow_inner < -0.3 or look.sneer > 0.5:
            for side in (-1, 1):
                crease = np.array([[64 + side * 2.2, 50.0], [64 + side * 1.8, 55.5]])
                line(canvas, place(crease), shade(who.skin, 0.76 * self.light), 0.7)

    def _mouth(self, canvas: np.ndarray, place, mouth: dict[str, float], look: Pose) -> None:
        """Draw lips, teeth and tongue."""
        who = self.who
        t = _T
        width = mouth["width"]
        rounded = float(np.clip(mouth["round"], 0, 1))
        press = float(np.clip(mouth["press"], 0, 1))
        tuck = float(np.clip(mouth["tuck"], 0, 1))
        half = who.mouth_width * (1 + (0.24 if width > 0 else 0.46) * width)
        half *= 1 + look.widen * (1 - rounded)
        inner_half = half * (0.93 - 0.16 * rounded)
        gap = max(0.0, mouth["open"] * _OPENING - 0.5)
        gap *= 1 - press
        rise = 0.26 * gap + 0.9 * look.sneer * min(1.0, gap)
        fall = 0.74 * gap
        y0 = who.mouth_y - 0.8 * rounded
        bend = -4.2 * look.corner * (1 - 0.75 * rounded)
        curve = bend * (t**2 - 0.35)
        power = 0.95 - 0.45 * rounded
        hump = np.maximum(0, 1 - t**2)
        top = y0 + curve - rise * hump**power
        low = y0 + curve + fall * hump ** (power * 0.9)
        lip_low_up = 1.6 * tuck
        low = low - lip_low_up * hump
        upper_lip = who.lip * (0.82 + 0.3 * rounded) * (1 - 0.5 * press) * (1 - 0.12 * max(0, width))
        lower_lip = who.lip * (1.12 + 0.25 * rounded) * (1 - 0.45 * press) * (1 - 0.62 * tuck)
        bow = 1 - 0.24 * np.exp(-((t / 0.13) ** 2)) * (1 - 0.6 * rounded)
        edge = np.maximum(0, 1 - t**2) ** 0.62
        outer_top = top - upper_lip * edge * bow - 0.15
        outer_low = low + lower_lip * np.maximum(0, 1 - t**2) ** 0.55 + 0.15

        def points(x_half: float, y: np.ndarray) -> np.ndarray:
            return np.stack([64 + x_half * t, y], 1)

        self._folds(canvas, place, half, y0, look, mouth)
        under = outer_low.max()
        shadow = np.stack([64 + 0.5 * half * t, under + 2.2 - 1.0 * t**2], 1)
        line(canvas, place(shadow), shade(self._skin, 0.8), 1.2)
        upper = np.concatenate([points(half, outer_top), points(inner_half, top)[::-1]])
        lower = np.concatenate([points(inner_half, low), points(half, outer_low)[::-1]])
        fill(canvas, place(np.concatenate([points(half, outer_top), points(half, outer_low)[::-1]])), self._lip)
        fill(canvas, place(upper), shade(self._lip, 0.86))
        fill(canvas, place(lower), self._lip)
        shine = points(0.42 * half, low + 0.45 * (outer_low - low))
        if lower_lip > 2:
            line(canvas, place(shine), mix(self._lip, (255, 225, 220), 0.3 + 0.2 * rounded), 0.9)
        if gap > 0.6:
            self._cavity(canvas, place, points, inner_half, top, low, mouth)
        else:
            seam = points(half * (0.97 + 0.04 * press), 0.5 * (top + low))
            line(canvas, place(seam), shade(self._lip, 0.45 if press < 0.5 else 0.36), 1.0 + 0.5 * press)
        if tuck > 0.3:
            line(canvas, place(points(0.8 * half, outer_low + 0.6)), shade(self._skin, 0.72), 1.0)
        if press > 0.5:
            for side in (-1, 1):
                dimple = ellipse(64 + side * (half + 1.6), y0 + bend * 0.65, 0.8, 2.0, n=12)
                fill(canvas, place(dimple), shade(self._skin, 0.82))

    def _folds(self, canvas: np.ndarray, place, half: float, y0: float, look: Pose, mouth: dict[str, float]) -> None:
        """Draw lines from the nose to the mouth's corners: with a smile, a sneer or spread lips."""
        depth = 0.1 + 0.16 * max(0.0, look.corner) + 0.16 * look.sneer + 0.05 * max(0.0, mouth["width"])
        for side in (-1, 1):
            x = 64 + side * (half + 3.4)
            fold = np.array(
                [
                    [64 + side * (self.who.nose_width + 3.6), y0 - 13.5 - 1.5 * look.sneer],
                    [0.5 * (x + 64 + side * (self.who.nose_width + 5)), y0 - 8.5],
                    [x, y0 - 2.5],
                ]
            )
            line(canvas, place(fold), shade(self._skin, 1 - depth), 0.9)

    def _cavity(
        self, canvas: np.ndarray, place, points, half: float, top: np.ndarray, low: np.ndarray, mouth: dict[str, float]
    ) -> None:
        """Draw teeth and tongue, seen through the opening between the lips only."""
        opening = np.zeros((CANVAS, CANVAS), np.uint8)
        shape = place(np.concatenate([points(half, top), points(half, low)[::-1]]))
        fill(opening, shape, 255)
        view = canvas.copy()
        fill(view, shape + (0, -1), self._inside)
        fill(view, shape, self._inside)
        height = float((low - top).max())
        tongue = mouth["tongue"]
        if height > 3:
            base = low.max() + 1.5
            size = min(0.9, 0.3 + 0.75 * tongue) * height
            hump = ellipse(64, base, half * (0.62 - 0.12 * tongue), size, 180, 360, 24)
            fill(view, place(hump), shade(self._tongue, 0.84))
        lower = mouth["lower"] * min(3.4, 0.5 * height)
        if lower > 0.7:
            band = np.concatenate([points(half * 0.8, low - lower), points(half * 0.8, low + 1.5)[::-1]])
            fill(view, place(band), shade(self._teeth, 0.88))
        if tongue > 0.55 and height > 2:
            tip = float(low.max()) + 0.5 - min(1.0, tongue + 0.1) * height * 0.86
            blade = ellipse(64, tip + 0.75 * height, half * (0.42 - 0.1 * (tongue < 0.95)), 0.75 * height, 180, 360, 24)
            fill(view, place(blade), self._tongue)
        upper = mouth["upper"] * min(4.4, 0.62 * height + 0.8 * mouth["tuck"])
        if upper > 0.7:
            arch = top.min() + (top - top.min()) * 0.5
            band = np.concatenate([points(half * 0.9, top - 1.5), points(half * 0.86, arch + upper)[::-1]])
            fill(view, place(band), self._teeth)
            for k in (-2, -1, 0, 1, 2):
                gap = np.array([[64 + k * half * 0.24, top.min() - 1], [64 + k * half * 0.24, top.min() + upper - 0.6]])
                line(view, place(gap), shade(self._teeth, 0.86), 0.5)
        if lower > 0.7 and upper > 0.7 and upper + lower > 0.8 * height:
            middle = top + np.minimum(upper, 0.6 * (low - top))
            line(view, place(points(half * 0.88, middle)), shade(self._teeth, 0.5), 0.7)
        if tongue > 0.9 and height > 2:
            blade = ellipse(64, low.max() - 0.28 * height, half * 0.46, 0.42 * height + 0.8, n=24)
            fill(view, place(blade), mix(self._tongue, (255, 190, 190), 0.15))
        composite(canvas, view, opening, (slice(64 * SCALE, 128 * SCALE), slice(30 * SCALE, 98 * SCALE)))
        line(canvas, place(points(half, top)), shade(self._lip, 0.6), 0.6)

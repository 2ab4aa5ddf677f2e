"""The mouth: lips, teeth and tongue drawn from mouth parameters.

Lengths are in pixels of the 128-pixel picture, in head coordinates (before the head's motion).

Axes: N points.
"""

from __future__ import annotations

import numpy as np

from corpora.synthetic.expression import Pose
from corpora.synthetic.portrait import CANVAS, SCALE, Identity, composite, ellipse, fill, line, mix, shade

_OPENING = 19.0  # pixels between the lips at open = 1
_T = np.linspace(-1, 1, 25)


class MouthPainter:
    """Draws one identity's mouth."""

    def __init__(self, who: Identity, light: float) -> None:
        self._who = who
        self._lip = shade(who.lip_colour, light)
        self._skin = shade(who.skin, light)
        self._teeth = shade((244, 240, 228), light)
        self._tongue = shade((196, 88, 96), light)
        self._inside = shade((58, 18, 26), light)

    def chin_drop(self, mouth: dict[str, float]) -> float:
        """How far the chin goes down, in pixels."""
        return 7.5 * mouth["open"] ** 1.1 - 1.2 * mouth["tuck"] - 0.8 * mouth["press"]

    def paint(self, canvas: np.ndarray, place, mouth: dict[str, float], look: Pose) -> None:
        """Draw on the canvas; `place` maps head coordinates (N, 2) to picture coordinates."""
        who, t = self._who, _T
        width, rounded = mouth["width"], float(np.clip(mouth["round"], 0, 1))
        press, tuck = float(np.clip(mouth["press"], 0, 1)), float(np.clip(mouth["tuck"], 0, 1))
        half = who.mouth_width * (1 + (0.24 if width > 0 else 0.46) * width)
        half *= 1 + look.widen * (1 - rounded)
        inner_half = half * (0.93 - 0.16 * rounded)
        gap = max(0.0, mouth["open"] * _OPENING - 0.5)
        gap *= 1 - press
        rise, fall = 0.26 * gap + 0.9 * look.sneer * min(1.0, gap), 0.74 * gap
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
        """Lines from the nose to the mouth's corners: with a smile, a sneer or spread lips."""
        depth = 0.1 + 0.16 * max(0.0, look.corner) + 0.16 * look.sneer + 0.05 * max(0.0, mouth["width"])
        for side in (-1, 1):
            x = 64 + side * (half + 3.4)
            fold = np.array(
                [
                    [64 + side * (self._who.nose_width + 3.6), y0 - 13.5 - 1.5 * look.sneer],
                    [0.5 * (x + 64 + side * (self._who.nose_width + 5)), y0 - 8.5],
                    [x, y0 - 2.5],
                ]
            )
            line(canvas, place(fold), shade(self._skin, 1 - depth), 0.9)

    def _cavity(
        self, canvas: np.ndarray, place, points, half: float, top: np.ndarray, low: np.ndarray, mouth: dict[str, float]
    ) -> None:
        """Teeth and tongue, seen through the opening between the lips only."""
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

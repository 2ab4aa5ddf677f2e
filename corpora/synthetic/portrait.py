"""Identity of a face: parameters tied to the voice, and the still parts of the portrait.

Lengths are in pixels of the 128-pixel frame; drawing is at `SCALE` times that. Colours are RGB.

Axes: N points.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike

SIZE = 128
SCALE = 2
CANVAS = SIZE * SCALE
_SHIFT = 4  # fractional bits of OpenCV's drawing coordinates


@dataclass(frozen=True)
class Identity:
    """Appearance of a face. Lengths are in pixels and colours in RGB; other floats are fractions."""

    half_width: float
    chin: float
    jaw: float
    top: float
    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    hair_style: str
    hairline: float
    brow: float
    eye: tuple[int, int, int]
    eye_gap: float
    eye_size: float
    nose_width: float
    nose_length: float
    mouth_y: float
    mouth_width: float
    lip: float
    lip_colour: tuple[int, int, int]
    beard: float
    glasses: bool
    freckles: int
    ears: float
    shirt: tuple[int, int, int]
    back: tuple[int, int, int]
    detail_seed: int


def rgb(values: ArrayLike) -> tuple[int, int, int]:
    """Round a colour to 8 bits."""
    return tuple(round(min(255.0, max(0.0, float(value)))) for value in values)


def hsv(h: float, s: float, v: float) -> tuple[int, int, int]:
    """Return the colour of a hue in units of 2 degrees, and a saturation and value from 0 to 255."""
    pixel = cv2.cvtColor(np.array([[[h % 180, s, v]]], np.uint8), cv2.COLOR_HSV2RGB)
    return rgb(pixel[0, 0])


def shade(colour, factor: float) -> tuple[int, int, int]:
    """Darken (factor below 1) or lighten (above 1) a colour."""
    return rgb([value * factor for value in colour])


def mix(a, b, weight: float) -> tuple[int, int, int]:
    """Mix colour `b` into colour `a`, with weight `weight` from 0 to 1."""
    return rgb([x * (1 - weight) + y * weight for x, y in zip(a, b)])


def fixed(points: ArrayLike) -> np.ndarray:
    """Convert points (N, 2) in frame pixels to OpenCV's fixed-point drawing coordinates."""
    return np.rint(np.asarray(points) * (SCALE << _SHIFT)).astype(np.int32)


def fill(canvas: np.ndarray, points: ArrayLike, colour) -> None:
    """Fill an antialiased polygon."""
    cv2.fillPoly(canvas, [fixed(points)], colour, cv2.LINE_AA, _SHIFT)


def line(canvas: np.ndarray, points: ArrayLike, colour, width: float) -> None:
    """Draw an antialiased open line; `width` in frame pixels."""
    cv2.polylines(canvas, [fixed(points)], False, colour, max(1, round(width * SCALE)), cv2.LINE_AA, _SHIFT)


def composite(canvas: np.ndarray, view: np.ndarray, mask: np.ndarray, part: tuple[slice, slice]) -> None:
    """Put a part of `view` on the canvas where the mask (CANVAS, CANVAS) uint8 covers it."""
    cover = cv2.merge([mask[part]] * 3)
    canvas[part] = cv2.add(
        cv2.multiply(np.ascontiguousarray(view[part]), cover, scale=1 / 255),
        cv2.multiply(np.ascontiguousarray(canvas[part]), cv2.bitwise_not(cover), scale=1 / 255),
    )


def ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0, end: float = 360, n: int = 40) -> np.ndarray:
    """Return points (n, 2) of an elliptic arc, angles in degrees, clockwise from the right."""
    cosine, sine = _arc(start, end, n)
    points = np.empty((n, 2))
    points[:, 0] = cx + rx * cosine
    points[:, 1] = cy + ry * sine
    return points


@functools.cache
def _arc(start: float, end: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.radians(np.linspace(start, end, n))
    return np.cos(angle), np.sin(angle)


def outline(who: Identity) -> np.ndarray:
    """Return the face's outline (N, 2), clockwise from the right temple."""
    middle = 0.5 * (who.top + who.chin) - 1
    angle = np.radians(np.linspace(0, 360, 90, endpoint=False))
    c = np.cos(angle)
    s = np.sin(angle)
    lower = s > 0
    power = np.where(lower, who.jaw, 0.9)
    x = 64 + who.half_width * np.sign(c) * np.abs(c) ** power * np.where(lower, 1 - 0.07 * s, 1)
    y = middle + s * np.where(lower, who.chin - middle, middle - who.top)
    return np.stack([x, y], 1)


def backdrop(who: Identity, light: float) -> np.ndarray:
    """Draw background, shoulders and neck, (CANVAS, CANVAS, 3) uint8."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / CANVAS
    glow = 1.1 * light - 0.28 * y - 0.25 * ((x - 0.5 + 0.15 * light) ** 2)
    canvas = np.clip(np.array(who.back, np.float32) * glow[..., None], 0, 255).astype(np.uint8)
    neck = who.half_width * 0.56
    shoulders = [[30, 117], [12, 124], [4, 140], [124, 140], [116, 124], [98, 117]]
    fill(canvas, [[64 - neck - 3, 110], *shoulders, [64 + neck + 3, 110]], who.shirt)
    _neck(canvas, neck, (90, 114, 124), 1, shade(who.skin, 0.78))
    line(canvas, [[64 - neck - 2, 112], [64, 125], [64 + neck + 2, 112]], shade(who.shirt, 0.72), 1.5)
    return canvas


def _neck(canvas: np.ndarray, half: float, y: tuple[int, int, int], wider: int, colour) -> None:
    """Draw the neck from y[0] down to y[1] at its sides, where it is `wider`, and to y[2] in the middle."""
    left = 64 - half
    right = 64 + half
    fill(canvas, [[left, y[0]], [left - wider, y[1]], [64, y[2]], [right + wider, y[1]], [right, y[0]]], colour)


def head(who: Identity, back: np.ndarray, light: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw the still head on the backdrop, (CANVAS, CANVAS, 3) uint8, and its coverage (CANVAS, CANVAS) uint8."""
    rng = np.random.default_rng(who.detail_seed)
    canvas = back.copy()
    cover = np.zeros((CANVAS, CANVAS), np.uint8)
    face = outline(who)

    def paint(points: np.ndarray, colour) -> None:
        fill(canvas, points, colour)
        fill(cover, points, 255)

    middle = 0.5 * (who.top + who.chin)
    _hair_behind(who, paint, middle)
    if who.hair_style == "bob":
        _neck(canvas, who.half_width * 0.56, (88, 113, 122), 0, shade(who.skin, 0.78 * light))
    for side in (-1, 1):
        x = 64 + side * (who.half_width + 0.4 * who.ears - 1.5)
        paint(ellipse(x, middle + 3, 0.62 * who.ears, 1.45 * who.ears), shade(who.skin, 0.93))
        fill(canvas, ellipse(x + 0.4 * side, middle + 3, 0.3 * who.ears, 0.95 * who.ears), shade(who.skin, 0.78))
    paint(face, who.skin)
    inside = np.zeros_like(cover)
    fill(inside, face, 255)
    _shading(who, canvas, inside, light)
    if who.beard:
        _beard(who, canvas, inside)
    for _ in range(who.freckles):
        x = 64 + rng.choice((-1, 1)) * rng.uniform(5, 22)
        y = rng.uniform(66, 80)
        fill(canvas, ellipse(x, y, 0.7, 0.6, n=8), shade(who.skin, 0.8))
    _nose(who, canvas)
    _hair_front(who, paint, canvas, rng)
    return canvas, cover


def _shading(who: Identity, canvas: np.ndarray, inside: np.ndarray, light: float) -> None:
    """Draw soft light from one side, darker towards the outline, warm cheeks."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / SCALE
    u = (x - 64) / who.half_width
    v = (y - 66) / 44
    level = 1.06 - 0.17 * (u**2 + 0.6 * v**2) - 0.07 * u - 0.03 * v
    level += 0.05 * np.exp(-((u * 1.4) ** 2) - ((y - 45) / 9) ** 2)
    level -= 0.06 * np.exp(-(((np.abs(x - 64) - who.eye_gap) / 9) ** 2) - ((y - 61) / 6) ** 2)
    colour = np.array(who.skin, np.float32) * (level * (0.5 + 0.5 * light))[..., None]
    cheek = 0.12 * np.exp(-(((np.abs(x - 64) - 19) / 8) ** 2) - ((y - 77) / 7) ** 2)[..., None]
    colour = colour * (1 - cheek) + np.array([214, 92, 84], np.float32) * cheek
    alpha = (inside.astype(np.float32) / 255)[..., None]
    canvas[:] = np.clip(canvas * (1 - alpha) + colour * alpha, 0, 255).astype(np.uint8)


def _beard(who: Identity, canvas: np.ndarray, inside: np.ndarray) -> None:
    mask = np.zeros_like(inside)
    shape = outline(who)
    low = shape[shape[:, 1] > 74]
    fill(mask, low, 255)
    clear = ellipse(64, 72, who.half_width * 0.76, who.mouth_y - 72 - 6.5)
    fill(mask, clear, 0)
    fill(mask, ellipse(64, who.mouth_y + 1, who.mouth_width + 3, 8), 0)
    moustache = [64 - 15, 64, 64 + 15, 64 + 13, 64, 64 - 13], who.mouth_y - np.array([3, 10, 3, 6, 11.5, 6])
    fill(mask, np.stack(moustache, 1), 255)
    mask = cv2.GaussianBlur(np.minimum(mask, inside), (0, 0), 2.0)
    alpha = (mask.astype(np.float32) / 255 * 0.75 * who.beard)[..., None]
    canvas[:] = (canvas * (1 - alpha) + np.array(who.hair, np.float32) * alpha).astype(np.uint8)


def _nose(who: Identity, canvas: np.ndarray) -> None:
    tip = 62 + who.nose_length
    w = who.nose_width
    dark = shade(who.skin, 0.74)
    light = shade(who.skin, 1.1)
    side = [[64 + 3.2, 62], [64 + 3.0, tip - 7], [64 + w * 0.8, tip - 2.5]]
    line(canvas, side, shade(who.skin, 0.86), 0.9)
    fill(canvas, ellipse(63.2, tip - 5, 1.3, 4.5), light)
    x = [64 - w, 64 - w + 0.8, 64 - 2.2, 64, 64 + 2.2, 64 + w - 0.8, 64 + w]
    y = [tip - 2, tip + 0.6, tip, tip + 1.4, tip, tip + 0.6, tip - 2]
    line(canvas, np.stack([x, y], 1), dark, 0.9)
    for s in (-1, 1):
        fill(canvas, ellipse(64 + s * w * 0.55, tip + 0.2, 1.5, 0.8, n=12), shade(who.skin, 0.5))


def _hair_behind(who: Identity, paint, middle: float) -> None:
    dark = shade(who.hair, 0.72)
    w = who.half_width
    if who.hair_style == "bob":
        crown = ellipse(64, middle - 8, w + 7, middle - who.top + 1, 180, 360)
        ends = [[64 + w + 8, 92], [64 + w - 1, 99], [64 - w + 1, 99], [64 - w - 8, 92]]
        paint(np.concatenate([crown, ends]), dark)
    elif who.hair_style == "bun":
        paint(ellipse(64, who.top - 5, 11, 9), dark)
        paint(ellipse(64, who.top - 6, 9, 7), who.hair)


def _hair_front(who: Identity, paint, canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Draw the hair over the forehead: an outer curve above the skull and a hairline that leaves the forehead free."""
    middle = 0.5 * (who.top + who.chin)
    w = who.half_width
    rise = {"buzz": 1.0, "short": 3.0, "side": 4.5, "curly": 5.0, "bob": 4.0, "bun": 2.0}[who.hair_style]
    down = 92 if who.hair_style == "bob" else middle - 4
    spread = {"buzz": 0.6, "bun": 0.8, "short": 1.8}.get(who.hair_style, 2.8)
    outer = ellipse(64, middle - 8, w + spread, middle - 8 - who.top + rise, 180, 360)
    line_y = who.top + who.hairline * (58 - who.top) - 2
    temple = w - (3.5 if who.hair_style == "bob" else 1.2)
    t = np.linspace(1, -1, 31)
    part = 0.42 if who.hair_style == "side" else 0.0
    depth = 1.0 if who.hair_style in ("side", "bob") else 0.0
    arch = line_y + (middle - 8 - line_y) * np.abs(t) ** (3.2 if depth else 4.5)
    arch += depth * 5.5 * (np.abs(t - part) - 0.5) * (1 - np.abs(t) ** 6)
    if who.hair_style == "curly":
        arch += 1.2 * np.sin(np.linspace(0, 9 * np.pi, 31))
        for a in np.linspace(190, 350, 13):
            x, y = ellipse(64, middle - 8, w + 1, middle - 8 - who.top + 2.5, a, a, 1)[0]
            paint(ellipse(x, y, 5.2, 5.0, n=18), shade(who.hair, rng.uniform(0.86, 1.06)))
    inner = np.stack([64 + temple * t, arch], 1)
    sides_right = np.array([[64 + w + spread, down], [64 + temple, down]])
    sides_left = np.array([[64 - temple, down], [64 - w - spread, down]])
    colour = mix(who.hair, who.skin, 0.25) if who.hair_style == "buzz" else who.hair
    paint(np.concatenate([outer, sides_right, inner, sides_left]), colour)
    crown = ellipse(58, middle - 10, w * 0.72, middle - 10 - who.top + rise * 0.3, 215, 300)
    if who.hair_style != "buzz":
        line(canvas, crown, mix(shade(who.hair, 1.25), (255, 255, 255), 0.12), 1.6)
        line(canvas, inner, shade(who.hair, 0.8), 0.8)

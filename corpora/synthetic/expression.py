"""Prosody and facial poses of seven expressions.

Axes: T moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXPRESSIONS = ("neutral", "happy", "sad", "surprised", "fearful", "disgusted", "angry")
SHARES = (0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)


@dataclass(frozen=True)
class Prosody:
    """Pitch and pitch range of espeak-ng (0 to 99; 50: default), relative speed, loudness in dB."""

    pitch: float = 50
    span: float = 50
    speed: float = 1.0
    gain: float = 0.0


@dataclass(frozen=True)
class Pose:
    """Facial pose in units of the neutral face: brow height and inner-end rise, eye opening, mouth-corner lift,
    mouth widening, upper-lip lift (a sneer). Zero is neutral."""

    brow: float = 0.0
    brow_inner: float = 0.0
    eyes: float = 0.0
    corner: float = 0.0
    widen: float = 0.0
    sneer: float = 0.0


# Spans are fractions of the voices' wide range: about a semitone for every ten.
_PROSODY = {
    "neutral": Prosody(pitch=50, span=32),
    "happy": Prosody(pitch=58, span=84, speed=1.1, gain=3.0),
    "sad": Prosody(pitch=42, span=4, speed=0.76, gain=-9.0),
    "surprised": Prosody(pitch=64, span=99, speed=0.94, gain=5.0),
    "fearful": Prosody(pitch=62, span=13, speed=1.22, gain=-5.0),
    "disgusted": Prosody(pitch=44, span=22, speed=0.86, gain=-2.0),
    "angry": Prosody(pitch=52, span=68, speed=1.16, gain=7.0),
}
_FLAT = ("neutral", "sad", "fearful", "disgusted")
_LIVELY = ("happy", "surprised", "angry")
POSES = {
    "neutral": Pose(),
    "happy": Pose(brow=0.25, brow_inner=0.1, eyes=-0.22, corner=1.0, widen=0.12),
    "sad": Pose(brow=0.1, brow_inner=1.0, eyes=-0.3, corner=-0.85, widen=-0.04),
    "surprised": Pose(brow=1.25, brow_inner=0.15, eyes=0.5, corner=0.0, widen=-0.08),
    "fearful": Pose(brow=0.75, brow_inner=0.85, eyes=0.38, corner=-0.5, widen=0.08),
    "disgusted": Pose(brow=-0.45, brow_inner=-0.3, eyes=-0.38, corner=-0.55, sneer=1.0),
    "angry": Pose(brow=-0.6, brow_inner=-1.0, eyes=-0.05, corner=-0.4, widen=0.05, sneer=0.25),
}


def draw_expression(rng: np.random.Generator) -> tuple[str, float]:
    """Draw an expression and its intensity (0.75 to 1), which scales both the voice and the face."""
    return EXPRESSIONS[rng.choice(len(EXPRESSIONS), p=SHARES)], float(rng.uniform(0.75, 1.0))


def draw_change(rng: np.random.Generator) -> tuple[str, str]:
    """Draw two expressions of one clip, in order: one with a narrow and one with a wide pitch range."""
    flat = _FLAT[rng.choice(4, p=(0.4, 0.2, 0.2, 0.2))]
    lively = _LIVELY[rng.integers(3)]
    return (flat, lively) if rng.random() < 0.5 else (lively, flat)


def blend(first, second, weight: float):
    """Mix two prosodies or two poses, with weight `weight` of the second."""
    return type(first)(*(a + (b - a) * weight for a, b in zip(vars(first).values(), vars(second).values())))


def prosody(expression: str, intensity: float) -> Prosody:
    """Return the expression's prosody at an intensity of 0 (neutral) to 1."""
    return blend(_PROSODY["neutral"], _PROSODY[expression], intensity)


def pose(expression: str, intensity: float) -> Pose:
    """Return the expression's facial pose at an intensity of 0 (neutral) to 1."""
    return Pose(*(value * intensity for value in vars(POSES[expression]).values()))


def ease(times: np.ndarray, change: float, first: Pose, second: Pose) -> list[Pose]:
    """Return the pose at each time (T,) in seconds. The transition at `change` lasts a quarter second."""
    weight = 0.5 - 0.5 * np.cos(np.pi * np.clip((times - change) / 0.24 + 0.5, 0, 1))
    return [blend(first, second, float(value)) for value in weight]

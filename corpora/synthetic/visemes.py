"""Mouth shapes from a phoneme track, with co-articulation.

Axes: T frames, P mouth parameters (the fields of `MOUTH`)."""

from __future__ import annotations

import numpy as np

FPS = 25
MOUTH = ("open", "width", "round", "tuck", "press", "upper", "lower", "tongue")
"""Opening (0 closed, 1 widest); width (-1 puckered, 1 spread); lip rounding; lower lip tucked under the upper teeth;
lips pressed together; how much of the upper and the lower teeth shows; tongue (0 lies low, 0.6 behind the teeth,
1 between them)."""

#          open  width round tuck press upper lower tongue
_SHAPES = {
    "rest": (0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.1, 0.0),
    "p": (0.0, 0.0, 0.0, 0.0, 1.0, 0.4, 0.1, 0.0),
    "f": (0.14, 0.1, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0),
    "T": (0.3, 0.1, 0.0, 0.0, 0.0, 0.7, 0.3, 1.0),
    "s": (0.2, 0.6, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0),
    "t": (0.27, 0.2, 0.0, 0.0, 0.0, 0.9, 0.2, 0.6),
    "n": (0.34, 0.1, 0.0, 0.0, 0.0, 0.8, 0.2, 0.65),
    "l": (0.46, 0.05, 0.0, 0.0, 0.0, 0.5, 0.1, 0.85),
    "S": (0.34, -0.5, 0.9, 0.0, 0.0, 1.0, 1.0, 0.0),
    "k": (0.42, 0.15, 0.0, 0.0, 0.0, 0.4, 0.6, 0.25),
    "r": (0.24, -0.5, 0.7, 0.0, 0.0, 0.6, 0.0, 0.3),
    "w": (0.1, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "h": (0.4, 0.0, 0.0, 0.0, 0.0, 0.5, 0.2, 0.1),
    "i": (0.26, 0.95, 0.0, 0.0, 0.0, 0.9, 0.5, 0.3),
    "I": (0.36, 0.5, 0.0, 0.0, 0.0, 0.8, 0.3, 0.25),
    "E": (0.58, 0.45, 0.0, 0.0, 0.0, 0.8, 0.2, 0.2),
    "a": (0.82, 0.5, 0.0, 0.0, 0.0, 0.7, 0.2, 0.1),
    "A": (1.0, -0.05, 0.0, 0.0, 0.0, 0.5, 0.2, 0.0),
    "V": (0.66, 0.05, 0.0, 0.0, 0.0, 0.6, 0.1, 0.1),
    "@": (0.42, 0.0, 0.0, 0.0, 0.0, 0.6, 0.1, 0.15),
    "3": (0.34, -0.35, 0.5, 0.0, 0.0, 0.6, 0.2, 0.3),
    "O": (0.68, -0.55, 0.75, 0.0, 0.0, 0.2, 0.0, 0.0),
    "u": (0.22, -0.95, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}
# espeak-ng phoneme mnemonics (length marks and variant digits removed) to one or two shapes in turn
_VISEMES = {
    **dict.fromkeys("pbm", "p"),
    **dict.fromkeys("fv", "f"),
    **dict.fromkeys("TD", "T"),
    **dict.fromkeys("sz", "s"),
    **dict.fromkeys("td", "t"),
    **dict.fromkeys("kgNx?", "k"),
    **dict.fromkeys(("S", "Z", "tS", "dZ"), "S"),
    **{symbol: symbol for symbol in "nlrwhiIEaAV@3Ou"},
    "j": "i",
    "r-": "r",
    "0": "A",
    "U": "u",
    "o": "O",
    "e": "E",
    "eI": "Ei",
    "aI": "ai",
    "OI": "Oi",
    "aU": "Aw",
    "oU": "Ow",
    "i@": "i@",
    "e@": "E@",
    "A@": "A3",
    "o@": "O3",
    "O@": "O3",
    "U@": "u3",
}
_FIRM = frozenset("pfTw")  # shapes that are always reached: closures, lip and tongue against teeth, tight rounding
_STEP = 0.005
_SMOOTHING = 0.085  # s, whole width of the raised cosine
# s: half the least time a firm shape stands (more than half a frame), and its approach
_HOLD = 0.024
_EASE = 0.045


def shapes_of(symbol: str) -> list[str]:
    """Return the one or two mouth shapes of an espeak-ng phoneme."""
    for name in (symbol, symbol.rstrip(":#2"), symbol[:2], symbol[:1]):
        if name in _VISEMES:
            return list(_VISEMES[name])
    return ["@"]


def mouth_track(phonemes: list[tuple[str, float, float]], frames: int) -> np.ndarray:
    """Convert phonemes (symbol, start s, end s) to mouth parameters (T, P) float32 at the frames' centres.

    Targets are smoothed by a raised cosine; firm shapes are then blended in so that at least one frame shows them in
    full."""
    steps = round(frames / FPS / _STEP)
    track = np.tile(np.array(_SHAPES["rest"]), (steps, 1))
    firm: list[tuple[float, float, np.ndarray]] = []
    for symbol, start, end in phonemes:
        names = shapes_of(symbol)
        edges = [start, end] if len(names) == 1 else [start, start + 0.5 * (end - start), end]
        for name, first, last in zip(names, edges, edges[1:]):
            target = np.array(_SHAPES[name])
            track[round(first / _STEP) : round(last / _STEP)] = target
            if name in _FIRM and len(names) == 1:
                firm.append((0.5 * (first + last), max(_HOLD, 0.3 * (last - first)), target))
    window = np.hanning(int(_SMOOTHING / _STEP) + 2)[1:-1]
    half = len(window) // 2
    padded = np.pad(track, ((half, len(window) - 1 - half), (0, 0)), mode="edge")
    smooth = np.stack([np.convolve(column, window / window.sum(), "valid") for column in padded.T], 1)
    centres = (np.arange(frames) + 0.5) / FPS
    times = (np.arange(steps) + 0.5) * _STEP
    mouth = np.stack([np.interp(centres, times, column) for column in smooth.T], 1)
    for middle, hold, target in firm:
        away = np.clip((np.abs(centres - middle) - hold) / _EASE, 0.0, 1.0)
        weight = 0.5 + 0.5 * np.cos(np.pi * away)
        mouth += weight[:, None] * (target - mouth)
    return mouth.astype(np.float32)

"""Estimation of the mouth opening of a cartoon face from frames, for ground-truth and generated frames.

Counting dark pixels correlates weakly with the rendered opening (r = 0.5: beards are dark, teeth and tongue are not). A
linear regression on the mouth region, fitted to newly rendered faces of the training voices, correlates well (r = 0.98
on held-out clips) and, as it is linear in area averages, is robust to slight blur.

Axes: T frames, H height, W width, F features, N frames of the fit."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from corpora.synthetic.expression import EXPRESSIONS, pose
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.portrait import SIZE
from corpora.synthetic.visemes import FPS, MOUTH, mouth_track
from corpora.synthetic.voices import Voice, load_voices

_SOUNDS = ("m", "p", "f", "T", "s", "t", "l", "S", "w", "u:", "oU", "i:", "eI", "E", "a", "aI", "A:", "n", "r", "k")
_MOUTH = (slice(80, 116), slice(40, 88))  # rows and columns of the mouth region in the 128-pixel frame
_CHEEKS = (slice(74, 84), (slice(40, 50), slice(78, 88)))
_GRID = (16, 12)  # cells across and down
_RIDGE = 10.0


def _features(frames: np.ndarray) -> np.ndarray:
    """Return the mouth's surroundings (T, F) in frames (T, H, W, 3) uint8 RGB, in units of the clip's skin colour."""
    if frames.shape[1:3] != (SIZE, SIZE):
        frames = np.stack([cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for frame in frames])
    rows, sides = _CHEEKS
    cheeks = np.concatenate([frames[:, rows, side].reshape(-1, 3) for side in sides])
    skin = np.maximum(np.median(cheeks, 0), 1.0).astype(np.float32)
    patches = frames[:, _MOUTH[0], _MOUTH[1]] / skin
    cells = np.stack([cv2.resize(patch, _GRID, interpolation=cv2.INTER_AREA) for patch in patches])
    return cells.reshape(len(frames), -1).clip(0, 3).astype(np.float64)


class MouthReader:
    """Estimates the mouth opening of frames: 0 is closed, 1 is the widest rendered opening.

    Args:
        clips: number of rendered clips of 1.5 s for the fit, which alternate between all training voices.
        seed: seed of audio, expressions and head motion.
    """

    def __init__(self, clips: int = 64, seed: int = 0) -> None:
        voices = [voice for voice in load_voices() if voice.group == "train"]
        features, openings = zip(*(_drawn_clip(voices[i % len(voices)], i, seed) for i in range(clips)))
        x = np.concatenate(features)  # (N, F)
        y = np.concatenate(openings)  # (N,)
        self._centre = x.mean(0)
        self._rest = y.mean()
        x = x - self._centre
        self._weights = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ (y - self._rest))

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Map frames (T, H, W, 3) uint8 RGB of one clip, square and framed as in the corpus, to openings (T,)."""
        return (_features(frames) - self._centre) @ self._weights + self._rest


def _drawn_clip(voice: Voice, index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render a clip. Return its features (T, F) and actual openings (T,)."""
    rng = np.random.default_rng([seed, index])
    ends = np.cumsum(rng.uniform(0.05, 0.2, 14)) + 0.1
    phonemes = [(str(rng.choice(_SOUNDS)), a, b) for a, b in pairwise(ends)]
    frames = int((ends[-1] + 0.15) * FPS)
    track = mouth_track(phonemes, frames)
    motion = draw_motion(rng, frames, rng.random(frames))
    look = pose(EXPRESSIONS[index % len(EXPRESSIONS)], float(rng.uniform(0.75, 1.0)))
    face = Face(voice.face, float(rng.uniform(0.93, 1.07)))
    return _features(face.render(track, look, motion)), track[:, MOUTH.index("open")]

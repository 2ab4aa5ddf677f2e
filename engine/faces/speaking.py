"""Which of several faces speaks: the one whose mouth moves, or, with audio, whose mouth and the audio go together.

Axes: T video frames (25 per second), S side of a mouth crop, N samples at 16 kHz, P principal components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from engine.faces.crops import crop_mouth
from engine.faces.track import FaceTrack

SIDE = 24  # of the mouth crops that are compared, in pixels
# principal components of the mouth and of the audio
MOUTH = 6
SOUND = 3
SAMPLES = 640  # of a frame's audio
BANDS = 16  # of its spectrum
FOLDS = 5  # parts of a clip
GAP = 2  # frames between a part and those that predict it
RIDGE = 0.3  # fraction of the variance


def speaking_face(blocks: Iterable[np.ndarray], tracks: Sequence[FaceTrack], wave: np.ndarray | None = None) -> int:
    """Return the index of the face that speaks in the blocks (n, H, W, 3) of a clip.

    Args:
        wave: (N,) the audio at 16 kHz; None: a silent clip, in which the mouth that moves most is chosen.
    """
    mouths: list[list[np.ndarray]] = [[] for _ in tracks]
    start = 0
    for block in blocks:
        for pictures, track in zip(mouths, tracks):
            pictures.append(crop_mouth(block, track[start : start + len(block)], SIDE))
        start += len(block)
    scores = []
    for pictures, track in zip(mouths, tracks):
        mouth = np.concatenate(pictures).astype(np.float32)
        scores.append(mouth_movement(mouth, track.seen) if wave is None else mouth_to_sound(mouth, track.seen, wave))
    return int(np.argmax(scores))


def mouth_movement(mouth: np.ndarray, seen: np.ndarray) -> float:
    """Return the mean change from frame to frame of a mouth (T, S, S) that no movement of the head explains.

    The change is fitted by shifts, a turn, a zoom and the brightness, to first order (Lucas & Kanade 1981). What
    is left is in units of the pictures' contrast. Frames in which the face is not `seen` (T,) count as still.
    """
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    change = np.zeros(len(mouth))
    for i in np.flatnonzero(seen[1:] & seen[:-1]) + 1:
        middle = (mouth[i] + mouth[i - 1]) / 2
        difference = (mouth[i] - mouth[i - 1]).ravel()
        down, right = np.gradient(middle)
        causes = (right, down, x * right + y * down, x * down - y * right, middle, np.ones_like(middle))
        causes = np.stack([cause.ravel() for cause in causes], 1)
        rest = difference - causes @ np.linalg.lstsq(causes, difference, rcond=None)[0]
        change[i] = np.sqrt(np.mean(rest**2))
    return float(np.minimum(change / (mouth.std() + 1e-6), 1).mean())


def mouth_to_sound(mouth: np.ndarray, seen: np.ndarray, wave: np.ndarray) -> float:
    """Return how well a mouth (T, S, S) predicts the audio (N,), as a correlation: about 0 for another's mouth.

    A linear model, as FaceSync (Slaney & Covell 2000), predicts the spectrum from the mouth in each part of the clip.
    It is fitted to the other parts of the same clip and needs no training. Frames that are not `seen` (T,) predict the
    mean.
    """
    frames = min(len(mouth), len(wave) // SAMPLES)
    sound = _components(_bands(wave[: SAMPLES * frames].reshape(frames, SAMPLES)), SOUND)
    pixels = mouth[:frames].reshape(frames, -1)
    pixels = (pixels - pixels.mean(1, keepdims=True)) / (pixels.std(1, keepdims=True) + 1e-6)
    seen = seen[:frames]
    lips = np.zeros((frames, MOUTH))
    components = _components(pixels[seen], MOUTH)
    components /= np.sqrt(np.mean(components**2, 0)) + 1e-6
    lips[seen, : components.shape[1]] = components
    predicted = np.zeros_like(sound)
    edges = np.linspace(0, frames, FOLDS + 1).astype(int)
    for first, last in pairwise(edges):
        others = np.r_[0 : max(0, first - GAP), min(frames, last + GAP) : frames]
        x = lips[others]
        y = sound[others]
        weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(MOUTH), x.T @ (y - y.mean(0)))
        predicted[first:last] = lips[first:last] @ weights
    if not (predicted.any() and sound.any()):
        return 0.0
    return float(np.corrcoef(predicted.ravel(), sound.ravel())[0, 1])


def _bands(pieces: np.ndarray) -> np.ndarray:
    """Return the logarithms (T, B) of the power of each frame's audio (T, 640) in B bands, 40 dB deep."""
    power = np.abs(np.fft.rfft(pieces * np.hanning(SAMPLES))) ** 2
    edges = np.geomspace(4, SAMPLES // 2, BANDS + 1).astype(int)  # bins of 25 Hz, from 100 Hz on
    bands = np.add.reduceat(power, edges[:-1], axis=1)
    return np.log(bands + 1e-4 * bands.max() + 1e-10)


def _components(values: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` principal components (T, P) of values (T, D)."""
    left, size, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    return left[:, :count] * size[:count]

"""Active speaker selection: the face whose mouth moves most or, given audio, whose mouth correlates with the audio.

Axes: T video frames (25 per second), S side of a mouth crop, N samples at 16 kHz, P principal components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from engine.faces.crops import crop_mouth
from engine.faces.track import FaceTrack

SIDE = 24  # side of the compared mouth crops in pixels
# principal components of the mouth and of the audio
MOUTH = 6
SOUND = 3
SAMPLES = 640  # audio samples per video frame
BANDS = 16  # number of spectral bands
FOLDS = 5  # number of cross-validation folds of a clip
GAP = 2  # gap in frames between a fold and its training frames
RIDGE = 0.3  # ridge penalty as a fraction of the variance


def speaking_face(blocks: Iterable[np.ndarray], tracks: Sequence[FaceTrack], wave: np.ndarray | None = None) -> int:
    """Return the index of the speaking face in the blocks (n, H, W, 3) of a clip.

    Args:
        wave: (N,) audio at 16 kHz. None for a silent clip, in which the mouth with the most movement is chosen.
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
    """Return the mean frame-to-frame change of a mouth (T, S, S) after removing head motion.

    Head motion is modelled as translation, rotation, zoom and brightness change, to first order (Lucas & Kanade 1981).
    The residual is in units of the image contrast. Frames in which the face is not `seen` (T,) count as still.
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
    """Return the correlation between the audio (N,) and its prediction from a mouth (T, S, S), about 0 for another
    person's mouth.

    As in FaceSync (Slaney & Covell 2000), a linear model predicts the spectrum from the mouth. It is fitted and
    evaluated on the same clip by cross-validation. Frames that are not `seen` (T,) predict the mean.
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
    """Return the log power (T, B) of each frame's audio (T, 640) in B bands, limited to 40 dB below the maximum."""
    power = np.abs(np.fft.rfft(pieces * np.hanning(SAMPLES))) ** 2
    edges = np.geomspace(4, SAMPLES // 2, BANDS + 1).astype(int)  # bins of 25 Hz, from 100 Hz on
    bands = np.add.reduceat(power, edges[:-1], axis=1)
    return np.log(bands + 1e-4 * bands.max() + 1e-10)


def _components(values: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` principal components (T, P) of values (T, D)."""
    left, size, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    return left[:, :count] * size[:count]

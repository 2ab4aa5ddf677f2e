"""Measures of speech with a mouth: where speech ends, how mouth and sound go together, how chunks join.

Axes: N samples, T video frames (25 a second).
"""

from __future__ import annotations

import numpy as np

from talker_t2av.model import FPS

WINDOW = 0.01  # seconds
DROP = 30.0  # dB under the loudest moment: what is quieter is no speech


def loudness(wave: np.ndarray, rate: int) -> np.ndarray:
    """Root mean square of each video frame's sound: (N,) -> (T,), T = N / rate * 25 rounded down."""
    frame = rate // FPS
    whole = wave[: len(wave) // frame * frame].reshape(-1, frame)
    return np.sqrt(np.mean(np.square(whole, dtype=np.float64), 1))


def synchrony(opening: np.ndarray, wave: np.ndarray, rate: int, shift: int = 0) -> float:
    """Pearson correlation of mouth opening (T,) with the loudness of the sound, over the frames that both have.

    Args:
        shift: frames by which the sound is moved against the mouth; positive: it comes later.
    """
    level = loudness(wave, rate)
    if shift >= 0:
        level = np.pad(level, (shift, 0))
    else:
        level = level[-shift:]
    length = min(len(level), len(opening))
    mouth, level = opening[max(shift, 0) : length], level[max(shift, 0) : length]
    if len(mouth) < 2 or np.ptp(mouth) == 0 or np.ptp(level) == 0:
        return 0.0
    return float(np.corrcoef(mouth, level)[0, 1])


def speech_end(wave: np.ndarray, rate: int) -> float:
    """Seconds until the last 10 ms that are at most 30 dB quieter than the loudest; 0 for silence.

    Energy alone decides, so that no recogniser's opinion is needed; the words play no part.
    """
    size = round(WINDOW * rate)
    windows = np.pad(wave, (0, -len(wave) % size)).reshape(-1, size)
    power = np.mean(np.square(windows, dtype=np.float64), 1)
    if not power.any():
        return 0.0
    return float((np.flatnonzero(power > power.max() * 10 ** (-DROP / 10))[-1] + 1) * WINDOW)

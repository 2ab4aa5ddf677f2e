"""Prosody and end of speech, and its synchrony with a mouth.

Axes: N samples, F analysis frames, T video frames (25 a second).
"""

from __future__ import annotations

import numpy as np
import torch

from engine.media.audio import resample
from engine.optional import require_librosa

FPS = 25  # video frames a second
WINDOW = 0.01  # seconds of a power measurement
PITCH_HOP = 0.016  # seconds of a frame of `pitch`
LOWEST, HIGHEST = 60.0, 500.0  # Hz, between which a pitch is looked for
DROP = 30.0  # dB below the loudest moment: what is quieter is not speech


def pitch_range(f0: np.ndarray) -> float:
    """Return semitones from the 10th to the 90th percentile of the voiced frames of a pitch (F,); 0 with under 5."""
    voiced = f0[f0 > 0]
    return float(12 * np.log2(np.percentile(voiced, 90) / np.percentile(voiced, 10))) if len(voiced) > 4 else 0.0


def energy(wave: np.ndarray) -> float:
    """Return the mean power of a wave (N,) in dB."""
    return float(10 * np.log10(np.mean(np.square(wave)) + 1e-10))


def pitch(wave: np.ndarray, rate: int) -> np.ndarray:
    """Find the pitch (F,) in Hz of every 16 ms of a wave (N,), 0 where unvoiced, by pYIN (Mauch & Dixon 2014).

    Its path search matters: frame by frame, resynthesised speech loses so many octaves that the pitch ranges of clips
    no longer correlate with those of the originals (0.62, against 0.89 with pYIN, 20 clips).
    """
    librosa, low_rate = require_librosa(), 12_000
    wave = resample(torch.as_tensor(np.asarray(wave), dtype=torch.float32), rate, low_rate).numpy()
    f0, _, _ = librosa.pyin(wave, fmin=LOWEST, fmax=HIGHEST, sr=low_rate, frame_length=768, hop_length=192)
    return np.nan_to_num(f0)


def loudness(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return the root mean square of each video frame's sound: (N,) -> (T,), T = N / rate * 25 rounded down."""
    frame = rate // FPS
    whole = wave[: len(wave) // frame * frame].reshape(-1, frame)
    return np.sqrt(np.mean(np.square(whole, dtype=np.float64), 1))


def synchrony(opening: np.ndarray, wave: np.ndarray, rate: int, shift: int = 0) -> float:
    """Correlate mouth opening (T,) with the loudness of the sound (Pearson), over the frames that both have.

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
    """Return the seconds from the start to the end of the last 10 ms within 30 dB of the loudest; 0 for silence.

    Energy alone decides: no recogniser is needed.
    """
    size = round(WINDOW * rate)
    windows = np.pad(wave, (0, -len(wave) % size)).reshape(-1, size)
    power = np.mean(np.square(windows, dtype=np.float64), 1)
    if not power.any():
        return 0.0
    return float((np.flatnonzero(power > power.max() * 10 ** (-DROP / 10))[-1] + 1) * WINDOW)

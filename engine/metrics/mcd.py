"""Mel cepstral distortion in dB (Kubichek 1993), as the program pymcd 0.2.1 (MIT) computes it.

22.05 kHz; spectral envelopes of WORLD every 5 ms (the package pyworld, MIT) with 512 bins; mel cepstra of order 13 with
alpha 0.65. The distance between two frames includes coefficient 0; the alignment excludes it. Modes: `plain` pads the
shorter waveform with silence; `dtw` aligns by FastDTW (Salvador and Chan 2007; the package fastdtw, MIT); `dtw_sl`
multiplies by the ratio of the lengths. The HiCoDiT paper does not state which of them it uses.

Axes: N samples, F frames, M = 14 coefficients.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from engine.errors import UserError, require
from engine.metrics.metric import Figure, Metric, Take, wave_of

RATE = 22_050
PERIOD = 5.0
BINS = 512
ORDER = 13
ALPHA = 0.65
FLOOR = 1e-8
DECIBEL = 10 / math.log(10) * math.sqrt(2)


@lru_cache(1)
def _warp() -> np.ndarray:
    """Return the matrix (BINS / 2 + 1, M) from cepstrum to mel cepstrum, by the all-pass (z^-1 - alpha) / (1 - alpha
    z^-1).

    Computed by the recursion of Oppenheim and Johnson (1972), from the highest coefficient down, on unit vectors.
    """
    half = BINS // 2
    warped = np.zeros((half + 1, ORDER + 1))
    for n in range(half, -1, -1):  # one step of the recursion for all unit vectors at once
        last = warped
        warped = np.zeros_like(warped)
        warped[:, 0] = ALPHA * last[:, 0]
        warped[n, 0] += 1
        warped[:, 1] = (1 - ALPHA**2) * last[:, 0] + ALPHA * last[:, 1]
        for m in range(2, ORDER + 1):
            warped[:, m] = last[:, m - 1] + ALPHA * (last[:, m] - warped[:, m - 1])
    return warped


def mel_cepstrum(wave: np.ndarray) -> np.ndarray:
    """Compute the mel cepstra (F, M) of a waveform (N,) at 22.05 kHz."""
    pyworld = require("pyworld", "pyworld", "metrics")
    wave = np.ascontiguousarray(wave, dtype=np.float64)
    f0, times = pyworld.dio(wave, RATE, frame_period=PERIOD)
    f0 = pyworld.stonemask(wave, f0, times, RATE)
    envelope = pyworld.cheaptrick(wave, f0, times, RATE, fft_size=BINS)
    cepstrum = np.fft.irfft(np.log(envelope**2 + FLOOR))[:, : BINS // 2 + 1]
    cepstrum[:, [0, -1]] *= 0.5
    return cepstrum @ _warp()


def distortion(reference: np.ndarray, made: np.ndarray, mode: str) -> float:
    """Return the distortion in dB between waveforms (N,) at 22.05 kHz; `mode` is plain, dtw or dtw_sl."""
    if mode == "plain":
        length = max(len(reference), len(made))
        reference = np.pad(reference, (0, length - len(reference)))
        made = np.pad(made, (0, length - len(made)))
    one = mel_cepstrum(reference)
    two = mel_cepstrum(made)
    at = np.arange(len(one))
    to = np.arange(len(two))
    if mode != "plain":
        path = require("fastdtw", "fastdtw", "metrics").fastdtw(one[:, 1:], two[:, 1:], dist=2)[1]
        at, to = np.array(path).T
    value = DECIBEL * np.linalg.norm(one[at] - two[to], axis=1).mean()
    return float(value * max(len(one) / len(two), len(two) / len(one)) if mode == "dtw_sl" else value)


class MCD(Metric):
    figures: ClassVar = {"mcd": Figure("MCD dB", -1, meaning="spectral envelope distance to the ground truth")}
    packages = ("pyworld", "fastdtw")
    protocols = ("dtw", "plain", "dtw_sl")
    needs_truth = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        made = wave_of(take.audio, RATE)
        true = wave_of(truth.audio, RATE)
        if min(len(made), len(true)) < RATE * 0.05:
            raise UserError("the clip is shorter than 50 ms, which WORLD cannot analyse")
        return {"mcd": (distortion(true, made, self.protocol), 1)}

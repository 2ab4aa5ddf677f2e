"""Short-time objective intelligibility against the true speech: STOI (Taal et al. 2011), ESTOI (Jensen & Taal 2016).

The package pystoi (MIT) computes both.

Axes: N samples.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np

from engine.errors import UserError
from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.optional import require

RATE = 16_000


def stoi(reference: np.ndarray, degraded: np.ndarray, rate: int, extended: bool = False) -> float:
    """Return STOI, about 0 to 1; both (N,) at `rate` Hz, time-aligned. The longer wave is cut to the shorter one.

    Args:
        extended: ESTOI, which correlates whole spectra and so also counts modulated noise.

    Raises:
        UserError: less than 0.4 s of speech, for which pystoi warns and gives 0.00001, which is no measurement.
    """
    length = min(len(reference), len(degraded))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        value = float(require("pystoi", "pystoi").stoi(reference[:length], degraded[:length], rate, extended))
    if any("Not enough STFT frames" in str(warning.message) for warning in given):
        raise UserError("STOI cannot be computed: the two have less than 0.4 s of speech in common")
    return value


class STOI(Metric):
    figures: ClassVar = {"stoi": Figure("STOI", 1, 3, meaning="intelligibility against the true speech, 0 to 1")}
    needs = ("pystoi",)
    version = 2
    pair, cuts = True, True
    extended: ClassVar[bool] = False

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        (figure,) = self.figures
        return {figure: (stoi(wave_of(truth.audio, RATE), wave_of(take.audio, RATE), RATE, self.extended), 1)}


class ESTOI(STOI):
    figures: ClassVar = {"estoi": Figure("ESTOI", 1, 3, meaning="extended STOI against the true speech, 0 to 1")}
    extended = True

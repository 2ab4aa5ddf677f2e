"""STOI, short-time objective intelligibility against the true speech (Taal et al. 2011); package pystoi (MIT).

Axes: N samples.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.optional import require

RATE = 16_000


def stoi(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """About 0 to 1; both (N,) at `rate` Hz, time-aligned. The longer wave is cut to the shorter one."""
    length = min(len(reference), len(degraded))
    return float(require("pystoi", "pystoi").stoi(reference[:length], degraded[:length], rate))


class STOI(Metric):
    figures: ClassVar = {"stoi": Figure("STOI", 1, 3, meaning="intelligibility against the true speech, 0 to 1")}
    pair = True

    @classmethod
    def packages(cls, protocol: str) -> list[str]:
        return ["pystoi"]

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        return {"stoi": (stoi(wave_of(truth.audio, RATE), wave_of(take.audio, RATE), RATE), 1)}

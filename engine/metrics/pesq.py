"""PESQ, perceived quality against the true speech: narrow band at 8 kHz (ITU-T P.862), wide band at 16 kHz (P.862.2).

The package pesq (MIT), which wraps the ITU's program; time-aligned waves, the longer one cut.

Axes: N samples.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from engine.errors import UserError
from engine.media.audio import resample
from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.optional import require

RATES = {"wb": 16_000, "nb": 8_000}


def pesq_score(reference: np.ndarray, degraded: np.ndarray, rate: int, band: str = "wb") -> float:
    """Return PESQ, about 1.0 to 4.6; both (N,) at `rate` Hz; `band` is wb or nb."""
    pesq, own = require("pesq", "pesq"), RATES[band]
    pair = [resample(torch.as_tensor(np.asarray(x), dtype=torch.float32), rate, own) for x in (reference, degraded)]
    try:
        return float(pesq.pesq(own, pair[0].numpy(), pair[1].numpy(), band))
    except pesq.PesqError as error:  # such as no utterance, or under a quarter of a second
        raise UserError(f"PESQ cannot be computed: {error.args[0].decode()}") from error
    except ValueError as error:  # levels of almost nothing are no numbers for it
        raise UserError("PESQ cannot be computed: one of the two is silent, or almost") from error


class PESQ(Metric):
    figures: ClassVar = {
        "pesq_wide": Figure("PESQ wide", 1, meaning="perceived quality against the true speech, 16 kHz"),
        "pesq_narrow": Figure("PESQ narrow", 1, meaning="perceived quality against the true speech, 8 kHz"),
    }
    needs = ("pesq",)
    pair, cuts = True, True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        true, made = wave_of(truth.audio, RATES["wb"]), wave_of(take.audio, RATES["wb"])
        length = min(len(true), len(made))
        pair = true[:length], made[:length], RATES["wb"]
        return {"pesq_wide": (pesq_score(*pair, "wb"), 1), "pesq_narrow": (pesq_score(*pair, "nb"), 1)}

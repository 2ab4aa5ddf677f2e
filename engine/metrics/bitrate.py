"""Bits a second of the code that speech was decoded from, as its system states them: levels times log2(codes) times
frames.
"""

from __future__ import annotations

from typing import Any, ClassVar

from engine.errors import UserError
from engine.metrics.metric import Figure, Metric, Take


class Bitrate(Metric):
    figures: ClassVar = {"bitrate": Figure("bit/s", -1, 0, meaning="of the code that the speech was decoded from")}
    inputs = ("bits",)
    outputs_only = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        if take.bits is None:
            raise UserError('not stated: write {"bits_per_second": N} to system.json in the folder of the outputs')
        return {"bitrate": (take.bits, 1)}

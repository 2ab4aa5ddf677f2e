"""What a system itself states of its outputs.

ID.json states of one output (a, b) by the name of the figure, such as its cost. system.json states of all of them the
bits a second of their code: levels times log2(codes) times frames.
"""

from __future__ import annotations

from typing import Any, ClassVar

from engine.errors import UserError
from engine.metrics.metric import Figure, Metric, Take


class Stated(Metric):
    figures: ClassVar = {
        "evaluations": Figure(
            "evaluations", -1, 1, meaning="clips that the network was given, by guidance branch and window"
        ),
        "seconds_a_second": Figure("s / s", -1, 3, meaning="processor seconds for a second of speech"),
    }
    inputs = ("about",)
    outputs_only = True

    @classmethod
    def applies(cls, take: Take) -> bool:
        return any(name in take.about for name in cls.figures)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        return {name: tuple(take.about[name]) for name in self.figures if name in take.about}


class Bitrate(Metric):
    figures: ClassVar = {"bitrate": Figure("bit/s", -1, 0, meaning="of the code that the speech was decoded from")}
    inputs = ("bits",)
    outputs_only = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        if take.bits is None:
            raise UserError('not stated: write {"bits_per_second": N} to system.json in the folder of the outputs')
        return {"bitrate": (take.bits, 1)}

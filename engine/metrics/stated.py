"""What a system itself wrote of an output in ID.json, as (a, b) by the name of the figure: such as its cost."""

from __future__ import annotations

from typing import Any, ClassVar

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

"""How well a mouth and a sound go together: the correlation of the mouth's opening with the loudness, clip by clip.

A reader of openings knows one kind of face. `drawn` is that of the synthetic corpus, a class named after a colon that
turns frames (T, H, W, 3) into openings (T,). The controls move the sound by 200 ms.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from engine.config import target
from engine.errors import UserError
from engine.media.video import read_video
from engine.metrics.metric import CACHED, Figure, Metric, PictureMetric, Take, wave_of
from engine.metrics.speech import FPS, synchrony

RATE = 24_000
SHIFT = 5  # video frames: 200 ms


class MouthMetric(Metric):
    """A metric of the mouth's opening."""

    protocols = ("drawn",)
    inputs = ("audio", "video", "source")

    def load(self) -> None:
        self.read = _reader(self.protocol.partition(":")[2])

    @classmethod
    def applies(cls, take: Take) -> bool:
        return (take.video or take.source) is not None

    def opening(self, take: Take) -> np.ndarray:
        """Return the opening (T,) in a take's own picture, or in the one that its sound was made for."""
        return self.read(take.video or take.source)


class Synchrony(MouthMetric):
    figures: ClassVar = {
        "synchrony": Figure("mouth and sound", 1, 3, meaning="correlation of mouth opening and loudness"),
        "synchrony_late": Figure("200 ms late", 0, 3, meaning="control: the same with the sound 200 ms late"),
        "synchrony_early": Figure("200 ms early", 0, 3, meaning="control: the same with the sound 200 ms early"),
    }

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        opening, wave = self.opening(take), wave_of(take.audio, RATE)
        shifts = {"synchrony": 0, "synchrony_late": SHIFT, "synchrony_early": -SHIFT}
        return {name: (synchrony(opening, wave, RATE, shift), 1) for name, shift in shifts.items()}


class MouthOpening(PictureMetric, MouthMetric):
    figures: ClassVar = {
        "mouth_opening": Figure(
            "mouth r", 1, 3, meaning="correlation in time of the opening with that of the true clip"
        )
    }

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        made, true = self.opening(take), self.opening(truth)
        length = min(len(made), len(true))
        if np.ptp(made[:length]) == 0 or np.ptp(true[:length]) == 0:
            raise UserError("the mouth does not move")
        return {"mouth_opening": (float(np.corrcoef(true[:length], made[:length])[0, 1]), 1)}


@lru_cache(1)
def _reader(name: str) -> Any:
    read = target(name)()  # fitted here, which takes seconds
    return lru_cache(CACHED)(lambda path: read(read_video(path, FPS)))

"""DD, duration distance: how far the lengths of the sounds are from those of the true speech.

Talker-T2AV's text does not define it. Here: both takes are aligned with the same text by pocketsphinx (BSD; it carries
its acoustic model, so nothing is downloaded), and the absolute differences of the phones' lengths are averaged, in
milliseconds. English words of its dictionary only; words that the takes pronounce in different ways do not count.
Figures of other definitions cannot be compared.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.errors import UserError
from engine.metrics.metric import CACHED, Figure, Metric, Take, text_of, wave_of
from engine.optional import require

RATE, FRAME = 16_000, 10  # milliseconds


class DurationDistance(Metric):
    figures: ClassVar = {"duration_distance": Figure("DD ms", -1, 1, meaning="mean difference of the phones' lengths")}
    needs = ("pocketsphinx",)
    pair = True

    def load(self) -> None:
        self.package = require("pocketsphinx", "pocketsphinx")
        self.phones = lru_cache(CACHED)(self._phones)

    def _phones(self, path: Path | None, text: str) -> list[list[tuple[str, int]]]:
        """Return (phone, frames) of each word of a file's speech."""
        pcm = (wave_of(path, RATE).clip(-1, 1) * 32767).astype("<i2").tobytes()
        decoder = self.package.Decoder(self.package.Config(loglevel="FATAL", lm=None, bestpath=False))
        try:
            decoder.set_align_text(text)
            for level in ("words", "phones"):
                decoder.start_utt()
                decoder.process_raw(pcm, full_utt=True)
                decoder.end_utt()
                if level == "words":
                    if decoder.hyp() is None:
                        raise UserError("the text cannot be aligned with the speech")
                    decoder.set_alignment()  # the next pass divides the words found into phones
            words = decoder.get_alignment()
            return [[(p.name, p.duration) for p in word] for word in words if word.name[0] not in "<["]
        except (RuntimeError, TypeError) as error:
            raise UserError(f"the text cannot be aligned with the speech ({error})") from error

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        words = "".join(c if c.isalnum() or c == "'" else " " for c in text_of(truth).lower())
        one, two = (self.phones(path, " ".join(words.split())) for path in (take.audio, truth.audio))
        pairs = [(a, b) for a, b in zip(one, two) if [name for name, _ in a] == [name for name, _ in b]]
        apart = [abs(long - short) for a, b in pairs for (_, long), (_, short) in zip(a, b)]
        if not apart:
            raise UserError("the two takes were aligned with different pronunciations")
        return {"duration_distance": (float(np.mean(apart) * FRAME), 1)}

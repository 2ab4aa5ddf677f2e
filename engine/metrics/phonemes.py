"""Phoneme error rate and phoneme durations by pocketsphinx (BSD, models included).

- PER, phoneme error rate, for English sentences within the dictionary. Phonemes are recognised with a phoneme bigram
  model, without words. The reference is the first pronunciation of each word in the dictionary, without stress. The PER
  of clean speech is high: report it, and that of resynthesised speech, with each result.
- DD, duration distance: mean absolute difference of phone durations from the ground truth, in milliseconds. The
  Talker-T2AV paper does not define it. Here both takes are aligned with the same text. English only; words with
  different pronunciations in the two takes are excluded. Values are not comparable with other definitions.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jiwer
import numpy as np

from engine.errors import UserError, require
from engine.metrics.metric import CACHED, Figure, Metric, Take, text_of, wave_of
from engine.metrics.recogniser import RATE, hear

FRAME = 10  # milliseconds per frame
SETTINGS = {"allphone_ci": True, "beam": 1e-20, "pbeam": 1e-20, "lw": 2.0, "remove_noise": False, "loglevel": "FATAL"}


class PhonemeErrors(Metric):
    figures: ClassVar = {"per": Figure("PER %", -1, 1, 100, "phoneme errors divided by phonemes")}
    packages = ("pocketsphinx",)
    parallel = False

    def load(self) -> None:
        self.package = require("pocketsphinx", "pocketsphinx")
        model = self.package.get_model_path("en-us/en-us-phone.lm.bin")
        self.recogniser = self.package.Decoder(self.package.Config(allphone=model, lm=None, **SETTINGS))

    @cached_property
    def dictionary(self) -> dict[str, list[str]]:
        """Phonemes of each word."""
        lines = Path(self.package.get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
        return {word: phonemes for word, *phonemes in map(str.split, lines)}

    def reference(self, text: str) -> list[str]:
        """Return the phonemes of a text."""
        words = [word.strip("'") for word in re.findall(r"[\w'-]+", text.lower())]
        words = [part for word in words for part in ([word] if word in self.dictionary else word.split("-")) if part]
        missing = [word for word in words if word not in self.dictionary]
        if missing or not words:
            raise UserError(
                f"{missing[0]!r} is not in the pronunciation dictionary" if missing else "the text contains no words"
            )
        return [phoneme for word in words for phoneme in self.dictionary[word]]

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        reference = self.reference(text_of(truth))
        hear(self.recogniser, wave_of(take.audio, RATE))
        found = [part.word for part in self.recogniser.seg() or () if part.word.isalpha() and part.word != "SIL"]
        found = jiwer.process_words(" ".join(reference), " ".join(found))
        return {"per": (found.substitutions + found.deletions + found.insertions, len(reference))}


class DurationDistance(Metric):
    figures: ClassVar = {
        "duration_distance": Figure("DD ms", -1, 1, meaning="mean absolute difference of phone durations")
    }
    packages = ("pocketsphinx",)
    needs_truth = True

    def load(self) -> None:
        self.package = require("pocketsphinx", "pocketsphinx")
        self.phones = lru_cache(CACHED)(self._phones)

    def _phones(self, path: Path | None, text: str) -> list[list[tuple[str, int]]]:
        """Return (phone, frames) for each word of the speech in a file."""
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
        text = " ".join(words.split())
        one = self.phones(take.audio, text)
        two = self.phones(truth.audio, text)
        pairs = [(a, b) for a, b in zip(one, two) if [name for name, _ in a] == [name for name, _ in b]]
        apart = [abs(long - short) for a, b in pairs for (_, long), (_, short) in zip(a, b)]
        if not apart:
            raise UserError("the two takes were aligned with different pronunciations")
        return {"duration_distance": (float(np.mean(apart) * FRAME), 1)}

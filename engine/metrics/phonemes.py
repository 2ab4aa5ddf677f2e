"""PER, phoneme error rate, for sentences of any words of the recogniser's dictionary.

pocketsphinx (BSD; it carries its models) recognises phonemes by a bigram model of them, without words. The reference
is its dictionary's first pronunciation of each word, without stress. Its rate on clean speech is high: report that, and
that of resynthesised true speech, beside a figure.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jiwer

from engine.errors import UserError
from engine.metrics.metric import Figure, Metric, Take, text_of, wave_of
from engine.metrics.recogniser import hear
from engine.optional import require

RATE = 16_000
SETTINGS = {"allphone_ci": True, "beam": 1e-20, "pbeam": 1e-20, "lw": 2.0, "remove_noise": False, "loglevel": "FATAL"}


class PhonemeErrors(Metric):
    figures: ClassVar = {"per": Figure("PER %", -1, 1, 100, "phoneme errors over phonemes")}
    needs = ("pocketsphinx",)
    parallel = False

    def load(self) -> None:
        self.package = require("pocketsphinx", "pocketsphinx")
        model = self.package.get_model_path("en-us/en-us-phone.lm.bin")
        self.recogniser = self.package.Decoder(self.package.Config(allphone=model, lm=None, **SETTINGS))

    @cached_property
    def dictionary(self) -> dict[str, list[str]]:
        """Phonemes by word."""
        lines = Path(self.package.get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
        return {word: phonemes for word, *phonemes in map(str.split, lines)}

    def reference(self, text: str) -> list[str]:
        """Return the phonemes of a text."""
        words = [word.strip("'") for word in re.findall(r"[\w'-]+", text.lower())]
        words = [part for word in words for part in ([word] if word in self.dictionary else word.split("-")) if part]
        missing = [word for word in words if word not in self.dictionary]
        if missing or not words:
            raise UserError(f"no phonemes are known of {missing[0] if missing else 'a text without words'!r}")
        return [phoneme for word in words for phoneme in self.dictionary[word]]

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        reference = self.reference(text_of(truth))
        hear(self.recogniser, wave_of(take.audio, RATE))
        found = [part.word for part in self.recogniser.seg() or () if part.word.isalpha() and part.word != "SIL"]
        found = jiwer.process_words(" ".join(reference), " ".join(found))
        return {"per": (found.substitutions + found.deletions + found.insertions, len(reference))}

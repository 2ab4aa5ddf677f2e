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
from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.optional import require

RATE = 16_000
SETTINGS = {"allphone_ci": True, "beam": 1e-20, "pbeam": 1e-20, "lw": 2.0, "remove_noise": False, "loglevel": "FATAL"}


class PhonemeErrors(Metric):
    figures: ClassVar = {"per": Figure("PER %", -1, 1, 100, "phoneme errors over phonemes")}
    parallel = False

    def __init__(self, protocol: str, weights: Path, device: str = "cpu") -> None:
        super().__init__(protocol, weights, device)
        self.package = require("pocketsphinx", "pocketsphinx")
        model = self.package.get_model_path("en-us/en-us-phone.lm.bin")
        self.recogniser = self.package.Decoder(self.package.Config(allphone=model, lm=None, **SETTINGS))

    @classmethod
    def packages(cls, protocol: str) -> list[str]:
        return ["pocketsphinx"]

    @cached_property
    def dictionary(self) -> dict[str, list[str]]:
        """Phonemes by word."""
        lines = Path(self.package.get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
        return {word: phonemes for word, *phonemes in map(str.split, lines)}

    def reference(self, text: str) -> list[str]:
        """Return the phonemes of a text.

        Raises:
            UserError: it has a word that the dictionary lacks, or none.
        """
        words = [word.strip("'") for word in re.findall(r"[\w'-]+", text.lower())]
        words = [part for word in words for part in ([word] if word in self.dictionary else word.split("-")) if part]
        missing = [word for word in words if word not in self.dictionary]
        if missing or not words:
            raise UserError(f"no phonemes are known of {missing[0] if missing else 'a text without words'!r}")
        return [phoneme for word in words for phoneme in self.dictionary[word]]

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        if not truth.text:
            raise UserError("its words are not known: give text in the manifest, or ID.txt beside the true file")
        reference = self.reference(truth.text)
        pcm = (wave_of(take.audio, RATE).clip(-1, 1) * 32767).astype("<i2").tobytes()
        self.recogniser.reinit_feat()  # forgets the last clip, whose running statistics would change this one's scores
        self.recogniser.start_utt()
        self.recogniser.process_raw(pcm, full_utt=True)
        self.recogniser.end_utt()
        found = [part.word for part in self.recogniser.seg() or () if part.word.isalpha() and part.word != "SIL"]
        found = jiwer.process_words(" ".join(reference), " ".join(found))
        return {"per": (found.substitutions + found.deletions + found.insertions, len(reference))}

"""Text to phonemes with espeak-ng's grapheme-to-phoneme conversion, including numbers, dates and abbreviations.

Each phoneme is one token, vowels including their stress (`'` primary, `,` secondary). Every clause ends with a
punctuation token. Phonemes are espeak-ng's mnemonics, which are finer than IPA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import unicodedata
from functools import lru_cache
from pathlib import Path

from engine.errors import UserError

CONSONANTS = "p b t t# t2 d k g ? f v T D s z S Z h x tS dZ m n n- N l l# r r- w j ;"
VOWELS = (
    "@ @2 @- @L 3 3: E I I2 I# i i: a a# aa V 0 A: A@ A~ O O: O2 O@ O~ o o@ U U@ u: eI aI aI3 aI@ aU OI oU i@ i@3 e@"
)
STOPS = "<.> <,> <?> <!>"  # in brackets, as ? is also a phoneme
PAUSE = "_:"
LANGUAGES = {  # language -> tokens of its phonemes
    "en-us": (*STOPS.split(), PAUSE, *CONSONANTS.split(), *(s + v for v in VOWELS.split() for s in ("", "'", ",")))
}
# Phonemes that have no stress.
SYMBOLS = sorted({name.rstrip("#") for name in f"{CONSONANTS} {VOWELS}".split()} - {";"})
SAME_STOP = {";": ",", ":": ",", "\u2026": ".", "": "."}  # other phonemes are separate tokens
HELPER = Path(__file__).with_name("espeak.py")


class Phonemizer:
    """Converts text to phonemes in a persistent espeak-ng process, which is restarted if it died."""

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise UserError(f"text.language={language} has no phoneme set; choose {', '.join(LANGUAGES)}")
        self.language = language
        self.tokens = frozenset(LANGUAGES[language])
        self._lock = threading.Lock()
        self._process = None
        self._owner = 0

    def __call__(self, text: str) -> str:
        """Return the phonemes of a text, with a space between tokens."""
        text = " ".join(unicodedata.normalize("NFKC", text).split())
        letters = (c for c in text if c.isalpha() and not unicodedata.name(c, "").startswith("LATIN"))
        foreign = next(letters, None)
        if foreign:
            raise UserError(
                f"the text contains the letter {foreign!r}: this model supports {self.language}, in Latin letters"
            )
        tokens: list[str] = []
        for mnemonics, stop in self._read(text):
            found = [token for name in mnemonics.split() if (token := self._token(name))]
            tokens += [*found, f"<{SAME_STOP.get(stop, stop)}>"] if found else []
        if text and not tokens:
            raise UserError(f"the text {text[:60]!r} contains nothing to speak: write words")
        return " ".join(token for i, token in enumerate(tokens) if token != PAUSE or tokens[i - 1] != PAUSE)

    def _token(self, name: str) -> str:
        """Return the token of a mnemonic, or of the nearest phoneme, and "" for marks that are not pronounced."""
        if name.startswith(PAUSE):
            return PAUSE
        name = name.strip("%=|!_")
        if name in self.tokens:
            return name
        name = name.lstrip("',")
        while name and name not in self.tokens:
            name = name[:-1]  # quality marks are at the end
        return name

    def _read(self, text: str) -> list[tuple[str, str]]:
        with self._lock:
            for _ in range(2):
                if self._process is None or self._owner != os.getpid():  # forked processes must not share the pipes
                    command = [sys.executable, "-P", str(HELPER), self.language]
                    pipe = subprocess.PIPE
                    self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8")
                    self._owner = os.getpid()
                try:
                    self._process.stdin.write(json.dumps(text) + "\n")
                    self._process.stdin.flush()
                    line = self._process.stdout.readline()
                except OSError:
                    line = ""
                if line:
                    return json.loads(line)
                self._process.kill()
                self._process.communicate()
                self._process = None
        raise UserError(f"espeak-ng cannot read {text[:60]!r}: rephrase it")


phonemizer = lru_cache(Phonemizer)  # one process for each language

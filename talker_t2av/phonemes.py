"""Text to phonemes: espeak-ng's grapheme-to-phoneme, which also reads numbers, dates and abbreviations.

A phoneme is one token, a vowel together with its stress (`'` primary, `,` secondary); every clause ends with the token
of its stop. Phonemes are espeak-ng's own mnemonics, finer than IPA: they name what its voices say.
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
STOPS = "<.> <,> <?> <!>"  # in brackets, as ? is a phoneme, too
PAUSE = "_:"
LANGUAGES = {  # language -> tokens of its phonemes
    "en-us": (*STOPS.split(), PAUSE, *CONSONANTS.split(), *(s + v for v in VOWELS.split() for s in ("", "'", ",")))
}
SYMBOLS = sorted({name.rstrip("#") for name in f"{CONSONANTS} {VOWELS}".split()} - {";"})  # without stress, by name
SAME_STOP = {";": ",", ":": ",", "\u2026": ".", "": "."}  # others are tokens of their own
HELPER = Path(__file__).with_name("espeak.py")


class Phonemizer:
    """Reads text by espeak-ng in a separate process, which stays and is started again if it died."""

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise UserError(f"text.language={language} has no phonemes here; choose {', '.join(LANGUAGES)}")
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
            raise UserError(f"the text has the letter {foreign!r}: this model reads {self.language}, in Latin letters")
        tokens: list[str] = []
        for mnemonics, stop in self._read(text):
            found = [token for name in mnemonics.split() if (token := self._token(name))]
            tokens += [*found, f"<{SAME_STOP.get(stop, stop)}>"] if found else []
        if text and not tokens:
            raise UserError(f"there is nothing to say in the text {text[:60]!r}: write words")
        return " ".join(token for i, token in enumerate(tokens) if token != PAUSE or tokens[i - 1] != PAUSE)

    def _token(self, name: str) -> str:
        """A mnemonic's token, or that of the nearest phoneme; "" for a mark that is not pronounced."""
        if name.startswith(PAUSE):
            return PAUSE
        name = name.strip("%=|!_")
        if name in self.tokens:
            return name
        name = name.lstrip("',")
        while name and name not in self.tokens:
            name = name[:-1]  # marks of quality stand at the end
        return name

    def _read(self, text: str) -> list[tuple[str, str]]:
        with self._lock:
            for _ in range(2):
                if self._process is None or self._owner != os.getpid():  # a fork must not share the pipes
                    command = [sys.executable, "-I", str(HELPER), self.language]
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
        raise UserError(f"espeak-ng cannot read {text[:60]!r}: write it in other words")


phonemizer = lru_cache(Phonemizer)  # one process for each language

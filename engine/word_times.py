"""When each word of a wave is said, and files of it: JSON, and subtitles as SRT and WebVTT.

Words that are known are placed by forced alignment, others are recognised, both by pocketsphinx with its en-us model.

Axes: N samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from engine.errors import require
from engine.files import write_json
from engine.media.audio import resample_wave
from engine.metrics.recogniser import RATE, hear

FRAME = 0.01  # seconds of a frame of pocketsphinx
QUIET = 0.1  # seconds of silence on both sides, without which the first and the last word lose their edges
# words of a subtitle at most; a longer pause (seconds) begins a new one
CUE_WORDS = 7
CUE_GAP = 0.6
SOUNDS = "AE B K D EH F G HH IH JH K L M N AA P K R S T AH V W K Y Z"  # roughly, of the letters a to z
MOST_ADDED = 10_000  # words, after which an aligner is made anew: its dictionary never forgets one
SILENT = 1e-3  # peak of a wave without speech, -60 dB


@dataclass(frozen=True)
class Word:
    """A word as it was written, and the seconds from and to which it is said."""

    text: str
    begin: float
    end: float


class WordTimes:
    """Places words in waves."""

    def __init__(self) -> None:
        self._sphinx = require("pocketsphinx", "pocketsphinx")
        self._aligner: Any = None
        self._added = 0  # words that the aligner's dictionary lacked

    def align(self, text: str, wave: np.ndarray, rate: int) -> list[Word]:
        """Place the words of `text` in a wave (N,) in [-1, 1] at `rate` Hz; none if they cannot be found in it.

        A word that the dictionary lacks gets a rough pronunciation from its letters, which is enough to place it.
        """
        if self._aligner is None or self._added > MOST_ADDED:
            self._added = 0
            self._aligner = self._sphinx.Decoder(self._config(lm=None, beam=1e-100, pbeam=1e-100, wbeam=1e-80))
        written = [word for word in text.split() if _key(word)]
        keys = [_key(word) for word in written]
        sounds = dict(zip(ascii_lowercase, SOUNDS.split()))
        for key in dict.fromkeys(keys):
            if self._aligner.lookup_word(key) is None:
                phones = " ".join(sounds[letter] for letter in key if letter in sounds)
                self._aligner.add_word(key, phones, True)
                self._added += 1
        if not keys:
            return []
        self._aligner.set_align_text(" ".join(keys))
        spans = [span for span in self._spans(self._aligner, wave, rate) if span.text in keys]
        if [span.text for span in spans] != keys or any(span.end <= span.begin for span in spans):
            return []
        return [Word(word, span.begin, span.end) for word, span in zip(written, spans)]

    def recognise(self, wave: np.ndarray, rate: int) -> list[Word]:
        """Recognise the words of a wave (N,) by pocketsphinx's own language model, and place them."""
        return self._spans(self._recogniser, wave, rate)

    @cached_property
    def _recogniser(self) -> Any:
        return self._sphinx.Decoder(self._config())

    def _config(self, **settings: Any) -> Any:
        return self._sphinx.Config(loglevel="FATAL", bestpath=False, remove_noise=False, **settings)

    def _spans(self, decoder: Any, wave: np.ndarray, rate: int) -> list[Word]:
        wave = resample_wave(wave, rate, RATE)
        words = []
        last = len(wave) / RATE
        if not np.abs(wave).max(initial=0) > SILENT:
            return []
        hear(decoder, np.pad(wave, round(QUIET * RATE)))
        for segment in (decoder.seg() or ()) if decoder.hyp() else ():
            name = re.sub(r"\(\d+\)$", "", segment.word)  # a second pronunciation
            begin = segment.start_frame * FRAME - QUIET
            end = (segment.end_frame + 1) * FRAME - QUIET
            if name[0] not in "<[":
                words.append(Word(name, round(max(0.0, begin), 3), round(min(last, end), 3)))
        return words


def _key(word: str) -> str:
    """Return a word as a dictionary has it."""
    return re.sub(r"[^a-z']", "", word.lower().replace("’", "'")).strip("'")


def cues(words: Sequence[Word]) -> list[Word]:
    """Join words into subtitles; a pause, the end of a sentence and a number of words end one."""
    lines: list[list[Word]] = []
    for word in words:
        last = lines[-1][-1] if lines else None
        if last is None or len(lines[-1]) == CUE_WORDS or word.begin - last.end > CUE_GAP or last.text[-1] in ".!?":
            lines.append([])
        lines[-1].append(word)
    return [Word(" ".join(word.text for word in line), line[0].begin, line[-1].end) for line in lines]


def _span(line: Word, point: str) -> str:
    """Return the time span of a subtitle; `point` parts seconds from milliseconds."""

    def clock(seconds: float) -> str:
        minutes, rest = divmod(round(seconds * 1000), 60_000)
        return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"

    return f"{clock(line.begin)} --> {clock(line.end)}"


def write_words(stem: Path, words: Sequence[Word], origin: str, subtitles: bool) -> None:
    """Write STEM.json and, with `subtitles`, STEM.srt and STEM.vtt.

    Args:
        origin: what placed the words: text or recogniser.
    """
    content = {"origin": origin, "words": [asdict(word) for word in words]}
    write_json(stem.with_name(f"{stem.name}.json"), content)
    if subtitles:
        lines = cues(words)
        srt = [f"{n}\n{_span(line, ',')}\n{line.text}\n" for n, line in enumerate(lines, 1)]
        vtt = ["WEBVTT\n", *(f"{_span(line, '.')}\n{line.text}\n" for line in lines)]
        stem.with_name(f"{stem.name}.srt").write_text("\n".join(srt))
        stem.with_name(f"{stem.name}.vtt").write_text("\n".join(vtt))

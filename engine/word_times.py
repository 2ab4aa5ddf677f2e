"""Word timestamps of speech, written as JSON and as SRT and WebVTT subtitles.

Known words are located by forced alignment, unknown speech is recognised, both by pocketsphinx with its en-us model.

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

FRAME = 0.01  # seconds per frame of pocketsphinx
QUIET = 0.1  # seconds of silence to add on both sides, without which the first and last word are truncated
# maximum number of words per subtitle; minimum pause in seconds that starts a new one
CUE_WORDS = 7
CUE_GAP = 0.6
SOUNDS = (
    "AE B K D EH F G HH IH JH K L M N AA P K R S T AH V W K Y Z"  # approximate pronunciations of the letters a to z
)
MOST_ADDED = 10_000  # number of added words after which the aligner is recreated, as its dictionary only grows
SILENT = 1e-3  # peak of a wave without speech, -60 dB


@dataclass(frozen=True)
class Word:
    """A word as written, with its start and end time in seconds."""

    text: str
    begin: float
    end: float


class WordTimes:
    """Computes word timestamps of waveforms."""

    def __init__(self) -> None:
        self._sphinx = require("pocketsphinx", "pocketsphinx")
        self._aligner: Any = None
        self._added = 0  # number of words added to the aligner's dictionary

    def align(self, text: str, wave: np.ndarray, rate: int) -> list[Word]:
        """Align the words of `text` with a waveform (N,) in [-1, 1] at `rate` Hz. Return [] if the alignment fails.

        Words outside of the dictionary get an approximate pronunciation from their letters, which suffices for
        alignment.
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
        """Recognise the words of a waveform (N,) and their times with pocketsphinx's language model."""
        return self._spans(self._recogniser, wave, rate)

    @staticmethod
    def write(stem: Path, words: Sequence[Word], origin: str) -> None:
        """Write STEM.json, STEM.srt and STEM.vtt.

        Args:
            origin: source of the words, text or recogniser.
        """
        content = {"origin": origin, "words": [asdict(word) for word in words]}
        write_json(stem.with_name(f"{stem.name}.json"), content)
        lines = cues(words)
        srt = [f"{n}\n{_span(line, ',')}\n{line.text}\n" for n, line in enumerate(lines, 1)]
        vtt = ["WEBVTT\n", *(f"{_span(line, '.')}\n{line.text}\n" for line in lines)]
        stem.with_name(f"{stem.name}.srt").write_text("\n".join(srt))
        stem.with_name(f"{stem.name}.vtt").write_text("\n".join(vtt))

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
            name = re.sub(r"\(\d+\)$", "", segment.word)  # suffix of an alternative pronunciation
            begin = segment.start_frame * FRAME - QUIET
            end = (segment.end_frame + 1) * FRAME - QUIET
            if name[0] not in "<[":
                words.append(Word(name, round(max(0.0, begin), 3), round(min(last, end), 3)))
        return words


def _key(word: str) -> str:
    """Return a word in dictionary form."""
    return re.sub(r"[^a-z']", "", word.lower().replace("’", "'")).strip("'")


def cues(words: Sequence[Word]) -> list[Word]:
    """Group words into subtitles, which end at a pause, at the end of a sentence, or at a maximum number of words."""
    lines: list[list[Word]] = []
    for word in words:
        last = lines[-1][-1] if lines else None
        if last is None or len(lines[-1]) == CUE_WORDS or word.begin - last.end > CUE_GAP or last.text[-1] in ".!?":
            lines.append([])
        lines[-1].append(word)
    return [Word(" ".join(word.text for word in line), line[0].begin, line[-1].end) for line in lines]


def _span(line: Word, point: str) -> str:
    """Return the time span of a subtitle. `point` is the decimal separator."""

    def clock(seconds: float) -> str:
        minutes, rest = divmod(round(seconds * 1000), 60_000)
        return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"

    return f"{clock(line.begin)} --> {clock(line.end)}"

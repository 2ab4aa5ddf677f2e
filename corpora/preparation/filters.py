"""Stages that reject clips by language, number of speakers or mismatching transcripts, and speech enhancement.

The paper filters VoxCeleb2 in this way. Networks are those of `corpora.preparation.engines`, or others with the same
interface.

Axes: N samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jiwer
import numpy as np

from corpora.preparation.clip import RATE, RATE16, MachineFault, Stage, WorkItem
from corpora.preparation.engines import Transcript
from engine.errors import UserError
from engine.media.audio import resample_wave
from engine.settings import require_range


def transcribe(clip: WorkItem, recogniser: Any) -> Transcript:
    """Return the transcript of a clip. Each recogniser runs once for all stages."""
    if recogniser.name not in clip.transcripts:
        clip.transcripts[recogniser.name] = recogniser(clip.wave16)
    return clip.transcripts[recogniser.name]


def normalise_text(text: str) -> str:
    """Convert text to lower case without punctuation, as recognisers differ in both."""
    return " ".join(re.sub(r"[^\w' ]+", " ", text.lower()).split())


class Language(Stage):
    """Keeps clips in given languages.

    Args:
        recogniser: detects the language.
        languages: languages to keep.
        min_probability: minimum probability of the language.
    """

    facts = ("language",)

    def __init__(self, recogniser: Any, languages: list[str], min_probability: float = 0.5) -> None:
        if not languages:
            raise UserError(f"stages.language.languages={languages}: list at least one language")
        require_range("stages.language.min_probability", min_probability, 0.0, 1.0)
        self.recogniser = recogniser
        self.languages = languages
        self.min_probability = min_probability

    def __call__(self, clip: WorkItem) -> None:
        transcript = transcribe(clip, self.recogniser)
        if transcript.language not in self.languages:
            raise UserError(f"language {transcript.language}, expected {', '.join(self.languages)}")
        if transcript.probability < self.min_probability:
            raise UserError(
                f"language {transcript.language} with probability {transcript.probability:.2f}, "
                f"under {self.min_probability:g}"
            )
        clip.facts["language"] = transcript.language


class SingleSpeaker(Stage):
    """Keeps clips with a single speaker.

    Args:
        counter: measures the speaking time of each speaker.
        max_other_seconds: maximum total speaking time of other speakers in seconds.
    """

    def __init__(self, counter: Callable[[np.ndarray], list[float]], max_other_seconds: float = 0.5) -> None:
        require_range("stages.speakers.max_other_seconds", max_other_seconds, 0.0, 1e6)
        self.counter = counter
        self.max_other_seconds = max_other_seconds

    def __call__(self, clip: WorkItem) -> None:
        seconds = self.counter(clip.wave16)
        if not seconds:
            raise UserError("no speech detected")
        if sum(seconds[1:]) > self.max_other_seconds:
            raise UserError(
                f"other speakers talk for {sum(seconds[1:]):.1f} s, at most {self.max_other_seconds:g} s are allowed"
            )


class Enhance(Stage):
    """Removes background noise from the audio.

    Args:
        enhancer: see `corpora.preparation.engines`. The audio is resampled to its sampling rate and back.
    """

    reusable = False

    def __init__(self, enhancer: Any) -> None:
        self.enhancer = enhancer

    def __call__(self, clip: WorkItem) -> None:
        noisy = resample_wave(clip.wave, RATE, self.enhancer.rate)
        clean = np.asarray(self.enhancer(noisy), np.float32)
        if clean.shape != noisy.shape or not np.isfinite(clean).all():
            found = f"shape {clean.shape}" if clean.shape != noisy.shape else "values that are not finite"
            raise UserError(f"the enhancer must return finite samples of shape {noisy.shape}, but returned {found}")
        clean = clean.clip(-1, 1)
        clip.wave = resample_wave(clean, self.enhancer.rate, RATE)[: len(clip.wave)]
        clip.wave16 = resample_wave(clean, self.enhancer.rate, RATE16)[: len(clip.wave16)]
        clip.transcripts.clear()


class Transcription(Stage):
    """Keeps clips whose text matches the audio. Without a text, two recognisers must agree.

    Args:
        recogniser: transcribes every clip.
        second: second recogniser for clips without a text, whose text becomes that of `recogniser`.
        max_wer: maximum WER (as a fraction) of clips to keep.
    """

    facts = ("text",)

    def __init__(self, recogniser: Any, second: Any = None, max_wer: float = 0.3) -> None:
        require_range("stages.transcription.max_wer", max_wer, 0.0, 1e6)
        self.recogniser = recogniser
        self.second = second
        self.max_wer = max_wer

    def __call__(self, clip: WorkItem) -> None:
        found = transcribe(clip, self.recogniser).text
        text = clip.facts.get("text")
        if text is None and self.second is None:
            raise MachineFault("it has no text to compare with: set stages.transcription.second, or disable the stage")
        if text is None:
            expected = found
            other = transcribe(clip, self.second).text
        else:
            expected = text
            other = found
        expected = normalise_text(expected)
        other = normalise_text(other)
        if not expected:
            raise UserError("its text is empty" if text is not None else "no words were recognised")
        rate = jiwer.wer(expected, other)
        if rate > self.max_wer:
            whose = "its text" if text is not None else "a second recogniser"
            raise UserError(f"the recognised words differ from {whose}: WER {rate:.2f}, over {self.max_wer:g}")
        if text is None:
            clip.facts["text"] = found

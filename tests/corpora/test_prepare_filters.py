"""The filters, with engines that hear what they are told to."""

from contextlib import nullcontext

import numpy as np
import pytest

from corpora.preparation.clip import MachineFault, SourceClip, WorkItem
from corpora.preparation.engines import Transcript
from corpora.preparation.filters import Enhance, Language, SingleSpeaker, Transcription, normalise_text
from engine.errors import UserError


class Hears:
    def __init__(self, text, language="en", probability=0.9, name="fake"):
        self.name = name
        self.transcript = Transcript(text, language, probability)
        self.calls = 0

    def __call__(self, wave):
        self.calls += 1
        return self.transcript


def clip(text=None):
    made = WorkItem(SourceClip("a"), ".", wave=np.zeros(2400, np.float32), wave16=np.zeros(1600, np.float32))
    made.facts["text"] = text
    return made


def test_clips_of_other_languages_are_refused():
    kept = clip()
    Language(Hears("", "de"), ["en", "de"])(kept)
    assert kept.facts["language"] == "de"
    for heard, message in (
        (Hears("", "fr"), "language fr, expected en, de"),
        (Hears("", "en", 0.4), r"probability 0\.40, under 0\.5"),
    ):
        with pytest.raises(UserError, match=message):
            Language(heard, ["en", "de"])(clip())


@pytest.mark.parametrize(
    ("seconds", "kept"), [([3.0], True), ([3.0, 0.2, 0.2], True), ([3.0, 0.6], False), ([], False)]
)
def test_clips_of_two_or_no_speakers_are_refused(seconds, kept):
    with nullcontext() if kept else pytest.raises(UserError):
        SingleSpeaker(lambda wave: seconds, max_other_seconds=0.5)(clip())


def test_transcription_against_the_text_and_between_recognisers():
    listens = Hears("Hello, there. It's me!")
    both = clip("hello there it's me")
    Language(listens, ["en"])(both)
    Transcription(listens, max_wer=0.0)(both)
    assert listens.calls == 1  # once for all stages
    with pytest.raises(UserError, match=r"differ from its text: WER 0\.50, over 0\.3"):
        Transcription(listens)(clip("hello where is me"))
    with pytest.raises(UserError, match="its text is empty"):
        Transcription(listens)(clip("..."))
    without = clip()
    Transcription(listens, Hears("hello there its me", name="second"))(without)
    assert without.facts["text"] == "Hello, there. It's me!"
    with pytest.raises(UserError, match="differ from a second recogniser"):
        Transcription(listens, Hears("good bye", name="second"))(clip())
    with pytest.raises(MachineFault, match="no text to compare with"):
        Transcription(listens)(clip())
    assert normalise_text("It's  TWO-fold, yes?") == "it's two fold yes"


def test_enhancement_replaces_the_sound_at_both_rates():
    class Half:
        rate = 16_000

        def __call__(self, wave):
            return wave / 2

    noisy = clip()
    time = np.arange(2400, dtype=np.float32) / 24_000
    noisy.wave = np.sin(2 * np.pi * 440 * time)
    noisy.transcripts["fake"] = Transcript("old", "en", 1.0)
    before = noisy.wave.copy()
    Enhance(Half())(noisy)
    assert len(noisy.wave) == 2400 and len(noisy.wave16) == 1600 and not noisy.transcripts
    assert np.abs(noisy.wave - before / 2)[100:-100].max() < 0.01
    with pytest.raises(UserError, match="enhancer must return finite samples"):
        Enhance(type("Cuts", (), {"rate": 16_000, "__call__": lambda self, wave: wave[1:]})())(noisy)

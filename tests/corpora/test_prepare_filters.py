"""The filters, with engines that hear what they are told to."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corpora.preparation.clip import MachineFault, SourceClip, WorkItem
from corpora.preparation.engines import ClearVoice, Emotion2Vec, Pyannote, SpeechBrain, Transcript, VoxLingua107
from corpora.preparation.filters import Enhance, Language, SingleSpeaker, Transcription, normalise_text
from engine.errors import UserError


class Hears:
    def __init__(self, text, language="en", probability=0.9, name="fake"):
        self.name, self.transcript, self.calls = name, Transcript(text, language, probability), 0

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
        (Hears("", "fr"), "language fr, wanted are en, de"),
        (Hears("", "en", 0.4), r"probability 0\.40, under 0\.5"),
    ):
        with pytest.raises(UserError, match=message):
            Language(heard, ["en", "de"])(clip())


@pytest.mark.parametrize(
    ("seconds", "kept"), [([3.0], True), ([3.0, 0.2, 0.2], True), ([3.0, 0.6], False), ([], False)]
)
def test_clips_of_two_or_no_speakers_are_refused(seconds, kept):
    with nullcontext() if kept else pytest.raises(UserError):
        SingleSpeaker(lambda wave: seconds, others=0.5)(clip())


def test_transcription_against_the_text_and_between_recognisers():
    listens = Hears("Hello, there. It's me!")
    both = clip("hello there it's me")
    Language(listens, ["en"])(both)
    Transcription(listens, most=0.0)(both)
    assert listens.calls == 1  # once for all stages
    with pytest.raises(UserError, match=r"differ from its text: word error rate 0\.50, over 0\.3"):
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
    with pytest.raises(UserError, match="enhancer made"):
        Enhance(type("Cuts", (), {"rate": 16_000, "__call__": lambda self, wave: wave[1:]})())(noisy)


@pytest.mark.parametrize(
    ("engine", "package", "extra"),
    [
        (Pyannote, "pyannote.audio", "prepare"),
        (SpeechBrain, "speechbrain", "prepare"),
        (VoxLingua107, "speechbrain", "prepare"),
        (ClearVoice, "clearvoice", "prepare"),
        (Emotion2Vec, "funasr", "emotion"),
    ],
)
def test_a_missing_package_is_one_line(engine, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"this needs {package} .* install it with  bash scripts/setup.sh {extra}"):
        engine(device="cpu")


def test_the_papers_engines_call_their_packages(monkeypatch):
    """Packages that answer as the published ones: labels such as "en: English", sources of a separation as rows."""
    calls = []

    class Classifier:
        @classmethod
        def from_hparams(cls, source, run_opts):
            calls.append((source, run_opts))
            return cls()

        def classify_batch(self, waves):
            return None, torch.tensor([0.9]).log(), None, ["en: English"]

    class Voice:
        def __init__(self, task, model_names):
            calls.append((task, model_names))

        def __call__(self, waves, online_write):
            assert waves.ndim == 2 and online_write is False
            return np.stack([waves / 4, waves / 2])

    for name in ("speechbrain", "speechbrain.inference"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "speechbrain.inference.classifiers", SimpleNamespace(EncoderClassifier=Classifier))
    monkeypatch.setitem(sys.modules, "clearvoice", SimpleNamespace(ClearVoice=Voice))
    heard = VoxLingua107(device="cpu")(np.zeros(1600, np.float32))
    assert (heard.language, heard.text) == ("en", "") and heard.probability == pytest.approx(0.9)
    assert calls == [("speechbrain/lang-id-voxlingua107-ecapa", {"device": "cpu"})]
    wave = np.linspace(-1, 1, 800, dtype=np.float32)
    clear, apart = ClearVoice(), ClearVoice("MossFormer2_SS_16K")
    assert (clear.rate, apart.rate) == (48_000, 16_000)
    assert calls[1:] == [("speech_enhancement", ["MossFormer2_SE_48K"]), ("speech_separation", ["MossFormer2_SS_16K"])]
    assert np.array_equal(apart(wave), wave / 2)  # the louder of two
    with pytest.raises(UserError, match="ClearerVoice has no model other"):
        ClearVoice("other")

"""How the outputs of label networks are read, on stand-ins that answer in the shapes of the real packages.

Shapes are those of funasr 1.2 (emotion2vec+), pyannote.audio 3 and 4, SpeechBrain 1.0 and clearvoice 0.1.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corpora.preparation import engines
from engine.errors import UserError
from hicodit.conditions.types import EXPRESSIONS

EMOTION2VEC = ["生气/angry", "厌恶/disgusted", "恐惧/fearful", "开心/happy", "中立/neutral", "其他/other", "<unk>"]
WAVE = np.zeros(16_000, np.float32)


def package(monkeypatch, name, **content):
    """Put a stand-in for a package, and for its parents, into sys.modules."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = SimpleNamespace(**(content if i == len(parts) else {}))
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)


@pytest.mark.parametrize("heard", [0, 5])
def test_emotion2vec_names_the_class_with_the_highest_score(monkeypatch, heard):
    scores = np.full(len(EMOTION2VEC), 0.05)
    scores[heard] = 0.6

    class AutoModel:
        def __init__(self, **how):
            assert how["hub"] == "hf" and how["device"] == "cpu"

        def generate(self, waves, granularity, extract_embedding):
            assert granularity == "utterance" and not extract_embedding
            return [{"labels": EMOTION2VEC, "scores": scores.tolist()} for _ in waves]

    package(monkeypatch, "funasr", AutoModel=AutoModel)
    names = engines.Emotion2Vec("folder", "cpu")([WAVE, WAVE])
    assert names == [EMOTION2VEC[heard].split("/")[-1]] * 2
    assert (names[0] in EXPRESSIONS) == (names[0] not in ("other", "<unk>"))


def test_voxlingua107_gives_a_language_and_its_probability(monkeypatch):
    class EncoderClassifier:
        @classmethod
        def from_hparams(cls, source, run_opts):
            assert source == "speechbrain/lang-id-voxlingua107-ecapa" and run_opts == {"device": "cpu"}
            return cls()

        def classify_batch(self, waves):
            assert waves.shape == (1, 16_000) and waves.dtype == torch.float32
            scores = torch.full((1, 107), -9.0)
            scores[0, 20] = np.log(0.75)
            return scores, scores.max(1).values, torch.tensor([20]), ["haw: Hawaiian"]

    package(monkeypatch, "speechbrain.inference.classifiers", EncoderClassifier=EncoderClassifier)
    found = engines.VoxLingua107(device="cpu")(WAVE)
    assert (found.text, found.language) == ("", "haw") and found.probability == pytest.approx(0.75)


class Annotation:
    """As pyannote.core's: `chart` lists the speakers with their seconds, the longest first."""

    def chart(self):
        return [("SPEAKER_01", 7.25), ("SPEAKER_00", np.float64(1.5))]


@pytest.mark.parametrize(
    "answer", [Annotation(), SimpleNamespace(speaker_diarization=Annotation(), exclusive_speaker_diarization=None)],
    ids=["version 3", "version 4"],
)  # fmt: skip
def test_pyannote_gives_the_seconds_of_each_speaker(monkeypatch, answer):
    class Pipeline:
        @classmethod
        def from_pretrained(cls, name):
            return cls() if name == "accepted" else None

        def to(self, device):
            assert device == torch.device("cpu")

        def __call__(self, file):
            assert file["waveform"].shape == (1, 16_000) and file["sample_rate"] == 16_000
            return answer

    package(monkeypatch, "pyannote.audio", Pipeline=Pipeline)
    assert engines.Pyannote("accepted", "cpu")(WAVE) == [7.25, 1.5]
    with pytest.raises(UserError, match="accept its terms on the hub"):
        engines.Pyannote("refused", "cpu")


@pytest.mark.parametrize(
    ("name", "task", "rate", "speakers"),
    [
        ("MossFormer2_SE_48K", "speech_enhancement", 48_000, 1),
        ("MossFormer2_SS_16K", "speech_separation", 16_000, 2),
    ],
)
def test_clearvoice_returns_one_wave_of_the_same_length(monkeypatch, name, task, rate, speakers):
    """Enhancement answers (1, N), separation (speakers, 1, N): the loudest speaker is kept."""

    class ClearVoice:
        def __init__(self, task, model_names):
            self.asked = task, model_names
            arguments = SimpleNamespace(use_cuda=1)
            self.models = [SimpleNamespace(args=arguments, device="cuda", model=torch.nn.Linear(1, 1))]

        def __call__(self, wave, online_write):
            assert wave.shape == (1, 16_000) and not online_write
            waves = np.stack([np.full((1, 16_000), 0.1 * (k + 1)) for k in range(speakers)])
            return waves if speakers > 1 else waves[0]

    package(monkeypatch, "clearvoice", ClearVoice=ClearVoice)
    enhancer = engines.ClearVoice(name, "cpu")
    (network,) = enhancer.model.models
    assert network.device == torch.device("cpu") and not network.args.use_cuda  # the package had chosen another
    clean = enhancer(WAVE)
    assert enhancer.rate == rate and enhancer.model.asked == (task, [name])
    assert clean.shape == WAVE.shape and clean.dtype == np.float32
    np.testing.assert_allclose(clean, 0.1 * speakers, rtol=1e-6)

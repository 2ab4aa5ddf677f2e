"""Engines of preparation: how outputs of label networks are read, on stand-ins of their packages, and tiny networks.

Stand-ins answer in the shapes of funasr 1.2 (emotion2vec+), pyannote.audio 3 and 4, SpeechBrain 1.0 and clearvoice 0.1.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from corpora.preparation import engines
from engine.errors import UserError
from engine.evaluation.validation import figures_of, measure_outputs
from engine.media.audio import read_audio
from tests.rehearsal import stand_ins

EMOTION2VEC = ["生气/angry", "厌恶/disgusted", "恐惧/fearful", "开心/happy", "中立/neutral", "其他/other", "<unk>"]
WAVE = np.zeros(16_000, np.float32)
CPU = torch.device("cpu")


def package(monkeypatch, name, **content):
    """Put a stand-in for a package, and for its parents, into sys.modules."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = SimpleNamespace(**(content if i == len(parts) else {}))
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)


def test_emotion2vec_names_the_class_with_the_highest_score(monkeypatch):
    def generate(waves, granularity, extract_embedding):
        return [{"labels": EMOTION2VEC, "scores": [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]} for _ in waves]

    package(monkeypatch, "funasr", AutoModel=lambda **settings: SimpleNamespace(generate=generate))
    assert engines.Emotion2Vec("folder", "cpu")([WAVE, WAVE]) == ["happy", "happy"]


def test_voxlingua107_gives_a_language_and_its_probability(monkeypatch):
    def classify(waves):
        assert waves.shape == (1, 16_000) and waves.dtype == torch.float32
        scores = torch.full((1, 107), -9.0)
        scores[0, 20] = np.log(0.75)
        return scores, scores.max(1).values, torch.tensor([20]), ["haw: Hawaiian"]

    loader = SimpleNamespace(from_hparams=lambda source, run_opts: SimpleNamespace(classify_batch=classify))
    package(monkeypatch, "speechbrain.inference.classifiers", EncoderClassifier=loader)
    found = engines.VoxLingua107(device="cpu")(WAVE)
    assert (found.text, found.language) == ("", "haw") and found.probability == pytest.approx(0.75)


# As pyannote.core's annotation: the speakers with their seconds, the longest first.
ANNOTATION = SimpleNamespace(chart=lambda: [("SPEAKER_01", 7.25), ("SPEAKER_00", np.float64(1.5))])
NEWER = SimpleNamespace(speaker_diarization=ANNOTATION, exclusive_speaker_diarization=None)


@pytest.mark.parametrize("answer", [ANNOTATION, NEWER], ids=["version 3", "version 4"])
def test_pyannote_gives_the_seconds_of_each_speaker(monkeypatch, answer):
    class Pipeline:
        from_pretrained = staticmethod(lambda name: Pipeline() if name == "accepted" else None)

        def to(self, device):
            assert device == CPU

        def __call__(self, file):
            assert file["waveform"].shape == (1, 16_000) and file["sample_rate"] == 16_000
            return answer

    package(monkeypatch, "pyannote.audio", Pipeline=Pipeline)
    assert engines.Pyannote("accepted", "cpu")(WAVE) == [7.25, 1.5]
    with pytest.raises(UserError, match="refused"):
        engines.Pyannote("refused", "cpu")


@pytest.mark.parametrize(
    ("name", "task", "rate", "answer"),
    [
        ("MossFormer2_SE_48K", "speech_enhancement", 48_000, np.full((1, 16_000), 0.2)),
        ("MossFormer2_SS_16K", "speech_separation", 16_000, np.stack([np.full((1, 16_000), x) for x in (0.1, 0.2)])),
    ],
    ids=["enhancement", "separation, which answers all speakers"],
)
def test_clearvoice_returns_the_loudest_speaker(monkeypatch, name, task, rate, answer):
    network = SimpleNamespace(args=SimpleNamespace(use_cuda=1), device="cuda", model=torch.nn.Linear(1, 1))

    class ClearVoice:
        def __init__(self, **asked):
            assert asked == {"task": task, "model_names": [name]}
            self.models = [network]

        def __call__(self, wave, online_write):
            assert wave.shape == (1, 16_000) and not online_write
            return answer

    package(monkeypatch, "clearvoice", ClearVoice=ClearVoice)
    enhancer = engines.ClearVoice(name, "cpu")
    clean = enhancer(WAVE)
    assert network.device == CPU and not network.args.use_cuda  # the package had chosen another
    assert enhancer.rate == rate
    assert clean.shape == WAVE.shape and clean.dtype == np.float32
    np.testing.assert_allclose(clean, 0.2, rtol=1e-6)


RATE = 16_000


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory):
    """A folder as the hub has them, with every size cut down and random weights."""
    folder = tmp_path_factory.mktemp("whisper")
    stand_ins.whisper(folder)
    return folder


@pytest.mark.parametrize("seconds", [2, 33])
def test_whisper_transcribes_clips_shorter_and_longer_than_its_window(tiny_whisper, seconds):
    wave = np.random.default_rng(0).normal(0, 0.1, seconds * RATE).astype(np.float32)
    heard = engines.Whisper(str(tiny_whisper), "cpu")(wave)
    assert heard.language in ("en", "de") and 0.5 <= heard.probability <= 1 and "<|" not in heard.text


def test_voice_windows_distinguish_one_speaker_from_two():
    pytest.importorskip("resemblyzer")
    voice = read_audio("assets/demo/voice.wav", RATE)
    voice = np.tile(voice, 3)
    other = np.interp(np.arange(0, len(voice), 1.7), np.arange(len(voice)), voice).astype(np.float32)  # a higher voice
    count = engines.VoiceWindows(device="cpu")
    alone = count(voice)
    both = count(np.concatenate([voice, other]))
    assert alone[1] < 0.5 and both[1] > 1  # seconds
    assert sum(both) == pytest.approx((len(voice) + len(other)) / RATE)
    with pytest.raises(UserError):
        count(np.zeros(RATE, np.float32))


def test_validation_measures_words_with_any_whisper(tiny_whisper, tmp_path, capsys):
    waves = [np.random.default_rng(i).normal(0, 0.1, 24_000).astype(np.float32) for i in range(3)]
    texts = ["lay blue", "", "set red now"]
    found = figures_of([measure_outputs(["wer"], texts, waves, None, 24_000, tiny_whisper)])
    assert found.keys() == {"wer"} and found["wer"] > 0.5  # random weights; the clip without words is left out
    (tmp_path / "empty").mkdir()
    assert measure_outputs(["wer"], texts, waves, None, 24_000, tmp_path / "empty") == {}
    assert "no wer" in capsys.readouterr().out


def test_wav2vec2_transcribes_letters(tmp_path):
    """A tiny network whose every frame is the letter A."""
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}')
    words = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    sound = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    transformers.Wav2Vec2Processor(sound, words).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(vocab_size=6, **sizes))
    model.lm_head.bias.data[5] = 100.0
    model.save_pretrained(tmp_path)
    heard = engines.Wav2Vec2(str(tmp_path), "cpu")(np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32))
    assert (heard.text, heard.language, heard.probability) == ("a", "en", 1.0)

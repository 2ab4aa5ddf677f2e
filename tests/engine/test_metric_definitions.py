"""Each metric against the package or program that defines it, or against a closed form.

Values written down here were computed from assets/demo/voice.wav, and from it with white noise of 0.01 (seed 0), by the
program named beside them. What needs a package of the extra `metrics` is skipped where that is not installed.
"""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from transformers import BatchFeature

from engine.errors import UserError
from engine.media.audio import read_audio
from engine.metrics import lip_sync
from engine.metrics.frechet import frechet_distance
from engine.metrics.metric import Take, Waveform
from engine.metrics.registry import METRICS, metric_of
from engine.metrics.words import count_errors
from engine.torch_files import read_checkpoint

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "demo"
TEXT = (ASSETS / "voice.txt").read_text().strip()
RATE = 16_000


@pytest.fixture(scope="module")
def voice():
    return read_audio(ASSETS / "voice.wav", RATE)


@pytest.fixture(scope="module")
def noisy(voice):
    return voice + 0.01 * np.random.default_rng(0).standard_normal(len(voice)).astype(np.float32)


def take(wave: np.ndarray, **more) -> Take:
    return Take(Waveform(wave, RATE), text=TEXT, **more)


def figures(name: str, made: Take, truth: Take, protocol: str | None = None, weights: Path = Path("nowhere")) -> dict:
    kind = metric_of(name)
    metric = kind(protocol or kind.protocols[0], weights)
    metric.load()
    return metric.measure(made, truth)


@pytest.mark.parametrize("name", METRICS)
def test_the_registry_lists_the_figures_of_each_metric(name):
    kind = metric_of(METRICS[name][0])
    assert kind.__name__ == name.partition(".")[2] and tuple(kind.figures) == METRICS[name]


# --- words ---


def test_word_and_character_errors():
    assert count_errors("set blue by hotel", "set glue hotel now") == {"wer": (3, 4), "cer": (8, 17)}
    assert count_errors("set blue", "")["wer"] == (2, 2)  # nothing heard is no reason to leave a clip out
    assert count_errors("set", "set set set")["wer"] == (2, 1)  # the reference's words divide
    assert count_errors("你 好 世界", "你好世", "zh") == {"cer": (1, 4)}
    with pytest.raises(UserError, match="no words"):
        count_errors(" ", "a")


def test_texts_are_normalised_as_by_whisper(tmp_path):
    (tmp_path / "whisper-medium").mkdir()
    (tmp_path / "whisper-medium" / "normalizer.json").write_text('{"colour": "color"}')
    metric = metric_of("wer")("auto-avsr", tmp_path)
    metric.load()
    assert metric.normalise("It's Mr. Hill's COLOUR, twenty-one [noise]!", "en") == "it is mister hill is color 21"
    row = metric.measure(
        Take(text="Their colour won't fade", heard="their color will not fade"), Take(text="Their colour won't fade")
    )
    assert row["wer"] == (0, 5)
    lips = figures("wer_lips", Take(heard="set glue"), Take(text="Set blue now."), weights=tmp_path)
    assert lips["wer_lips"] == (2, 3) and "wer" not in lips
    chinese = Take(text="你好", language="zh")
    with pytest.raises(UserError, match="zh, ja, th, yue"):
        figures("wer_lips", Take(heard="你好", language="zh"), chinese, weights=tmp_path)


def test_the_recogniser_with_a_grammar_and_its_dictionary(voice, tmp_path):
    pytest.importorskip("pocketsphinx")
    grammar = tmp_path / "g.jsgf"
    grammar.write_text("#JSGF V1.0;\ngrammar g;\npublic <s> = set (g | r) at (m | alpha) four again;")
    words = {"g": "G R IY N", "r": "R EH D", "m": "M AY K", "set": "S EH T", "at": "AE T", "alpha": "AE L F AH"}
    words |= {"four": "F AO R", "again": "AH G EH N"}
    (tmp_path / "g.dict").write_text("".join(f"{word} {phones}\n" for word, phones in words.items()))
    row = figures("wer", take(voice), Take(text="set g at m four again"), f"grammar:{grammar}")
    assert row["wer"] == (0, 6) and row["heard"] == "set g at m four again"


def test_errors_by_qwen3_asr(voice, monkeypatch):
    """Punctuation and spaces do not count; Chinese has a character error rate alone."""
    inputs = {"input_ids": torch.arange(7)[None], "input_features": torch.zeros(1, 128, 20)}
    asr = Mock()  # processor and model in the shapes of transformers
    asr.apply_transcription_request.return_value = BatchFeature(inputs)
    asr.generate.return_value = torch.cat([inputs["input_ids"], torch.tensor([[70, 71]])], 1)
    asr.decode.return_value = "你好 四界！"
    monkeypatch.setattr("engine.metrics.words.load_speech_model", lambda *_: (asr, asr))
    said = Take(Waveform(voice, RATE), text="你好，世界。", language="zh")
    row = figures("cer", said, said, "qwen3-asr")
    assert row["cer"] == (1, 4) and "wer" not in row and row["heard"] == "你好 四界！"
    assert asr.apply_transcription_request.call_args.kwargs["language"] == "zh"
    assert asr.decode.call_args.args[0].tolist() == [70, 71]  # the answer alone, without the prompt


# --- emotion ---


def test_emotion_accuracy_and_similarity(voice, noisy, monkeypatch):
    """EmoAcc compares the classes of both takes, EMO-SIM is the cosine of their embeddings."""
    answers = {len(voice): (1, [3.0, 4.0]), len(voice) - 5: (1, [4.0, 3.0]), len(voice) - 9: (0, [-3.0, -4.0])}

    class AutoModel:
        def generate(self, wave, granularity, extract_embedding):
            assert granularity == "utterance" and extract_embedding
            label, embedding = answers[len(wave)]
            scores = np.eye(2)[label].tolist()
            labels = ["生气/angry", "开心/happy"]
            return [{"labels": labels, "scores": scores, "feats": np.array(embedding, np.float32)}]

    monkeypatch.setattr("engine.metrics.emotion.load_emotion2vec", lambda *_: AutoModel())
    for shorter, same, cosine in ((0, 1, 1.0), (5, 1, 0.96), (9, 0, -1.0)):
        row = figures("emotion_accuracy", take(noisy[: len(voice) - shorter]), take(voice))
        assert row["emotion_accuracy"] == (same, 1)
        assert row["emotion_similarity"] == (pytest.approx(cosine), 1)


# --- quality ---


@pytest.mark.parametrize(("protocol", "clean", "rough"), [("p808", 3.016985, 2.554678), ("p835", 2.476792, 2.086557)])
def test_dnsmos_equals_speechmos(voice, noisy, protocol, clean, rough):
    """speechmos 0.0.1.1, `dnsmos.run(wave, 16000)`: p808_mos and ovrl_mos."""
    pytest.importorskip("speechmos")
    pytest.importorskip("onnxruntime")
    assert figures("dnsmos", take(voice), take(voice), protocol)["dnsmos"][0] == pytest.approx(clean, abs=1e-4)
    assert figures("dnsmos", take(noisy), take(voice), protocol)["dnsmos"][0] == pytest.approx(rough, abs=1e-4)


def test_pesq_has_the_bounds_of_its_recommendations(voice, noisy):
    """P.862.1 maps the best raw score 4.5 to 4.549, P.862.2 to 4.644; the others by pesq 0.0.4."""
    pytest.importorskip("pesq")
    best = figures("pesq_wide", take(voice), take(voice))
    rough = figures("pesq_wide", take(noisy), take(voice))
    map_wide, map_narrow = (0.999 + 4 / (1 + np.exp(a * 4.5 + b)) for a, b in ((-1.3669, 3.8224), (-1.4945, 4.6607)))
    assert best["pesq_wide"][0] == pytest.approx(map_wide, abs=1e-3)
    assert best["pesq_narrow"][0] == pytest.approx(map_narrow, abs=1e-3)
    assert (rough["pesq_wide"][0], rough["pesq_narrow"][0]) == pytest.approx((1.82726, 3.14587), abs=1e-3)
    for wave, message in ((voice * 0, "silent"), (voice * 0 + 1e-30, "PESQ cannot be computed")):
        with pytest.raises(UserError, match=message):
            figures("pesq_wide", take(wave), take(voice))


def test_stoi(voice, noisy):
    """pystoi 0.4.1; 1 for equal waves."""
    pytest.importorskip("pystoi")
    for name, rough in (("stoi", 0.98543), ("estoi", 0.94271)):
        assert figures(name, take(voice), take(voice))[name][0] == pytest.approx(1, abs=1e-9)
        assert figures(name, take(noisy[:-100]), take(voice))[name][0] == pytest.approx(rough, abs=1e-3)
    with pytest.raises(UserError, match=r"0\.4 s"):  # pystoi gives 0.00001, and warns
        figures("stoi", take(voice[: RATE // 10]), take(voice))
    for pair in ((np.zeros_like(voice), voice), (voice, np.zeros_like(voice))):  # pystoi would add random numbers
        with pytest.raises(UserError, match="a signal is silent"):
            figures("estoi", *map(take, pair))


@pytest.mark.parametrize(("mode", "value"), [("plain", 5.401065706), ("dtw", 6.368744917), ("dtw_sl", 7.956420704)])
def test_mcd_equals_pymcd(voice, noisy, tmp_path, mode, value):
    """pymcd 0.2.1 with the noisy wave cut to four fifths, both resampled by librosa, as that program does."""
    pytest.importorskip("pyworld")
    pytest.importorskip("fastdtw")
    librosa = pytest.importorskip("librosa")
    from engine.metrics.mcd import distortion

    pair = []
    for name, wave in {"a": voice, "b": noisy[: len(noisy) * 4 // 5]}.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, RATE, subtype="FLOAT")
        pair.append(librosa.load(tmp_path / f"{name}.wav", sr=22_050)[0])
    assert distortion(*pair, mode) == pytest.approx(value, abs=1e-6)


def test_utmos_equals_its_package(voice, tmp_path):
    package = pytest.importorskip("utmos_pytorch.utmos_torch")
    torch.manual_seed(0)
    state = package.UTMOSModel().state_dict()
    torch.save(state, tmp_path / "utmos_state_dict.pt")
    scorer = package.UTMOSScoreTorch(str(tmp_path / "utmos_state_dict.pt"))
    expected = float(scorer.score(torch.from_numpy(voice)[None]).reshape(-1)[0])
    assert figures("utmos", take(voice), take(voice), weights=tmp_path)["utmos"][0] == pytest.approx(expected, abs=1e-6)


# --- voices ---


def test_ecapa_equals_speechbrain(voice, noisy, tmp_path):
    pytest.importorskip("speechbrain")
    from speechbrain.lobes.features import Fbank
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from speechbrain.processing.features import InputNormalization

    torch.manual_seed(0)
    network = ECAPA_TDNN(80, channels=[1024, 1024, 1024, 1024, 3072], lin_neurons=192).eval()
    normalise = InputNormalization(norm_type="sentence", std_norm=False)

    @torch.no_grad()
    def embed(wave):
        features = Fbank(n_mels=80)(torch.from_numpy(wave)[None])
        return network(normalise(features, torch.ones(1)))[0, 0]

    (tmp_path / "ecapa").mkdir()
    torch.save(network.state_dict(), tmp_path / "ecapa" / "embedding_model.ckpt")
    one = embed(noisy)
    two = embed(voice)
    expected = float(torch.nn.functional.cosine_similarity(one, two, 0))
    row = figures("speaker_similarity", take(noisy), take(voice), "ecapa", tmp_path)
    assert row["speaker_similarity"][0] == pytest.approx(expected, abs=1e-5) and expected < 0.9999


def test_the_cosine_of_ge2e(voice, noisy):
    """Resemblyzer 0.1.4, embed_utterance(preprocess_wav(wave)) of both."""
    pytest.importorskip("resemblyzer")
    row = figures("speaker_similarity", take(noisy), take(voice), "ge2e")
    assert row["speaker_similarity"][0] == pytest.approx(0.83564, abs=1e-3)


# --- time ---


def test_duration_distance_compares_phoneme_durations(voice):
    """Played a quarter slower, every phone is a quarter longer, up to the frames of 10 ms."""
    pytest.importorskip("pocketsphinx")
    assert figures("duration_distance", take(voice), take(voice))["duration_distance"] == (0, 1)
    slow = np.interp(np.arange(0, len(voice), 0.8), np.arange(len(voice)), voice).astype(np.float32)
    metric = metric_of("duration_distance")()
    metric.load()
    own = [phone for word in metric.phones(Waveform(voice, RATE), TEXT) for phone in word]
    assert [name for name, _ in own][:7] == ["S", "EH", "T", "G", "R", "IY", "N"] and len(own) == 19
    distance, _ = figures("duration_distance", take(slow), take(voice))["duration_distance"]
    assert distance == pytest.approx(0.25 * np.mean([frames for _, frames in own]) * 10, rel=0.4)
    with pytest.raises(UserError, match="cannot be aligned"):
        metric.phones(Waveform(voice, RATE), "set grxxn")


# --- pictures ---


def test_the_frechet_distance_of_two_normal_distributions():
    """Independent axes: sum of (m1 - m2)^2 + (s1 - s2)^2; with a rotation, nothing changes."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((4000, 5))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base.T))).T  # exact moments
    spread = np.array([1.0, 2, 0.5, 3, 1])
    shift = np.array([0.0, 1, -2, 0, 0.5])
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    expected = float(np.square(shift).sum() + np.square(spread - 1).sum())
    assert frechet_distance(base, base * spread + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(base @ turn, (base * spread + shift) @ turn) == pytest.approx(expected, rel=1e-9)


@pytest.fixture
def faces(monkeypatch):
    """In place of a video's face squares: noise, another one for each name."""

    def squares(path):
        return np.random.default_rng(len(str(path))).integers(0, 255, (37, 224, 224, 3), dtype=np.uint8)

    monkeypatch.setattr("engine.metrics.frechet.face_video", squares)
    return squares


def test_fid_features_equal_torch_fidelity(faces, monkeypatch, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3
    states = []
    with monkeypatch.context() as patch:  # without a file, so that its random weights can be saved as one
        patch.setattr(module.torch, "load", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda self, _: states.append(self.state_dict()))
        plain = network("inception", ["2048"], "none")
    file = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(states[0], file)
    row = figures("fid", Take(video=Path("a")), Take(), weights=tmp_path)
    shown = faces("a")[np.linspace(0, 36, 16).round().astype(int)]
    (expected,) = plain(torch.from_numpy(shown).permute(0, 3, 1, 2))
    assert row["fid"].shape == (16, 2048) and np.abs(row["fid"] - expected.numpy()).max() < 1e-4
    assert set(read_checkpoint(file)) == set(plain.state_dict())


class Averages(torch.nn.Module):
    """Takes what the I3D file takes, gives a video's mean colours."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features and x.shape == (1, 3, 16, 224, 224)
        return x.mean((2, 3, 4))


def test_fvd_uses_windows_of_16_frames(faces, tmp_path):
    torch.jit.script(Averages()).save(str(tmp_path / "i3d_torchscript.pt"))
    row = figures("fvd", Take(video=Path("a")), Take(), weights=tmp_path)
    expected = faces("a")[:32].reshape(2, -1, 3).astype(float).mean(1)
    assert row["fvd"].shape == (2, 3) and np.abs(row["fvd"] - expected).max() < 1e-2


def test_face_crops_are_those_of_syncnets_program():
    """Rows y - s to y + 1.8 s, columns x - 1.4 s to x + 1.4 s; the half side s and the middle are medians of 13."""
    frames = np.zeros((20, 400, 400, 3), np.uint8)
    frames[:, 150:290, 130:270] = 255  # the square of a box with middle (200, 200) and s = 50
    boxes = np.tile([150.0, 160, 100, 80], (20, 1))
    boxes[7] += 300  # one wrong box
    squares = lip_sync.face_squares(frames, boxes)
    assert squares.shape == (20, 224, 224, 3) and (squares[:, 3:-3, 3:-3] == 255).all()
    moved = lip_sync.face_squares(frames, boxes + [40, 0, 0, 0])
    assert (moved[:, :, -56:] == 0).all() and (moved[:, 3:-3, 3:150] == 255).all()
    assert (lip_sync.face_squares(frames, boxes - [150, 0, 0, 0])[:, :, :3] == 110).all()  # outside the picture


def test_syncnet_gets_windows_of_five_bgr_frames():
    torch.manual_seed(0)
    model = lip_sync.SyncNet().eval()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 40, 40, 3), dtype=np.uint8)
    wave = 0.1 * rng.standard_normal(640 * 7 + 100).astype(np.float32)
    lip, audio = model.embed(frames, wave)
    assert lip.shape == audio.shape == (2, 1024)
    other, _ = model.embed(frames[..., ::-1], wave)
    assert not torch.allclose(lip, other)
    with pytest.raises(UserError, match="5"):
        model.embed(frames[:5], wave)

"""The engines that can be run without a download: Whisper as a tiny random network, and the windows of GE2E."""

import numpy as np
import pytest
import transformers

from corpora.preparation.engines import VoiceWindows, Wav2Vec2, Whisper
from engine.errors import UserError
from engine.evaluation.validation import figures_of, measure_outputs
from engine.media.audio import read_audio
from tests.rehearsal import stand_ins

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
    heard = Whisper(str(tiny_whisper), "cpu")(wave)
    assert heard.language in ("en", "de") and 0.5 <= heard.probability <= 1 and "<|" not in heard.text


def test_voice_windows_distinguish_one_speaker_from_two():
    pytest.importorskip("resemblyzer")
    voice = read_audio("assets/demo/voice.wav", RATE)
    voice = np.tile(voice, 3)
    other = np.interp(np.arange(0, len(voice), 1.7), np.arange(len(voice)), voice).astype(np.float32)  # a higher voice
    count = VoiceWindows(device="cpu")
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
    assert measure_outputs(["wer"], [""] * 3, waves, None, 24_000, tiny_whisper) == {}
    (tmp_path / "empty").mkdir()
    assert measure_outputs(["wer"], texts, waves, None, 24_000, tmp_path / "empty") == {}
    assert measure_outputs(["wer", "mcd"], texts, waves, None, 24_000) == {}
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["no wer"] * 3 + ["no mcd"]


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
    heard = Wav2Vec2(str(tmp_path), "cpu")(np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32))
    assert (heard.text, heard.language, heard.probability) == ("a", "en", 1.0)

"""The engines that can be run without a download: Whisper as a tiny random network, and the windows of GE2E."""

import numpy as np
import pytest
import torch

from corpora.preparation.engines import VoiceWindows, Whisper
from engine.errors import UserError
from engine.media.audio import read_audio

RATE = 16_000
SPECIAL = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe"]
SPECIAL += ["startoflm", "startofprev", "nospeech", "notimestamps"]


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory):
    """A folder as the hub has them, with every size cut down and random weights."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    words = transformers.WhisperTokenizer(vocab=letters, merges=[])
    names = [f"<|{name}|>" for name in SPECIAL] + [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    words.add_special_tokens({"additional_special_tokens": names})
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    end, start = ids["endoftext"], ids["startoftranscript"]
    tokens = {"eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    sizes = {"d_model": 16, "num_mel_bins": 80, "vocab_size": len(words)}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    more = {"suppress_tokens": None, "begin_suppress_tokens": None, "bos_token_id": end}
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **tokens, **more))
    model.generation_config = transformers.GenerationConfig(
        **tokens,
        max_length=12,
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["en"], "<|de|>": ids["de"]},
        task_to_id={"transcribe": ids["transcribe"], "translate": ids["translate"]},
        no_timestamps_token_id=ids["notimestamps"],
        prev_sot_token_id=ids["startofprev"],
    )
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    features = transformers.WhisperFeatureExtractor(feature_size=80)
    transformers.WhisperProcessor(features, words).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("seconds", [2, 33])
def test_whisper_hears_clips_shorter_and_longer_than_its_window(tiny_whisper, seconds):
    wave = np.random.default_rng(0).normal(0, 0.1, seconds * RATE).astype(np.float32)
    heard = Whisper(str(tiny_whisper), "cpu")(wave)
    assert heard.language in ("en", "de") and 0.5 <= heard.probability <= 1 and "<|" not in heard.text


def test_weights_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"Whisper .*nothing cannot be loaded"):
        Whisper(str(tmp_path / "nothing"), "cpu")


def test_windows_tell_one_voice_from_two():
    pytest.importorskip("resemblyzer")
    voice = read_audio("assets/demo/voice.wav", RATE)
    voice = np.tile(voice, 3)
    other = np.interp(np.arange(0, len(voice), 1.7), np.arange(len(voice)), voice).astype(np.float32)  # a higher voice
    count = VoiceWindows(device="cpu")
    alone, both = count(voice), count(np.concatenate([voice, other]))
    assert alone[1] < 0.5 and both[1] > 1  # seconds
    assert sum(both) == pytest.approx((len(voice) + len(other)) / RATE)
    with pytest.raises(UserError):
        count(np.zeros(RATE, np.float32))

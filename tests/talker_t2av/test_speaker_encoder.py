"""Speaker encoders: released names, unequal lengths, the small encoder's release, and its training by distillation."""

import numpy as np
import pytest
import torch
from shard_files import write_split
from transformers import WavLMConfig

from engine.errors import UserError
from engine.evaluation.validation import Share, figures_of
from engine.media.audio import write_wav
from talker_t2av.speaker.encoder import VoiceEncoder, VoiceEncoderConfig, WavLMEncoder
from talker_t2av.speaker.task import VoiceClips, VoiceEncoderTask
from tests.reference import released_names
from tests.rehearsal.stand_ins import WAVLM
from tests.releases import write_release

SIZES = {"bands": 16, "channels": 16, "pooled": 24, "bottleneck": 8, "embedding": 12}


def tiny_encoder(**changes):
    torch.manual_seed(0)
    return WavLMEncoder(WavLMConfig(**WAVLM | changes), channels=8, pooled=8, bottleneck=8).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": True}]
)
def test_a_state_by_released_names_makes_the_same_encoder(changes):
    encoder = tiny_encoder(**changes)
    settings = WAVLM | changes
    state = released_names.speaker_encoder(encoder.state_dict(), settings["feat_extract_norm"])
    loss = {"loss_calculator.projection.weight": torch.zeros(3)}
    again = WavLMEncoder.from_upstream(state | loss, settings)
    wave = torch.randn(4000)
    assert torch.equal(again.embed(wave), encoder.embed(wave))
    del state["bn.weight"]
    with pytest.raises(UserError, match=r"head\.bn\.weight"):
        WavLMEncoder.from_upstream(state, settings)


def test_voice_encoder_release(tmp_path):
    torch.manual_seed(0)
    encoder = VoiceEncoder(VoiceEncoderConfig(**SIZES)).eval()
    encoder.save_pretrained(tmp_path / "voice", "card")
    again = VoiceEncoder.from_pretrained(tmp_path / "voice")
    wave = torch.randn(16_000)
    embedding = encoder.embed(wave)
    assert embedding.shape == (12,)
    assert torch.allclose(again.embed(wave), embedding, atol=5e-3)  # half precision
    assert torch.allclose(encoder.embed(0.3 * wave), embedding, atol=1e-3)  # loudness drops out
    with pytest.raises(UserError, match="reference voice"):
        encoder.embed(wave[:1000])


@pytest.fixture
def corpus(tmp_path):
    """Three voices of buzzes, each with a GE2E direction of its own."""
    rng = np.random.default_rng(0)
    time = np.arange(24_000 * 6 // 5) / 24_000
    for split, count in (("train", 12), ("seen", 6), ("unseen", 6)):
        (tmp_path / split).mkdir()
        samples = []
        for i in range(count):
            voice = i % 3
            wave = np.sin(2 * np.pi * (120 + 200 * voice) * time + rng.uniform(0, 6)) ** 9
            write_wav(tmp_path / split / f"c{i}.wav", 0.3 * wave + 0.003 * rng.standard_normal(len(time)), 24_000)
            ge2e = torch.zeros(12)
            ge2e[4 * voice : 4 * voice + 4] = 0.5
            samples.append(({"key": f"c{i}", "speaker": str(voice + 7), "frames": 30}, {"ge2e": ge2e}))
        write_split(tmp_path / "shards" / split, samples, 5, digests={"ge2e": "made up"})
    return tmp_path


def test_distillation_learns_the_voices(corpus, tmp_path):
    torch.manual_seed(0)
    clips = VoiceClips(corpus, corpus / "shards", bands=16, seconds=1.0)
    task = VoiceEncoderTask(SIZES, corpus, corpus / "shards", ["seen", "unseen"], recipe="Recipe.")
    optimiser = torch.optim.AdamW(task.parameters(), lr=1e-2)
    losses = []
    for step in range(25):
        generator = torch.Generator().manual_seed(step)
        batch = clips.collate([clips.load(i, generator) for i in range(12)])
        assert batch["mel"].shape == (12, 16, 100)
        result = task(batch, "encoder")
        optimiser.zero_grad()
        result["loss"].backward()
        optimiser.step()
        losses.append(result["distance"].item())
    assert losses[-1] < 0.3 * losses[0]
    task.eval()
    results = figures_of([task.measure(tmp_path, Share())])
    assert results.keys() == {"seen/cosine", "unseen/cosine"} and min(results.values()) > 0.8
    write_release(task, tmp_path / "release", results)
    assert "seen/cosine" in (tmp_path / "release" / "README.md").read_text()


def test_crops_are_functions_of_the_generator_and_short_clips_repeat(corpus):
    clips = VoiceClips(corpus, corpus / "shards", bands=16, seconds=2.0)  # the clips last 1.2 s
    one, same = (clips.load(3, torch.Generator().manual_seed(5)) for _ in range(2))
    other = clips.load(3, torch.Generator().manual_seed(6))
    assert one["mel"].shape == (16, 200)
    assert torch.equal(one["mel"], same["mel"]) and not torch.equal(one["mel"], other["mel"])
    assert clips.voices.tolist() == 4 * [0, 1, 2]

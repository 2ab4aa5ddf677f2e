"""Training of the WhisperX-VAE at toy size. Axes: B batch, N samples, T latent frames, Z latent channels."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperModel

from engine.errors import UserError
from engine.evaluation.validation import Share, figures_of
from engine.media.audio import write_wav
from tests.releases import write_release
from tests.tiny import DISCRIMINATORS, WHISPERX_VAE
from tests.tiny import train as train_task
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig
from whisperx_vae.latent_targets import SUBFRAMES, LatentTargets
from whisperx_vae.task import WhisperXVAETask, kl_divergence


def speech(samples=7200, seed=0):
    """(1, N): a gliding buzz in noise, loud and soft."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 24_000
    buzz = np.tanh(3 * np.sin(2 * np.pi * (100 + 30 * seed + 200 * t) * t)) * (0.3 + 0.2 * np.sin(30 * t + seed))
    return torch.from_numpy((buzz + 0.01 * rng.standard_normal(samples)).astype(np.float32))[None]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for split in ("train", "seen"):
        (root / split).mkdir()
        rows = []
        for i in range(6):
            write_wav(root / split / f"c{i}.wav", speech(24_000, i)[0], 24_000)
            rows.append({"id": f"c{i}", "text": "lay blue"})
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def make_task(**changes):
    torch.manual_seed(0)
    arguments = {
        "codec": WHISPERX_VAE,
        "mel": {"n_mels": [10, 40], "windows": [128, 512], "clamp": 1e-4},
        "weights": {"mel": 15.0, "adversarial": 1.0, "feature": 2.0, "kl": 0.01, "semantic": 1.0, "targets": 1.0},
        **DISCRIMINATORS,
        "gan_start": None,
    }
    return WhisperXVAETask(**(arguments | changes))


def targets_of(corpus, **changes):
    return {"root": corpus, "split": "train", "clips": 6, "until": 2, "noise": 0.3} | changes


def train(task, steps):
    return train_task(task, {"wave": torch.stack([speech(seed=s) for s in range(3)])}, steps, whole=True)


def test_stages_follow_the_schedule(corpus):
    task = make_task(targets=targets_of(corpus), gan_start=3)
    logs = [log["generator"] for log in train(task, 4)]
    assert ["kl" in log for log in logs] == [False, False, True, True]
    assert ["adversarial" in log for log in logs] == [False, False, False, True]
    assert all("targets" in log for log in logs)
    assert "targets" not in train(make_task(), 1)[0]["generator"]


def test_decoder_only_training_keeps_the_codes_of_a_release(the_decoder_alone_goes_on_from_a_release):
    batch = {"wave": torch.stack([speech(seed=s) for s in range(3)])}
    sizes = WHISPERX_VAE | {"mel_bands": 30}
    make = partial(make_task, gan_start=0)
    the_decoder_alone_goes_on_from_a_release(make, batch, speech(6720)[None], sizes, r"task\.init")


def test_the_posterior_is_sampled_in_training_and_its_mean_taken_at_inference():
    task = make_task()
    wave = speech(6720)[None]
    with torch.no_grad():
        first, second = (task.run({"wave": wave}) for _ in range(2))
    assert torch.equal(first["mean"], second["mean"]) and not torch.equal(first["fake"], second["fake"])
    codec = task.codec.eval()
    assert torch.equal(codec.encode(wave), codec.encode(wave))
    torch.testing.assert_close(codec.encode(wave), first["mean"].transpose(1, 2))


def test_a_clip_outside_whispers_window_is_an_error():
    task = make_task()
    for samples in (10, task.codec.config.max_frames * task.codec.hop + task.codec.hop):
        with pytest.raises(UserError, match=f"wave of {samples} samples"):
            task.run({"wave": torch.zeros(1, 1, samples)})


def test_kl_is_twice_the_divergence_from_the_prior():
    mean = torch.randn(2, 3, 4)
    std = torch.rand(2, 3, 4) + 0.1
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), prior)
    torch.testing.assert_close(kl_divergence(mean, std), 2 * exact.sum(1).mean())


def test_targets_are_standardised_and_without_phases(corpus):
    waves = [speech(24_000, i)[0] for i in range(6)]
    targets = LatentTargets(12, 24_000, 960, mel_bands=20).fit(waves)
    found = targets(torch.stack(waves)[:, None])
    assert found.shape == (6, 12, 25)
    flat = found.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(12), rtol=0, atol=1e-3)
    torch.testing.assert_close(flat.std(0), torch.ones(12), rtol=0, atol=0.01)
    correlation = torch.corrcoef(flat[:, : 12 - 2 * SUBFRAMES].T)
    torch.testing.assert_close(correlation, torch.eye(12 - 2 * SUBFRAMES), rtol=0, atol=0.01)
    torch.testing.assert_close(targets(-torch.stack(waves)[:, None]), found)


def test_pitch_and_voicing_targets():
    targets = LatentTargets(12, 24_000, 960)
    t = torch.arange(24_000) / 24_000
    low, high = (torch.tanh(5 * torch.sin(2 * torch.pi * f * t)) * 0.3 for f in (100, 200))
    noise = 0.3 * torch.randn(24_000, generator=torch.Generator().manual_seed(0))
    source = targets._source(torch.stack([low, high, noise]))[:, 3:-3]
    voicing, pitch = source.split(SUBFRAMES, -1)
    assert voicing[:2].min() > 0.95 and voicing[2].mean() < 0.5
    torch.testing.assert_close(pitch[1] - pitch[0], torch.ones_like(pitch[0]), rtol=0, atol=0.05)
    torch.testing.assert_close(pitch[0], torch.full_like(pitch[0], np.log2(100 / 150)), rtol=0, atol=0.05)


def test_a_given_whisper_is_frozen(tmp_path):
    sizes = WhisperConfig(
        num_mel_bins=20, max_source_positions=20, d_model=16, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=60,
        pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
    )  # fmt: skip
    whisper = WhisperModel(sizes)
    whisper.save_pretrained(tmp_path / "whisper")
    task = make_task(whisper=str(tmp_path / "whisper"))
    before = {k: v.clone() for k, v in whisper.encoder.state_dict().items()}
    encoder = [v.clone() for v in task.codec.encoder.state_dict().values()]
    train(task, 2)
    for name, value in task.codec.whisper.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not task.codec.whisper.training and task.codec.encoder.training
    assert any(not torch.equal(a, b) for a, b in zip(encoder, task.codec.encoder.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="other sizes"):
        make_task(whisper=str(tmp_path / "whisper"), codec=WHISPERX_VAE | {"whisper_layers": 2})


def test_validation_and_release(corpus, tmp_path, shares_give_the_same_figures):
    task = make_task(validation={"root": corpus, "splits": ["seen"], "clips": 2}).eval()
    results = figures_of([task.measure(tmp_path, Share())])
    assert {"seen/mel", "seen/latent_std", "seen/latent_speed"} <= results.keys()
    assert (tmp_path / "seen-decoded.wav").is_file()
    shares_give_the_same_figures(task)
    write_release(task, tmp_path / "release", results)
    codec = WhisperXVAE.from_pretrained(tmp_path / "release")
    assert codec.config == WhisperXVAEConfig(**WHISPERX_VAE)
    again = make_task(init=str(tmp_path / "release"), targets=targets_of(corpus, until=9))
    assert again.codec.config == codec.config and "kl" in train(again, 1)[0]["generator"]

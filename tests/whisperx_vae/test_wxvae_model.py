"""WhisperX-VAE at toy size. Axes: B batch, N samples, T latent frames, Z latent channels."""

import pytest
import torch

from engine.errors import UserError
from engine.media.audio import resample
from tests.tiny import WHISPERX_VAE
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

TINY = WhisperXVAEConfig(**WHISPERX_VAE | {"latent_dim": 6, "whisper_context": 50})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return WhisperXVAE(TINY).eval()


def waves(batch, samples, seed=0):
    return torch.rand(batch, samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("samples", "frames"), [(960, 1), (1919, 1), (1920, 2), (7677, 7)])
def test_frame_count(model, samples, frames):
    mel = model.mel(waves(2, 16_000))
    latents = model.encode_window(waves(2, samples)[:, None], mel)
    assert latents.shape == (2, frames, 6) and frames == model.frames(samples)
    assert model.decode(latents).shape == (2, 1, 960 * frames)


def test_whisper_hears_what_follows_a_beginning(model):
    wave = waves(1, 20 * 960)[:, None]
    mel = model.mel(resample(wave[:, 0], 24_000, 16_000))
    assert torch.equal(model.encode_beginning(wave, 10), model.encode_window(wave[..., :9600], mel))
    assert not torch.equal(model.encode_beginning(wave, 10), model.encode(wave[..., :9600]))


def test_wrong_inputs_say_what_to_give(model):
    mel = model.mel(waves(1, 16_000))
    with pytest.raises(UserError, match="959 samples is too short: give 960"):
        model.encode_window(torch.zeros(1, 1, 959), mel)
    with pytest.raises(UserError, match="longer than Whisper's window: give 24000"):
        model.encode_window(torch.zeros(1, 1, 26 * 960), mel)
    with pytest.raises(UserError, match=r"mel of shape \(1, 20, 98\)"):
        model.encode_window(torch.zeros(1, 1, 960), mel[..., :98])
    with pytest.raises(UserError, match="mono"):
        model.encode_window(torch.zeros(1, 960), mel)
    for shape in ((1, 0, 6), (1, 6, 5), (6, 5)):
        with pytest.raises(UserError, match="latents of shape"):
            model.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"decoder_ratios": (2, 2)}, "decoder_ratios"), ({"hidden": 33}, "hidden"), ({"decoder_width": 20}, "halved")],
)
def test_wrong_configs(change, word):
    with pytest.raises(UserError, match=word):
        WhisperXVAEConfig(**change)

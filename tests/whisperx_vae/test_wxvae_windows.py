"""Recordings longer than Whisper's window, and sound that is decoded while it arrives. Axes: T frames, Z channels."""

import pytest
import torch

from engine.media.audio import resample
from engine.nn.dac import DACDecoder
from tests.tiny import WHISPERX_VAE
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

TINY = WhisperXVAEConfig(**WHISPERX_VAE | {"latent_dim": 6, "whisper_context": 40})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return WhisperXVAE(TINY).eval()


def wave(samples):
    return 0.3 * torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frames", [20, 21, 35, 36, 100])
def test_a_long_wave_is_encoded_in_windows(model, frames):
    """Both ends are what the first and the last window alone give, and every frame is filled in."""
    x = wave(frames * 960 + 17)
    found = model.encode(x)
    assert found.shape == (2, frames, 6) and found.isfinite().all()
    first = model.encode(x[..., : 20 * 960])
    torch.testing.assert_close(found[:, :3], first[:, :3], rtol=1e-4, atol=1e-5)
    last = model.encode_window(
        x[..., (frames - 20) * 960 : frames * 960],
        model.mel(resample(x[:, 0], 24_000, 16_000)[:, (frames - 20) * 640 :]),
    )
    torch.testing.assert_close(found[:, -8:], last[:, -8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [[60], [1] * 40, [4] * 10, [3, 0, 30, 1, 1, 9], [5], [1], [16, 1], [17, 17]])
def test_streamed_chunks_join_to_the_offline_wave(model, chunks):
    latents = torch.randn(2, sum(chunks), 6, generator=torch.Generator().manual_seed(1))
    whole = model.decode(latents)
    pieces = list(model.decode_stream(latents.split(chunks, 1)))
    assert all(piece.shape[-1] > 0 for piece in pieces)
    torch.testing.assert_close(torch.cat(pieces, -1), whole, rtol=0, atol=1e-5)


def test_a_frame_is_given_out_as_soon_as_it_is_settled(model):
    _, after = model.decoder.reach
    sizes = []

    def arriving():
        for _ in range(after + 6):
            yield torch.zeros(1, 1, 6)
            sizes.append(0)

    for piece in model.decode_stream(arriving()):
        sizes.append(piece.shape[-1] // 960)
    assert sizes == [0] * after + [1, 0] * 6 + [after]


@pytest.mark.parametrize("ratios", [(12, 10, 4, 2), (10, 4, 2, 2, 6), (3, 5, 4), (5, 3)])
def test_reach_is_exact(ratios):
    """Of the frames around t, samples of frame t depend on exactly `reach` many."""
    torch.manual_seed(0)
    decoder = DACDecoder(3, 2 ** len(ratios), ratios).double()
    before, after = decoder.reach
    t = before + 3
    frames = torch.randn(1, 3, t + after + 4, dtype=torch.double, requires_grad=True)
    hop = decoder(frames).shape[-1] // frames.shape[-1]
    sound = decoder.model[:-1](frames)[..., t * hop : (t + 1) * hop]
    (slope,) = torch.autograd.grad(sound.abs().sum(), frames)
    used = slope.abs().sum((0, 1)).nonzero().flatten()
    assert (t - int(used.min()), int(used.max()) - t) == (before, after)

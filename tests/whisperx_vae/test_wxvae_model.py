"""WhisperX-VAE at toy size: windows, long recordings, streams, and Whisper's log-mel.

Axes: B batch, N samples, T latent frames, Z latent channels, M bands, F mel frames.
"""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from engine.media.audio import resample
from engine.nn.dac import DACDecoder
from engine.nn.mel import log_mel, pad_or_trim
from tests.tiny import WHISPERX_VAE
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig
from whisperx_vae.codec import POSITIONS

TINY = WhisperXVAEConfig(**WHISPERX_VAE | {"latent_dim": 6, "whisper_context": 40})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return WhisperXVAE(TINY).eval()


def wave(samples):
    return 0.3 * torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(0))


def test_whisper_sees_the_whole_recording_of_a_prefix(model):
    x = wave(20 * 960)
    mel = model.mel(resample(x[:, 0], 24_000, 16_000))
    assert torch.equal(model.encode_beginning(x, 10), model.encode_window(x[..., :9600], mel))
    assert not torch.equal(model.encode_beginning(x, 10), model.encode(x[..., :9600]))


@pytest.mark.parametrize("frames", [20, 35, 100])
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


@pytest.mark.parametrize("chunks", [[60], [1] * 40, [3, 0, 30, 1, 1, 9], [16, 1]])
def test_streamed_chunks_join_to_the_offline_wave(model, chunks):
    latents = torch.randn(2, sum(chunks), 6, generator=torch.Generator().manual_seed(1))
    whole = model.decode(latents)
    pieces = list(model.decode_stream(latents.split(chunks, 1)))
    assert all(piece.shape[-1] > 0 for piece in pieces)
    torch.testing.assert_close(torch.cat(pieces, -1), whole, rtol=0, atol=1e-5)


def test_a_frame_is_returned_once_its_receptive_field_is_complete(model):
    _, after = model.decoder.reach
    returned = []

    def arriving():
        for _ in range(after + 6):
            yield torch.zeros(1, 1, 6)
            returned.append(0)

    for piece in model.decode_stream(arriving()):
        returned.append(piece.shape[-1] // 960)
    assert returned == [0] * after + [1, 0] * 6 + [after]


@pytest.mark.parametrize("ratios", [(12, 10, 4, 2), (10, 4, 2, 2, 6), (3, 5, 4), (5, 3)])
def test_the_receptive_field_is_exact(ratios):
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


VOCOS = {
    "decoder": "vocos", "vocos_channels": 6, "vocos_dim": 8, "vocos_intermediate": 12, "vocos_layers": 2,
    "vocos_hop": 480, "n_fft": 720,
}  # fmt: skip


def test_a_vocos_decoder_streams_what_it_decodes():
    torch.manual_seed(0)
    codec = WhisperXVAE(WhisperXVAEConfig(**asdict(TINY) | VOCOS)).eval()
    latents = torch.randn(1, 30, 6)
    wave = codec.decode(latents)
    assert wave.shape == (1, 1, 30 * 960)
    streamed = torch.cat(list(codec.decode_stream(latents.split(4, dim=1))), -1)
    torch.testing.assert_close(streamed, wave, rtol=1e-4, atol=1e-5)


def test_a_missing_position_table_is_computed(model):
    state = {key: value for key, value in model.state_dict().items() if key != POSITIONS}
    again = WhisperXVAE.from_tensors(asdict(TINY), state, "test")
    assert torch.equal(again.whisper.embed_positions.weight, model.whisper.embed_positions.weight)


def speechlike(samples, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * (150 + 30 * t) * t) + 0.02 * rng.standard_normal(samples)
    return torch.from_numpy(wave.astype(np.float32))


@pytest.mark.parametrize("bands", [80, 128])
def test_log_mel_is_that_of_transformers(bands):
    extractor = WhisperFeatureExtractor(feature_size=bands)
    waves = [speechlike(20_000), 0.01 * speechlike(31 * 16_000, 1)]  # one shorter and one longer than the window
    expected = extractor([w.numpy() for w in waves], sampling_rate=16_000, return_tensors="pt").input_features
    actual = log_mel(torch.stack([pad_or_trim(w, 480_000) for w in waves]), bands)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from rvq_codec import RVQCodec, RVQCodecConfig
from rvq_codec.codebooks import count_codes, restart_dead_codes, warm_start
from rvq_codec.codec import build_quantizer
from tests.rehearsal.stand_ins import maskgct
from tests.tiny import RVQ

SMALL = RVQCodecConfig(**RVQ | {"ratios": (3, 4, 5), "levels": 4, "vocos_layers": 2})


def wave(samples, batch=1, seed=0):
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def test_released_files(tmp_path):
    folder = tmp_path / "acoustic_codec"
    folder.mkdir()
    codec = maskgct(folder, SMALL)
    for place in (tmp_path, folder):
        again = RVQCodec.from_pretrained(place)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in codec.state_dict().items())
    encoder = load_file(folder / "model.safetensors")
    encoder.popitem()
    save_file(encoder, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor|missing"):
        RVQCodec.from_pretrained(tmp_path)


def test_quantizer_dropout_masks_sum_and_losses():
    torch.manual_seed(0)
    quantizer = build_quantizer(SMALL)
    z = torch.randn(64, 12, 5)
    quantizer.dropout = 1.0
    dropped = quantizer.train()(z)
    quantizer.dropout = 0.0
    kept = quantizer(z)
    assert torch.equal(dropped.codes, kept.codes)  # all levels are still searched
    partial = torch.stack([quantizer.embed(kept.codes, n) for n in (1, 2, 3, 4)])  # (Q, B, C, T): sums of n levels
    match = (partial - dropped.latent).abs().amax((2, 3)) < 1e-5
    assert match.any(0).all() and match.any(1).all()  # every item is one of them, and every n occurs
    assert torch.allclose(dropped.commitment[0], kept.commitment[0])
    assert (dropped.commitment[1:] < kept.commitment[1:]).all()


def test_warm_start_beats_random_books_and_restart_fills_dead_codes():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 12, generator=generator)
    latents = 30 * torch.randn(2000, 6, generator=generator) @ mixing + 100  # far from zero and of large scale
    quantizer = build_quantizer(SMALL).eval()
    z = latents.T[None]

    def error():
        return (quantizer(z).latent - z).square().mean() / latents.var(0).mean()

    before = error()
    warm_start(quantizer, latents, generator)
    assert error() < 0.2 < before
    assert quantizer(z).codebook[0] < 1  # unit scale, whatever the latents' scale
    counts = count_codes(quantizer(z).codes, 16)
    assert (counts > 0).all()
    with torch.no_grad():
        quantizer.quantizers[2].codebook.weight[3] = -quantizer.quantizers[2].codebook.weight[5] * 1e3
    counts[2, 3] = 0
    books = [level.codebook.weight for level in quantizer.quantizers]
    before = [book.clone() for book in books]
    pool = torch.cat([torch.zeros_like(latents[:500]), latents])  # not full yet
    restart_dead_codes(quantizer, torch.zeros_like(pool), counts, seed=7)  # nothing to take codes from
    assert all(map(torch.equal, books, before))
    restart_dead_codes(quantizer, pool, counts, seed=7)
    changed = [(book != old).any(1).nonzero().flatten().tolist() for book, old in zip(books, before)]
    assert changed == [[], [], [3], []]
    assert count_codes(quantizer(z).codes, 16)[2, 3] > 0


def test_codes_are_searched_in_float32_under_autocast():
    """In half precision a good part of the nearest codes would be others."""
    torch.manual_seed(0)
    quantizer = build_quantizer(RVQCodecConfig(latent_channels=32)).eval()
    z = torch.randn(2, 32, 200)
    whole = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        half = quantizer(z)
        codes = quantizer.quantize(z)
    assert torch.equal(half.codes, whole.codes) and torch.equal(codes, whole.codes)
    assert half.latent.dtype == torch.float32
    torch.testing.assert_close(half.latent, whole.latent)

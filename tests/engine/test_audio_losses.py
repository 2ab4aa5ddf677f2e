import pytest
import torch

from engine.nn.audio_losses import (
    CompressedSpectrumLoss,
    DisturbanceLoss,
    MultiResolutionSTFTLoss,
    MultiScaleMelLoss,
)


def test_compressed_spectrum_loss_depends_on_phase_and_level():
    real = 0.1 * torch.randn(1, 4800, generator=torch.Generator().manual_seed(0))
    loss = CompressedSpectrumLoss()
    assert loss(real, real) == 0
    assert 0 < loss(0.9 * real, real) < loss(-real, real)  # the same magnitudes, all phases wrong


def vowel(rate, seconds=1.0):
    """Harmonics of 120 Hz under a spectrum that falls, loud and soft in turn."""
    time = torch.arange(int(seconds * rate)) / rate
    tones = sum(torch.sin(2 * torch.pi * 120 * n * time + n * n) / n for n in range(1, 40))
    return 0.05 * tones * (1.2 + torch.sin(2 * torch.pi * 3 * time))


def test_disturbance_orders_noise_levels_as_pesq_does():
    pesq = pytest.importorskip("pesq").pesq
    real = vowel(16_000, 2.0)
    noise = torch.randn(len(real), generator=torch.Generator().manual_seed(0)) * real.std()
    loss = DisturbanceLoss(16_000)
    drops = []
    scores = []
    for decibels in (5, 15, 25, 35, 60):
        fake = real + noise * 10 ** (-decibels / 20)
        drops.append(float(loss(fake[None], real[None])))
        scores.append(pesq(16_000, real.numpy(), fake.numpy(), "wb"))
    assert sorted(drops, reverse=True) == drops and sorted(scores) == scores
    assert drops[0] > 2 and drops[-1] < 0.2


def test_disturbance_ignores_inaudible_tones_and_the_overall_level():
    real = vowel(24_000)[None, None].repeat(2, 1, 1)
    loss = DisturbanceLoss(24_000)
    assert loss(real, real) < 1e-2
    time = torch.arange(24_000) / 24_000

    def tone(hertz):
        return loss(real + 0.01 * torch.sin(2 * torch.pi * hertz * time), real)

    assert tone(10_000) < 0.05 < tone(3_060)  # over 8 kHz; between two harmonics
    assert torch.isclose(loss(0.1 * 0.7 * real, 0.1 * real), loss(0.7 * real, real))  # levels are relative
    assert torch.isclose(DisturbanceLoss(16_000)(0.5 * vowel(16_000)[None], vowel(16_000)[None]),
                         loss(0.5 * real, real), rtol=0.05)  # fmt: skip


def test_disturbance_covers_the_last_frame():
    real = vowel(16_000, 70 * 0.016)  # 69 frames, in pieces of 20 that start every 10
    fake = real.clone()
    fake[-2000:] += 0.05 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    assert DisturbanceLoss(16_000)(fake[None], real[None]) > 0.1


VOWEL = vowel(24_000)[None]
SILENCE = torch.zeros(1, 24_000)


@pytest.mark.parametrize(
    ("loss", "waves"),
    [
        (MultiScaleMelLoss(24_000, (10, 40), (128, 512)), [VOWEL, SILENCE]),
        (MultiResolutionSTFTLoss(), [VOWEL]),  # its spectral convergence is relative to the real wave
        (DisturbanceLoss(24_000), [VOWEL, SILENCE]),
    ],
)
def test_gradients_are_finite_everywhere(loss, waves):
    for real in waves:
        for start in (real, SILENCE, real + 0.01 * torch.randn_like(real)):
            fake = start.clone().requires_grad_()
            loss(fake, real).backward()
            assert fake.grad.isfinite().all()

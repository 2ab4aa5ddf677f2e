import pytest
import torch
import torchaudio

from engine.nn.audio_losses import (
    MultiResolutionSTFTLoss,
    MultiScaleMelLoss,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    mel_filters,
    warmup_decay_lr,
)
from engine.nn.dac import DACDecoder, DACEncoder, WNConv1d, WNConvTranspose1d
from engine.nn.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator


@pytest.mark.parametrize("rate, n_fft, n_mels", [(16_000, 400, 80), (24_000, 2048, 320)])
def test_mel_filters_equal_torchaudio(rate, n_fft, n_mels):
    theirs = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, 0.0, rate / 2, n_mels, rate, norm="slaney", mel_scale="slaney"
    )
    torch.testing.assert_close(mel_filters(rate, n_fft, n_mels), theirs, atol=2e-6, rtol=0)


def test_spectral_losses_vanish_only_for_equal_waves():
    generator = torch.Generator().manual_seed(0)
    real = 0.1 * torch.randn(2, 1, 4800, generator=generator)
    fake = (real + 0.05 * torch.randn(2, 1, 4800, generator=generator)).requires_grad_()
    for loss in (MultiScaleMelLoss(24_000, (10, 40), (128, 512)), MultiResolutionSTFTLoss(((512, 128, 512),))):
        assert loss(real, real) == 0
        value = loss(fake, real)
        value.backward()
        assert value > 0.1 and fake.grad.isfinite().all()
        assert torch.isclose(loss(fake[:, 0], real[:, 0]), value)  # (B, N) and (B, 1, N)


def test_mel_loss_of_a_gain_is_its_logarithm():
    real = torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0))
    loss = MultiScaleMelLoss(24_000, (20, 40), (256, 1024))
    assert loss(10 * real, real).item() == pytest.approx(2.0, rel=1e-4)  # one decade at each of two scales


def test_gradients_are_finite_on_silence():
    fake = torch.zeros(1, 1, 4800, requires_grad=True)
    loss = MultiScaleMelLoss(24_000, (10, 40), (128, 512))(fake, torch.zeros(1, 1, 4800))
    (loss + MultiResolutionSTFTLoss(((512, 128, 512),))(fake, torch.randn(1, 1, 4800))).backward()
    assert fake.grad.isfinite().all()


def test_gan_losses():
    real = [[torch.ones(2, 3), torch.full((2, 4), 1.0)], [torch.zeros(1), torch.zeros(2, 2)]]
    fake = [[torch.zeros(2, 3), torch.zeros(2, 4)], [torch.full((1,), 0.5), torch.full((2, 2), 0.5)]]
    assert [float(x) for x in discriminator_loss(real, fake)] == [1.0, 0.25]
    assert float(generator_loss(fake)) == 1.25
    assert float(feature_matching_loss(real, fake)) == 1.5  # logits do not count


def test_learning_rate_schedule():
    assert warmup_decay_lr(0) == pytest.approx(1e-5)
    assert warmup_decay_lr(3000) == pytest.approx(1e-4)
    assert warmup_decay_lr(203_000) == pytest.approx(6e-5)
    assert warmup_decay_lr(10**7) == pytest.approx(2e-5)


@pytest.mark.parametrize("kind, arguments", [(WNConv1d, {}), (WNConvTranspose1d, {"output_padding": 1})])
def test_weight_norm_equals_torch(kind, arguments):
    torch.manual_seed(0)
    ours = kind(3, 5, 4, stride=2, padding=1, **arguments)
    with torch.no_grad():
        ours.weight_g.mul_(1.3)
    theirs = kind.__mro__[2](3, 5, 4, stride=2, padding=1, **arguments)
    theirs = torch.nn.utils.parametrizations.weight_norm(theirs)
    assert ours.weight_g.shape == ((5, 1, 1) if kind is WNConv1d else (3, 1, 1))
    weight = theirs.parametrizations.weight
    with torch.no_grad():
        weight.original0.copy_(ours.weight_g)
        weight.original1.copy_(ours.weight_v)
        theirs.bias.copy_(ours.bias)
    x = torch.randn(2, 3, 11)
    torch.testing.assert_close(ours(x), theirs(x))


def test_decoder_mirrors_encoder_lengths():
    decoder = DACDecoder(6, 16, (5, 2, 3))
    assert decoder(torch.randn(1, 6, 7)).shape == (1, 1, 7 * 30)
    encoder = DACEncoder(2, (3, 2, 5), 6, tanh=True)
    for samples in range(encoder.min_samples, encoder.min_samples + 40):
        assert encoder(torch.zeros(1, 1, samples)).shape[-1] == encoder.frames(samples) > 0
    assert encoder.frames(encoder.min_samples - 1) == 0
    assert encoder(10 * torch.randn(1, 1, 300)).abs().max() < 1


def test_discriminators_take_any_length():
    for discriminator in (
        MultiPeriodDiscriminator((2, 3), channels=2, max_channels=4),
        MultiResolutionDiscriminator((64, 100), channels=2, max_channels=4),
    ):
        for samples in (600, 601):
            results = discriminator(torch.randn(2, 1, samples))
            assert [len(maps) for maps in results] == [6, 6]
            assert all(maps[-1].shape[0] == 2 for maps in results)

"""Speech features on which a codec's latent is pre-trained before its decoder: spectral envelope and low-band waveform.

An autoencoder with a Vocos decoder trains slowly from scratch: until the latent is informative, the decoder ignores it,
and phases stay constant. Regressing these features trains an encoder in minutes, while the decoder is trained on the
features. Log-mel bands alone are not enough: with the true magnitudes but constant phases PESQ stays under 1.9, with
true phases below 1 kHz it is 2.7.

Axes: B batch, N samples, M mel bands, S low-band samples of a frame, T frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.nn.mel import mel_filters

WINDOW = 1024
CUTOFF = 850.0  # of the low band in Hz


class CumulativeNorm(nn.BatchNorm1d):
    """`BatchNorm1d(channels, affine=False, momentum=None)`, whose statistics are averages over all batches so far.

    PyTorch's implementation reads the number of batches on the host, which requires a device sync.
    """

    def __init__(self, channels: int):
        super().__init__(channels, affine=False, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = self.running_mean.clone()
        var = self.running_var.clone()
        y = F.batch_norm(x, mean, var, training=True, momentum=1.0, eps=self.eps)  # they become those of the batch
        fraction = self.num_batches_tracked.add_(1).double().reciprocal()
        for average, of_batch in ((self.running_mean, mean), (self.running_var, var)):
            average.copy_((1 - fraction) * average + fraction * of_batch)
        return y


class SpeechFeatures(nn.Module):
    """Computes features (B, M + S, N / hop) of waveforms (B, 1, N): standardised log-mel bands, and the waveform below
    850 Hz.

    Frame t describes the samples hop * t .. hop * (t + 1): the mel window is centred in it, and the S low-band samples
    are spaced evenly over it, divided by the band's level in three frames.

    Args:
        mel_bands, low_samples: M and S; S must divide the hop.
        sample_rate, hop: sampling rate and hop of the codec.
    """

    def __init__(self, mel_bands: int, low_samples: int, sample_rate: int, hop: int):
        super().__init__()
        assert hop % low_samples == 0, "low-band samples are evenly spaced"
        self.mel_bands = mel_bands
        self.low_samples = low_samples
        self.hop = hop
        self.stride = hop // low_samples
        half = 20 * self.stride
        t = torch.arange(-half, half) + 0.5
        taps = 2 * CUTOFF / sample_rate * torch.sinc(2 * CUTOFF / sample_rate * t)
        taps = taps * (0.5 + 0.5 * torch.cos(math.pi * t / half))
        self.register_buffer("taps", taps[None, None], persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(sample_rate, WINDOW, mel_bands), persistent=False)
        self.standardise = CumulativeNorm(mel_bands)

    def forward(self, wave: Tensor) -> Tensor:
        return torch.cat([self.standardise(self._log_mel(wave[:, 0])), self._low_band(wave)], 1)

    def _log_mel(self, wave: Tensor) -> Tensor:
        frames = wave.shape[-1] // self.hop
        padded = F.pad(wave, ((WINDOW - self.hop) // 2, WINDOW // 2))
        spectrum = torch.fft.rfft(padded.unfold(-1, WINDOW, self.hop)[:, :frames] * self.window)
        return (spectrum.abs() @ self.filters).clamp_min(1e-4).log10().transpose(1, 2)

    def _low_band(self, wave: Tensor) -> Tensor:
        frames = wave.shape[-1] // self.hop
        half = self.taps.shape[-1] // 2
        # Sample j of a frame is centred at stride * (j + 1/2).
        low = F.conv1d(F.pad(wave, (half - self.stride // 2, half)), self.taps, stride=self.stride)
        low = low[:, 0, : frames * self.low_samples].unflatten(1, (frames, self.low_samples))
        power = low.square().mean(-1)[:, None]
        level = F.avg_pool1d(F.pad(power, (1, 1), mode="replicate"), 3, 1)[:, 0].sqrt()
        return (low / (level[..., None] + 2e-3)).transpose(1, 2)

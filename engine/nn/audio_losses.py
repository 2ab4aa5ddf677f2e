"""Losses of waveform generators: multi-scale mel, STFT, compressed complex spectrum, loudness,
least-squares GAN, feature matching.

Axes: B batch, N samples, F frequency bins, M mel bands, T frames. Waveforms are (B, N) or (B, 1, N). Logarithms are
computed in the precision of the buffers (float32), also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.nn.mel import mel_filters


def _flat(wave: Tensor) -> Tensor:
    return wave.squeeze(1) if wave.ndim == 3 else wave


def _magnitude(wave: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """Compute the STFT magnitude (B, F, T), centred and reflect-padded. Powers are clamped from below to keep gradients
    finite.
    """
    spectrum = torch.stft(_flat(wave).to(window.dtype), n_fft, hop, window.numel(), window, return_complex=True)
    return torch.view_as_real(spectrum).square().sum(-1).clamp_min(1e-20).sqrt()


class MelSpectrogram(nn.Module):
    """Mel spectrogram with Slaney bands on the STFT magnitude: (B, N) -> (B, M, T). The hop is a quarter of the
    window.
    """

    def __init__(self, sample_rate: int, n_mels: int, window: int):
        super().__init__()
        self.n_fft = window
        self.hop = window // 4
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", mel_filters(sample_rate, window, n_mels), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        return self.filters.T @ _magnitude(wave, self.n_fft, self.hop, self.window)


class MultiScaleMelLoss(nn.Module):
    """Sum over resolutions of the mean |log10 mel(fake) - log10 mel(real)| (DAC, Kumar et al., 2023, section 3.4).

    Args:
        sample_rate: sampling rate of both waveforms.
        n_mels, windows: number of bands and window length of each resolution. The hop is a quarter of the window.
        clamp: minimum mel magnitude before the logarithm.
    """

    def __init__(
        self,
        sample_rate: int,
        n_mels: Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
        windows: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
        clamp: float = 1e-5,
    ):
        super().__init__()
        if len(n_mels) != len(windows):
            raise UserError(
                f"mel.n_mels={list(n_mels)} and mel.windows={list(windows)}: both must have the same length"
            )
        self.clamp = clamp
        self.scales = nn.ModuleList(MelSpectrogram(sample_rate, m, w) for m, w in zip(n_mels, windows))

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.autocast(fake.device.type, enabled=False):
            total = fake.new_zeros((), dtype=torch.float32)
            for scale in self.scales:
                with torch.no_grad():
                    target = scale(real).clamp_min(self.clamp).log10()
                total = total + (scale(fake).clamp_min(self.clamp).log10() - target).abs().mean()
        return total


class MultiResolutionSTFTLoss(nn.Module):
    """Spectral convergence plus mean log-magnitude distance, averaged over resolutions (Yamamoto et al., 2020).

    Args:
        resolutions: (n_fft, hop, window) of each resolution.
    """

    def __init__(self, resolutions: Sequence[Sequence[int]] = ((512, 128, 512), (2048, 512, 2048))):
        super().__init__()
        self.resolutions = [tuple(r) for r in resolutions]
        for i, (_, _, window) in enumerate(self.resolutions):
            self.register_buffer(f"window_{i}", torch.hann_window(window), persistent=False)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.autocast(fake.device.type, enabled=False):
            total = fake.new_zeros((), dtype=torch.float32)
            for i, (n_fft, hop, _) in enumerate(self.resolutions):
                window = getattr(self, f"window_{i}")
                with torch.no_grad():
                    target = _magnitude(real, n_fft, hop, window)
                output = _magnitude(fake, n_fft, hop, window)
                convergence = torch.linalg.vector_norm(target - output) / torch.linalg.vector_norm(target)
                total = total + convergence + ((output + 1e-7).log() - (target + 1e-7).log()).abs().mean()
        return total / len(self.resolutions)


class CompressedSpectrumLoss(nn.Module):
    """Mean squared error of STFTs with power-law compressed magnitudes, with and without phase.

    mean |A^c e^(i a) - B^c e^(i b)|^2 + mean (A^c - B^c)^2 (Braun & Tashev, 2021, whose c is 0.3; equal weights here).
    Compression increases the weight of quiet bands, so that phases are learned beyond the loudest harmonics. The hop is
    a quarter of the window.
    """

    power = 0.3  # c

    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(512), persistent=False)

    def _compressed(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Return (A^c, A^c e^(i a)), both (B, F, T)."""
        n_fft = len(self.window)
        window = self.window
        spectrum = torch.stft(_flat(wave).to(window.dtype), n_fft, n_fft // 4, window=window, return_complex=True)
        # The floor bounds the gradient for silence, where A^(c - 1) diverges.
        energy = torch.view_as_real(spectrum).square().sum(-1) + 1e-8
        return energy ** (self.power / 2), spectrum * energy ** ((self.power - 1) / 2)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.autocast(fake.device.type, enabled=False):
            with torch.no_grad():
                target_size, target = self._compressed(real)
            size, output = self._compressed(fake)
            distance = torch.view_as_real(output - target).square().sum(-1)
            return distance.mean() + (size - target_size).square().mean()


class DisturbanceLoss(nn.Module):
    """Difference in perceived loudness between two waveforms, weighted as in PESQ (ITU-T P.862, section 10.2).

    Bark spectra of both are converted to sones by Zwicker's law. Their difference is reduced by a quarter of the softer
    one; the asymmetric part only counts components added by the fake. Power means of order 3 (symmetric) and 1
    (asymmetric) are taken over bands, of order 6 over 0.3 s, and of order 2 over the waveform. First used as a loss by
    Martin-Donas et al. (2018). Omitted: time alignment, compensation of gain and filtering (level differences therefore
    count), the input filter, and the steeper loudness law below 4 Bark. The reference program uses the power mean of
    order 2 over bands, which is smaller.

    Returns approximately the drop of PESQ's raw score from 4.5: 0.1 symmetric + 0.0309 asymmetric disturbance, averaged
    over waveforms.

    Args:
        sample_rate: sampling rate of both waveforms, at least 16 kHz.
    """

    bands = 49  # Bark bands of equal width up to 8 kHz
    power = 10 ** (80 / 10)  # playback level of the real waveform: 80 dB SPL between 350 and 3,250 Hz

    def __init__(self, sample_rate: int):
        super().__init__()
        self.frame = round(0.032 * sample_rate)
        bins = torch.arange(self.frame // 2 + 1, dtype=torch.float64) * (sample_rate / self.frame)
        bark = 26.81 * bins / (1960 + bins) - 0.53  # Traunmueller (1990)
        top = 26.81 * 8000 / (1960 + 8000) - 0.53
        inside = (bins > 0) & (bins <= 8000)
        band = ((bark + 0.53) / (top + 0.53) * self.bands).long().clamp_max(self.bands - 1)
        filters = torch.nn.functional.one_hot(band, self.bands) * inside[:, None]
        filters = filters[:, filters.sum(0) > 0].double()  # the lowest bands are narrower than an FFT bin
        centre = (filters * bins[:, None]).sum(0) / filters.sum(0) / 1000
        # Threshold of hearing in decibels (Terhardt, 1979)
        quiet = 3.64 * centre**-0.8 - 6.5 * torch.exp(-0.6 * (centre - 3.3) ** 2) + 1e-3 * centre**4
        self.width = (top + 0.53) / self.bands
        self.register_buffer("window", torch.hann_window(self.frame), persistent=False)
        self.register_buffer("filters", filters.float(), persistent=False)
        self.register_buffer("speech", ((centre > 0.35) & (centre < 3.25)).float(), persistent=False)
        self.register_buffer("quiet", (10 ** (quiet / 10)).float(), persistent=False)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.autocast(fake.device.type, enabled=False):
            # (B, T, bands)
            real = self._powers(real)
            fake = self._powers(fake)
            gain = self.power / (real @ self.speech).mean(1).clamp_min(1e-6)
            real = real * gain[:, None, None]
            fake = fake * gain[:, None, None]
            output = self._sones(fake)
            target = self._sones(real)
            distance = ((output - target).abs() - 0.25 * torch.minimum(output, target)).clamp_min(0) * self.width
            added = ((fake + 50) / (real + 50)) ** 1.2
            added = torch.where(added < 3, 0, added.clamp_max(12))
            whole = self.width * distance.shape[-1]
            # A power mean has no gradient at 0; 1e-4 is a hundredth of an audible difference.
            symmetric = ((distance**3).sum(-1) / whole + 1e-12) ** (1 / 3) * whole
            asymmetric = (distance * added).sum(-1)
            weight = ((real.sum(-1) + 1e5) / 1e7) ** 0.04  # soft frames have a slightly higher weight
            return sum(
                factor * self._over_time((frames / weight).clamp_max(45)).mean()
                for factor, frames in ((0.1, symmetric), (0.0309, asymmetric))
            )

    def _powers(self, wave: Tensor) -> Tensor:
        """Return the power in each band, (B, T, bands)."""
        wave = _flat(wave).to(self.window.dtype)
        spectrum = torch.stft(wave, self.frame, self.frame // 2, window=self.window, center=False, return_complex=True)
        return torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2) @ self.filters

    def _sones(self, power: Tensor) -> Tensor:
        """Return the loudness density of bands (Zwicker): 0 below the threshold of hearing, then a power law of
        exponent 0.23.
        """
        return 0.1866 * (2 * self.quiet) ** 0.23 * ((0.5 + 0.5 * power / self.quiet) ** 0.23 - 1).clamp_min(0)

    @staticmethod
    def _over_time(frames: Tensor) -> Tensor:
        """Average (B, T) to (B,): power mean of order 6 over half-overlapping windows of 20 frames, then of order 2."""
        rest = max(20 - frames.shape[1], -frames.shape[1] % 10)  # the last window is padded with zeros
        frames = torch.nn.functional.pad(frames, (0, rest))
        pieces = torch.nn.functional.avg_pool1d((frames[:, None] + 1e-4) ** 6, 20, 10) ** (1 / 6)
        return pieces.square().mean((1, 2)).sqrt()


def discriminator_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the least-squares discriminator losses on real and on fake inputs, summed over sub-discriminators (Mao et
    al., 2017).

    `real` and `fake` are the outputs of the discriminator: feature maps, followed by the logits.
    """
    return (
        sum((maps[-1].float() - 1).square().mean() for maps in real),
        sum(maps[-1].float().square().mean() for maps in fake),
    )


def generator_loss(fake: list[list[Tensor]]) -> Tensor:
    """Return the least-squares GAN loss of the generator, summed over sub-discriminators."""
    return sum((maps[-1].float() - 1).square().mean() for maps in fake)


def feature_matching_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """Return the mean |real - fake| of every feature map (logits excluded), summed over maps and sub-discriminators."""
    return sum(
        (a.detach() - b).abs().float().mean()
        for of_real, of_fake in zip(real, fake, strict=True)
        for a, b in zip(of_real[:-1], of_fake[:-1], strict=True)
    )

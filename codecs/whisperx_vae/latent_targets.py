"""Speech features on which a latent is pre-trained before its decoder: spectral envelope, voicing and pitch of 40 ms.

An autoencoder of waveforms trains slowly from scratch: the decoder cannot use an uninformative latent, so that the
encoder receives no useful gradient. Regressing these features trains an encoder in minutes, while the decoder is
trained on the features. They do not contain the phases of glottal pulses, which cannot be predicted from text and are
not needed by a recogniser.

Axes: B batch, N samples, T latent frames, S sub-frames of a latent frame, M mel bands, K lags, Z latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.nn.mel import mel_filters

SUBFRAMES = 2
MEL_WINDOW = 1024
PITCH_WINDOW = 1536
# Hz, of the pitch
LOWEST = 60.0
HIGHEST = 400.0
PITCH_BAND = 1000.0  # cut-off frequency of the pitch estimation in Hz


class LatentTargets(nn.Module):
    """Computes targets (B, Z, N / hop) of waveforms (B, 1, N): principal components of S log-mel frames, and voicing
    and pitch of each frame, standardised over the clips of `fit`.

    Pitch is log2 of the frequency over 150 Hz times voicing, so that it fades to 0 where there is none.

    Args:
        channels: Z; 2 S of them are voicing and pitch.
        sample_rate, hop: sampling rate in Hz and hop in samples of the codec.
        mel_bands: M.
    """

    def __init__(self, channels: int, sample_rate: int, hop: int, mel_bands: int = 64):
        super().__init__()
        assert hop % SUBFRAMES == 0 and channels > 2 * SUBFRAMES
        self.sample_rate = sample_rate
        self.step = hop // SUBFRAMES
        self.axes_count = channels - 2 * SUBFRAMES
        self.shortest = round(sample_rate / HIGHEST)
        self.longest = round(sample_rate / LOWEST)
        self.register_buffer("filters", mel_filters(sample_rate, MEL_WINDOW, mel_bands), persistent=False)
        self.register_buffer("mel_window", torch.hann_window(MEL_WINDOW), persistent=False)
        self.register_buffer("pitch_window", torch.hann_window(PITCH_WINDOW), persistent=False)
        spectrum = torch.fft.rfft(self.pitch_window, 2 * PITCH_WINDOW).abs().square()
        self.register_buffer("window_correlation", torch.fft.irfft(spectrum)[: self.longest + 1], persistent=False)
        self.register_buffer("mel_mean", torch.zeros(SUBFRAMES * mel_bands))
        self.register_buffer("mel_axes", torch.zeros(self.axes_count, SUBFRAMES * mel_bands))
        self.register_buffer("source_mean", torch.zeros(2 * SUBFRAMES))
        self.register_buffer("source_scale", torch.ones(2 * SUBFRAMES))

    @torch.no_grad()
    def fit(self, waves: Sequence[Tensor]) -> LatentTargets:
        """Estimate means, principal axes and scales from waveforms (N,)."""
        mel = torch.cat([self._log_mel(wave[None])[0] for wave in waves])
        source = torch.cat([self._source(wave[None])[0] for wave in waves])
        self.mel_mean.copy_(mel.mean(0))
        centred = (mel - self.mel_mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        values = values.flip(0)[: self.axes_count]
        vectors = vectors.flip(1)[:, : self.axes_count]
        vectors = vectors * vectors.sum(0).sign()  # an eigenvector's sign is arbitrary
        self.mel_axes.copy_((vectors / values.sqrt()).T)
        self.source_mean.copy_(source.mean(0))
        self.source_scale.copy_(source.std(0))
        return self

    @torch.no_grad()
    def forward(self, wave: Tensor) -> Tensor:
        with torch.autocast(wave.device.type, enabled=False):
            wave = wave[:, 0].float()
            envelope = (self._log_mel(wave) - self.mel_mean) @ self.mel_axes.T
            source = (self._source(wave) - self.source_mean) / self.source_scale
            return torch.cat([envelope, source], -1).transpose(1, 2)

    def _frames(self, wave: Tensor, window: Tensor) -> Tensor:
        """Return windows (B, S T, len(window)) of (B, N), centred in the sub-frames."""
        size = len(window)
        count = wave.shape[-1] // (SUBFRAMES * self.step) * SUBFRAMES
        padded = F.pad(wave, ((size - self.step) // 2, size))
        return padded.unfold(-1, size, self.step)[:, :count] * window

    def _log_mel(self, wave: Tensor) -> Tensor:
        """Map (B, N) -> (B, T, S M)."""
        mel = torch.fft.rfft(self._frames(wave, self.mel_window)).abs() @ self.filters
        return mel.clamp_min(1e-4).log10().unflatten(1, (-1, SUBFRAMES)).flatten(2)

    def _source(self, wave: Tensor) -> Tensor:
        """Map (B, N) -> (B, T, 2 S): voicing 0..1, then pitch, by the autocorrelation of each sub-frame."""
        power = torch.fft.rfft(self._frames(wave, self.pitch_window), 2 * PITCH_WINDOW).abs().square()
        power[..., math.ceil(PITCH_BAND / self.sample_rate * 2 * PITCH_WINDOW) :] = 0
        correlation = torch.fft.irfft(power)[..., : self.longest + 1] / self.window_correlation
        correlation = correlation[..., self.shortest :] / (correlation[..., :1] + 1e-4)
        # The correlation at twice the period is nearly as high: a slight slope prefers the shorter lag.
        slope = 1 - 5e-4 * torch.arange(correlation.shape[-1], device=wave.device)
        peak, lag = (correlation * slope).max(-1)
        voicing = torch.sigmoid(12 * (peak - 0.5))
        pitch = voicing * (self.sample_rate / (lag + self.shortest) / 150).log2()
        return torch.cat([x.unflatten(1, (-1, SUBFRAMES)) for x in (voicing, pitch)], -1)

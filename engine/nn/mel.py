"""Mel filter banks and Whisper's log-mel front end: batched, on any device, equal to transformers'
`WhisperFeatureExtractor`.

Axes: B batch, N samples at 16 kHz, M mel bands, T frames (100 per second), F frequency bins.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from engine.device import to_device

RATE = 16_000
N_FFT = 400
HOP = 160


def mel_filters(rate: int, n_fft: int, bands: int) -> Tensor:
    """Return Slaney mel filters (F, M) of unit area, from 0 Hz to half of `rate`, where F = n_fft // 2 + 1."""
    filters = mel_filter_bank(n_fft // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


_whisper_filters = lru_cache(maxsize=4)(partial(mel_filters, RATE, N_FFT))


def pad_or_trim(wave: Tensor, samples: int) -> Tensor:
    """Trim (..., N) to (..., samples), or zero-pad it at the end."""
    return F.pad(wave[..., :samples], (0, max(0, samples - wave.shape[-1])))


def log_mel(wave: Tensor, bands: int = 128) -> Tensor:
    """Compute log-mel spectrograms (B, M, T) or (M, T) of 16-kHz waveforms (B, N) or (N,), where T = N // 160. N must
    exceed 200.

    Base-10 logarithms of the mel power are clipped to 8 below the maximum of the item and scaled by (x + 4) / 4. The
    features of an item do not depend on the rest of the batch.
    """
    levels = mel_levels(wave, bands)
    return (torch.maximum(levels, levels.amax((-2, -1), keepdim=True) - 8) + 4) / 4


def mel_levels(wave: Tensor, bands: int) -> Tensor:
    """Return base-10 logarithms of the mel power, with shapes as in `log_mel`."""
    window = torch.hann_window(N_FFT, device=wave.device)
    with torch.autocast(wave.device.type, enabled=False):
        spectrum = torch.stft(wave.float(), N_FFT, HOP, window=window, return_complex=True)
        power = spectrum[..., :-1].abs().square()
        return (to_device(_whisper_filters(bands), wave.device).T @ power).clamp(min=1e-10).log10()

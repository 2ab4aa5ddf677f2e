"""Whisper's log-mel front end in PyTorch: batched, on any device, equal to transformers' `WhisperFeatureExtractor`.

Axes: B batch, N samples at 16 kHz, M mel bands, F frames (100 a second).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

RATE = 16_000
N_FFT, HOP = 400, 160


@lru_cache(maxsize=4)
def mel_filters(bands: int) -> Tensor:
    """(M, 201) triangles on the Slaney mel scale from 0 to 8000 Hz, each of unit area."""
    filters = mel_filter_bank(1 + N_FFT // 2, bands, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T).float()


def pad_or_trim(wave: Tensor, samples: int) -> Tensor:
    """(..., N) -> (..., samples): cut, or filled with zeros at the end."""
    return F.pad(wave[..., :samples], (0, max(0, samples - wave.shape[-1])))


def log_mel(wave: Tensor, bands: int = 128, shared_peak: bool = False) -> Tensor:
    """16-kHz waves (B, N) or (N,) -> (B, M, F) or (M, F) with F = N // 160; N must exceed 200.

    Base-10 logarithms of the mel power, clipped to 8 below their peak, then (x + 4) / 4.

    Args:
        shared_peak: take one peak over the batch, as openai-whisper does (it encodes items one by one); else each item
            has its own, so that an item's features do not depend on the others.
    """
    window = torch.hann_window(N_FFT, device=wave.device)
    with torch.autocast(wave.device.type, enabled=False):
        spectrum = torch.stft(wave.float(), N_FFT, HOP, window=window, return_complex=True)
        power = spectrum[..., :-1].abs().square()
        levels = (mel_filters(bands).to(wave.device) @ power).clamp(min=1e-10).log10()
        peak = levels.amax() if shared_peak else levels.amax((-2, -1), keepdim=True)
        return (torch.maximum(levels, peak - 8) + 4) / 4

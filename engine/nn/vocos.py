"""Vocos decoder (Siuzdak, 2023): ConvNeXt blocks at the frame rate, then one inverse STFT.

Axes: B batch, C channels, T frames, F = n_fft / 2 + 1 frequency bins, N = T * hop samples. Parameter names are those of
the released checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block: depthwise convolution (kernel 7), LayerNorm, two linear layers with GELU, a learned scale, and a
    residual connection. (B, C, T) -> (B, C, T).
    """

    def __init__(self, dim: int, intermediate: int, scale: float):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, intermediate)
        self.pwconv2 = nn.Linear(intermediate, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.dwconv(x).transpose(1, 2))
        h = self.pwconv2(F.gelu(self.pwconv1(h)))
        return x + (self.gamma * h).transpose(1, 2)


class VocosBackbone(nn.Module):
    """ConvNeXt backbone: (B, in_channels, T) -> (B, T, C)."""

    def __init__(self, in_channels: int, dim: int, intermediate: int, layers: int):
        super().__init__()
        self.embed = nn.Conv1d(in_channels, dim, 7, padding=3)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXtBlock(dim, intermediate, 1 / layers) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x)
        return self.final_layer_norm(x.transpose(1, 2))


class ISTFTHead(nn.Module):
    """Predicts log-magnitude and phase of every frequency bin and applies the inverse STFT. (B, T, C) -> (B, T * hop).

    Frames are overlap-added with a periodic Hann window. (n_fft - hop) / 2 samples are trimmed from both ends of the
    sum and of the window envelope, by which the sum is divided.
    """

    def __init__(self, dim: int, n_fft: int, hop: int):
        super().__init__()
        self.n_fft = n_fft
        self.hop = hop
        self.out = nn.Linear(dim, n_fft + 2)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """Overlap-add frames (B, n_fft, T) -> (B, T * hop)."""
        length = (frames.shape[-1] - 1) * self.hop + self.n_fft
        wave = F.fold(frames, (1, length), (1, self.n_fft), stride=(1, self.hop))[:, 0, 0]
        cut = (self.n_fft - self.hop) // 2
        return wave[:, cut : length - cut]

    def forward(self, x: Tensor) -> Tensor:
        magnitude, phase = self.out(x).to(self.window.dtype).transpose(1, 2).chunk(2, dim=1)
        # Magnitudes of a waveform in [-1, 1] do not exceed 100; the limit prevents overflow of exp early in training.
        magnitude = magnitude.exp().clamp_max(100)
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())  # (B, F, T)
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * self.window[:, None]
        envelope = self.window.square()[None, :, None].expand(1, -1, frames.shape[-1])
        return self._overlap_add(frames) / self._overlap_add(envelope)


class VocosDecoder(nn.Module):
    """Vocos decoder: (B, in_channels, T) -> (B, 1, T * hop), not clamped.

    Args:
        in_channels: channels of a frame.
        dim, intermediate, layers: width, inner width and number of ConvNeXt blocks.
        n_fft, hop: window and hop of the inverse STFT in samples, both even; `n_fft` must be larger.

    Raises:
        UserError: If `n_fft` and `hop` do not fit.
    """

    def __init__(self, in_channels: int, dim: int, intermediate: int, layers: int, n_fft: int, hop: int):
        super().__init__()
        if n_fft % 2 or hop % 2 or n_fft <= hop:
            raise UserError(f"n_fft={n_fft} and the Vocos decoder's hop of {hop} must be even, and n_fft larger")
        self.backbone = VocosBackbone(in_channels, dim, intermediate, layers)
        self.head = ISTFTHead(dim, n_fft, hop)
        # Receptive field to each side, in frames: convolutions over seven frames, and overlapping windows.
        self.reach = 3 * (layers + 1) + math.ceil((n_fft - hop) / 2 / hop)
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # Phases of pi k centre the energy of a frame. With the published initial phase 0 it is at the edge, where the
        # window vanishes, so that training starts with silence.
        bins = torch.arange(n_fft // 2 + 1)
        self.head.out.bias.data[n_fft // 2 + 1 :] = math.pi * (bins % 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).unsqueeze(1)

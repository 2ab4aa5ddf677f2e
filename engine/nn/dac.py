"""Convolutional waveform encoder and decoder of the Descript Audio Codec (Kumar et al., 2023), with upstream parameter
names.

Axes: B batch, C channels, N samples, T frames. Encoder (B, 1, N) -> (B, C, T), decoder (B, C, T) -> (B, 1, T * hop).
All padding is zero padding. Parameter names (`weight_g`, `weight_v`, `alpha`, `block.i`, `model.i`) are those of the
released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _WeightNorm:
    """Weight normalisation (Salimans & Kingma, 2016) over all axes except axis 0, with parameters `weight_g` and
    `weight_v`.

    Axis 0 of a transposed convolution is its *input* channel, as in the released files. Weights use PyTorch's default
    initialisation; biases are zero.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        weight = self.weight.detach()
        del self.weight
        self.weight_g = nn.Parameter(self._norm(weight))
        self.weight_v = nn.Parameter(weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @staticmethod
    def _norm(weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)

    def normed_weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self._norm(self.weight_v))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normed_weight(), self.bias)


class WNConv1d(_WeightNorm, nn.Conv1d):
    """Weight-normed `nn.Conv1d`."""


class WNConv2d(_WeightNorm, nn.Conv2d):
    """Weight-normed `nn.Conv2d`."""


class WNConvTranspose1d(_WeightNorm, nn.ConvTranspose1d):
    """Weight-normed `nn.ConvTranspose1d`; the norm is taken per *input* channel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(x, self.normed_weight(), self.bias, self.stride, self.padding, self.output_padding)


class Snake(nn.Module):
    """Snake activation x + sin(alpha x)^2 / (alpha + 1e-9), with one slope per channel (Ziyin et al., 2020). (B, C, T)
    -> (B, C, T).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() * (self.alpha + 1e-9).reciprocal()


class ResidualUnit(nn.Module):
    """Residual unit: Snake, dilated convolution (kernel 7), Snake, pointwise convolution. (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels),
            WNConv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            WNConv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class DownBlock(nn.Module):
    """Three residual units and a strided convolution. (B, in, T) -> (B, out, `down_length(T, stride)`)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.block = nn.Sequential(
            *(ResidualUnit(in_channels, dilation) for dilation in (1, 3, 9)),
            Snake(in_channels),
            WNConv1d(in_channels, out_channels, 2 * stride, stride=stride, padding=math.ceil(stride / 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class UpBlock(nn.Module):
    """A transposed convolution and three residual units. (B, in, T) -> (B, out, T * stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        steps = {"stride": stride, "padding": math.ceil(stride / 2), "output_padding": stride % 2}
        self.block = nn.Sequential(
            Snake(in_channels),
            WNConvTranspose1d(in_channels, out_channels, 2 * stride, **steps),
            *(ResidualUnit(out_channels, dilation) for dilation in (1, 3, 9)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def down_length(length: int, stride: int) -> int:
    """Return the number of output frames of a down block: floor(length / s) for even s, floor((length + 1) / s) for odd
    s.
    """
    return max(0, (length + 2 * math.ceil(stride / 2) - 2 * stride) // stride + 1)


class DACEncoder(nn.Module):
    """Encodes a waveform as frames: convolution (kernel 7), one down block per ratio (the width doubles), Snake,
    convolution (kernel 3), optional tanh.

    Args:
        width: channels after the first conv; stage i has width * 2^i.
        ratios: strides of the down blocks, first to last; their product is the hop.
        out_channels: channels per frame.
        tanh: bound the output to (-1, 1).
    """

    def __init__(self, width: int, ratios: Sequence[int], out_channels: int, tanh: bool = False):
        super().__init__()
        self.ratios = tuple(ratios)
        layers: list[nn.Module] = [WNConv1d(1, width, 7, padding=3)]
        for ratio in self.ratios:
            layers.append(DownBlock(width, 2 * width, ratio))
            width *= 2
        layers += [Snake(width), WNConv1d(width, out_channels, 3, padding=1)]
        if tanh:
            layers.append(nn.Tanh())
        self.block = nn.Sequential(*layers)

    def frames(self, samples: int) -> int:
        """Return the number of frames of a waveform of `samples` samples. Nothing is padded to a multiple of
        the hop.
        """
        for ratio in self.ratios:
            samples = down_length(samples, ratio)
        return samples

    @property
    def min_samples(self) -> int:
        """The shortest waveform that yields a frame, in samples."""
        length = 1
        for ratio in reversed(self.ratios):
            length = (length - 1) * ratio + 2 * ratio - 2 * math.ceil(ratio / 2)
        return max(1, length)

    def forward(self, wave: Tensor) -> Tensor:
        """Map (B, 1, N) -> (B, out_channels, frames(N))."""
        return self.block(wave)


class DACDecoder(nn.Module):
    """Decodes frames to a waveform: convolution (kernel 7), one up block per ratio (the width halves), Snake,
    convolution (kernel 7), tanh.

    Args:
        in_channels: channels per frame.
        width: channels after the first conv; stage i has width / 2^i.
        ratios: strides of the up blocks; their product is the hop.
    """

    def __init__(self, in_channels: int, width: int, ratios: Sequence[int]):
        super().__init__()
        self.ratios = tuple(ratios)
        layers: list[nn.Module] = [WNConv1d(in_channels, width, 7, padding=3)]
        for i, ratio in enumerate(self.ratios):
            layers.append(UpBlock(width // 2**i, width // 2 ** (i + 1), ratio))
        last = width // 2 ** len(self.ratios)
        layers += [Snake(last), WNConv1d(last, 1, 7, padding=3), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    @property
    def reach(self) -> tuple[int, int]:
        """Receptive field: number of frames before and after frame t on which its samples t * hop .. (t + 1) * hop - 1
        depend.
        """
        first = -3
        last = math.prod(self.ratios) - 1 + 3
        for ratio in reversed(self.ratios):
            units = 3 * (1 + 3 + 9)
            first = first - units
            last = last + units
            # Sample j of a transposed convolution depends on inputs i with 0 <= j + padding - ratio i < 2 ratio.
            padding = math.ceil(ratio / 2)
            first = -((2 * ratio - 1 - padding - first) // ratio)
            last = (last + padding) // ratio
        return 3 - first, last + 3

    def forward(self, frames: Tensor) -> Tensor:
        """Map (B, in_channels, T) -> (B, 1, T * hop), in (-1, 1)."""
        return self.model(frames)

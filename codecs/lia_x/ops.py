"""Building blocks of the LIA-X networks: the StyleGAN2 family (Karras et al., 2020) in plain PyTorch.

Axes: B images, C channels, O output channels, H height, W width, S side of a square map, D style.
Feature maps are (B, C, H, W), styles (B, D). Weights are stored at unit variance and scaled by 1/sqrt(fan-in) when used
("equalised"), so that every weight has the same effective learning rate.

Gains, biases and sums are folded into weights or into one pass over a map where possible: a map of 512 x 512 pixels
and 128 channels is 134 MB, and each pass costs about a sixth of a convolution on a CPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def blur(x: Tensor, pad: tuple[int, int], gain: float = 1.0, stride: int = 1) -> Tensor:
    """Zero-pad both axes by `pad` = (before, after), low-pass with a sum of `gain`, keep every `stride`-th value.

    The kernel is the outer product of (1, 3, 3, 1) / 8, exact in any precision. It is created on the device of `x`, as
    a copy from the host would synchronise. (B, C, H, W) -> (B, C, H', W') with H' = (H + before + after - 4) // stride
    + 1.
    """
    channels = x.shape[1]
    taps = 0.5 - (torch.arange(4, dtype=x.dtype, device=x.device) - 1.5).abs() / 4
    kernel = (torch.outer(taps, taps) * gain).expand(channels, 1, 4, 4)
    return F.conv2d(F.pad(x, (*pad, *pad)), kernel, stride=stride, groups=channels)


def upsample(x: Tensor) -> Tensor:
    """Double the resolution, (B, C, H, W) -> (B, C, 2H, 2W), by zero insertion and low-pass filtering (gain 4, pad
    (2, 1)).

    Even outputs are (x[i-1] + 3 x[i]) / 4 and odd ones (3 x[i] + x[i+1]) / 4 on each axis, with zeros outside: bilinear
    interpolation between pixel centres of the zero-padded map.
    """
    x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return x[..., 2:-2, 2:-2]


SLOPE = 0.2  # of leaky ReLUs
ACTIVATION_GAIN = math.sqrt(2)  # keeps the variance of a normal input near one; goes through the leaky ReLU


class EqualConv2d(nn.Module):
    """Convolution without bias or padding, with equalised learning rate (Karras et al. 2018, arXiv:1710.10196)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.scale = 1 / math.sqrt(in_channels * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> (B, O, H - kernel + 1, W - kernel + 1)."""
        return F.conv2d(x, self.weight * self.scale)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: (..., in) -> (..., out). `bias` is the initial value of every bias."""

    def __init__(self, in_features: int, out_features: int, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.full((out_features,), bias))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class ConvLayer(nn.Module):
    """Equalised convolution, optionally re-sampled, with bias and activation unless `activate` is False.

    Args:
        resample: "" keeps the size, "down" halves it (floor) after a blur, "up" doubles it before the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, resample: str = "", activate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None
        self.scale = 1 / math.sqrt(in_channels * kernel**2)
        self.kernel = kernel
        self.resample = resample

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """Map (B, C, H, W) -> (B, O, H', W'), multiplied by a positive `gain`."""
        if self.bias is not None:
            gain = gain * ACTIVATION_GAIN
        weight = self.weight * (self.scale * gain)
        bias = None if self.bias is None else self.bias * gain
        if self.resample == "down" and self.kernel == 1:  # a 1x1 convolution commutes with dropping pixels
            x = F.conv2d(blur(x, (1, 1), stride=2), weight, bias)
        elif self.resample == "down":
            pad = self.kernel + 1  # of the blur, both sides together; the convolution itself does not pad
            x = F.conv2d(blur(x, ((pad + 1) // 2, pad // 2)), weight, bias, stride=2)
        else:
            x = F.conv2d(upsample(x) if self.resample == "up" else x, weight, bias, padding=self.kernel // 2)
        return x if self.bias is None else F.leaky_relu(x, SLOPE, inplace=True)


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled by a style, then normalised per output channel ("demodulated").

    Scaling the *maps* by the style, and the result by the norm that the scaled weight would have, equals scaling the
    weight of each image (Karras et al., 2020, equations 1 and 3), and lets a batch share one convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        style_dim: int,
        demodulate: bool = True,
        up: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.modulation = EqualLinear(style_dim, in_channels, bias=1.0)
        self.scale = 1 / math.sqrt(in_channels * kernel**2)
        self.demodulate = demodulate
        self.up = up
        self.padding = kernel // 2

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Map (B, C, H, W), (B, D) -> (B, O, H, W), or (B, O, 2H, 2W) when upsampling."""
        x, norm = self.convolve(x, style)
        return x if norm is None else x * norm

    def convolve(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor | None]:
        """Convolve without demodulation. Return the result and the demodulation factor (B, O, 1, 1), None if unused."""
        gain = self.modulation(style) * self.scale
        if self.weight.shape[2] == 1 and not self.up:  # a small matrix: scaling it is less than scaling the map
            weight = self.weight[:, :, 0, 0] * gain[:, None]  # (B, O, C)
            x = (weight @ x.flatten(2)).unflatten(2, x.shape[2:])
        elif self.up:
            x = F.conv_transpose2d(x * gain[:, :, None, None], self.weight.transpose(0, 1), stride=2)
            x = blur(x, (1, 1), gain=4)
        else:
            x = F.conv2d(x * gain[:, :, None, None], self.weight, padding=self.padding)
        if not self.demodulate:
            return x, None
        power = gain.square() @ self.weight.square().sum((2, 3)).T  # (B, O)
        return x, torch.rsqrt(power + 1e-8)[:, :, None, None]


class StyledConv(nn.Module):
    """Demodulated 3x3 convolution, bias and activation; twice the size if `up`."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, up=up)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x, norm = self.conv.convolve(x, style)
        bias = (self.bias * ACTIVATION_GAIN)[:, None, None].to(x.dtype)
        x = torch.addcmul(bias, x, (norm * ACTIVATION_GAIN).to(x.dtype))
        return F.leaky_relu(x, SLOPE, inplace=True)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a 1x1 skip, summed and divided by sqrt(2). `down` halves the resolution.

    The skip is the identity where neither width nor size changes.
    """

    def __init__(self, in_channels: int, out_channels: int, down: bool = False):
        super().__init__()
        resample = "down" if down else ""
        self.conv1 = ConvLayer(in_channels, out_channels, 3)
        self.conv2 = ConvLayer(out_channels, out_channels, 3, resample)
        same = in_channels == out_channels and not down
        self.skip = nn.Identity() if same else ConvLayer(in_channels, out_channels, 1, resample, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        half = math.sqrt(0.5)  # halves the variance of the sum
        skipped = self.skip(x)
        residual = self.conv2(self.conv1(x), half)
        return torch.add(residual, skipped, alpha=half)


class FlowResBlock(nn.Module):
    """Styled convolution, then a normalised styled residual whose gain `gamma` starts near zero."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int):
        super().__init__()
        self.conv1 = StyledConv(in_channels, out_channels, style_dim)
        self.norm = nn.GroupNorm(math.gcd(32, out_channels), out_channels, eps=1e-5)
        self.conv2 = StyledConv(out_channels, out_channels, style_dim)
        self.gamma = nn.Parameter(torch.full((1, out_channels, 1, 1), 1e-5))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.conv1(x, style)
        residual = self.conv2(self.norm(x), style)
        return torch.addcmul(x, residual, self.gamma.to(x.dtype))


class ToRGB(nn.Module):
    """Maps a feature map to RGB and adds the upsampled image of the level below."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ConvLayer(channels, 3, 1)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.conv(x) + self.bias
        return x if skip is None else x + upsample(skip)


class ToFlow(nn.Module):
    """Warps the source's features by a predicted flow and blends them into the generated ones by a predicted mask."""

    def __init__(self, channels: int, style_dim: int):
        super().__init__()
        self.conv = ModulatedConv2d(channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(
        self, x: Tensor, style: Tensor, source: Tensor, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Warp the source by the flow predicted from x.

        Args:
            x, source: (B, C, S, S) feature maps.
            style: (B, D).
            skip: (B, 3, S/2, S/2) logits of the level below.

        Returns:
            The masked warp (B, C, S, S), the blend (B, C, S, S), and the raw logits (B, 3, S, S): displacement along
            x and along y before tanh, mask before the sigmoid.
        """
        logits = self.conv(x, style) + self.bias
        if skip is not None:
            logits = logits + upsample(skip)
        line = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=logits.dtype)
        base = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)  # (S, S, 2): x, then y
        grid = base + torch.tanh(logits[:, :2]).permute(0, 2, 3, 1)
        mask = torch.sigmoid(logits[:, 2:])
        warp = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=True) * mask
        return warp, torch.addcmul(warp, 1 - mask, x), logits


class MotionBasis(nn.Module):
    """Orthonormal motion directions in style space: the Q of a reduced QR decomposition of a learnt matrix.

    Column signs are those of LAPACK's Householder QR, which released weights rely on. The decomposition is
    computed in float32 in each call, which takes half a millisecond at full size.
    """

    def __init__(self, style_dim: int, motion_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(style_dim, motion_dim))

    def directions(self) -> Tensor:
        """Compute (D, motion): one unit vector per column."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.linalg.qr(self.weight.float() + 1e-8).Q

    def forward(self, motion: Tensor) -> Tensor:
        """Map motion codes (B, motion) -> displacements in style space (B, D), float32."""
        with torch.autocast(motion.device.type, enabled=False):
            return motion.float() @ self.directions().T

"""PSNR and SSIM between pictures.

Axes: B pictures, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.nn.transfer import send

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two equal shapes with values from 0 to 255. Equal inputs: inf."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def _gaussian(size: int) -> Tensor:
    """Return a blur along one axis as a matrix (size - 10, size): on a CPU much faster than convolving one channel."""
    assert size >= WINDOW, f"SSIM takes {WINDOW} pixels or more, not {size}"
    taps = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2).double() / (2 * SIGMA**2))
    rows = torch.zeros(size - WINDOW + 1, size, dtype=torch.float64)
    for k, tap in enumerate(taps / taps.sum()):
        rows.diagonal(k).fill_(tap)
    return rows


def ssim_map(a: Tensor, b: Tensor, span: float = 255.0) -> Tensor:
    """Compute local structural similarity (Wang et al., 2004) (B, C, H - 10, W - 10) of two (B, C, H, W).

    Gaussian window of 11 pixels with a deviation of 1.5, constants 0.01 and 0.03, no padding. `span` is the range of
    the values.
    """
    batch, channels, height, width = a.shape
    stacked = torch.cat([a, b, a * a, b * b, a * b])
    rows, columns = (send(_gaussian(size).to(a.dtype), a.device) for size in (height, width))
    blurred = rows @ stacked @ columns.T
    mean_a, mean_b, aa, bb, ab = blurred.view(5, batch, channels, *blurred.shape[-2:])
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    spread = aa - mean_a**2 + bb - mean_b**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    return similarity / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))


def ssim(a: Tensor, b: Tensor) -> float:
    """Return the mean structural similarity of pictures (B, C, H, W) with values from 0 to 255, in float64."""
    return ssim_map(a.double(), b.double()).mean().item()

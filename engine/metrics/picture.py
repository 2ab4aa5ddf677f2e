"""Image reconstruction metrics: PSNR and SSIM of whole images, and of the eye and mouth regions.

`movement` is the fraction of a region's temporal variance that is explained by the reconstruction: 1 is perfect, 0
equals the mean image of the clip. Regions are boxes of a square image, framed as in the synthetic corpus.

Axes: B images, T frames, C channels, H height, W width, S side.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.media.pictures import fit_frames
from engine.media.video import read_video
from engine.metrics.metric import FPS, Figure, Metric, Take

# side of SSIM's Gaussian window in pixels
WINDOW = 11
SIGMA = 1.5
# Left, top, right, bottom, in fractions of the side.
REGIONS = {"eyes": (0.27, 0.36, 0.73, 0.58), "mouth": (0.30, 0.63, 0.70, 0.92)}


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two tensors of equal shape in [0, 255]. Equal inputs yield inf."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def _blur(x: Tensor) -> Tensor:
    """Blur images (..., H, W) by SSIM's Gaussian window: (..., H - 10, W - 10).

    Variances are small differences of blurred images. Products and sums of elements keep full precision; matrix
    products and convolutions would be computed in bfloat16 under autocast, and in TF32 on a GPU.
    """
    taps = [math.exp(-((k - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for k in range(WINDOW)]
    for dim in (-2, -1):
        size = x.shape[dim] - WINDOW + 1
        assert size > 0, f"SSIM needs at least {WINDOW} pixels, not {x.shape[dim]}"
        x = sum(tap / sum(taps) * x.narrow(dim, k, size) for k, tap in enumerate(taps))
    return x


def ssim_map(a: Tensor, b: Tensor, span: float = 255.0) -> Tensor:
    """Compute the local structural similarity (Wang et al., 2004) of images (B, C, H, W): (B, C, H - 10, W - 10).

    Gaussian window of 11 pixels with a deviation of 1.5, constants 0.01 and 0.03, no padding. `span` is the range of
    the values. Computed in the precision of the images.
    """
    mean_a, mean_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]))
    c1 = (0.01 * span) ** 2
    c2 = (0.03 * span) ** 2
    spread = aa - mean_a**2 + bb - mean_b**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    return similarity / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))


def ssim(a: Tensor, b: Tensor) -> float:
    """Return the mean structural similarity of images (B, C, H, W) in [0, 255], in float64."""
    return ssim_map(a.double(), b.double()).mean().item()


class Reconstruction(Metric):
    figures: ClassVar = {
        "psnr": Figure("PSNR dB", 1, 2, meaning="of whole frames"),
        "ssim": Figure("SSIM", 1, 4, meaning="of whole frames"),
        "mouth_psnr": Figure("mouth PSNR dB", 1, 2, meaning="of the mouth region"),
        "mouth_movement": Figure(
            "mouth movement", 1, 3, meaning="explained fraction of the temporal variance of the mouth"
        ),
        "eyes_psnr": Figure("eyes PSNR dB", 1, 2, meaning="of the eye region"),
        "eyes_movement": Figure(
            "eyes movement", 1, 3, meaning="explained fraction of the temporal variance of the eyes"
        ),
    }
    needs_truth = True
    outputs_only = True
    needs_video = True
    inputs = ("video",)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        made = read_video(take.video, FPS)
        true = read_video(truth.video, FPS)
        length = min(len(made), len(true))
        found = reconstruction(fit_frames(true[:length], made.shape[1]), made[:length])
        return {name: (value, 1) for name, value in found.items()}


def reconstruction(true: np.ndarray, rebuilt: np.ndarray) -> dict[str, float]:
    """Return `psnr` (dB), `ssim`, and NAME_psnr and NAME_movement of each region, for frames (T, S, S, 3) uint8.

    The infinite PSNR of identical images is omitted.

    Raises:
        UserError: If the frames differ in size.
    """
    if true.shape != rebuilt.shape:
        raise UserError(
            f"frames of {rebuilt.shape[1:3]} pixels and ground truth of {true.shape[1:3]}: sizes must be equal"
        )
    pictures = [torch.from_numpy(frames).permute(0, 3, 1, 2) for frames in (true, rebuilt)]
    found = {"psnr": psnr(*pictures), "ssim": ssim(*pictures)}
    for name, box in REGIONS.items():
        left, top, right, bottom = (round(share * true.shape[1]) for share in box)
        a = true[:, top:bottom, left:right].astype(np.float64)
        b = rebuilt[:, top:bottom, left:right].astype(np.float64)
        found[f"{name}_psnr"] = psnr(torch.from_numpy(a), torch.from_numpy(b))
        variance = np.square(a - a.mean(0)).sum()
        if variance > 0:
            found[f"{name}_movement"] = float(1 - np.square(a - b).sum() / variance)
    return {name: value for name, value in found.items() if math.isfinite(value)}

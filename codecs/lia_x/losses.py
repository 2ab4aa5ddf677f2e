"""Image losses and the networks that they use.

Axes: B images, C channels, S side, H height, W width. Images are (B, 3, S, S) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError, require
from engine.metrics.picture import ssim_map
from engine.torch_files import read_state
from lia_x.ops import ConvLayer, EqualLinear, ResBlock

LEAST_MOVEMENT = 1e-3  # mean square difference below which a movement has a lower weight
VGG_TAPS = (1, 6, 11, 20, 29)  # torchvision's indices of relu1_1, relu2_1, relu3_1, relu4_1, relu5_1


def region_weights(size: int, regions: Sequence[Mapping[str, float]]) -> Tensor:
    """Return loss weights per pixel, (1, 1, S, S), with mean 1.

    Args:
        regions: boxes `left`, `top`, `right`, `bottom` in fractions of the side, with a loss weight of `weight`
            relative to the rest of the image; of overlapping boxes the last one applies.
    """
    weights = torch.ones(size, size)
    for box in regions:
        left = round(box["left"] * size)
        top = round(box["top"] * size)
        right = round(box["right"] * size)
        bottom = round(box["bottom"] * size)
        if not (0 <= left < right <= size and 0 <= top < bottom <= size and box["weight"] > 0):
            raise UserError(f"task.regions: {dict(box)} is not a box inside the image with a positive weight")
        weights[top:bottom, left:right] = box["weight"]
    return (weights / weights.mean())[None, None]


def pyramid_l1(fake: Tensor, real: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Return the weighted L1 loss, averaged over `levels` resolutions, each half of the previous one."""
    total = fake.new_zeros(())
    for level in range(levels):
        if level:
            fake = F.avg_pool2d(fake, 2)
            real = F.avg_pool2d(real, 2)
            weights = F.avg_pool2d(weights, 2)
        total = total + (weights * (fake - real).abs()).mean()
    return total / levels


def structural(fake: Tensor, real: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of 1 - SSIM of the luminance."""
    fake = fake.mean(1, keepdim=True) + 1  # SSIM requires positive means
    real = real.mean(1, keepdim=True) + 1
    similarity = ssim_map(fake, real, 2.0)
    crop = (weights.shape[-1] - similarity.shape[-1]) // 2
    return (weights[..., crop:-crop, crop:-crop] * (1 - similarity)).mean()


def unexplained(made: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted fraction of a movement that is not explained, averaged over the batch.

    A movement is the difference between two images that are reconstructed from the same source. Errors in texture that
    the source does not show cancel out. In an L1 loss, these errors dominate small movements, and the best prediction
    for an uncertain mouth is one that does not move.

    Args:
        made, true: differences between images, (B, C, S, S).
        weights: loss weights per pixel, (B or 1, 1, S, S).
    """
    error = (weights * (made - true).square()).mean((1, 2, 3))
    return (error / ((weights * true.square()).mean((1, 2, 3)) + LEAST_MOVEMENT)).mean()


class Perceptual(nn.Module):
    """Perceptual loss: distance of VGG-19 features over an image pyramid (Johnson et al., 2016; LIA's trainer, Wang et
    al., 2022).

    Args:
        weights: file with torchvision's `vgg19` state dict (its ImageNet weights).
    """

    def __init__(self, weights: str | Path):
        super().__init__()
        with torch.device("meta"):  # initialising the whole network would take seconds
            features = require("torchvision", "the perceptual loss").models.vgg19().features
        try:
            state = read_state(weights)
            features.load_state_dict(
                {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}, assign=True
            )
        except RuntimeError as error:
            raise UserError(
                f"task.vgg={weights} does not contain torchvision's weights of VGG-19 ({error}): set it to "
                "vgg19-dcbb9e9d.pth"
            ) from error
        cuts = [0, *(tap + 1 for tap in VGG_TAPS)]
        self.stages = nn.ModuleList(features[a:b] for a, b in pairwise(cuts))
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def normalise(self, pictures: Tensor) -> Tensor:
        """Normalise images in [-1, 1] as the network expects."""
        return ((pictures.clamp(-1, 1) + 1) / 2 - self.mean) / self.std

    def forward(self, fake: Tensor, real: Tensor, levels: int = 4) -> Tensor:
        """Return the L1 distance of features, summed over stages and over `levels` resolutions."""
        total = fake.new_zeros(())
        for level in range(levels):
            if level:
                fake = F.avg_pool2d(fake, 2)
                real = F.avg_pool2d(real, 2)
            x = self.normalise(fake)
            y = self.normalise(real)
            for stage in self.stages:
                x = stage(x)
                y = stage(y)
                total = total + (x - y).abs().mean()
        return total


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator (Karras et al., 2020) for square images.

    Args:
        size: S, 4 times a power of two.
        width: channels at full size; they double with each halving of the side, up to `max_width`.
    """

    def __init__(self, size: int, width: int, max_width: int):
        super().__init__()
        halvings = (size // 4).bit_length() - 1
        if size < 8 or size != 4 << halvings:
            raise UserError(f"size={size}: the discriminator requires 4 times a power of two, such as 64, 128 or 512")
        widths = [min(max_width, width << n) for n in range(halvings + 1)]
        self.stem = ConvLayer(3, widths[0], 1)
        self.blocks = nn.Sequential(*(ResBlock(a, b, down=True) for a, b in pairwise(widths)))
        self.last = ConvLayer(widths[-1] + 1, widths[-1], 3)
        self.hidden = EqualLinear(widths[-1] * 16, widths[-1])
        self.out = EqualLinear(widths[-1], 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B,), positive for real ones. The batch standard deviation is an additional
        channel.
        """
        x = self.blocks(self.stem(pictures))
        spread = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
        x = self.last(torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], 1)).flatten(1)
        return self.out(F.leaky_relu(self.hidden(x), 0.2))[:, 0]

"""LIA-X's encoder: a picture becomes a style code, a motion code, and feature maps for the decoder to warp.

Axes: B pictures, C channels, S side of the square picture, D style, M motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lia_x.ops import ConvLayer, EqualConv2d, EqualLinear, ResBlock


class Encoder(nn.Module):
    """Down-sampling residual network.

    Args:
        widths: channels by level, coarsest (side 2 * base) to finest (side base * 2^levels).
        base: side of the map that the last convolution reduces to one style vector.
        style_dim, motion_dim: D, M.
    """

    def __init__(self, widths: Sequence[int], base: int, style_dim: int, motion_dim: int):
        super().__init__()
        fine_to_coarse = [*reversed(widths), widths[0]]
        self.stem = ConvLayer(3, fine_to_coarse[0], 1)
        self.blocks = nn.ModuleList(ResBlock(a, b, down=True) for a, b in pairwise(fine_to_coarse))
        self.head = EqualConv2d(widths[0], style_dim, base)
        self.to_motion = EqualLinear(style_dim, motion_dim)

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (B, 3, S, S) in [-1, 1] -> style (B, D) and the feature maps, coarsest (side 2 * base) first."""
        maps = [self.stem(pictures)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        style = self.head(maps.pop()).flatten(1)
        return style, maps[::-1]

    def style(self, pictures: Tensor) -> Tensor:
        """The style (B, D) alone, without keeping the feature maps of every level."""
        x = self.stem(pictures)
        for block in self.blocks:
            x = block(x)
        return self.head(x).flatten(1)

    def motion(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> motion codes (B, M)."""
        return self.to_motion(self.style(pictures))

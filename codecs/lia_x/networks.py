"""LIA-X's networks: an encoder to style, motion and feature maps, and a decoder that renders by a pyramid of warps.

Axes: B images, C channels, S side of a level's square maps, D style, M motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lia_x import ops


class Encoder(nn.Module):
    """Downsampling residual network.

    Args:
        widths: channels by level, coarsest (side 2 * base) to finest (side base * 2^levels).
        base: side of the map that the last convolution reduces to one style vector.
        style_dim, motion_dim: D, M.
    """

    def __init__(self, widths: Sequence[int], base: int, style_dim: int, motion_dim: int):
        super().__init__()
        fine_to_coarse = [*reversed(widths), widths[0]]
        self.stem = ops.ConvLayer(3, fine_to_coarse[0], 1)
        self.blocks = nn.ModuleList(ops.ResBlock(a, b, down=True) for a, b in pairwise(fine_to_coarse))
        self.head = ops.EqualConv2d(widths[0], style_dim, base)
        self.to_motion = ops.EqualLinear(style_dim, motion_dim)

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map images (B, 3, S, S) in [-1, 1] to style (B, D) and feature maps, coarsest (side 2 * base) first."""
        maps = [self.stem(pictures)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        style = self.head(maps.pop()).flatten(1)
        return style, maps[::-1]

    def motion(self, pictures: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to motion codes (B, M), without keeping feature maps."""
        x = self.stem(pictures)
        for block in self.blocks:
            x = block(x)
        return self.to_motion(self.head(x).flatten(1))


class Level(nn.Module):
    """One resolution of the decoder: doubles the size, predicts the flow, warps the source's features, and adds to the
    image.
    """

    def __init__(self, in_channels: int, channels: int, style_dim: int, depth: int, first: bool):
        super().__init__()
        self.grow = ops.StyledConv(in_channels, channels, style_dim, up=True)
        self.flow_blocks = nn.ModuleList(ops.FlowResBlock(channels, channels, style_dim) for _ in range(depth))
        self.to_flow = ops.ToFlow(channels, style_dim)
        self.carry = None if first else ops.ConvLayer(in_channels, channels, 3, "up")
        self.refine_blocks = nn.Sequential(*(ops.ResBlock(channels, channels) for _ in range(depth)))
        self.to_rgb = ops.ToRGB(channels)

    def forward(
        self,
        hidden: Tensor,
        refined: Tensor | None,
        flow: Tensor | None,
        picture: Tensor | None,
        style: Tensor,
        source: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map the outputs of the coarser level, None if there are none, to the same outputs at twice the size.

        Args:
            hidden: generated and warped features, (B, C, S, S).
            refined: the source's warped features after refinement, (B, C, S, S).
            flow: raw flow and mask logits, (B, 3, S, S).
            picture: (B, 3, S, S), not clamped.
            style: style vectors (B, D) that modulate the convolutions.
            source: the feature map of the source image of this level, (B, C, S, S).
        """
        hidden = self.grow(hidden, style)
        for block in self.flow_blocks:
            hidden = block(hidden, style)
        warp, hidden, flow = self.to_flow(hidden, style, source, flow)
        if self.carry is not None:
            warp = warp + self.carry(refined)
        refined = self.refine_blocks(warp)
        return hidden, refined, flow, self.to_rgb(refined, picture)


class Decoder(nn.Module):
    """Moves a style along the motion directions and renders it with a pyramid of levels.

    Args:
        widths: channels by level, coarsest (side 2 * base) to finest (side base * 2^levels).
        base: side of the learnt constant that the pyramid starts from.
        style_dim, motion_dim: D, M.
        depth: residual blocks in each of a level's two branches.
    """

    def __init__(self, widths: Sequence[int], base: int, style_dim: int, motion_dim: int, depth: int):
        super().__init__()
        self.directions = ops.MotionBasis(style_dim, motion_dim)
        self.constant = nn.Parameter(torch.randn(1, widths[0], base, base))
        self.first = ops.StyledConv(widths[0], widths[0], style_dim)
        self.levels = nn.ModuleList(
            Level(below, width, style_dim, depth, first=i == 0)
            for i, (below, width) in enumerate(pairwise([widths[0], *widths]))
        )

    def navigate(self, style: Tensor, target: Tensor) -> Tensor:
        """Move the style (B, D) along the motion directions by motion codes (B, M) (absolute motion)."""
        return style + self.directions(target)

    def forward(self, style: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Map styles (B, D) with motion and feature maps of one source (or B sources) to images (B, 3, S, S), not
        clamped.

        Feature maps with batch size 1 are used for every style. With fewer maps than levels, the image of the last
        available level is returned.
        """
        count = style.shape[0]
        hidden = self.first(self.constant.expand(count, -1, -1, -1), style)
        refined = None
        flow = None
        picture = None
        for level, source in zip(self.levels, maps, strict=False):
            source = source.expand(count, -1, -1, -1)
            hidden, refined, flow, picture = level(hidden, refined, flow, picture, style, source)
        return picture

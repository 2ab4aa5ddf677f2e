"""A patch of latent frames becomes one token of the language model.

Axes: ... any leading axes, P frames of a patch, E input width, D width, M patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from talker_t2av.layers import Transformer


class PatchEncoder(Transformer):
    """The learned `cls_token` reads the frames of its patch; patches do not see each other.

    Frames that are absent are zero vectors, and the token of a patch of zeros is not zero.
    """

    def __init__(self, input_dim: int, width: int, layers: int, heads: int, max_positions: int = 1024) -> None:
        super().__init__(input_dim, width, layers, heads, max_positions)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Embedded frames (..., P, E) -> tokens (..., D)."""
        frames = self.input_proj(x.flatten(0, -3))
        cls = self.cls_token[0].expand(len(frames), -1, -1).to(frames.dtype)
        tokens = self.run(torch.cat([cls, frames], 1), slice(0, 1))
        return tokens.view(*x.shape[:-2], tokens.shape[-1])

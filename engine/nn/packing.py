"""Packing: the clips of a batch concatenated without padding, and attention that stays inside each clip.

Axes: B clips, L longest clip, N real positions of all clips, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.nn.transfer import send


@dataclass(frozen=True)
class Packing:
    """Which positions of a padded batch are real, and where they lie in the packed row.

    valid: (B, L). places: (N,) of the real ones in B * L. row, position: (N,) clip and place within it.
    bounds: (B + 1,) int32, where clips begin and end. longest: of the clips.
    """

    valid: Tensor
    places: Tensor
    row: Tensor
    position: Tensor
    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, valid: Tensor) -> Packing:
        """From (B, L) bool, each clip padded on the right. Waits for the device that the mask is on."""
        row, position = valid.nonzero(as_tuple=True)
        lengths = valid.sum(1)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(valid, row * valid.shape[1] + position, row, position, bounds, int(lengths.max()))

    def to(self, device: torch.device) -> Packing:
        names = ("valid", "places", "row", "position", "bounds")
        return replace(self, **{name: send(getattr(self, name), device) for name in names})

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (N, ...)."""
        return x.flatten(0, 1)[self.places]

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, L, ...), zero where there is padding."""
        padded = x.new_zeros(self.valid.numel(), *x.shape[1:])
        return padded.index_copy(0, self.places, x).unflatten(0, self.valid.shape)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dense: Callable[[Tensor, Tensor, Tensor], Tensor], causal: bool = False
    ) -> Tensor:
        """Attention over (H, N, D), inside each clip.

        CUDA in half precision takes PyTorch's variable-length attention kernel (tried on fake tensors only: it needs a
        GPU). Elsewhere clips are padded for the attention alone, which is `dense` over (B, H, L, D).
        """
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (N, H, D)
        if v.is_cuda and v.dtype in (torch.float16, torch.bfloat16):
            from torch.nn.attention.varlen import varlen_attn

            # Under autocast norms and rotary positions leave queries and keys in float32, values are in half precision.
            q, k = q.to(v.dtype), k.to(v.dtype)

            window = (-1, 0) if causal else (-1, -1)
            row = (self.bounds, self.bounds, self.longest, self.longest)
            return varlen_attn(q, k, v, *row, window_size=window).transpose(0, 1)
        out = dense(*(self.unpack(x).transpose(1, 2) for x in (q, k, v)))
        return self.pack(out.transpose(1, 2)).transpose(0, 1)

"""The bidirectional transformer that patch encoders and diffusion heads share.

Axes: B batch, L sequence, D width, H heads, h head width (D = H * h), Q kept positions.

Parameter names are the released ones. Rotary positions pair neighbouring components; those of the language model pair
the two halves of a vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), 1e-6)


class Rotary(nn.Module):
    """Interleaved rotary embedding: components (2i, 2i + 1) turn by position * base^(-2i/h).

    The table `w` (positions, h/2, 2) of cosines and sines is saved with a model if it is not exact: released files may
    hold a rounded table, with which the released model was trained.
    """

    def __init__(self, head_dim: int, max_positions: int = 1024, base: float = 10000.0) -> None:
        super().__init__()
        self.max_positions, self.base, self.pairs = max_positions, base, head_dim // 2
        self.register_buffer("w", self.table())

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """The exact table in float32."""
        inverse = self.base ** (-torch.arange(self.pairs, device=device, dtype=torch.float32) / self.pairs)
        angles = torch.outer(torch.arange(self.max_positions, device=device, dtype=torch.float32), inverse)
        return torch.stack([angles.cos(), angles.sin()], -1)

    def forward(self, x: Tensor, keep: slice = slice(None)) -> Tensor:
        """Rotate x (B, Q, H, h), which stand at the positions `keep` of the sequence."""
        length = x.shape[1] if keep == slice(None) else keep.stop
        turn = torch.view_as_complex(self.w[:length].float())[keep, None]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over all positions; with `keep`, only the outputs at these positions are computed.

    Without a rotary table, it does not see the order of the sequence.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None, keep: slice | None = None) -> Tensor:
        """x (B, L, D) -> (B, Q, D)."""
        width = x.shape[-1]
        # packed, or with a low-rank update; or of torchao
        if keep is None or type(self.qkv) is not nn.Linear or type(self.qkv.weight) is not nn.Parameter:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
            q = q if keep is None else q[:, keep]
        else:
            q = F.linear(x[:, keep], self.qkv.weight[:width]).unflatten(-1, (self.heads, -1))
            k, v = F.linear(x, self.qkv.weight[width:]).unflatten(-1, (2, self.heads, -1)).unbind(2)
        if rotary is not None:
            q, k = rotary(q) if keep is None else rotary(q, keep), rotary(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated MLP of inner width floor(8 D / 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3
        self.fc1 = nn.Linear(width, inner, bias=False)
        self.fc2 = nn.Linear(width, inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, rotary: Rotary | None, keep: slice | None = None) -> Tensor:
        """x (B, L, D) -> (B, Q, D), Q = L without `keep`."""
        x = self.attn(self.norm1(x), rotary, keep) + (x if keep is None else x[:, keep])
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Input projection, blocks and a final norm; only the outputs at some positions are computed."""

    def __init__(self, input_dim: int, width: int, layers: int, heads: int, max_positions: int = 1024) -> None:
        super().__init__()
        self.input_proj = nn.Linear(input_dim, width)
        self.rope = Rotary(width // heads, max_positions)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = RMSNorm(width)

    def run(self, x: Tensor, keep: slice) -> Tensor:
        """Projected input (B, L, D) -> (B, Q, D): the positions `keep`, a slice with a stop.

        In the last block the other positions are only keys and values.
        """
        if not x.requires_grad:
            x = x.float()  # the residual stream, also in half precision
        for block in self.blocks[:-1]:
            x = block(x, self.rope)
        return self.norm(self.blocks[-1](x, self.rope, keep))

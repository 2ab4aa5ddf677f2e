"""The bidirectional transformer of patch encoders and diffusion heads.

Axes: B batch, L sequence, D width, H heads, h head width (D = H * h), Q kept positions, P frames of a patch, E input
width.

Parameter names are those of the released checkpoint. Rotary embeddings pair adjacent components, whereas those of the
language model pair the two halves of a vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product_type(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype for matrix products if no gradients are needed, else None.

    Inputs of matrix products are then directly written in this dtype, which avoids a separate cast kernel.
    """
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


class RMSNorm(nn.Module):
    """RMS normalisation x / sqrt(mean(x^2) + 1e-6) * scale over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise x (..., D).

        Args:
            dtype: dtype of the result, without gradients. Default: that of x.
        """
        if dtype is None or dtype == x.dtype:
            return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), 1e-6)
        return torch.mul(F.rms_norm(x, self.scale.shape, None, 1e-6), self.scale, out=torch.empty_like(x, dtype=dtype))


class QwenNorm(nn.RMSNorm):
    """RMS norm of the language model as one operator; that of transformers uses six and casts twice."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, None, self.eps) * self.weight


class Rotary(nn.Module):
    """Interleaved rotary embedding: components (2i, 2i + 1) are rotated by position * base^(-2i/h).

    The table `w` (positions, h/2, 2) of cosines and sines is saved with a model if it is not exact, as released files
    may contain a rounded table that was used in training.
    """

    def __init__(self, head_dim: int, max_positions: int = 1024, base: float = 10000.0) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.base = base
        self.pairs = head_dim // 2
        self.register_buffer("w", self.table())

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """Compute the exact table in float32."""
        inverse = self.base ** (-torch.arange(self.pairs, device=device, dtype=torch.float32) / self.pairs)
        angles = torch.outer(torch.arange(self.max_positions, device=device, dtype=torch.float32), inverse)
        return torch.stack([angles.cos(), angles.sin()], -1)

    def factors(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the inputs of `rotate` for the first `length` positions: cosines and signed sines (L, 1, h)."""
        cos, sin = self.w[:length].float().unbind(-1)
        cos = torch.stack([cos, cos], -1)
        sin = torch.stack([-sin, sin], -1)
        return cos.flatten(1)[:, None], sin.flatten(1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, L, H, h) by `Rotary.factors`. Computed in float32 and returned in the dtype of x."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([odd, even], -1).flatten(-2)  # `flip` takes three times as long on a CPU
    if torch.is_grad_enabled():
        return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
    return torch.addcmul(x * cos, swapped, sin, out=torch.empty_like(x))


class Attention(nn.Module):
    """Self-attention over all positions. With `keep`, only the outputs at these positions are computed.

    Without rotary embeddings it is permutation-equivariant.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, factors: tuple[Tensor, Tensor] | None, keep: slice | None = None) -> Tensor:
        """Map x (B, L, D) -> (B, Q, D). `factors` are those of `Rotary`."""
        queries_keys, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], 2)
        if factors is not None:
            queries_keys = rotate(queries_keys, *factors)
        q, k = queries_keys.chunk(2, 2)
        if keep is not None:
            q = q[:, keep]
        if not len(x):  # no motion in a batch of TTS; PyTorch 2.11's attention of no rows is None on CUDA
            return self.proj(q.flatten(2))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated MLP with inner width floor(8 D / 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3
        self.fc1 = nn.Linear(width, inner, bias=False)
        self.fc2 = nn.Linear(width, inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, factors: tuple[Tensor, Tensor] | None, keep: slice | None = None) -> Tensor:
        """Map x (B, L, D) -> (B, Q, D).

        Args:
            factors: cosines and signed sines of `Rotary.factors`; None: no position encoding.
            keep: the Q positions whose outputs are computed; None: all L.
        """
        dtype = product_type(x.device)
        x = self.attn(self.norm1(x, dtype), factors, keep) + (x if keep is None else x[:, keep])
        return x + self.mlp(self.norm2(x, dtype))


class Transformer(nn.Module):
    """Input projection, blocks and final norm. Only the outputs at some positions are computed."""

    def __init__(self, input_dim: int, width: int, layers: int, heads: int, max_positions: int = 1024) -> None:
        super().__init__()
        self.input_proj = nn.Linear(input_dim, width)
        self.rope = Rotary(width // heads, max_positions)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = RMSNorm(width)

    def run(self, x: Tensor, keep: slice) -> Tensor:
        """Map projected inputs (B, L, D) to the outputs (B, Q, D) at positions `keep`, a slice with a stop.

        In the last block, the other positions only serve as keys and values.
        """
        if not x.requires_grad:
            x = x.float()  # the residual stream stays in float32, also in half precision
        factors = self.rope.factors(x.shape[1])
        for block in self.blocks[:-1]:
            x = block(x, factors)
        return self.norm(self.blocks[-1](x, factors, keep))


class PatchEncoder(Transformer):
    """Transformer encoder of patches. The learned `cls_token` attends to the frames of its patch; patches are
    independent.

    Absent frames are zero vectors. The token of an all-zero patch is not zero.
    """

    def __init__(self, input_dim: int, width: int, layers: int, heads: int, max_positions: int = 1024) -> None:
        super().__init__(input_dim, width, layers, heads, max_positions)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map embedded frames (..., P, E) to tokens (..., D)."""
        frames = self.input_proj(x.flatten(0, -3))
        cls = self.cls_token[0].expand(len(frames), -1, -1).to(frames.dtype)
        tokens = self.run(torch.cat([cls, frames], 1), slice(0, 1))
        return tokens.view(*x.shape[:-2], tokens.shape[-1])

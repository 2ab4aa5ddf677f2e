"""Transformer blocks with adaptive layer norm as in SEDD and DiT, and HiCoDiT's dual-scale variant.

Axes: B batch, L sequence, C width, H heads, D head width (C = H * D), E condition width, J expression windows.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FLASH_INSTALLED = find_spec("flash_attn") is not None  # optional extra
GELU_SLOPE = math.sqrt(8 / math.pi)


def rotary_table(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Return cosines and sines (2, L, D/2) of rotary position embeddings."""
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x (B, H, L, D) by a table (2, L, D/2). Pairs are formed between the two halves, not between neighbours."""
    cos, sin = table
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str = "sdpa") -> Tensor:
    """Compute attention over (B, H, L, D). mask (B, 1, 1, L) is True for keys to attend to.

    `backend="flash"` uses the flash-attn kernel if possible (installed, CUDA, half precision, no mask).
    """
    if backend == "flash" and FLASH_INSTALLED and mask is None and q.is_cuda and q.dtype != torch.float32:
        from flash_attn import flash_attn_func  # importing it is slow

        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, L, H, D)
        return out.transpose(1, 2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None and not q.requires_grad:
        # torch's own kernel takes 1.5 times as long here.
        return (q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2)).softmax(-1) @ v
    if q.device.type == "cpu" and q.requires_grad:
        # In float32, as the backward pass of bfloat16 attention on a CPU is three times as slow.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class TimeEmbedding(nn.Module):
    """Embeds the noise level (B,) -> (B, E): 128 cosines and 128 sines of sigma, followed by an MLP (SEDD)."""

    FREQUENCIES = 128

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        steps = torch.arange(self.FREQUENCIES, device=sigma.device, dtype=torch.float32)
        angles = sigma.float()[:, None] * torch.exp(-math.log(10000.0) * steps / self.FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class ScaleNorm(nn.Module):
    """Layer norm with a gain and no bias, followed by (1 + scale) * x + shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        gain = self.weight.to(x.dtype)  # FSDP may gather this weight in bfloat16
        return F.layer_norm(x, x.shape[-1:], gain) * (1 + scale) + shift


class TanhGELU(nn.GELU):
    """`nn.GELU(approximate="tanh")`, three times as fast on a CPU without gradients.

    With p = sqrt(8 / pi) (1 + 0.044715 x^2) it is x sigmoid(p x) = silu(p x) / p, and silu has a vectorised kernel.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or x.device.type != "cpu":
            return super().forward(x)
        wide = x.float()
        p = (wide * wide).mul_(0.044715 * GELU_SLOPE).add_(GELU_SLOPE)
        return F.silu(wide * p).div_(p).to(x.dtype)


class AdaLNBlock(nn.Module):
    """Pre-norm transformer block with modulated and gated attention and MLP (AdaLN).

    The modulation is computed for all blocks of a stage at once. With temporal scales, the modulated inputs of
    attention and MLP are also multiplied by one scalar per frame: gamma_t * [(1 + gamma_c) * LN(h) + beta_c], HiCoDiT's
    dual-scale AdaLN. The residual stream `h` keeps its dtype under autocast.
    """

    PARTS = 6  # modulation vectors of width C: shift, scale and gate of attention and MLP

    def __init__(self, width: int, heads: int, dropout: float = 0.0, attention: str = "sdpa") -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.norm1 = ScaleNorm(width)
        self.norm2 = ScaleNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), TanhGELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, h: Tensor, modulation: Tensor, rotary: Tensor, mask: Tensor | None = None, temporal: Tensor | None = None
    ) -> Tensor:
        """Map h (B, L, C) to (B, L, C).

        Args:
            modulation: (B, 6C).
            rotary: (2, L, D/2).
            mask: (B, 1, 1, L), True at real positions.
            temporal: (B, L, 2), the scales of attention and of the MLP.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(self.PARTS, -1)  # each (B, 1, C)
        x = self.norm1(h, shift1, scale1)
        if temporal is not None:
            x = x * temporal[..., :1]
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        x = attend(apply_rotary(q, rotary), apply_rotary(k, rotary), v, mask, self.attention)
        h = h + gate1 * self.dropout(self.out(rearrange(x, "b h l d -> b l (h d)")))
        x = self.norm2(h, shift2, scale2)
        if temporal is not None:
            x = x * temporal[..., 1:]
        return h + gate2 * self.dropout(self.mlp(x))


def modulation_layer(cond_dim: int, width: int, blocks: int, norms: int = 1) -> nn.Linear:
    """Return the linear layer from a condition (B, E) to the modulation of n blocks, and shift and scale of further
    norms.

    It is initialised to zero, so that the gates are closed and each block is the identity.
    """
    layer = nn.Linear(cond_dim, (AdaLNBlock.PARTS * blocks + 2 * norms) * width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TemporalScales(nn.Module):
    """Temporal scales gamma_t of a stage's blocks: an MLP of half-second expressions and diffusion time.

    gamma_t is a factor without "1 +", so it is initialised to 1 for all inputs.
    """

    def __init__(self, width: int, cond_dim: int, blocks: int) -> None:
        super().__init__()
        self.expression = nn.Linear(width, cond_dim)  # time-independent part of the first layer
        self.time = nn.Linear(cond_dim, cond_dim, bias=False)
        self.scales = nn.Linear(cond_dim, 2 * blocks)
        nn.init.zeros_(self.scales.weight)
        nn.init.ones_(self.scales.bias)

    def forward(self, expression: Tensor, time: Tensor) -> Tensor:
        """Map `self.expression` of the windows (B, J, E) and embedded time (B, E) to scales (B, J, 2 * blocks).

        Two consecutive columns are the scales of attention and MLP of a block.
        """
        return self.scales(F.silu(expression + self.time(time)[:, None]))

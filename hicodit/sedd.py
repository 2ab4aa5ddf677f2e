"""The plain SEDD transformer on one token sequence (arXiv 2310.16834): HiCoDiT's blocks are checked by it.

Axes: B batch, L sequence, V = N + 1 columns.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from hicodit.diffusion import to_log_score
from hicodit.layers import AdaLNBlock, AdaLNFinal, TimeEmbedding, rotary_table

RELEASED_NAMES = (  # regex on a released key -> our name
    (r"vocab_embed\.embedding", "embedding.weight"),
    (r"sigma_map\.", "time."),
    (r"\.attn_qkv\.", ".qkv."),
    (r"\.attn_out\.", ".out."),
    (r"\.adaLN_modulation\.", ".modulation."),
    (r"output_layer\.linear\.", "head."),
    (r"output_layer\.norm_final\.", "final.norm."),
    (r"output_layer\.", "final."),
)


class SEDDNetwork(nn.Module):
    """Tokens (B, L) and noise levels (B,) to log scores (B, L, V)."""

    def __init__(self, tokens: int, width: int, cond_dim: int, blocks: int, heads: int, scale_by_sigma: bool) -> None:
        super().__init__()
        self.scale_by_sigma = scale_by_sigma
        self.embedding = nn.Embedding(tokens + 1, width)
        self.time = TimeEmbedding(cond_dim)
        self.blocks = nn.ModuleList(AdaLNBlock(width, heads, cond_dim) for _ in range(blocks))
        self.final = AdaLNFinal(width, cond_dim)
        self.head = nn.Linear(width, tokens + 1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = self.embedding(x)
        cond = nn.functional.silu(self.time(sigma))
        rotary = rotary_table(x.shape[1], h.shape[-1] // self.blocks[0].heads, h.device)
        for block in self.blocks:
            h = block(h, cond, rotary)
        rows = torch.arange(len(h), device=h.device)[:, None]
        return to_log_score(self.head(self.final(h, cond, rows)), x, sigma, self.scale_by_sigma)

    def load_released(self, state: dict[str, Tensor]) -> None:
        """Load a state dict by the released program's key names, strictly."""
        renamed = {}
        for key, value in state.items():
            for pattern, name in RELEASED_NAMES:
                key = re.sub(pattern, name, key)
            renamed[key] = torch.as_tensor(value)
        self.load_state_dict(renamed)

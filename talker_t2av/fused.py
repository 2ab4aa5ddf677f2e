"""Fused layers of Talker-T2AV for inference, with fewer and larger matrix products; see `fuse_layers`.

Axes: B batch, T tokens, S tokens that they attend to, D width, H query heads, K key heads, G = H / K, h head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3Model

from talker_t2av.layers import MLP


def fuse_layers(network: nn.Module) -> None:
    """Fuse gated MLPs and the attention of the language model in place. Do not train or save the result.

    Outputs only change by rounding.
    """
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, MLP):
                setattr(module, name, FusedMLP(layer.fc1, layer.fc2, layer.proj))
            elif isinstance(layer, Qwen3MLP):
                setattr(module, name, FusedMLP(layer.gate_proj, layer.up_proj, layer.down_proj))
            elif isinstance(layer, Qwen3Attention):
                setattr(module, name, FusedAttention(layer))
        if isinstance(module, Qwen3Model):
            module.rotary_emb = SignedRotary(module.rotary_emb)


def fuse_linear(*layers: nn.Linear) -> nn.Linear:
    """Return a linear layer whose output is the concatenated output of several layers with the same input."""
    fused = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), device="meta")
    fused.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return fused


class FusedMLP(nn.Module):
    """Gated MLP whose two input layers are fused."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.both = fuse_linear(gate, up)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class FusedAttention(nn.Module):
    """Attention of the language model with fused query, key and value projections, norms and rotations.

    The G query heads of a key head are treated as rows of one head, so that keys and values are not repeated.
    """

    def __init__(self, attention: Qwen3Attention) -> None:
        super().__init__()
        self.index = attention.layer_idx
        self.width = attention.head_dim
        self.eps = attention.q_norm.eps
        self.heads = attention.q_proj.out_features // self.width
        self.key_heads = attention.k_proj.out_features // self.width
        self.qkv = fuse_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.proj = attention.o_proj
        norms = [attention.q_norm.weight.expand(self.heads, -1), attention.k_norm.weight.expand(self.key_heads, -1)]
        self.scale = nn.Parameter(torch.cat(norms).detach(), requires_grad=False)  # (H + K, h)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Map hidden states (B, T, D) -> (B, T, D). The argument names are those of transformers.

        Args:
            position_embeddings: result of `SignedRotary`.
            attention_mask: (B, 1, T, S) bool. None is causal.
        """
        cos, sin = position_embeddings
        length = hidden_states.shape[1]
        rotated = self.heads + self.key_heads
        x = self.qkv(hidden_states).unflatten(-1, (-1, self.width))
        queries_keys, v = x.split([rotated, self.key_heads], 2)
        normed = F.rms_norm(queries_keys, (self.width,), None, self.eps) * self.scale
        turned = torch.addcmul(normed * cos, normed.roll(self.width // 2, -1), sin)
        q, k = turned.split([self.heads, self.key_heads], 2)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.index)
        if attention_mask is None:
            attention_mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        q = q.unflatten(2, (self.key_heads, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, T, h)
        if length > 1:
            attention_mask = attention_mask.repeat(1, 1, q.shape[2], 1)
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=attention_mask)
        return self.proj(out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2)), None


class SignedRotary(nn.Module):
    """Rotary factors of the language model (B, T, 1, h), with negated sines in the first half."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, position_ids)
        first, second = sin.chunk(2, -1)
        return cos[:, :, None], torch.cat([-first, second], -1)[:, :, None]

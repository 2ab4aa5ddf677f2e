"""Alignment of patches with text tokens: auxiliary targets that speed up the training of a small model.

Frame-wise phoneme labels are aligned with the text tokens. One attention head of some layers is then trained to attend,
before each patch, to the tokens spoken in it: guided attention (Tachibana et al. 2018, arXiv:1710.08969) with the
actual alignment instead of the diagonal. Inference is unchanged.

Axes: B batch, T tokens, F frames, M patches, P frames of a patch, D width, h head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from engine.device import to_device
from talker_t2av.losses import SpanLayout

if TYPE_CHECKING:
    from talker_t2av.model import TalkerConfig, TalkerT2AV
    from talker_t2av.text import TalkerTokenizer

SKIP_COST = 0.6  # of a token without frames; a frame with another phoneme costs 1
MAX_ADVANCE = 3  # maximum number of tokens from one frame to the next
GUIDED_HEAD = 0  # index of the guided attention head of a layer


def token_classes(words: TalkerTokenizer, symbols: Sequence[str]) -> np.ndarray:
    """Return the phoneme class (V,) of each token in the frame labels, and 0 for stops and control tokens.

    Args:
        symbols: phonemes of the labels, with classes starting at 1.
    """
    numbers = {symbol: number for number, symbol in enumerate(symbols, 1)}
    classes = np.zeros(words.vocab_size, int)
    for token, index in words.tokenizer.get_vocab().items():
        classes[index] = numbers.get(token.lstrip("',").rstrip("#"), 0)
    return classes


def align(tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Align frames with tokens by dynamic programming: a monotonic path of minimum cost.

    Args:
        tokens: (B, T) classes.
        lengths: (B,) lengths of the prompts.
        labels: (B, F) classes of the frames.

    Returns:
        The index of the token that is spoken in each frame, (B, F) int64.
    """
    rows, count = tokens.shape
    wrong = tokens[:, None] != labels[..., None]  # (B, F, T)
    outside = np.arange(count) >= lengths[:, None]
    cost = np.where(np.arange(count) < 2, 0.0, np.inf) + wrong[:, 0] + np.where(outside, np.inf, 0.0)
    back = np.zeros(wrong.shape, np.int8)
    for frame in range(1, labels.shape[1]):
        steps = np.full((MAX_ADVANCE + 1, rows, count), np.inf)
        for step in range(MAX_ADVANCE + 1):
            steps[step, :, step:] = cost[:, : count - step] + SKIP_COST * max(0, step - 1)
        back[:, frame] = steps.argmin(0)
        cost = steps.min(0) + wrong[:, frame]
        cost[outside] = np.inf
    token = cost.argmin(1)
    path = np.empty(labels.shape, np.int64)
    for frame in range(labels.shape[1] - 1, -1, -1):
        path[:, frame] = token
        token = token - back[np.arange(rows), frame, token]
    return path


class Alignment:
    """Context manager that records the attention inputs of some layers. `loss` then guides one head of each layer.

    Args:
        model: the model.
        layers: indices of the layers of its language model.
    """

    def __init__(self, model: TalkerT2AV, layers: Sequence[int]) -> None:
        self.attentions = [model.llm.model.layers[i].self_attn for i in layers]
        self.inputs: list[tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]] = []

    def __enter__(self) -> Alignment:
        self._hooks = [a.register_forward_pre_hook(self._keep, with_kwargs=True) for a in self.attentions]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, attention: nn.Module, args: tuple, named: dict) -> None:
        hidden = named["hidden_states"] if "hidden_states" in named else args[0]
        self.inputs.append((attention, hidden, named["position_embeddings"]))

    def loss(self, batch: Mapping[str, Tensor], mask: Tensor, config: TalkerConfig) -> Tensor:
        """Return the mean negative log attention (B, T) to the tokens of the next patch.

        Args:
            batch: of `talker_t2av.data.collate`, with `pointer`.
            mask: (B, T), 1 at real tokens, including the task token at the start.
            config: of the model.
        """
        size = config.patch_size
        device = self.inputs[0][1].device
        frames = torch.arange(batch["pointer"].shape[1]) < batch["speech_frames"][:, None]
        at = torch.where(frames, 1 + batch["pointer"], -1)  # one task token in front
        at = F.pad(at, (0, -at.shape[1] % size), value=-1).unflatten(1, (-1, size))  # (B, M, P)
        row, patch = (at[..., 0] >= 0).nonzero(as_tuple=True)
        pointer = at[row, patch]
        layout = SpanLayout.of(config, batch)
        query = (layout.begin["speech"] - 1)[row] + layout.step[row] * patch
        query = query.clamp(max=layout.tokens - 1)
        row, query, first, last = to_device(torch.stack([row, query, pointer[:, 0], pointer.amax(1)]), device)
        mask = to_device(mask, device)
        position = torch.arange(mask.shape[1], device=device)
        is_target = (position >= first[:, None]) & (position <= last[:, None])
        visible = (position <= query[:, None]) & mask.bool()[row]
        losses = []
        for attention, hidden, (cos, sin) in self.inputs:
            width = attention.head_dim
            q = attention.q_norm(
                F.linear(hidden, attention.q_proj.weight[GUIDED_HEAD * width : (GUIDED_HEAD + 1) * width])
            )
            k = attention.k_norm(F.linear(hidden, attention.k_proj.weight[:width]))
            q, k = apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin)
            scores = (q[:, 0] @ k[:, 0].transpose(1, 2))[row, query].float() * attention.scaling
            scores = scores.masked_fill(~visible, -torch.inf)
            to_target = scores.masked_fill(~is_target, -torch.inf).logsumexp(1)
            losses.append((scores.logsumexp(1) - to_target).mean())
        return torch.stack(losses).mean()

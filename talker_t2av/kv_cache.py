"""Keys and values of the backbone in buffers of fixed size, for rows of unequal lengths padded on the left.

Axes: b rows, H key heads, L length so far, Q new tokens, N capacity, h head width, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from talker_t2av.layers import with_enough_rows
from talker_t2av.model import TalkerT2AV

EACH_ROW = "talker_each_row"


class KVCache:
    """What `Qwen3Attention` asks of a cache, without growing: nothing is copied but the new tokens.

    Attention sees only the filled part of the buffers, so that its cost is that of the tokens there are. On a CPU it
    sees each row by itself, without the padding: a row's result is then the same to the last bit whatever rows are
    beside it. Elsewhere rows share a call with a mask.
    """

    def __init__(self, padding: list[int], capacity: int, device: torch.device) -> None:
        """padding: for each row, how many of the first tokens are none. capacity: N."""
        self.capacity, self.length = capacity, 0
        self.each_row = device.type == "cpu"
        self.padding = torch.tensor(padding, device=device)[:, None]
        self._all_visible = not any(padding)
        self._visible = torch.arange(capacity, device=device) >= self.padding  # (b, N)
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Any, Any]:
        """Store new keys and values (b, H, Q, h) of a layer; gives all so far.

        Returns:
            Two tensors (b, H, L + Q, h), or with `each_row` two lists of (1, H, length of the row, h). Rows that were
            added to make enough of them are not stored.
        """
        rows = len(self.padding)
        if layer == len(self._layers):
            shape = (rows, keys.shape[1], self.capacity, keys.shape[3])
            self._layers.append((keys.new_empty(shape), values.new_empty(shape)))
        end = self.length + keys.shape[2]
        for buffer, new in zip(self._layers[layer], (keys, values)):
            buffer[:, :, self.length : end] = new[:rows]
        if self.each_row:
            first = self.padding[:, 0].tolist()
            return tuple([buffer[i : i + 1, :, n:end] for i, n in enumerate(first)] for buffer in self._layers[layer])
        return tuple(buffer[:, :, :end] for buffer in self._layers[layer])

    def feed(self, model: TalkerT2AV, embeds: Tensor) -> Tensor:
        """Run the backbone over the next tokens (b, Q, D); the hidden state (b, D) after the last."""
        end = self.length + embeds.shape[1]
        place = torch.arange(self.length, end, device=embeds.device)
        mask = None
        if not (self._all_visible or self.each_row):
            mask = self._visible[:, None, None, :end]
            if len(place) > 1:
                # A padding token sees itself, as a softmax over nothing is not a number.
                key = torch.arange(end, device=embeds.device)
                mask = (mask & (key <= place[:, None])) | (key == place[:, None])

        def run(embeds: Tensor, positions: Tensor) -> Tensor:
            # Given by layer type, the mask is taken as it is; without one, several tokens attend causally.
            return model.backbone(
                embeds, {"full_attention": mask}, position_ids=positions, past_key_values=self, use_cache=True
            )

        positions = (place - self.padding).clamp(min=0)
        with _attention(model, EACH_ROW if self.each_row else None):
            # Several tokens of a row are rows enough of every product.
            hidden = with_enough_rows(run, embeds, positions) if len(place) == 1 else run(embeds, positions)
        self.length = end
        return hidden[:, -1]

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        self.padding, self._visible = self.padding[rows], self._visible[rows]
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]


def _each_row(
    module: Any, query: Tensor, keys: list[Tensor], values: list[Tensor], *_: object, scaling: float, **__: object
) -> tuple[Tensor, None]:
    """Causal attention of queries (b, heads, Q, h), the last ones of each row; gives (b, Q, heads, h).

    Queries that are padding, and those of rows that have no keys, get zeros.
    """
    out = query.new_zeros(query.shape)
    for i, (k, v) in enumerate(zip(keys, values)):
        count = min(query.shape[2], k.shape[2])
        q = query[i : i + 1, :, -count:]
        assert count in (1, k.shape[2]), "several tokens only come first"
        out[i, :, -count:] = F.scaled_dot_product_attention(
            q, k, v, scale=scaling, is_causal=count > 1, enable_gqa=True
        )[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(EACH_ROW, _each_row)


@contextmanager
def _attention(model: TalkerT2AV, name: str | None) -> Iterator[None]:
    """The backbone's attention is the one of that name; None changes nothing."""
    config = model.llm.model.config
    usual = config._attn_implementation
    config._attn_implementation = name or usual
    try:
        yield
    finally:
        config._attn_implementation = usual

"""Keys and values of the backbone in buffers of fixed size, for rows of unequal lengths padded on the left.

Axes: b rows, H key heads, L length so far, Q new tokens, N capacity, h head width, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from talker_t2av.model import TalkerT2AV


class KVCache:
    """What `Qwen3Attention` asks of a cache, without growing: nothing is copied but the new tokens.

    Attention sees only the filled part of the buffers, so that its cost is that of the tokens there are.
    """

    def __init__(self, padding: list[int], capacity: int, device: torch.device) -> None:
        """padding: for each row, how many of the first tokens are none. capacity: N."""
        self.capacity, self.length = capacity, 0
        self.padding = torch.tensor(padding, device=device)[:, None]
        self._all_visible = not any(padding)
        self._visible = torch.arange(capacity, device=device) >= self.padding  # (b, N)
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b, H, Q, h) of a layer; gives all so far (b, H, L + Q, h)."""
        if layer == len(self._layers):
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._layers.append((keys.new_empty(shape), values.new_empty(shape)))
        end = self.length + keys.shape[2]
        for buffer, new in zip(self._layers[layer], (keys, values)):
            buffer[:, :, self.length : end] = new
        return tuple(buffer[:, :, :end] for buffer in self._layers[layer])

    def feed(self, model: TalkerT2AV, embeds: Tensor) -> Tensor:
        """Run the backbone over the next tokens (b, Q, D); the hidden state (b, D) after the last."""
        end = self.length + embeds.shape[1]
        place = torch.arange(self.length, end, device=embeds.device)
        mask = None
        if not self._all_visible:
            mask = self._visible[:, None, None, :end]
            if len(place) > 1:
                # A padding token sees itself, as a softmax over nothing is not a number.
                key = torch.arange(end, device=embeds.device)
                mask = (mask & (key <= place[:, None])) | (key == place[:, None])
        positions = (place - self.padding).clamp(min=0)
        # Given by layer type, the mask is taken as it is; without one, several tokens attend causally.
        hidden = model.backbone(
            embeds, {"full_attention": mask}, position_ids=positions, past_key_values=self, use_cache=True
        )
        self.length = end
        return hidden[:, -1]

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        self.padding, self._visible = self.padding[rows], self._visible[rows]
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]

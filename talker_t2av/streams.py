"""Streams cut into patches: for training, and encoded for generation.

Axes: B batch, M patches, P frames of a patch, F frames, C channels, N patches of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.nn.transfer import send


@dataclass(frozen=True)
class PatchStream:
    """One stream cut into patches: latents (B, M, P, C), zero from `frames` (B,) on; patches (B,) that hold a frame.

    Frames and patches may be on the host, as indices to `gather` then are.
    """

    latents: Tensor
    frames: Tensor
    patches: Tensor

    @classmethod
    def of(cls, latents: Tensor, frames: Tensor, size: int) -> PatchStream:
        length = latents.shape[1]
        frames = frames.clamp(max=length)
        real = send(torch.arange(length, device=frames.device) < frames[:, None], latents.device)
        latents = F.pad(latents * real[..., None], (0, 0, 0, -length % size))
        return cls(latents.unflatten(1, (-1, size)), frames, (frames + size - 1) // size)

    def gather(self, row: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (N, P, C) and which of their frames are real (N, P); a patch outside the stream has none."""
        count, size = self.latents.shape[1:3]
        if count == 0:
            empty = self.latents.new_zeros(len(row), size, self.latents.shape[-1])
            return empty, torch.zeros_like(empty[..., 0], dtype=torch.bool)
        frame = patch[:, None] * size + torch.arange(size, device=patch.device)
        real = (frame >= 0) & (frame < self.frames[row][:, None])
        place = send(torch.stack([row, patch.clamp(0, count - 1)]), self.latents.device)
        return self.latents[place[0], place[1]], send(real, self.latents.device)


class EncodedStream:
    """Tokens of the given frames of one stream. A patch without frames has the token of zero frames.

    The token of zero frames is not zero: in training the encoder sees it before and after a stream.
    """

    def __init__(self, encode: Callable[[Tensor, Tensor], Tensor], frames: Sequence[Tensor], patch_size: int) -> None:
        self.counts = [-(-len(x) // patch_size) for x in frames]
        longest = max(self.counts) + 1  # the last column stays empty in every row
        padded = torch.stack([F.pad(x, (0, 0, 0, longest * patch_size - len(x))) for x in frames])
        lengths = torch.tensor([len(x) for x in frames], device=padded.device)
        valid = torch.arange(longest * patch_size, device=padded.device) < lengths[:, None]
        self.tokens = encode(padded.unflatten(1, (-1, patch_size)), valid.unflatten(1, (-1, patch_size)))  # (B, M, D)

    def patches(self, row: int, numbers: Tensor) -> Tensor:
        """(n, D): tokens of patches (n,) of a row."""
        outside = (numbers < 0) | (numbers >= self.counts[row])
        return self.tokens[row, torch.where(outside, self.tokens.shape[1] - 1, numbers)]

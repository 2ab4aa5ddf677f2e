"""Streams cut into patches.

Axes: B batch, M patches, P frames of a patch, F frames, C channels, N patches of all rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import send


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

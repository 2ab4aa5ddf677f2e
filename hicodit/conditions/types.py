"""The typed conditions of HiCoDiT.

Axes: B batch, T video frames (25 a second), J expression windows (2 a second), E lip feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPRESSIONS = ("neutral", "happy", "sad", "surprised", "fearful", "disgusted", "angry")
NO_EXPRESSION = len(EXPRESSIONS)  # row of the null condition in the expression table
WINDOW_SECONDS = 0.5


@dataclass(frozen=True)
class Conditions:
    """All that a clip says, made once.

    lip: (B, T, E) lip features, 25 a second.
    identity: (B, 256) unit vectors in the GE2E voice space.
    expression: (B, J) class of each half second, an index into `EXPRESSIONS`; J = ceil(T / 12.5).
    frames: (B,) valid video frames of each clip; the rest of T is padding.
    """

    lip: Tensor
    identity: Tensor
    expression: Tensor
    frames: Tensor

    @property
    def batch(self) -> int:
        return len(self.frames)


def window_expressions(probabilities: Tensor) -> Tensor:
    """Frame-wise class probabilities (T, 7) at 25 frames a second to one class a half second (J,).

    The most frequent class of a window wins, ties go to the larger summed probability; a last partial window counts.
    """
    window = 2 * torch.arange(len(probabilities), device=probabilities.device) // 25
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).to(probabilities.dtype)
    size = (int(window[-1]) + 1, probabilities.shape[-1])
    counts = torch.zeros(size, dtype=probabilities.dtype, device=probabilities.device).index_add_(0, window, votes)
    mass = torch.zeros_like(counts).index_add_(0, window, probabilities)
    return (counts + mass / (mass.sum(-1, keepdim=True) + 1e-9) * 0.5).argmax(-1)  # the tie-break stays under one vote

"""When to stop: the head, its labels and its loss.

Axes: B batch, T tokens of the language model, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
LONGEST_SPAN = 187  # patches; longer clips were cut at 30 s, so that their end is unknown
POSITIVE_SHARE = 0.3  # released weight of positives, as a share of the ratio of negatives to positives


class StopPredictor(nn.Module):
    """Hidden states (..., D) to logits (...)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(F.silu(self.proj(h)))[..., 0]


def stop_labels(
    start: Tensor, length: Tensor, tokens: int, patch_size: int = 4, fps: float = 25, ignore_seconds: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Labels (B, T) of spans: 1 at the last patch, 0 before, -100 outside and shortly before the end.

    A span that runs past the row, or is longer than `LONGEST_SPAN`, has no end: all its patches are 0.

    Args:
        start, length: (B,) of each row's span, in tokens.
        tokens: T.
    Returns:
        Labels, and the mean number of zeros of the rows that have a 1 (1.0 if none has).
    """
    ignored = max(1, round(ignore_seconds * fps / patch_size))
    end = start + length
    first, stop = start.clamp(min=0), end.clamp(max=tokens)
    valid = (length > 0) & (first < stop)
    ends = valid & (end <= tokens) & (length <= LONGEST_SPAN)
    last = torch.maximum(first, stop - 1 - ignored)
    place = torch.arange(tokens, device=start.device)
    zeros_end = torch.where(ends, last, stop)[:, None]
    labels = torch.full((len(start), tokens), IGNORED, device=start.device)
    labels = labels.masked_fill(valid[:, None] & (place >= first[:, None]) & (place < zeros_end), 0)
    labels = labels.masked_fill(ends[:, None] & (place == stop[:, None] - 1), 1)
    count = ends.sum()
    zeros = ((last - first) * ends).sum() / count.clamp(min=1)
    return labels, torch.where(count > 0, zeros, 1.0)


def stop_loss(logits: Tensor, labels: Tensor, pos_weight: Tensor, share: float = POSITIVE_SHARE) -> Tensor:
    """Binary cross entropy of logits (B, T), averaged over the labelled positions; 0 if there is none.

    Args:
        pos_weight: of `stop_labels`; positives weigh `share` of it.
    """
    counted = labels != IGNORED
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), labels.clamp(min=0).float(), reduction="none", pos_weight=share * pos_weight
    )
    return (loss * counted).sum() / counted.sum().clamp(min=1)

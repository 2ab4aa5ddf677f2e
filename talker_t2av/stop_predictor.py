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
    start: Tensor,
    length: Tensor,
    tokens: int,
    patch_size: int = 4,
    fps: float = 25,
    ignore_seconds: float = 0.3,
    step: Tensor | int = 1,
) -> tuple[Tensor, Tensor]:
    """Labels (B, T) of spans: 1 at the last patch, 0 before, -100 outside and shortly before the end.

    A span that runs past the row, or is longer than `LONGEST_SPAN`, has no end: all its patches are 0.

    Args:
        start, length: (B,) of each row's span, in tokens.
        tokens: T.
        step: (B,) tokens of a patch. The last of them bears the label, the others have none.
    Returns:
        Labels, and the mean number of zeros of the rows that have a 1 (1.0 if none has).
    """
    ignored, end, step = (
        max(1, round(ignore_seconds * fps / patch_size)),
        start + length,
        step + torch.zeros_like(start),
    )
    first, stop = start.clamp(min=0), end.clamp(max=tokens)
    valid = (length > 0) & (first < stop)
    ends = valid & (end <= tokens) & (length // step <= LONGEST_SPAN)
    count = (stop - first) // step  # of patches
    last = (count - 1 - ignored).clamp(min=0)
    offset, step = torch.arange(tokens, device=start.device) - first[:, None], step[:, None]
    patch = torch.where((offset >= 0) & (offset % step == step - 1) & valid[:, None], offset // step, -1)
    zero = (patch >= 0) & (patch < torch.where(ends, last, count)[:, None])
    one = (patch >= 0) & ends[:, None] & (patch == count[:, None] - 1)
    labels = torch.full_like(patch, IGNORED).masked_fill(zero, 0).masked_fill(one, 1)
    rows = ends.sum()
    return labels, torch.where(rows > 0, (last * ends).sum() / rows.clamp(min=1), 1.0)


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

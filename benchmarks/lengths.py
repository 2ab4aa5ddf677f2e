"""Synthetic clip lengths of a speech corpus, and the resulting load imbalance between ranks."""

from __future__ import annotations

from typing import Any

import torch

from engine.training.batches import MicroBatches

CLIPS = 20_000
# of the clips' seconds: median, standard deviation of the logarithm, crop
MEDIAN = 5.0
SPREAD = 0.5
LONGEST = 10.0
FPS = 25
STEPS = 200  # number of micro-batches that are averaged


class MadeUpClips:
    """A training set of clips without content, whose lengths (n,) in frames have a log-normal distribution."""

    def __init__(self) -> None:
        spread = torch.randn(CLIPS, generator=torch.Generator().manual_seed(0)) * SPREAD
        self.lengths = (FPS * MEDIAN * spread.exp()).round().clamp(FPS, FPS * LONGEST).long()

    def __len__(self) -> int:
        return CLIPS

    def load(self, index: int, generator: torch.Generator) -> int:
        return int(self.lengths[index])

    def collate(self, items: list[int]) -> dict[str, Any]:
        return {"frames": torch.tensor(items)}


def padding_efficiency(batches: MicroBatches, ranks: int) -> float:
    """Return the mean over the maximum of the ranks' padded tokens, averaged over micro-batches of the ranks.

    It is the fraction of time in which ranks do not wait for the one with the longest batch.
    """
    lengths = batches.dataset.lengths
    factors = []
    for step in range(max(1, min(STEPS, len(lengths) // (ranks * batches.size)))):
        padded = torch.stack([lengths[batches.samples(step * ranks + rank)].max() for rank in range(ranks)]).double()
        factors.append(float(padded.mean() / padded.max()))
    return sum(factors) / len(factors)

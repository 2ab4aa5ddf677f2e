"""Seeds and data order as functions of names and numbers, so that a resumed run needs no stored random state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch


def seed_for(*names: str | int) -> int:
    """A 63-bit seed that depends on every name and on their order, and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "big") >> 1


def generator_for(*names: str | int) -> torch.Generator:
    """A CPU generator seeded by `seed_for(*names)`."""
    return torch.Generator().manual_seed(seed_for(*names))


class TrainingSet(Protocol):
    """A dataset for the trainer. All randomness of an item (crops, augmentation) is drawn from the generator."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, generator: torch.Generator) -> Any: ...

    def collate(self, items: list[Any]) -> dict[str, Any]: ...


class MicroBatches(torch.utils.data.Dataset):
    """An endless row of batches; number g holds the samples at positions [g * size, (g + 1) * size) of all epochs.

    Epoch e is a permutation of the dataset drawn from (seed, e); a batch may straddle two epochs, so every sample is
    used once an epoch and every batch is full. The same positions give the same samples whichever process asks.
    """

    def __init__(self, dataset: TrainingSet, size: int, seed: int):
        self.dataset, self.size, self.seed = dataset, size, seed
        self._order: Callable[[int], torch.Tensor] | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.dataset.collate(
            [
                self.dataset.__getitem__(index, generator_for(self.seed, "sample", position))
                for position, index in self.samples(number)
            ]
        )

    def samples(self, number: int) -> list[tuple[int, int]]:
        """(position among all epochs, index in the dataset) of every sample of batch `number`."""
        if self._order is None:  # made in the worker process, as a cache cannot be pickled
            self._order = lru_cache(maxsize=2)(self._permutation)
        samples = []
        for position in range(number * self.size, (number + 1) * self.size):
            epoch, offset = divmod(position, len(self.dataset))
            samples.append((position, int(self._order(epoch)[offset])))
        return samples

    def _permutation(self, epoch: int) -> torch.Tensor:
        return torch.randperm(len(self.dataset), generator=generator_for(self.seed, "epoch", epoch))

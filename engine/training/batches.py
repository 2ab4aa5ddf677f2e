"""Batches as a function of their number, so that a resumed run needs no stored position but a number.

Items of a dataset may lie in blocks, the shards of a prepared split. Blocks are then dealt to streams, and items are
shuffled inside a window of blocks, so that a process that reads one stream has few blocks in use at a time. Batch
number g belongs to stream g mod S. Of W processes, rank r takes the numbers r, r + W, ...: with S = W it reads one
stream alone, and with any S and W all together see what one process sees.

Axes: n items, S streams, m = n // S items of a stream in an epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import UserError
from engine.seeding import generator_for
from engine.shards.reader import Blocks
from engine.training import distributed
from engine.training.signals import ignore_in_worker

POOL = 64  # batches' worth of items that are sorted by length together: more means less padding and less chance


class TrainingSet(Protocol):
    """A dataset for the trainer. All randomness of an item (crops, augmentation) is drawn from the generator.

    It may also have:
        lengths: (n,) tensor, the tokens of each item, for batches by length.
        blocks: `Blocks`, or None where every item is equally quick to read.
        prefetch(spans): called with the items [first, last) that come next, where there are blocks.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, generator: torch.Generator) -> Any: ...

    def collate(self, items: list[Any]) -> dict[str, Any]: ...


def require_lengths(dataset: TrainingSet | type) -> None:
    """Refuse batches by length of a dataset, or class of datasets, whose items have none."""
    if getattr(dataset, "lengths", None) is None:
        name = dataset.__name__ if isinstance(dataset, type) else type(dataset).__name__
        raise UserError(f"{name} has no lengths of its items: set trainer.by_length=false")


class MicroBatches(torch.utils.data.Dataset):
    """An endless row of batches; the same number gives the same batch whichever process asks.

    By count, every batch is full and may straddle two epochs: of a stream's items in all epochs one after the other,
    its batch j holds [j * size, (j + 1) * size). Every item is used once an epoch (but for n mod S of them). By length,
    an epoch's items are sorted in pools and cut into batches of like length, which come in random order.

    Args:
        size: items of a batch.
        by_length: put items of like length in one batch.
        streams: S, for a dataset of blocks; None: as many as there are processes.
    """

    def __init__(self, dataset: TrainingSet, size: int, seed: int, by_length: bool = False, streams: int | None = None):
        self.dataset, self.size, self.seed, self.by_length = dataset, size, seed, by_length
        if by_length:
            require_lengths(dataset)
        self.blocks: Blocks | None = getattr(dataset, "blocks", None)
        self.streams = (self.blocks.streams or streams or distributed.world_size()) if self.blocks else 1
        if len(dataset) < self.streams:
            raise UserError(f"data.shards.streams={self.streams}, but there are only {len(dataset)} clips: lower it")
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._cuts = lru_cache(maxsize=2 * self.streams)(self._cut)
        self._ends = [[0] for _ in range(self.streams)]  # of each stream, batches in all epochs before each

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the caches out of a pickle."""
        return MicroBatches, (self.dataset, self.size, self.seed, self.by_length, self.streams)

    @property
    def fixed_shapes(self) -> bool:
        """Return whether all batches have the same shape, as far as is known: items have no lengths."""
        return getattr(self.dataset, "lengths", None) is None

    def state(self) -> dict[str, int]:
        """Return what the numbers of batches depend on, for a checkpoint."""
        return {"batch_size": self.size, "streams": self.streams}

    def position(self, info: dict[str, Any]) -> int:
        """Return the number of the next batch after a checkpoint, whose batches may have had another size."""
        if self.by_length:
            return info["position"]
        return info["position"] * info.get("batch_size", self.size) // self.size

    def __getitem__(self, number: int) -> dict[str, Any] | UserError:
        """Make batch `number`. A worker process returns an error, which `load_batches` raises: it stays one line."""
        try:
            epoch, window, chosen = self._choose(number)
            if self.blocks is not None:
                self.dataset.prefetch(self._order(epoch).spans(number % self.streams, window))
            items = [self.dataset.__getitem__(index, generator_for(self.seed, *names)) for names, index in chosen]
            return self.dataset.collate(items)
        except UserError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error

    def samples(self, number: int) -> list[tuple[tuple, int]]:
        """Return (names that seed it, index in the dataset) of every sample of batch `number`."""
        return self._choose(number)[2]

    def mean_size(self) -> float:
        """Return the mean number of items in a batch."""
        if not self.by_length:
            return self.size
        return (len(self.dataset) // self.streams) / len(self._cuts(0, 0))

    def _choose(self, number: int) -> tuple[int, int, list[tuple[tuple, int]]]:
        """Return the epoch and the window of a batch, and its samples."""
        turn, stream = divmod(number, self.streams)
        if self.by_length:
            ends = self._ends[stream]
            while ends[-1] <= turn:
                ends.append(ends[-1] + len(self._cuts(len(ends) - 1, stream)))
            epoch = bisect_right(ends, turn) - 1
            batch = self._cuts(epoch, stream)[turn - ends[epoch]]
            order = self._order(epoch)
            window = int(order.windows[stream, batch[0]])
            chosen = [(("sample", epoch, index), index) for index in order.items[stream, batch].tolist()]
            return epoch, window, chosen
        count, chosen = len(self.dataset) // self.streams, []
        for k in range(self.size):
            epoch, offset = divmod(turn * self.size + k, count)
            chosen.append((("sample", number * self.size + k), int(self._order(epoch).items[stream, offset])))
        return epoch, int(self._order(epoch).windows[stream, offset]), chosen

    def _make_order(self, epoch: int) -> Order:
        draw = generator_for(self.seed, "epoch", epoch)
        if self.blocks is not None:
            return Order.of_blocks(replace(self.blocks, streams=self.streams), draw)
        items = torch.randperm(len(self.dataset), generator=draw)[None]
        return Order(items, torch.zeros_like(items), lambda stream, window: [])

    def _cut(self, epoch: int, stream: int) -> list[Tensor]:
        """Cut a stream's epoch into batches by length, as positions in its order."""
        order = self._order(epoch)
        lengths = torch.as_tensor(self.dataset.lengths)[order.items[stream]]
        _, sizes = order.windows[stream].unique_consecutive(return_counts=True)
        batches = []
        for window, positions in enumerate(torch.arange(len(lengths)).split(sizes.tolist())):
            cuts = []
            for pool in positions.split(POOL * self.size):
                pool = pool[lengths[pool].argsort(descending=True, stable=True)]
                cuts += pool.tensor_split(-(-len(pool) // self.size))
            draw = generator_for(self.seed, "batches", epoch, stream, window)
            batches += [cuts[i] for i in torch.randperm(len(cuts), generator=draw).tolist()]
        return batches


@dataclass(frozen=True)
class Order:
    """One epoch: items (S, m) in the order of each stream; the window (S, m) that each belongs to; spans of blocks."""

    items: Tensor
    windows: Tensor
    spans: Callable[[int, int], list[tuple[int, int]]]

    @classmethod
    def of_blocks(cls, blocks: Blocks, draw: torch.Generator) -> Order:
        """Deal blocks in random order to the streams in equal parts; a block on a border belongs to both."""
        sizes = torch.tensor(blocks.sizes)
        first = sizes.cumsum(0) - sizes
        order = torch.randperm(len(sizes), generator=draw)
        ranks = torch.arange(len(sizes)).repeat_interleave(sizes[order])
        offset = first[order] - (sizes[order].cumsum(0) - sizes[order])
        items = torch.arange(len(ranks)) + offset[ranks]
        each = len(items) // blocks.streams
        items, ranks = (x[: each * blocks.streams].view(blocks.streams, each) for x in (items, ranks))
        windows = (ranks - ranks[:, :1]) // blocks.window
        mixed = (windows + torch.rand(windows.shape, generator=draw, dtype=torch.float64)).argsort(1)
        begin, end = ranks[:, 0].tolist(), ranks[:, -1].tolist()

        def spans(stream: int, window: int) -> list[tuple[int, int]]:
            """Return items [first, last) of each block of a window and of the next one."""
            at = begin[stream] + window * blocks.window
            blocks_ahead = order[at : min(at + 2 * blocks.window, end[stream] + 1)].tolist()
            return [(int(first[i]), int(first[i] + sizes[i])) for i in blocks_ahead if sizes[i]]

        return cls(items.gather(1, mixed), windows, spans)


def load_batches(
    batches: MicroBatches, numbers: range, workers: int, device: torch.device, stay: Container[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the batches of these numbers on `device`, made by `workers` processes ahead of time.

    For CUDA they come through pinned memory, and one is copied to the device ahead of the one in use.

    Args:
        stay: entries of a batch that stay in main memory.
    """
    cuda = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=cuda,
        worker_init_fn=ignore_in_worker,
    )
    ahead: deque[dict[str, Any]] = deque()
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        ahead.append({name: value if name in stay else _move(value, device) for name, value in batch.items()})
        if len(ahead) > cuda:
            yield ahead.popleft()
    yield from ahead


def _move(value: Any, device: torch.device) -> Any:
    """Move tensors, however nested in dicts, to `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return {k: _move(v, device) for k, v in value.items()} if isinstance(value, dict) else value

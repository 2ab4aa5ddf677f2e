"""Batches as a function of their number, so that a resumed run needs no stored position but a number.

Items of a dataset may lie in blocks, the shards of a prepared split. Blocks are then dealt to streams, and items are
shuffled inside a window of blocks, so that a process that reads one stream has few blocks in use at a time. Batch
number g belongs to stream g mod S. Of W processes, rank r takes the numbers r, r + W, ...: with S = W it reads one
stream alone, and with any S and W all together see what one process sees.

Axes: n items, S streams, m = n // S items of a stream in an epoch.
"""

from __future__ import annotations

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

POOL = 32  # groups that are sorted by length together: more means less padding and less chance
JITTER = 0.05  # relative noise of the lengths that are sorted, so that small datasets get new batches every epoch
STEP = 512  # samples per step, unless stated


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
    """An endless sequence of batches; the same number gives the same batch in every process.

    Each stream goes through its items in a new random order every epoch. Batch j of a stream holds its items
    [j * size, (j + 1) * size), counted over all epochs, so batches are always full and may straddle two epochs.
    Every item is used once per epoch, except for n mod S of them.

    With `by_length`, neighbouring items have similar lengths: the items are sorted in pools, and groups of neighbours
    are shuffled. A group holds the samples of one step, so that the ranks of a step finish together. The order does not
    depend on `size` or on the world size, so a run that resumes with other ones continues at the same sample.

    Args:
        dataset: see `TrainingSet`.
        size: items per batch.
        seed: seed of order and items.
        by_length: give neighbouring items similar lengths.
        streams: S, for a dataset of blocks; None: the world size.
        step: samples per step over all ranks, the size of a group with `by_length`.
    """

    def __init__(
        self,
        dataset: TrainingSet,
        size: int,
        seed: int,
        by_length: bool = False,
        streams: int | None = None,
        step: int = STEP,
    ):
        self.dataset = dataset
        self.size = size
        self.seed = seed
        self.by_length = by_length
        if by_length:
            require_lengths(dataset)
        self.blocks: Blocks | None = getattr(dataset, "blocks", None)
        self.streams = (self.blocks.streams or streams or distributed.world_size()) if self.blocks else 1
        if len(dataset) < self.streams:
            raise UserError(f"data.shards.streams={self.streams}, but there are only {len(dataset)} clips: lower it")
        self.group = max(size, step // self.streams)  # items of a stream
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of a pickle."""
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def fixed_shapes(self) -> bool:
        """Whether all batches are known to have the same shape, because items have no lengths."""
        return getattr(self.dataset, "lengths", None) is None

    def state(self, number: int) -> dict[str, int]:
        """Return what a checkpoint stores, for `resume`, before batch `number`."""
        return {"samples": number * self.size, "streams": self.streams, "group": self.group}

    def resume(self, state: dict[str, Any]) -> int:
        """Continue after a checkpoint, whose batches may have had another size; return the number of the next batch."""
        self.streams = state["streams"]
        self.group = state["group"]
        self._order.cache_clear()
        return state["samples"] // self.size

    def __getitem__(self, number: int) -> dict[str, Any] | UserError:
        """Make batch `number`. A worker process returns an error, which `load_batches` raises: it stays one line."""
        try:
            epoch, window, indices = self._choose(number)
            if self.blocks is not None:
                self.dataset.prefetch(self._order(epoch).spans(number % self.streams, window))
            first = number * self.size
            draws = [generator_for(self.seed, "sample", first + k) for k in range(self.size)]
            return self.dataset.collate([self.dataset.__getitem__(*pair) for pair in zip(indices, draws)])
        except UserError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error

    def samples(self, number: int) -> list[int]:
        """Return the index in the dataset of every sample of batch `number`."""
        return self._choose(number)[2]

    def _choose(self, number: int) -> tuple[int, int, list[int]]:
        """Return the epoch and the window in which a batch ends, and the indices of its items."""
        turn, stream = divmod(number, self.streams)
        count = len(self.dataset) // self.streams
        indices = []
        for place in range(turn * self.size, (turn + 1) * self.size):
            epoch, offset = divmod(place, count)
            order = self._order(epoch)
            indices.append(int(order.items[stream, offset]))
        return epoch, int(order.windows[stream, offset]), indices

    def _make_order(self, epoch: int) -> Order:
        draw = generator_for(self.seed, "epoch", epoch)
        if self.blocks is not None:
            order = Order.of_blocks(replace(self.blocks, streams=self.streams), draw)
        else:
            items = torch.randperm(len(self.dataset), generator=draw)[None]
            order = Order(items, torch.zeros_like(items), lambda stream, window: [])
        return self._sort(order, epoch) if self.by_length else order

    def _sort(self, order: Order, epoch: int) -> Order:
        """Reorder each stream of an epoch by length: sort pools of items, and shuffle groups within a pool.

        Pools and the permutation of groups are the same in all streams, so that ranks which read different streams have
        similar lengths at the same time. Groups begin at multiples of their size, counted over all epochs, as steps do;
        what is left before the first and after the last whole group stays there.
        """
        count = order.items.shape[1]
        windows = int(order.windows.max()) + 1
        pool = max(1, min(POOL, count // windows // self.group)) * self.group  # few more items than a window of blocks
        head = min(count, -epoch * count % self.group)
        draw = generator_for(self.seed, "groups", epoch)
        lengths = torch.as_tensor(self.dataset.lengths)[order.items]
        lengths = lengths * (1 + JITTER * torch.rand(lengths.shape, generator=draw))
        places = torch.arange(count).expand(len(lengths), count).clone()
        for first in range(head, count, pool):
            last = min(first + pool, count)
            by_length = first + lengths[:, first:last].argsort(dim=1, descending=True, stable=True)
            whole = (last - first) // self.group
            groups = by_length[:, : whole * self.group].unflatten(1, (whole, self.group)) if whole else by_length[:, :0]
            shuffled = groups[:, torch.randperm(whole, generator=draw)].flatten(1)
            places[:, first:last] = torch.cat([shuffled, by_length[:, whole * self.group :]], 1)
        return replace(order, items=order.items.gather(1, places), windows=order.windows.gather(1, places))


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
        begin = ranks[:, 0].tolist()
        end = ranks[:, -1].tolist()

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

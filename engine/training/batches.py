"""Batches as a function of their index, so that a resumed run only needs to store an index.

Items of a dataset may be grouped in blocks, the shards of a prepared split. Blocks are divided among streams, and items
are shuffled within a window of blocks, so that a process that reads one stream uses few blocks at a time. Batch g
belongs to stream g mod S. Of W processes, rank r takes batches r, r + W, ...: with S = W it reads a single stream. For
any S and W, all ranks together see the same data as one process.

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

POOL = 32  # groups per sorting pool: larger pools reduce padding and randomness
JITTER = 0.05  # relative noise of the sorted lengths, so that batches of small datasets vary between epochs
STEP = 512  # default number of samples per step


class TrainingSet(Protocol):
    """Dataset for the trainer. It has `load` instead of `__getitem__`, as an item is a function of its index and a
    generator, from which all its randomness (crops, augmentation) must be drawn.

    Optional members:
        lengths: (n,) number of tokens of each item, for batching by length.
        blocks: `Blocks`, or None if items can be read in any order equally fast.
        prefetch(spans): called with the spans [first, last) of the next items, if there are blocks.
    """

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator) -> Any: ...

    def collate(self, items: list[Any]) -> dict[str, Any]: ...


def require_lengths(dataset: TrainingSet | type) -> None:
    """Raise UserError if a dataset (or class) has no item lengths, which batching by length requires."""
    if getattr(dataset, "lengths", None) is None:
        name = dataset.__name__ if isinstance(dataset, type) else type(dataset).__name__
        raise UserError(f"{name} has no lengths of its items: set trainer.by_length=false")


class MicroBatches(torch.utils.data.Dataset):
    """Infinite sequence of batches. Batch i is the same in every process.

    Each stream visits its items in a new random order in every epoch. Batch j of a stream has its items [j * size, (j
    + 1) * size), counted over all epochs, so batches are always full and may straddle two epochs. Every item is used
    once per epoch, except for n mod S of them.

    With `by_length`, neighbouring items have similar lengths: the items are sorted in pools, and groups of neighbours
    are shuffled. A group contains the samples of one step, so that the ranks of a step finish together. The order does
    not depend on `size` or on the world size, so that a resumed run can change both and continues at the same sample.

    Args:
        dataset: see `TrainingSet`.
        size: number of items per batch.
        seed: random seed of order and items.
        by_length: group items of similar length.
        streams: S, for a dataset with blocks. None: the world size.
        step: samples per step over all ranks, which is the group size with `by_length`.
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
        self.group = max(size, step // self.streams)  # number of items per stream
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the cache from pickling."""
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def fixed_shapes(self) -> bool:
        """Whether all batches have the same shape, because items have no lengths."""
        return getattr(self.dataset, "lengths", None) is None

    def state(self, number: int) -> dict[str, int]:
        """Return the state to store in a checkpoint before batch `number`, for `resume`."""
        return {"samples": number * self.size, "streams": self.streams, "group": self.group, "size": self.size}

    def resume(self, state: dict[str, Any]) -> int:
        """Restore a checkpoint, whose batch size may differ. Return the index of the next batch.

        Raises:
            UserError: If no batch of this size starts at the checkpoint's sample.
        """
        if state.get("size", self.size) != self.size and state["samples"] % (self.size * state["streams"]):
            raise UserError(
                f"the checkpoint is at sample {state['samples']:,}, which is not a multiple of batches of {self.size} "
                f"from {state['streams']} streams: resume with the former batch size"
            )
        self.streams = state["streams"]
        self.group = state["group"]
        self._order.cache_clear()
        return state["samples"] // self.size

    def __getitem__(self, number: int) -> dict[str, Any] | UserError:
        """Return batch `number`. Errors are returned, and raised by `load_batches`, so that worker processes do not
        print tracebacks.
        """
        try:
            epoch, window, indices = self._choose(number)
            if self.blocks is not None:
                self.dataset.prefetch(self._order(epoch).spans(number % self.streams, window))
            first = number * self.size
            draws = [generator_for(self.seed, "sample", first + k) for k in range(self.size)]
            return self.dataset.collate([self.dataset.load(*pair) for pair in zip(indices, draws)])
        except UserError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error

    def samples(self, number: int) -> list[int]:
        """Return the dataset index of every sample of batch `number`."""
        return self._choose(number)[2]

    def _choose(self, number: int) -> tuple[int, int, list[int]]:
        """Return the epoch and window in which a batch ends, and its item indices."""
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
        """Sort each stream of an epoch by length: sort pools of items, and shuffle groups within each pool.

        Pools and group permutations are the same in all streams, so that ranks that read different streams have similar
        lengths at the same time. Groups start at multiples of their size, counted over all epochs like steps; items
        before the first and after the last complete group keep their positions.
        """
        count = order.items.shape[1]
        windows = int(order.windows.max()) + 1
        # Slightly more items than a window of blocks.
        pool = max(1, min(POOL, count // windows // self.group)) * self.group
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
    """Order of one epoch: items (S, m) of each stream, the window (S, m) of each item, and the spans of blocks."""

    items: Tensor
    windows: Tensor
    spans: Callable[[int, int], list[tuple[int, int]]]

    @classmethod
    def of_blocks(cls, blocks: Blocks, draw: torch.Generator) -> Order:
        """Divide blocks in random order among the streams in equal parts. A block at a boundary belongs to both
        streams.
        """
        sizes = torch.tensor(blocks.sizes)
        ends = sizes.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        order = torch.randperm(len(sizes), generator=draw).tolist()
        items = torch.cat([torch.arange(starts[block], ends[block]) for block in order])
        ranks = torch.arange(len(order)).repeat_interleave(sizes[order])  # position in `order` of each item's block
        each = len(items) // blocks.streams
        count = each * blocks.streams
        items = items[:count].view(blocks.streams, each)
        ranks = ranks[:count].view(blocks.streams, each)
        windows = (ranks - ranks[:, :1]) // blocks.window
        mixed = (windows + torch.rand(windows.shape, generator=draw, dtype=torch.float64)).argsort(1)
        first_ranks = ranks[:, 0].tolist()
        last_ranks = ranks[:, -1].tolist()

        def spans(stream: int, window: int) -> list[tuple[int, int]]:
            """Return the spans [first, last) of the items of each block in a window and the next one."""
            begin = first_ranks[stream] + window * blocks.window
            end = min(begin + 2 * blocks.window, last_ranks[stream] + 1)
            return [(starts[block], ends[block]) for block in order[begin:end] if starts[block] < ends[block]]

        return cls(items.gather(1, mixed), windows, spans)


def load_batches(
    batches: MicroBatches, numbers: range, workers: int, device: torch.device, stay: Container[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the batches with these indices on `device`, prepared by `workers` processes.

    For CUDA, pinned memory is used, and the next batch is copied to the device in advance.

    Args:
        stay: entries of a batch that are not moved to the device.
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
    """Move tensors, nested in dicts, to `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return {k: _move(v, device) for k, v in value.items()} if isinstance(value, dict) else value

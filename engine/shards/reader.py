"""Random access to the samples of a prepared split, directly within the tar files.

SPLIT/index.json lists the shards with sizes and checksums, and the stages and weights that produced them.
SPLIT/000000.json lists the samples of a shard and the offset of each member in SPLIT/000000.tar. See docs/data.md.
"""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.settings import Group, setting
from engine.shards.source import SplitFiles, join, verify_once
from engine.untrusted import parse_json, safe_name

VERSION = 2
OPEN_SHARDS = 64  # number of open files per process
HEADER = 2048  # bytes to read first; most headers are shorter
DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Reading(Group, prefix="data.shards."):
    """Settings of reading and shuffling shards: the fields of `data.shards` in configs/data/shards.yaml.

    Attributes:
        streams: with as many processes as streams, each process reads a single stream. A run that is resumed with
            another number of processes keeps its number of streams.
    """

    cache: str = setting("data/cache", about="cache folder for remote shards")
    cache_gb: float = setting(50.0, 1e-9, 1e9, "size limit of the cache in GB")
    verify: bool = setting(True, about="verify the checksum of each shard when a machine first opens it")
    window: int | None = setting(None, 1, 10**9, "number of shards whose clips are shuffled together; null: all")
    streams: int | None = setting(
        None, 1, 10**9, "number of streams among which the shards are divided in each epoch; null: number of processes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None and self.streams not in (None, 1):
            raise UserError(
                f"data.shards.streams={self.streams} requires data.shards.window, the shards shuffled together"
            )


@dataclass(frozen=True)
class Blocks:
    """Consecutive items of a data set that are read together; block i contains sizes[i] items.

    Attributes:
        window: number of blocks whose items are shuffled together.
        streams: number of streams among which the blocks are divided in each epoch. None: the number of processes.
    """

    sizes: Sequence[int]
    window: int
    streams: int | None = 1


class ShardSplit:
    """All samples of a split; sample i is (its JSON, its tensors).

    Can be used in forked and spawned worker processes.

    Args:
        source: folder or URL with index.json.
        reading: see `Reading`.
        least_frames: shorter samples are skipped, and their number is printed.

    Attributes:
        index: contents of index.json.
        frames: (n,) int64, number of frames of each sample.
        sizes: number of samples of each shard.
    """

    def __init__(self, source: str | Path, reading: Reading | None = None, least_frames: int = 0) -> None:
        self.reading = r = reading or Reading()
        self.source = str(source)
        self.files = SplitFiles(self.source, r.cache, round(r.cache_gb * 1e9))
        self.index = self.files.index
        if (version := self.index.get("version")) != VERSION:
            raise UserError(
                f"{source}: shards of version {version}, this program supports {VERSION}: prepare them again"
            )
        self.shards: list[dict[str, Any]] = self.index["shards"]
        self.sizes: list[int] = [shard["clips"] for shard in self.shards]
        with ThreadPoolExecutor(16) as pool:  # fetch remote files concurrently
            tables = list(pool.map(self._table, self.shards))
        if not sum(self.sizes):
            raise UserError(f"{source} has no samples: see its quarantine.jsonl for the reasons")
        self.frames = torch.from_numpy(np.concatenate([frames for frames, _, _ in tables]))
        self._members = np.concatenate([members for _, members, _ in tables])
        self._tensor_names = [names for _, _, names_of_samples in tables for names in names_of_samples]
        self._ends = np.cumsum(self.sizes)
        short = self.frames.numpy() < least_frames
        self._drop(short, f"shorter than {least_frames} frames", f"of {least_frames} frames or more")
        self._handles: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.frames)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": OrderedDict()}

    def read(self, index: int, names: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the JSON of a sample, and its tensors with the given names that exist (None: all tensors)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, "right"))
        handle = self._open(shard)
        listed = self._tensor_names[index]
        if names is not None:
            listed = listed.intersection(names)
        try:
            info, tensors = read_sample(handle, self._members[index].tolist(), names)
            if not tensors.keys() >= listed:
                raise ValueError(f"{info['key']} has no {', '.join(sorted(listed - tensors.keys()))}")
            return info, tensors
        except (OSError, ValueError, KeyError, TypeError) as error:
            path = self.files.tar(self.shards[shard])
            raise UserError(f"shard {path} is damaged ({error}): copy it or prepare it again") from error

    __getitem__ = read

    def require(self, *names: str) -> None:
        """Skip samples without one of these tensors, such as clips without video, and print their number."""
        incomplete = np.array([not contained.issuperset(names) for contained in self._tensor_names])
        missing = [name for name in names if any(name not in contained for contained in self._tensor_names)]
        self._drop(incomplete, f"as they have no {', '.join(missing)}", f"with {', '.join(names)}: prepare that too")

    def blocks(self) -> Blocks | None:
        """Return the shards as blocks, or None if all samples are shuffled together."""
        if self.reading.window is None:
            return None
        return Blocks(self.sizes, self.reading.window, self.reading.streams)

    def prefetch(self, items: Iterable[tuple[int, int]]) -> None:
        """Fetch the shards of samples [first, last) in the background if they are remote."""
        spans = (np.searchsorted(self._ends, (first, last - 1), "right") for first, last in items)
        self.files.prefetch(self.shards[i] for first, last in spans for i in range(first, last + 1))

    def check_made_with(self, digests: dict[str, str]) -> None:
        """Check that the digests of the weights in use equal those of the weights that computed the features."""
        self.check_contains(*digests)
        for name, digest in digests.items():
            if (stored := self.index["digests"][name]) != digest:
                use = f"{name} {digest} is in use: use the original weights, or prepare the shards again"
                raise UserError(f"{self.source} was prepared with {name} {stored}, but {use}")

    def check_contains(self, *names: str) -> None:
        """Check that the split contains features with these names."""
        for name in names:
            if not (self.index.get("digests") or {}).get(name):
                raise UserError(f"{self.source} contains no {name} features: prepare them with that stage")

    def _drop(self, rows: np.ndarray, which: str, wanted: str) -> None:
        """Drop the samples where `rows` (n,) is True. `which` describes them in the message, and `wanted` the
        others.
        """
        if not rows.any():
            return
        if rows.all():
            raise UserError(f"{self.source} has no samples {wanted}")
        print(f"{self.source}: {rows.sum()} of {len(rows)} samples are skipped, {which}", file=sys.stderr)
        self.sizes = [int((~part).sum()) for part in np.split(rows, self._ends[:-1])]
        self._ends = np.cumsum(self.sizes)
        self._tensor_names = [self._tensor_names[i] for i in np.flatnonzero(~rows)]
        self.frames = self.frames[torch.from_numpy(~rows)]
        self._members = self._members[~rows]

    def _table(self, shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[frozenset[str]]]:
        """Return for the n samples of a shard: frames (n,), offset and size of KEY.json and KEY.safetensors (n, 2, 2),
        and tensor names.
        """
        sidecar = self.files.sidecar(shard)
        name = join(self.source, f"{shard['name']}.json")
        try:
            rows = sidecar["samples"]
            stated = sidecar["bytes"], sidecar["crc32"], len(rows)
            frames = np.array([sample["frames"] for sample in rows], np.int64)
            members = [[s["members"]["json"], s["members"]["safetensors"]] for s in rows]
            members = np.array(members, np.int64).reshape(-1, 2, 2)
            all_names = frozenset(sidecar["tensors"])
            missing = [tuple(sample.get("lacks", ())) for sample in rows]
            distinct = {names: all_names.difference(names) for names in set(missing)}  # samples share these sets
            tensor_names = [distinct[names] for names in missing]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{name} is damaged ({error!r}): copy it or prepare it again") from error
        if stated != (shard["bytes"], shard["crc32"], shard["clips"]):
            raise UserError(f"{name} does not belong to this index.json: copy both again")
        if (members < 0).any() or (members.sum(-1) > shard["bytes"]).any() or (frames < 0).any():
            raise UserError(f"{name} is damaged: a sample lies outside its shard; copy it or prepare it again")
        return frames, members, tensor_names

    def _open(self, shard: int) -> BinaryIO:
        if shard not in self._handles:
            known = self.shards[shard]
            path = self.files.tar(known)
            if self.reading.verify and not self.files.remote:
                verify_once(path, known["crc32"])
            self._handles[shard] = path.open("rb", buffering=0)
            if len(self._handles) > OPEN_SHARDS:
                self._handles.popitem(last=False)  # the file is closed with its last reference
        self._handles.move_to_end(shard)
        return self._handles[shard]


def read_sample(
    file: BinaryIO, members: Sequence[Sequence[int]], names: Collection[str] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON of a sample, and its tensors with the given names (None: all tensors), from an open shard.

    Args:
        members: offset and size of KEY.json and of KEY.safetensors.

    Raises:
        ValueError, KeyError, TypeError: If the shard is damaged.
    """
    info = parse_json(bytes(_bytes(file, *members[0])), "a sample")
    safe_name(info["key"], "a sample's key")  # used as a file name in validation
    return info, _tensors(file, *members[1], names)


def _bytes(file: BinaryIO, at: int, size: int) -> bytearray:
    buffer = bytearray(size)
    if os.preadv(file.fileno(), [buffer], at) != size:
        raise ValueError("it ends early")
    return buffer


def _tensors(file: BinaryIO, at: int, size: int, names: Collection[str] | None) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors member: 8 bytes of header length, a JSON header, data."""
    head = _bytes(file, at, min(size, HEADER))
    length = int.from_bytes(head[:8], "little")
    if length > size - 8:
        raise ValueError("a safetensors header runs past its member")
    head = head if 8 + length <= len(head) else _bytes(file, at, 8 + length)
    header = parse_json(bytes(head[8 : 8 + length]), "a safetensors header")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or (names is not None and name not in names):
            continue
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= size - 8 - length:
            raise ValueError(f"{name} runs past its member")
        dtype = DTYPES[entry["dtype"]]
        shape = entry["shape"]
        if math.prod(shape) * dtype.itemsize != last - first:
            raise ValueError(f"{name} has another size than its shape {shape}")
        data = _bytes(file, at + 8 + length + first, last - first)
        tensors[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
    return tensors

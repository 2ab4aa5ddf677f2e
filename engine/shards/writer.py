"""Writing samples into tar shards that come out the same, byte for byte, however often the work was broken off.

FOLDER holds one split. Every sample that is done lies in FOLDER/.work-SHARD/KEY.tar, a refused one in KEY.json there;
when all of a shard's are there, they are joined to FOLDER/SHARD.tar and FOLDER/SHARD.json, and the work folder goes.
Whichever process then finds all shards writes index.json and quarantine.jsonl, which depend on the shards alone.

Unfinished files have fixed names in folders of their own (not `engine.files.atomic_output`, whose random ones a killed
process would leave behind), and all are on the disk before they get their final names.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load

from engine.errors import UserError

VERSION = 2
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
END = bytes(2 * tarfile.BLOCKSIZE)  # of a tar file
MIN_STD = 1e-6
INDEX, QUARANTINE, PLAN = "index.json", "quarantine.jsonl", ".plan.json"


def dumps(value: Any) -> bytes:
    """JSON in one line, the same bytes for equal values."""
    return (json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n").encode()


def sample_bytes(key: str, members: Mapping[str, bytes]) -> bytes:
    """The members KEY.SUFFIX of a tar file, in the order given; no time, owner or other trace of the run."""
    assert KEY.fullmatch(key), key
    parts = []
    for suffix, data in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join(parts)


def read_members(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    """(suffix, offset of the data, data) of every member that `sample_bytes` packed."""
    with tarfile.open(fileobj=io.BytesIO(data + END)) as tar:
        for info in tar:
            start = info.offset_data
            yield info.name.partition(".")[2], start, data[start : start + info.size]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what is done stays, the same command goes on from there"
        ) from error


def write_whole(path: Path, chunks: Iterable[bytes], staging: Path | None = None) -> None:
    """Write `path` by way of `staging` (KEY.part beside it if not given); both must lie on one disk.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    staging = staging or path.with_suffix(".part")
    with _writing(path):
        with staging.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            _settle(file)
        os.replace(staging, path)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def keep(work: Path, key: str, members: Mapping[str, bytes]) -> None:
    """Put a finished sample into the work folder of its shard."""
    write_whole(work / f"{key}.tar", [sample_bytes(key, members)])


def refuse(work: Path, key: str, source: str, stage: str, reason: str) -> None:
    """Note in the work folder of its shard why a sample does not come into it."""
    write_whole(work / f"{key}.json", [dumps({"key": key, "source": source, "stage": stage, "reason": reason})])


class SplitWriter:
    """The shards of one split, of which this process makes every `world`-th.

    Args:
        folder: of the split.
        keys: of all samples of the split, in order; sample i belongs to shard i // per_shard.
        plan: what decides about the content of the shards, as JSON values. A folder is of one plan.
        moments: name of a tensor (T, D) in KEY.safetensors whose mean and standard deviation over all frames the index
            gets, as NAME_mean and NAME_std.
        rank, world: of this process.

    Raises:
        UserError: the folder cannot be written, or holds shards of another plan.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[str],
        per_shard: int,
        plan: Mapping[str, Any],
        moments: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder, self.keys, self.per_shard, self.moments = folder, keys, per_shard, moments
        self.shards = range(-(-len(keys) // per_shard))
        self.mine = self.shards[rank::world]
        self.scratch = folder / f".work-process-{rank}"
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".work-process-*"):  # of a killed process
                number = int(left.name.rpartition("-")[2])
                if number == rank or (rank == 0 and number >= world):
                    shutil.rmtree(left, ignore_errors=True)
            self.scratch.mkdir()
        self._agree(dict(plan))
        for shard in self.mine:
            if self.is_made(shard):
                shutil.rmtree(self.work(shard), ignore_errors=True)

    def _agree(self, plan: dict[str, Any]) -> None:
        path, own = self.folder / PLAN, self.scratch / "plan"
        write_whole(own, [dumps(plan)], self.scratch / "plan.part")
        try:
            os.link(own, path)  # of several processes one is first
        except FileExistsError:
            pass
        except OSError:  # a disk without hard links: processes of one command write the same
            if not path.exists():
                write_whole(path, [dumps(plan)], self.scratch / "plan.part")
        there = json.loads(path.read_bytes())
        if there != json.loads(dumps(plan)):
            raise UserError(
                f"{self.folder} was begun with {_difference(there, plan)}: give the same settings, or another output"
            )

    def work(self, shard: int) -> Path:
        return self.folder / f".work-{shard:06d}"

    def shard_keys(self, shard: int) -> Sequence[str]:
        return self.keys[shard * self.per_shard : (shard + 1) * self.per_shard]

    def is_made(self, shard: int) -> bool:
        return (self.folder / f"{shard:06d}.json").is_file()

    def missing(self, shard: int) -> list[str]:
        """Keys of a shard that are still to do, in order."""
        if self.is_made(shard):
            return []
        work = self.work(shard)
        there = {path.stem for path in work.iterdir() if path.suffix in (".tar", ".json")} if work.is_dir() else set()
        return [key for key in self.shard_keys(shard) if key not in there]

    def begin(self, shard: int) -> Path:
        """The work folder of a shard, made."""
        work = self.work(shard)
        with _writing(work):
            work.mkdir(exist_ok=True)
        return work

    def pack(self, shard: int) -> None:
        """Join the samples of a shard, none of which may be missing, and put its sidecar beside it."""
        name, work = f"{shard:06d}", self.work(shard)
        samples: list[dict[str, Any]] = []
        refused: list[dict[str, str]] = []
        moments = _Moments()
        crc = size = 0

        def chunks() -> Iterator[bytes]:
            nonlocal crc, size
            for key in self.shard_keys(shard):
                if (work / f"{key}.tar").is_file():
                    data = (work / f"{key}.tar").read_bytes()
                    samples.append(self._sample(key, data, size, moments))
                else:
                    refused.append(json.loads((work / f"{key}.json").read_bytes()))
                    continue
                crc, size = zlib.crc32(data, crc), size + len(data)
                yield data
            crc, size = zlib.crc32(END, crc), size + len(END)
            yield END

        write_whole(self.folder / f"{name}.tar", chunks(), work / ".shard")
        sidecar = {
            "version": VERSION,
            "samples": samples,
            "rejected": dict(Counter(each["stage"] for each in refused)),
            "quarantine": refused,
            self.moments: moments.value(),
            "bytes": size,
            "crc32": crc,
        }
        write_whole(self.folder / f"{name}.json", [dumps(sidecar)], work / ".sidecar")
        shutil.rmtree(work, ignore_errors=True)

    def _sample(self, key: str, data: bytes, start: int, moments: _Moments) -> dict[str, Any]:
        places = {}
        for suffix, offset, member in read_members(data):
            places[suffix] = [start + offset, len(member)]
            if suffix == "json":
                about = json.loads(member)
            elif suffix == "safetensors":
                moments.add(load(member).get(self.moments))
        return {"key": key, "frames": about["frames"], "seconds": about["seconds"], "members": places}

    def finish(self, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """Write the index if every shard is there; gives it, or None where other processes are still at work.

        Args:
            about: of the whole split, goes into the index.
        """
        index = None
        if all(self.is_made(shard) for shard in self.shards):
            sidecars = [(f"{i:06d}", json.loads((self.folder / f"{i:06d}.json").read_bytes())) for i in self.shards]
            lines = [dumps(each) for _, sidecar in sidecars for each in sidecar["quarantine"]]
            write_whole(self.folder / QUARANTINE, lines, self.scratch / "quarantine")
            index = self._index(sidecars, about)
            write_whole(self.folder / INDEX, [json.dumps(index, indent=1).encode(), b"\n"], self.scratch / "index")
        shutil.rmtree(self.scratch, ignore_errors=True)
        return index

    def _index(self, sidecars: list[tuple[str, dict[str, Any]]], about: Mapping[str, Any]) -> dict[str, Any]:
        moments, rejected, shards = _Moments(), Counter(), []
        for name, sidecar in sidecars:
            moments.merge(sidecar[self.moments])
            rejected.update(sidecar["rejected"])
            samples = sidecar["samples"]
            seconds = round(sum(sample["seconds"] for sample in samples), 3)
            shards.append({"name": name, "clips": len(samples), "seconds": seconds})
            shards[-1] |= {"bytes": sidecar["bytes"], "crc32": sidecar["crc32"]}
        mean, std = moments.mean_and_std()
        return {
            "version": VERSION,
            **about,
            f"{self.moments}_mean": mean,
            f"{self.moments}_std": std,
            "shards": shards,
            "clips": sum(shard["clips"] for shard in shards),
            "seconds": round(sum(shard["seconds"] for shard in shards), 3),
            "rejected": {stage: rejected[stage] for stage in sorted(rejected)},
        }


class _Moments:
    """Sums over the rows of tensors (T, D) in float64, and of their squares, added in the order of the samples."""

    def __init__(self) -> None:
        self.count, self.sum, self.square = 0, torch.zeros(0), torch.zeros(0)

    def add(self, rows: torch.Tensor | None) -> None:
        if rows is not None:
            rows = rows.double()
            self.merge({"count": len(rows), "sum": rows.sum(0).tolist(), "square": rows.square().sum(0).tolist()})

    def merge(self, other: dict[str, Any] | None) -> None:
        if other is not None:
            total, square = (torch.tensor(other[name], dtype=torch.float64) for name in ("sum", "square"))
            first = self.count == 0
            self.count += other["count"]
            self.sum, self.square = (total, square) if first else (self.sum + total, self.square + square)

    def value(self) -> dict[str, Any] | None:
        if not self.count:
            return None
        return {"count": self.count, "sum": self.sum.tolist(), "square": self.square.tolist()}

    def mean_and_std(self) -> tuple[list[float] | None, list[float] | None]:
        if self.count < 2:
            return None, None
        mean = self.sum / self.count
        variance = (self.square - self.count * mean.square()) / (self.count - 1)
        return mean.tolist(), variance.clamp_min(0).sqrt().clamp_min(MIN_STD).tolist()


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """The first setting in which two plans differ, as `name=VALUE, not OTHER`."""
    for name in sorted({*there, *wanted}):
        old, new = there.get(name), wanted.get(name)
        if old != new:
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                return _difference(old, new, f"{prefix}{name}.")
            return f"{prefix}{name}={old}, not {new}"
    return "other settings"

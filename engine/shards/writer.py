"""Writing of samples to tar shards, byte for byte reproducible regardless of interruptions.

FOLDER contains one split. A finished sample is stored as FOLDER/.work-SHARD-PLAN/KEY.tar, the reason for a rejected one
as KEY.json there. When all samples of a shard are finished, they are joined to FOLDER/SHARD.tar and FOLDER/SHARD.json,
and the work folder is deleted. When all shards are finished, index.json and quarantine.jsonl are written, which depend
only on the shards. PLAN is a digest of the settings; shards of other settings count as missing.

Unfinished files have fixed names in separate folders, as the random names of `engine.files.atomic_output` would be left
behind by a killed process. All files are synced to the disk before they get their final names.

Axes: T frames, D channels.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from engine.errors import UserError
from engine.files import report_os_errors
from engine.shards.reader import VERSION

KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
END = bytes(2 * tarfile.BLOCKSIZE)  # end-of-archive marker of a tar file
MIN_STD = 1e-6
INDEX = "index.json"
QUARANTINE = "quarantine.jsonl"
PLAN = ".plan.json"


def dumps(value: Any) -> bytes:
    """Serialise JSON to a single line, deterministically."""
    return (json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n").encode()


def read_members(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yield (suffix, offset of the data, data) of every member of a sample written by `write_sample`."""
    with tarfile.open(fileobj=io.BytesIO(data + END)) as tar:
        for info in tar:
            start = info.offset_data
            yield info.name.partition(".")[2], start, data[start : start + info.size]


def _writing(path: Path) -> AbstractContextManager[None]:
    return report_os_errors(f"cannot write {path}", "; finished samples are kept, run the same command to continue")


def write_whole(path: Path, chunks: Iterable[bytes], staging: Path) -> None:
    """Write `path` via `staging`, which is on the same disk."""
    with _writing(path):
        with staging.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)


def write_sample(work: Path, key: str, members: Mapping[str, bytes]) -> None:
    """Write a finished sample, the members KEY.SUFFIX of a tar file in the given order, to the work folder of its
    shard, without time stamps, owners or other metadata of the run.
    """
    assert KEY.fullmatch(key), key
    parts = []
    for suffix, data in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    write_whole(work / f"{key}.tar", parts, _own_staging(work, key))


def reject_sample(work: Path, key: str, source: str, stage: str, reason: str) -> None:
    """Write the reason for rejecting a sample to the work folder of its shard."""
    row = {"key": key, "source": source, "stage": stage, "reason": reason}
    write_whole(work / f"{key}.json", [dumps(row)], _own_staging(work, key))


def _own_staging(work: Path, key: str) -> Path:
    """Return a file name that no other process uses.

    A cluster may rerun a clip while the first run continues on an unreachable machine. Files left by killed processes
    are deleted with the work folder.
    """
    return work / f"{key}.{uuid.uuid4().hex[:12]}.part"


class SplitWriter:
    """Writer of the shards of one split. Only one process may write a split at a time.

    The index contains the mean and standard deviation of the tensors `motion` (T, D) over all frames.

    Args:
        keys: keys of all samples of the split in order. Sample i belongs to shard i // per_shard.
        plan: settings that determine the content of the shards, as JSON values.
        stages: fingerprint of each stage by name, stored in the JSON of every shard.
        replace: whether to replace shards of another plan, which are an error otherwise.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[str],
        per_shard: int,
        plan: Mapping[str, Any],
        stages: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> None:
        self.folder = folder
        self.keys = keys
        self.per_shard = per_shard
        self.stages = dict(stages or {})
        self.plan = hashlib.sha256(dumps(dict(plan))).hexdigest()[:8]
        self.shards = range(-(-len(keys) // per_shard))
        self.scratch = folder / ".work-process"
        self._made: set[int] = set()
        self._unsettled: dict[Path, tuple[int, int]] = {}  # shard, and number of remaining keys, of each work folder
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for abandoned in folder.glob(".work-process*"):  # left by a killed process
                shutil.rmtree(abandoned, ignore_errors=True)
            self.scratch.mkdir()
        self.check_plan(dict(plan), replace)
        for shard in self.shards:
            if self.is_made(shard):
                shutil.rmtree(self.work(shard), ignore_errors=True)

    def check_plan(self, plan: dict[str, Any], replace: bool) -> None:
        """Write the plan, or compare it with that of the folder."""
        path = self.folder / PLAN
        if not path.exists():
            write_whole(path, [dumps(plan)], self.scratch / "plan.part")
        existing = json.loads(path.read_bytes())
        if existing == json.loads(dumps(plan)):
            return
        if not replace:
            raise UserError(
                f"{self.folder} was started with {_difference(existing, plan)}: use the same settings, another output, "
                f"or reuse={self.folder.parent} to replace these shards and keep what is unchanged"
            )
        for name in (INDEX, QUARANTINE):  # readers do not see the split until all its shards have the same plan
            (self.folder / name).unlink(missing_ok=True)
        write_whole(path, [dumps(plan)], self.scratch / "plan.part")
        for work in self.folder.glob(".work-[0-9]*"):
            if not work.name.endswith(self.plan):
                shutil.rmtree(work, ignore_errors=True)

    def work(self, shard: int) -> Path:
        return self.folder / f".work-{shard:06d}-{self.plan}"

    def shard_keys(self, shard: int) -> Sequence[str]:
        return self.keys[shard * self.per_shard : (shard + 1) * self.per_shard]

    def is_made(self, shard: int) -> bool:
        """Return whether the shard exists and belongs to this plan."""
        path = self.folder / f"{shard:06d}.json"
        if shard not in self._made and path.is_file() and json.loads(path.read_bytes()).get("plan") == self.plan:
            self._made.add(shard)
        return shard in self._made

    def missing(self, shard: int) -> list[str]:
        """Return the remaining keys of a shard, in order."""
        if self.is_made(shard):
            return []
        work = self.work(shard)
        there = {path.stem for path in work.iterdir() if path.suffix in (".tar", ".json")} if work.is_dir() else set()
        return [key for key in self.shard_keys(shard) if key not in there]

    def begin(self, shard: int) -> tuple[Path, list[str]]:
        """Create the work folder of a shard. Return it and the remaining keys; a shard without any is packed."""
        work = self.work(shard)
        keys = self.missing(shard)
        if keys:
            with _writing(work):
                work.mkdir(exist_ok=True)
            self._unsettled[work] = (shard, len(keys))
        elif not self.is_made(shard):  # killed between the last sample and packing
            self.pack(shard)
        return work, keys

    def settle(self, work: Path) -> None:
        """Count a key of an open shard as written or rejected. The last one packs the shard."""
        shard, remaining = self._unsettled[work]
        self._unsettled[work] = (shard, remaining - 1)
        if remaining == 1:
            self.pack(shard)

    def pack(self, shard: int) -> None:
        """Join the samples of a shard, all of which must exist, and write its sidecar."""
        name = f"{shard:06d}"
        work = self.work(shard)
        contents = ShardContents()
        write_whole(self.folder / f"{name}.tar", contents.join(work, self.shard_keys(shard)), work / ".shard")
        sidecar = {"version": VERSION, "plan": self.plan, "stages": self.stages, **contents.describe()}
        write_whole(self.folder / f"{name}.json", [dumps(sidecar)], work / ".sidecar")
        shutil.rmtree(work, ignore_errors=True)

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write the index, with `facts` added, and return it. Every shard must exist."""
        sidecars = [(f"{i:06d}", json.loads((self.folder / f"{i:06d}.json").read_bytes())) for i in self.shards]
        lines = [dumps(each) for _, sidecar in sidecars for each in sidecar["quarantine"]]
        write_whole(self.folder / QUARANTINE, lines, self.scratch / "quarantine")
        for path in self.folder.glob("[0-9]*"):  # left over from a larger split
            if int(path.stem) >= len(self.shards):
                path.unlink(missing_ok=True)
        index = self._index(sidecars, facts)
        write_whole(self.folder / INDEX, [json.dumps(index, indent=1).encode(), b"\n"], self.scratch / "index")
        shutil.rmtree(self.scratch, ignore_errors=True)
        return index

    def _index(self, sidecars: list[tuple[str, dict[str, Any]]], facts: Mapping[str, Any]) -> dict[str, Any]:
        sums = []
        rejected = Counter()
        shards = []
        for name, sidecar in sidecars:
            if part := sidecar["motion"]:
                sums.append((part["count"], torch.tensor([part["sum"], part["square"]], dtype=torch.float64)))
            rejected.update(sidecar["rejected"])
            samples = sidecar["samples"]
            seconds = round(sum(sample["seconds"] for sample in samples), 3)
            shards.append({"name": name, "clips": len(samples), "seconds": seconds})
            shards[-1] |= {"bytes": sidecar["bytes"], "crc32": sidecar["crc32"]}
        count, (total, square) = _total(sums)
        mean = total / max(1, count)
        variance = (square - count * mean.square()) / max(1, count - 1)
        std = variance.clamp_min(0).sqrt().clamp_min(MIN_STD)
        return {
            "version": VERSION,
            **facts,
            "motion_mean": mean.tolist() if count > 1 else None,
            "motion_std": std.tolist() if count > 1 else None,
            "shards": shards,
            "clips": sum(shard["clips"] for shard in shards),
            "seconds": round(sum(shard["seconds"] for shard in shards), 3),
            "rejected": {stage: rejected[stage] for stage in sorted(rejected)},
        }


class ShardContents:
    """Joins samples to a tar file and describes them.

    Attributes:
        samples: row of each sample in the sidecar, except for the names that it lacks.
        tensor_names: names of the tensors of each sample.
        motion_sums: number of frames, and sums (2, D) of motion and its square, of each sample with motion.
        rejected: reasons for rejected samples.
        size, crc: size and CRC-32 of the tar file.
    """

    def __init__(self) -> None:
        self.samples: list[dict[str, Any]] = []
        self.tensor_names: list[set[str]] = []
        self.motion_sums: list[tuple[int, torch.Tensor]] = []
        self.rejected: list[dict[str, Any]] = []
        self.size = 0
        self.crc = 0

    def join(self, work: Path, keys: Sequence[str]) -> Iterator[bytes]:
        """Yield the bytes of the tar file, from the finished samples in a work folder."""
        for key in keys:
            path = work / f"{key}.tar"
            if path.is_file():
                data = path.read_bytes()
                self._add(key, data)
                yield self._counted(data)
            else:
                self.rejected.append(json.loads((work / f"{key}.json").read_bytes()))
        yield self._counted(END)

    def _add(self, key: str, data: bytes) -> None:
        """Add the sample that starts at the current end of the tar file."""
        positions = {}
        contents = {}
        for suffix, offset, member in read_members(data):
            positions[suffix] = [self.size + offset, len(member)]
            contents[suffix] = member
        facts = json.loads(contents["json"])
        tensors = load(contents["safetensors"])
        self.samples.append({"key": key, "frames": facts["frames"], "seconds": facts["seconds"], "members": positions})
        self.tensor_names.append(set(tensors))
        motion = tensors.get("motion")
        if motion is not None:
            sums = torch.stack([motion.double().sum(0), motion.double().square().sum(0)])
            self.motion_sums.append((len(motion), sums))

    def _counted(self, data: bytes) -> bytes:
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)
        return data

    def describe(self) -> dict[str, Any]:
        """Return the entries of the sidecar, once all bytes have been yielded."""
        all_names = set().union(*self.tensor_names)
        for sample, names in zip(self.samples, self.tensor_names):
            if names != all_names:  # missing names are stored, as most samples contain all
                sample["lacks"] = sorted(all_names - names)
        count, (total, square) = _total(self.motion_sums)
        return {
            "tensors": sorted(all_names),
            "samples": self.samples,
            "rejected": dict(Counter(each["stage"] for each in self.rejected)),
            "quarantine": self.rejected,
            "motion": {"count": count, "sum": total.tolist(), "square": square.tolist()} if count else None,
            "bytes": self.size,
            "crc32": self.crc,
        }


def _total(sums: Sequence[tuple[int, torch.Tensor]]) -> tuple[int, torch.Tensor]:
    """Sum row counts and sums (2, D) of rows and of their squares in float64, in the order of the samples."""
    if not sums:
        return 0, torch.zeros(2, 0)
    counts, totals = zip(*sums)
    return sum(counts), sum(totals[1:], totals[0])


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """Return the first setting in which two plans differ, as `name=VALUE, not OTHER`."""
    for name in sorted({*there, *wanted}):
        old = there.get(name)
        new = wanted.get(name)
        if old != new:
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                return _difference(old, new, f"{prefix}{name}.")
            return f"{prefix}{name}={old}, not {new}"
    return "other settings"

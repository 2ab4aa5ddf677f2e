"""Training checkpoints: RUN/checkpoints/step-00001000/, written by torch.distributed.checkpoint.

A folder holds tensors only (model, average, optimisers), `info.json` (step, data position, config, code version, size
and CRC-32 of every file) and, where that step was validated, `results.json`. It is written under a temporary name,
synced and renamed, so a folder with a final name was complete once; the checksums tell whether it still is.

No random state is stored: every draw of a step is a function of the run's seed and of the number of the batch
(`engine.seeding`), in every process, so the data position is the random state.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import threading
import warnings
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from engine.errors import UserError
from engine.files import atomic_output
from engine.safe_pickle import load_problem
from engine.training import distributed
from engine.untrusted import parse_json, safe_name

INFO, RESULTS = "info.json", "results.json"
CLOSING = 600.0  # seconds that a run which fails waits for the checkpoint in work

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process: fine


# All that the pickled `.metadata` of a dict of tensors names. BytesStorageMetadata is left out for good: what it
# describes, torch would unpickle with no such list.
_METADATA = (dcp_metadata.Metadata, dcp_metadata.TensorStorageMetadata, dcp_metadata.TensorProperties)
_METADATA += (dcp_metadata.ChunkStorageMetadata, dcp_metadata.MetadataIndex, dcp_metadata.StorageMeta)
_METADATA += (dcp_metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.serialization._get_layout, torch.Size)
_METADATA += (PosixPath, *{value for value in vars(torch).values() if isinstance(value, torch.dtype)})
_GLOBALS = {(found.__module__, found.__qualname__): found for found in _METADATA if not isinstance(found, torch.dtype)}
_GLOBALS |= {tuple(str(found).split(".")): found for found in _METADATA if isinstance(found, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _GLOBALS[module, name]


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint that may come from anywhere: nothing that its files name is run or lies outside its folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """What the checkpoint holds.

        Raises:
            UserError: anything but tensors, or tensors that its files cannot hold.
        """
        try:
            with (self.path / ".metadata").open("rb") as file:
                found = _Unpickler(file).load()
            size = 0
            for entry in found.state_dict_metadata.values():
                if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
                    raise ValueError("it holds more than tensors")
                count = math.prod(entry.size)
                if min(entry.size, default=0) < 0 or sum(math.prod(part.sizes) for part in entry.chunks) != count:
                    raise ValueError("a tensor and its parts differ in size")
                size += count * entry.properties.dtype.itemsize
            for place in found.storage_data.values():
                safe_name(place.relative_path, "the name of a data file")
                if place.transform_descriptors:
                    raise ValueError("its data files are packed")
            if size > sum(path.stat().st_size for path in self.path.glob("*.distcp")):
                raise ValueError(f"its files cannot hold {size:,} bytes of tensors")
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(
                f"checkpoint {self.path} is damaged or forged: .metadata cannot be read ({error})"
            ) from error
        found.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return found


class Checkpoints:
    """Writes a run's checkpoints in the background, one at a time.

    `save` copies the state to main memory and returns; a thread writes the copy while training goes on. Every process
    makes one of these and calls the same methods in the same order; on several machines `root` must be on a disk that
    all of them share.

    Args:
        root: folder of the checkpoints.
        keep: so many of the newest stay.
        best: `min NAME` or `max NAME`: the one whose `results.json` has the best NAME stays too.
    """

    def __init__(self, root: str | Path, keep: int, best: str | None = None):
        self.root, self.keep, self.best = Path(root), keep, best
        # Of its own: collective calls of the thread must not mix with those of training.
        self._group = (
            dist.new_group(backend="gloo", timeout=distributed.COLLECTIVE_TIMEOUT) if dist.is_initialized() else None
        )
        self._thread: threading.Thread | None = None
        self.problem: str | None = None  # one line: what could not be written

    def save(self, step: int, state: dict[str, Tensor], info: dict[str, Any]) -> Path:
        """Start writing the checkpoint of `step`; waits for the one before. Gives its folder.

        Args:
            state: flat dict of tensors; equal keys of several processes are one replicated tensor, unless DTensors.
            info: what JSON can hold; the main process's counts.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        copy = DefaultStager(StagingOptions(False, False, False, False)).stage(state)
        # A daemon, so that a process that fails while its peers are dead can leave.
        self._thread = threading.Thread(target=self._write, args=(step, copy, info), daemon=True)
        self._thread.start()
        return self._folder(step)

    def wait(self) -> None:
        """Return when the checkpoint in work is on the disk.

        Raises:
            UserError: it cannot be written (in the main process; the others exit). Earlier ones are untouched.
        """
        self.close()
        if self.problem:
            distributed.fail(self.problem)

    def close(self) -> None:
        """Wait for the checkpoint in work, whatever becomes of it."""
        if self._thread:
            self._thread.join(CLOSING if self._group else None)
            self._thread = None

    def note(self, step: int, results: dict[str, float]) -> None:
        """Keep the validation results of `step` with its checkpoint (main process); waits for it to be written."""
        self.wait()
        if distributed.is_main() and self._folder(step).is_dir():
            try:
                with atomic_output(self._folder(step) / RESULTS) as path:
                    path.write_text(json.dumps(results, indent=1) + "\n")
            except UserError as error:
                self.problem = str(error)

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _write(self, step: int, state: dict[str, Tensor], info: dict[str, Any]) -> None:
        final, staging = self._folder(step), self.root / f".step-{step:08d}.writing"
        try:
            self._together(self._make_room if distributed.is_main() else None)
            dcp.save(state, checkpoint_id=staging, process_group=self._group, no_dist=self._group is None)
            files = self._together(lambda: _fingerprints(staging, distributed.rank()))
            info = {**info, "step": step, "files": {name: of for part in files for name, of in part.items()}}
            self._together((lambda: self._commit(staging, final, info)) if distributed.is_main() else None)
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)
            self.problem = f"checkpoint {final} cannot be written: {_cause(error)}; earlier checkpoints are intact"

    def _together(self, action: Callable[[], Any] | None) -> list[Any]:
        """Results of every process's `action`; raises OSError in all of them if it failed in one."""
        try:
            outcome = (action() if action else None, None)
        except OSError as error:
            outcome = (None, str(error))
        outcomes = distributed.gather(outcome, self._group)
        for _, problem in outcomes:
            if problem is not None:
                raise OSError(problem)
        return [result for result, _ in outcomes]

    def _make_room(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _commit(self, staging: Path, final: Path, info: dict[str, Any]) -> None:
        with (staging / INFO).open("w") as file:
            json.dump(info, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(staging)
        if final.exists():  # it is damaged, or training would not have come here again
            self._remove(final)
        os.replace(staging, final)
        _sync(self.root)
        present = steps(self.root)
        kept = [step for step in present if step <= info["step"]][-self.keep :]  # later ones are damaged: skipped over
        if self.best:
            kept.append(best(self.root, self.best))
        for step in present:
            if step not in kept:
                self._remove(self._folder(step))

    def _remove(self, folder: Path) -> None:
        """Under a hidden name first: a folder with a final name is whole at any moment."""
        hidden = folder.with_name(f".{folder.name}.old")
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def steps(root: str | Path) -> list[int]:
    """Steps of the checkpoint folders in `root`, ascending."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in Path(root).glob("step-*") if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def best(root: str | Path, rule: str) -> int | None:
    """Step of the checkpoint that is best by `rule` (`min NAME` or `max NAME`); None: none has such a result."""
    direction, name = rule.split()
    found = {}
    for step in steps(root):
        try:
            results = Path(root) / f"step-{step:08d}" / RESULTS
            found[step] = float(parse_json(results.read_bytes(), results)[name])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    finite = {step: value for step, value in found.items() if value == value}
    return (min if direction == "min" else max)(finite, key=finite.__getitem__, default=None)


def newest(root: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint whose files are all as they were written; `say` gets a line for each one skipped.

    Raises:
        UserError: there are some, and every one is damaged.
    """
    for step in reversed(steps(root)):
        folder = Path(root) / f"step-{step:08d}"
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"checkpoint {folder} is skipped: {problem}")
    if steps(root):
        raise UserError(f"every checkpoint in {root} is damaged; bring one back, or start anew with fresh=true")
    return None


def remove_all(root: str | Path) -> None:
    """Delete the checkpoints in `root`, for a fresh start."""
    for step in steps(root):
        shutil.rmtree(Path(root) / f"step-{step:08d}")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        for name, expected in info(folder)["files"].items():
            if name != ".metadata":
                safe_name(name, "the name of a data file")
            if _fingerprint(folder / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def load(folder: str | Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Fill the tensors of `state` in place and return the info. Keys that the checkpoint lacks are removed from `state`
    if they are of an optimiser (`optim.`): a parameter that never had a gradient has no optimiser state.

    Raises:
        UserError: the checkpoint is of a model with other tensors or shapes.
    """
    folder = Path(folder)
    stored = Reader(folder).read_metadata().state_dict_metadata
    hint = "the model was changed since: go on with the old config, or start anew with fresh=true or another run="
    for key in sorted(stored.keys() - state.keys()):
        raise UserError(f"checkpoint {folder} has {key!r}, which the model lacks; {hint}")
    for key in sorted(state.keys() - stored.keys()):
        if not key.startswith("optim."):
            raise UserError(f"checkpoint {folder} lacks {key!r}; {hint}")
        del state[key]
    for key, tensor in state.items():
        if tuple(stored[key].size) != tuple(tensor.shape):
            raise UserError(
                f"checkpoint {folder} has {key!r} with shape {tuple(stored[key].size)}, "
                f"the model has {tuple(tensor.shape)}; {hint}"
            )
    return _fill(state, folder, no_dist=not dist.is_initialized())


def read(folder: str | Path, prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors whose keys begin with one of `prefixes`, info): whole, in this one process, whichever processes wrote
    them."""
    folder = Path(folder)
    stored = Reader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefixes)
    }
    return state, _fill(state, folder, no_dist=True)


def _fill(state: dict[str, Tensor], folder: Path, no_dist: bool) -> dict[str, Any]:
    try:
        dcp.load(state, storage_reader=Reader(folder), no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        raise UserError(f"checkpoint {folder} cannot be read: {_cause(error)}") from error
    return info(folder)


def info(folder: Path) -> dict[str, Any]:
    """What was stored beside the tensors: step, config, and what else `save` was given.

    Raises:
        UserError: it is damaged.
    """
    found = parse_json((folder / INFO).read_bytes(), folder / INFO)
    if not isinstance(found, dict) or not type(found.get("step")) is type(found.get("position", 0)) is int:
        raise UserError(f"{folder / INFO} is damaged: step and position must be whole numbers")
    return found


def code_version() -> str:
    """The git commit of this code, with `-dirty` if files were changed; outside a checkout, the package's version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return metadata.version("speaking-faces")
    except metadata.PackageNotFoundError:
        return "unknown"


def _fingerprints(folder: Path, rank: int) -> dict[str, list[int]]:
    """Of the files that process `rank` wrote (0 writes `.metadata` too)."""
    paths = sorted(folder.glob(f"__{rank}_*")) + ([folder / ".metadata"] if rank == 0 else [])
    return {path.name: _fingerprint(path) for path in paths}


def _fingerprint(path: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _sync(folder: Path) -> None:
    """Make names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> str:
    """One line: the operating system's message if there is one, else the first line of the error."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return _cause(next(iter(error.failures.values()))[0])
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    return load_problem(error)

"""Training checkpoints: RUN/checkpoints/step-00001000/, written by torch.distributed.checkpoint.

A folder contains only tensors (model, averaged weights, optimisers), `info.json` (step, data position, config, code
version, size and CRC-32 of every file) and, where that step was validated, `results.json`. It is written under a
temporary name, synced and renamed, so that a folder with a final name was complete; checksums detect later damage.

No random state is stored: the random numbers of a step are a function of the run's seed and the batch index
(`engine.seeding`) in every process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.errors import UserError, causes
from engine.files import CHECKOUT, checksum, write_json
from engine.training import distributed
from engine.training.checkpoint_reader import Reader
from engine.untrusted import load_problem, parse_json, read_json, safe_name

INFO = "info.json"
RESULTS = "results.json"
COUNTS = {"step": 0, "samples": 0, "streams": 1, "group": 1}  # integer entries of `INFO` and their minimum
FAILING = 60.0  # seconds for which a failing process waits for a pending checkpoint, if there are several processes

# Expected in a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """Writes the checkpoints of a run in the background, one at a time.

    `save` copies the state to main memory and returns; a thread writes the copy while training continues. Every process
    creates an instance and calls the same methods in the same order. On several machines, `root` must be on a shared
    disk. Replicated state is only copied and written by the first process. The buffers of the copies, pinned for GPUs,
    are reused for the next checkpoint.

    Args:
        root: folder of the checkpoints.
        keep: number of newest checkpoints to keep.
        best: `min NAME` or `max NAME`: also keep the checkpoint with the best NAME in its `results.json`.
    """

    def __init__(self, root: Path, keep: int, best: str | None = None):
        self.root = root
        self.keep = keep
        self.best = best
        # A separate group: collective calls of the thread must not mix with those of training.
        self._group = distributed.new_cpu_group() if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._copies: dict[str, Tensor] = {}
        self.problem: str | None = None  # one-line description of a write error

    def save(self, step: int, state: dict[str, Tensor], info: dict[str, Any]) -> Path:
        """Start writing the checkpoint of `step` as soon as the previous one is written. Return its folder.

        Args:
            state: flat dict of tensors. Equal keys of several processes are replicated, except for DTensors.
            info: JSON-serialisable values; those of the main process are stored.
        """
        self.wait()
        copies: dict[str, Tensor] = {}
        for key, tensor in state.items():
            if not _is_first_copy(tensor):
                continue
            local = distributed.local(tensor)
            if key not in self._copies or self._copies[key].shape != local.shape:
                self._copies[key] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            copy = self._copies[key].copy_(local, non_blocking=local.is_cuda)
            # Sharded tensors stay sharded.
            copies[key] = DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy
        device = None
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # synchronise once, after all copies have been started
            device = torch.cuda.current_device()  # threads have their own current device
        # A daemon, so that a failing process can exit while its peers are dead.
        self._thread = threading.Thread(target=self._write, args=(step, copies, info, device), daemon=True)
        self._thread.start()
        return folder_of(self.root, step)

    def wait(self, failing: bool = False) -> None:
        """Wait for the pending checkpoint, whether it succeeds or fails; see `problem`.

        With several processes, a `failing` process only waits briefly, as the others may be dead.
        """
        if self._thread:
            self._thread.join(FAILING if failing and self._group else None)

    def note(self, step: int, results: dict[str, float]) -> None:
        """Store the validation results of `step` with its checkpoint once it is written (main process only)."""
        self.wait()
        if (folder := folder_of(self.root, step)).is_dir():
            write_json(folder / RESULTS, results)

    def _write(self, step: int, state: dict[str, Tensor], info: dict[str, Any], device: int | None) -> None:
        final = folder_of(self.root, step)
        staging = self.root / f".step-{step:08d}.writing"
        if device is not None:
            torch.cuda.set_device(device)
        try:
            with self._together():
                if distributed.is_main():
                    self.root.mkdir(parents=True, exist_ok=True)
                    for leftover in self.root.glob(".step-*"):
                        shutil.rmtree(leftover, ignore_errors=True)
            dcp.save(state, checkpoint_id=staging, process_group=self._group, no_dist=self._group is None)
            with self._together():  # each process reads its own files
                own = sorted(staging.glob(f"__{distributed.rank()}_*"))
                if distributed.is_main():
                    own.insert(0, staging / ".metadata")
                written = {path.name: _fingerprint(path) for path in own}
            files = {}
            for written_by_rank in distributed.all_gather(written, self._group):
                files |= written_by_rank
            with self._together():
                if distributed.is_main():
                    self._commit(staging, final, info | {"step": step, "files": files})
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)
            self.problem = f"checkpoint {final} cannot be written: {_cause(error)}; earlier checkpoints are intact"

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Wait until all processes have finished the block. Raise OSError in all of them if one of them failed."""
        problem = None
        try:
            yield
        except OSError as error:
            problem = str(error)
        for each in distributed.all_gather(problem, self._group):
            if each is not None:
                raise OSError(each)

    def _commit(self, staging: Path, final: Path, info: dict[str, Any]) -> None:
        with (staging / INFO).open("w") as file:
            json.dump(info, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(staging)
        if final.exists():  # it is damaged, otherwise training would not repeat this step
            self._remove(final)
        os.replace(staging, final)
        _sync(self.root)
        present = steps(self.root)
        # Later ones are damaged and were skipped.
        kept = [step for step in present if step <= info["step"]][-self.keep :]
        if self.best:
            kept.append(best(self.root, self.best))
        for step in present:
            if step not in kept:
                self._remove(folder_of(self.root, step))

    def _remove(self, folder: Path) -> None:
        """Delete a checkpoint, after renaming it to a hidden name, so that folders with final names are always
        complete.
        """
        hidden = folder.with_name(f".{folder.name}.old")
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _is_first_copy(tensor: Tensor) -> bool:
    """Return whether this process is the first one with this tensor, or with this shard of it."""
    if not isinstance(tensor, DTensor):
        return distributed.is_main()
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements)
    return all(place == 0 for place, placement in places if placement.is_replicate())


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Return the steps of the checkpoint folders in `root`, ascending."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in root.glob("step-*") if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def best(root: Path, rule: str) -> int | None:
    """Return the step of the best checkpoint by `rule` (`min NAME` or `max NAME`), or None if there is no such
    result.
    """
    direction, name = rule.split()
    found = {}
    for step in steps(root):
        with suppress(UserError, ValueError, KeyError, TypeError):
            found[step] = float(read_json(folder_of(root, step) / RESULTS)[name])
    numbers = [step for step, value in found.items() if value == value]
    return (min if direction == "min" else max)(numbers, key=found.__getitem__, default=None)


def newest(root: Path, say: Callable[[str], None] = print) -> Path | None:
    """Return the newest checkpoint whose files are intact. `say` is called with a message for each skipped
    checkpoint.
    """
    for step in reversed(steps(root)):
        folder = folder_of(root, step)
        if (problem := damage(folder)) is None:
            return folder
        say(f"checkpoint {folder} is skipped: {problem}")
    if steps(root):
        raise UserError(f"all checkpoints in {root} are damaged: restore one, or start again with fresh=true")
    return None


def damage(folder: Path) -> str | None:
    """Return a description of the damage of a checkpoint folder, or None if it is intact."""
    try:
        files = info(folder)["files"]
        if not files:
            return f"{INFO} lists no files"
        for name, expected in files.items():
            if name != ".metadata":
                safe_name(name, "the name of a data file")
            if _fingerprint(folder / name) != expected:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def load(folder: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Load the tensors of `state` in place and return the info. Keys that are missing in the checkpoint are removed
    from `state` if they belong to an optimiser (`optim.`), as a parameter without gradients has no optimiser state.
    """
    shapes = _shapes(folder)
    for key in [key for key in state if key.startswith("optim.") and key not in shapes]:
        del state[key]
    _require_equal(folder, shapes, {key: tuple(tensor.shape) for key, tensor in state.items()})
    return _fill(state, folder, no_dist=not dist.is_initialized())


def require_model(root: Path, task: nn.Module) -> None:
    """Raise UserError if the newest checkpoint in `root` does not match the tensors and shapes of `task`."""
    for step in steps(root)[-1:]:
        folder = folder_of(root, step)
        if damage(folder) is None:  # otherwise training skips it with a message
            stored = {key: shape for key, shape in _shapes(folder).items() if key.startswith("model.")}
            _require_equal(folder, stored, {f"model.{k}": tuple(v.shape) for k, v in task.state_dict().items()})


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a checkpoint."""
    return {key: tuple(entry.size) for key, entry in Reader(folder).read_metadata().state_dict_metadata.items()}


def _require_equal(folder: Path, stored: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> None:
    hint = "the model has changed since: use the original config, or start again with fresh=true or another run="
    for key in sorted(stored.keys() ^ own.keys()):
        difference = f"has {key!r}, which the model does not have" if key in stored else f"has no {key!r}"
        raise UserError(f"checkpoint {folder} {difference}; {hint}")
    for key, shape in own.items():
        if stored[key] != shape:
            raise UserError(f"checkpoint {folder} has {key!r} with shape {stored[key]}, the model has {shape}; {hint}")


def read(folder: Path, prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the full tensors whose keys start with one of `prefixes`, and the info, in a single process."""
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
    """Read the metadata of a checkpoint: step, config, and other values passed to `save`."""
    found = parse_json((folder / INFO).read_bytes(), folder / INFO)  # a missing file is handled by the caller
    counts = found if isinstance(found, dict) else {}
    for name, least in COUNTS.items():
        if type(counts.get(name)) is not int or counts[name] < least:
            raise UserError(f"{folder / INFO} is damaged: {name} must be an integer of at least {least}")
    return found


def code_version() -> str:
    """Return the git commit, with `-dirty` if files have changed, or the package version outside of a checkout."""
    if (CHECKOUT / ".git").exists():
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("speaking-faces")
    return "unknown"


def _fingerprint(path: Path) -> list[int]:
    """Return [size, CRC-32] of a file."""
    return [path.stat().st_size, checksum(path)]


def _sync(folder: Path) -> None:
    """Sync a folder, so that its file names survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> str:
    """Return the message of the operating system, if any, or the first line of the error."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return _cause(next(iter(error.failures.values()))[0])
    system = next((link for link in causes(error) if isinstance(link, OSError)), None)
    return load_problem(error) if system is None else str(system)

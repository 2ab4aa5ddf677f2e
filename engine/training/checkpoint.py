"""Training checkpoints: RUN/checkpoints/step-00001000/, written by torch.distributed.checkpoint.

A folder holds tensors only (model, average, optimisers), `info.json` (step, data position, config, code version, size
and CRC-32 of every file) and, where that step was validated, `results.json`. It is written under a temporary name,
synced and renamed, so a folder with a final name was complete once; the checksums tell whether it still is.

No random state is stored: every draw of a step is a function of the run's seed and of the number of the batch
(`engine.seeding`), in every process, so the data position is the random state.
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

from engine.errors import UserError
from engine.files import checksum, write_json
from engine.torch_files import load_problem
from engine.training import distributed
from engine.training.checkpoint_reader import Reader
from engine.untrusted import parse_json, read_json, safe_name

INFO = "info.json"
RESULTS = "results.json"
COUNTS = ("step", "samples", "streams", "group")  # in `INFO`
FAILING = 60.0  # seconds that one of several processes which fails waits for the checkpoint in work

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process: fine


class Checkpoints:
    """Writes a run's checkpoints in the background, one at a time.

    `save` copies the state to main memory and returns; a thread writes the copy while training continues. Every process
    makes one of these and calls the same methods in the same order; on several machines `root` must be on a disk that
    all of them share. What several processes hold alike is copied and written by the first of them alone. The copies'
    memory, pinned where it comes from a GPU, is kept for the next checkpoint.

    Args:
        root: folder of the checkpoints.
        keep: so many of the newest stay.
        best: `min NAME` or `max NAME`: the one whose `results.json` has the best NAME stays too.
    """

    def __init__(self, root: Path, keep: int, best: str | None = None):
        self.root = root
        self.keep = keep
        self.best = best
        # Of its own: collective calls of the thread must not mix with those of training.
        self._group = distributed.patient_group() if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._copies: dict[str, Tensor] = {}
        self.problem: str | None = None  # one line: what could not be written

    def save(self, step: int, state: dict[str, Tensor], info: dict[str, Any]) -> Path:
        """Start writing the checkpoint of `step`, once the one before is written; return its folder.

        Args:
            state: flat dict of tensors; equal keys of several processes are one replicated tensor, unless DTensors.
            info: what JSON can hold; the main process's counts.
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
            torch.cuda.synchronize()  # once, after all copies are under way
            device = torch.cuda.current_device()  # a thread has one of its own
        # A daemon, so that a process that fails while its peers are dead can leave.
        self._thread = threading.Thread(target=self._write, args=(step, copies, info, device), daemon=True)
        self._thread.start()
        return folder_of(self.root, step)

    def wait(self, failing: bool = False) -> None:
        """Wait for the checkpoint in work, whatever becomes of it: see `problem`.

        A process that is `failing` does not wait long if there are several: the others may be dead.
        """
        if self._thread:
            self._thread.join(FAILING if failing and self._group else None)

    def note(self, step: int, results: dict[str, float]) -> None:
        """Keep the validation results of `step` with its checkpoint, once that is written; for the main process."""
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
            with self._together():  # each process reads what it wrote; the main one has written `.metadata`, too
                own = [*staging.glob(f"__{distributed.rank()}_*"), *[staging / ".metadata"] * distributed.is_main()]
                written = {path.name: _fingerprint(path) for path in own}
            shares = distributed.gather(written, self._group)
            info = info | {"step": step, "files": {name: of for share in shares for name, of in sorted(share.items())}}
            with self._together():
                if distributed.is_main():
                    self._commit(staging, final, info)
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)
            self.problem = f"checkpoint {final} cannot be written: {_cause(error)}; earlier checkpoints are intact"

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Wait until every process has done the block; raise OSError in all of them if one of them failed in it."""
        problem = None
        try:
            yield
        except OSError as error:
            problem = str(error)
        for each in distributed.gather(problem, self._group):
            if each is not None:
                raise OSError(each)

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
                self._remove(folder_of(self.root, step))

    def _remove(self, folder: Path) -> None:
        """Delete a checkpoint, under a hidden name first: a folder with a final name is whole at any moment."""
        hidden = folder.with_name(f".{folder.name}.old")
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _is_first_copy(tensor: Tensor) -> bool:
    """Return whether this process is the first of those that hold the same tensor, or the same shard of one."""
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
    """Return the step of the best checkpoint by `rule` (`min NAME` or `max NAME`); None: none has such a result."""
    direction, name = rule.split()
    found = {}
    for step in steps(root):
        with suppress(UserError, ValueError, KeyError, TypeError):
            found[step] = float(read_json(folder_of(root, step) / RESULTS)[name])
    numbers = [step for step, value in found.items() if value == value]
    return (min if direction == "min" else max)(numbers, key=found.__getitem__, default=None)


def newest(root: Path, say: Callable[[str], None] = print) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written; `say` gets a line for each one skipped."""
    for step in reversed(steps(root)):
        folder = folder_of(root, step)
        if (problem := damage(folder)) is None:
            return folder
        say(f"checkpoint {folder} is skipped: {problem}")
    if steps(root):
        raise UserError(f"every checkpoint in {root} is damaged; bring one back, or start anew with fresh=true")
    return None


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder; None: nothing."""
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


def load(folder: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Fill the tensors of `state` in place and return the info. Keys that the checkpoint lacks are removed from `state`
    if they are of an optimiser (`optim.`): a parameter that never had a gradient has no optimiser state.
    """
    shapes = _shapes(folder)
    for key in [key for key in state if key.startswith("optim.") and key not in shapes]:
        del state[key]
    _require_equal(folder, shapes, {key: tuple(tensor.shape) for key, tensor in state.items()})
    return _fill(state, folder, no_dist=not dist.is_initialized())


def require_model(root: Path, task: nn.Module) -> None:
    """Refuse the newest checkpoint in `root` if it is of a model with other tensors or shapes than `task`."""
    for step in steps(root)[-1:]:
        folder = folder_of(root, step)
        if damage(folder) is None:  # else training skips it, and says so
            stored = {key: shape for key, shape in _shapes(folder).items() if key.startswith("model.")}
            _require_equal(folder, stored, {f"model.{k}": tuple(v.shape) for k, v in task.state_dict().items()})


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a checkpoint."""
    return {key: tuple(entry.size) for key, entry in Reader(folder).read_metadata().state_dict_metadata.items()}


def _require_equal(folder: Path, stored: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> None:
    hint = "the model was changed since: continue with the old config, or start anew with fresh=true or another run="
    for key in sorted(stored.keys() ^ own.keys()):
        lacks = f"has {key!r}, which the model lacks" if key in stored else f"lacks {key!r}"
        raise UserError(f"checkpoint {folder} {lacks}; {hint}")
    for key, shape in own.items():
        if stored[key] != shape:
            raise UserError(f"checkpoint {folder} has {key!r} with shape {stored[key]}, the model has {shape}; {hint}")


def read(folder: Path, prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read whole tensors whose keys begin with one of `prefixes`, and the info, in one process."""
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
    """Read what is stored beside the tensors: step, config, and what else `save` was given."""
    found = parse_json((folder / INFO).read_bytes(), folder / INFO)  # the error of a missing file is the caller's
    whole = isinstance(found, dict) and all(type(found.get(name, 0)) is int for name in COUNTS)
    if not whole or "step" not in found:
        raise UserError(f"{folder / INFO} is damaged: {', '.join(COUNTS)} must be whole numbers")
    return found


def code_version() -> str:
    """Return the git commit, with `-dirty` if files were changed; outside a checkout, the package's version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("speaking-faces")
    return "unknown"


def _fingerprint(path: Path) -> list[int]:
    """Return [size, CRC-32] of a file."""
    return [path.stat().st_size, checksum(path)]


def _sync(folder: Path) -> None:
    """Make names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> str:
    """Return one line: the operating system's message if there is one, else the first line of the error."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return _cause(next(iter(error.failures.values()))[0])
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    return load_problem(error)

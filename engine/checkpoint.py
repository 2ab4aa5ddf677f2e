"""Training checkpoints: RUN/checkpoints/step-00001000/, written by torch.distributed.checkpoint.

A folder holds tensors only (model, average, optimisers) and `info.json` (step, config, size and CRC-32 of every file).
It is written under a temporary name and renamed, so a folder with a final name was complete once; the checksums tell
whether it still is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from engine import distributed
from engine.errors import UserError

INFO = "info.json"


def save(root: str | Path, step: int, state: dict[str, Tensor], info: dict[str, Any], keep: int) -> Path:
    """Write `state` of all processes and keep the newest `keep` checkpoints. Every process must call this.

    Args:
        state: flat dict of tensors; equal keys of several processes are one replicated tensor.
        info: what JSON can hold.

    Raises:
        UserError: the checkpoint cannot be written; earlier ones are untouched.
    """
    root = Path(root)
    final, staging = root / f"step-{step:08d}", root / f".step-{step:08d}.writing"
    try:
        if distributed.is_main():
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        distributed.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that a single process saves without a process group
            dcp.save(state, checkpoint_id=staging, no_dist=not dist.is_initialized())
        if distributed.is_main():
            files = {path.name: _fingerprint(path) for path in sorted(staging.iterdir())}
            with (staging / INFO).open("w") as file:
                json.dump({**info, "step": step, "files": files}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            if final.exists():
                shutil.rmtree(final)
            os.replace(staging, final)
            for old in steps(root)[:-keep]:
                shutil.rmtree(root / f"step-{old:08d}", ignore_errors=True)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"checkpoint {final} cannot be written: {error}; earlier checkpoints are intact") from error
    distributed.barrier()
    return final


def steps(root: str | Path) -> list[int]:
    """Steps of the checkpoint folders in `root`, ascending."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in Path(root).glob("step-*") if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def newest(root: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint whose files are all as they were written; `say` gets a line for each one skipped."""
    for step in reversed(steps(root)):
        folder = Path(root) / f"step-{step:08d}"
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"checkpoint {folder} is skipped: {problem}")
    return None


def remove_all(root: str | Path) -> None:
    """Delete the checkpoints in `root`, for a fresh start."""
    for step in steps(root):
        shutil.rmtree(Path(root) / f"step-{step:08d}")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((folder / INFO).read_text())["files"]
        for name, expected in files.items():
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
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return json.loads((folder / INFO).read_text())


def read(folder: str | Path, prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors whose keys begin with one of `prefixes`, info): whole, in this one process, whichever processes wrote
    them."""
    folder = Path(folder)
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefixes)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state, info(folder)


def info(folder: Path) -> dict[str, Any]:
    """What was stored beside the tensors: step, config, and what else `save` was given."""
    return json.loads((folder / INFO).read_text())


def _fingerprint(path: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]

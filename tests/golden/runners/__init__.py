"""Golden cases: reference numbers that the official programs gave, run through this project's public classes.

A runner is a function `(case) -> {output name: tensor}` registered for a case-name prefix; it may leave outputs out
only by naming them in `case.skip(name, why)`. Which runner serves a case follows from the prefix and the case's own
metadata, never from a list of case names; a case that names its runner in `meta["runner"]` gets that one.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

RUNNERS: dict[str, Callable] = {}  # word -> (case) -> {output name: tensor}


def runner(*words: str) -> Callable:
    """Register the decorated function for the cases whose `meta["runner"]`, or begin of the name, is one of `words`."""

    def register(function: Callable) -> Callable:
        RUNNERS.update(dict.fromkeys(words, function))
        return function

    return register


def find_runner(name: str, meta: dict[str, Any]) -> Callable[[Case], dict[str, Any]] | None:
    """The runner that the case's metadata names; without such a word, the one with the longest prefix of `name`."""
    if "runner" in meta:
        return RUNNERS.get(meta["runner"])
    matches = [prefix for prefix in RUNNERS if name.startswith(prefix)]
    return RUNNERS[max(matches, key=len)] if matches else None


@dataclass
class Case:
    """One golden case: tensors in, tensors out, metadata, and the official state-dict shapes."""

    name: str
    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    keys: dict[str, tuple[int, ...]]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.meta.get("weights_seed", self.meta.get("seed", 0)))

    @property
    def config(self) -> dict[str, Any]:
        return self.meta.get("config", {})

    def first(self, output: str, value: Tensor, axis: int) -> Tensor:
        """The start of `value` along `axis`, as long as the case stores it."""
        return value.narrow(axis, 0, self.outputs[output].shape[axis])

    def every(self, output: str, value: Tensor, axis: int) -> Tensor:
        """Every n-th of `value` along `axis`: n as the case's notes say it (`OUTPUT = frames 0,50,100,...`), else the
        smallest n that gives as many as the case stores."""
        said = re.search(rf"\b{re.escape(output)} = frames 0, ?(\d+),", str(self.meta.get("notes", "")))
        step = int(said[1]) if said else -(-value.shape[axis] // self.outputs[output].shape[axis])
        return value.index_select(axis, torch.arange(0, value.shape[axis], step))

    def skip(self, output: str, why: str) -> None:
        """Say that `output` is not compared; the reason is printed with the case."""
        self.skipped[output] = why

    def weights(self, keep: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
        """The case's state dict by official names, filled by the recipe; computed buffers are absent."""
        not_filled = set(self.meta.get("not_filled") or ())
        rules = self.meta.get("post_fill") or ()
        fill = _fill_tensor(self.folder)
        state = {}
        for key, shape in self.keys.items():
            if key in not_filled or is_buffer(key) or not keep(key):
                continue
            value = fill(key, shape, self.seed)
            for rule in rules:
                if re.fullmatch(rule["match"], key):
                    gain = np.sqrt(np.prod(shape[1:])) if rule["mul"] == "unit" else float(rule["mul"])
                    value = (value.astype(np.float64) * gain).astype(np.float32)
            state[key] = torch.from_numpy(value)
        return state


def is_buffer(key: str) -> bool:
    """Buffers that a module computes for itself (blur kernels, windows, Whisper's sinusoids) are never filled."""
    return key.rsplit(".", 1)[-1] in ("kernel", "window") or key.endswith("encoder.positional_embedding")


def load_case(path: Path) -> Case:
    """Read `CASE.safetensors` and `CASE.keys.json`; names ending in `_f16` are widened and lose the ending."""
    inputs = {}
    outputs = {}
    with safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {}).get("meta", "{}"))
        for full in file.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
            side, _, name = full.partition(".")
            value = file.get_tensor(full)
            if name.endswith("_f16"):
                name = name.removesuffix("_f16")
                value = value.float()
            (inputs if side == "in" else outputs)[name] = value
    keys_file = path.with_name(path.stem + ".keys.json")
    keys = json.loads(keys_file.read_text()) if keys_file.is_file() else {}
    return Case(path.stem, path.parent, meta, inputs, outputs, {k: tuple(v) for k, v in keys.items()})


_FILLS: dict[Path, Callable] = {}


def _fill_tensor(folder: Path) -> Callable[[str, tuple[int, ...], int], np.ndarray]:
    """The `fill_tensor` of the nearest `weights.py` above `folder`: the recipe travels with the cases."""
    bundled = Path(__file__).resolve().parents[1]
    for parent in (folder, *folder.resolve().parents, bundled):
        path = parent / "weights.py"
        if path.is_file():
            if path not in _FILLS:
                spec = importlib.util.spec_from_file_location("golden_weights", path)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                _FILLS[path] = module.fill_tensor
            return _FILLS[path]
    raise FileNotFoundError(f"no weights.py in or above {folder}")

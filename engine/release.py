"""Release folders: `config.yaml` (kind and constructor arguments), `model.safetensors`, `README.md`.

A release is what inference loads and what ships; training state lives in `engine.training.checkpoint`. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import UserError
from engine.hub import release_folder
from engine.untrusted import read_yaml

M = TypeVar("M", bound=nn.Module)


def save_release(
    folder: str | Path,
    kind: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    card: str,
    files: Path | None = None,
) -> Path:
    """Write a release folder in one move: `folder` either holds the whole release or is as it was before.

    Tensors are stored as they come; pass `half(state)` or `compact(state)` to ship less.

    Args:
        files: folder whose files join the release, such as a tokenizer's.

    Raises:
        UserError: `folder` holds something else than a release, or cannot be written.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not _is_release(folder)):
        raise UserError(f"{folder} exists and is no release folder: it is not replaced, name another one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return _replace(folder, kind, config, state, card, files)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"release {folder} cannot be written: {why}") from error


def _is_release(folder: Path) -> bool:
    try:
        return "kind" in read_yaml(folder / "config.yaml") and (folder / "model.safetensors").is_file()
    except (UserError, TypeError):
        return False


def _replace(
    folder: Path, kind: str, config: dict[str, Any], state: dict[str, Tensor], card: str, files: Path | None
) -> Path:
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        OmegaConf.save(OmegaConf.create({"kind": kind, **config}), staging / "config.yaml")
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, staging / "model.safetensors")
        (staging / "README.md").write_text(card)
        for path in files.iterdir() if files else ():
            if path.is_symlink() or (staging / path.name).exists():
                raise UserError(f"{path} cannot join a release: it is a link, or has the name of another file")
            shutil.copyfile(path, staging / path.name)
        staging.chmod(0o755)  # temporary folders and safetensors files begin as their owner's alone
        for path in staging.iterdir():
            path.chmod(0o644)
        if folder.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, previous / "release")
            os.replace(staging, folder)
            shutil.rmtree(previous)
        else:
            os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float16: half the download, and under 1e-3 relative rounding of each weight."""
    return {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in state.items()}


SCALE = "::scale"  # ending of the companion of a tensor that is stored in 8 bits
COMPACT_FROM = 4096  # numbers; smaller tensors are not worth the rounding


def compact(state: dict[str, Tensor], exact: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """`half(state)` with large matrices in 8 bits: a quarter of the download in float32.

    A tensor (R, ...) becomes int8 of the same shape and, under its name with `::scale`, one float32 a row: the row's
    largest magnitude over 127, so that rounding is at most 0.4 % of it. `read_release` undoes it.

    Args:
        exact: beginnings of names that stay in half precision.
    """
    out = half(state)
    for key, value in state.items():
        if (
            value.is_floating_point()
            and value.ndim >= 2
            and value.numel() >= COMPACT_FROM
            and not key.startswith(exact)
        ):
            rows = value.detach().float().flatten(1)
            scale = rows.abs().amax(1).clamp_min(1e-12) / 127
            out[key] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
            out[key + SCALE] = scale
    return out


def average(
    states: list[dict[str, Tensor]], shares: list[float], prefixes: tuple[str, ...] = ("",)
) -> dict[str, Tensor]:
    """The first state dict, with the floating-point tensors whose names begin with a prefix averaged over all of them.

    Args:
        shares: weight of each state dict; divided by their sum.

    Raises:
        UserError: the names or shapes of the state dicts differ, or no tensor is averaged.
    """
    first = states[0]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    for other in shapes[1:]:
        unlike = sorted(name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name))
        if unlike:
            raise UserError(f"not the same model: {unlike[0]} is missing or of another shape in one of the releases")
    names = [name for name, value in first.items() if name.startswith(prefixes) and value.is_floating_point()]
    if not names:
        raise UserError(f"--only {' '.join(prefixes)}: no tensor begins so; the first is {min(first)}")
    total = sum(shares)
    means = {name: sum(share / total * state[name] for share, state in zip(shares, states)) for name in names}
    return first | means


def _expand(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors in float32, whichever way they were written."""
    scales = {key.removesuffix(SCALE): state.pop(key) for key in [k for k in state if k.endswith(SCALE)]}
    out = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    for key, scale in scales.items():
        out[key] = out[key].float() * scale.view(-1, *[1] * (out[key].ndim - 1))
    return out


def read_release(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(constructor arguments, state dict in float32) of a release of `kind`: a folder, or a name on the hub.

    Raises:
        UserError: the folder or a file is missing, the release is of another kind, or a file is damaged.
    """
    folder = release_folder(folder)
    if not folder.is_dir():
        raise UserError(f"weights folder not found: {folder} (give a folder with config.yaml and model.safetensors)")
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"weights folder {folder} has no {name}: it is not a release folder, or was copied in part")
    config = read_yaml(folder / "config.yaml")
    found = config.pop("kind", None) if isinstance(config, dict) else None
    if found != kind:
        raise UserError(f"weights folder {folder} holds a model of kind {found!r}, but {kind!r} is needed")
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / 'model.safetensors'} is damaged ({error}); copy or download it again") from error
    return config, _expand(state)


def release_kind(folder: Path) -> str:
    """Kind of the model that a release folder holds.

    Raises:
        UserError: `folder` is no release folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"no release in {folder}: give a folder with config.yaml and model.safetensors")
    config = read_yaml(folder / "config.yaml")
    return config.get("kind") if isinstance(config, dict) else None


def companion(folder: Path, named: Any, kind: str, bundled: Path) -> str:
    """The release of `kind` that a model's release in `folder` goes with, such as its tokenizer.

    Looked for by its folder's name in `folder`, beside it and among the `bundled` ones, and else where it was when the
    model was trained: at `named`, a path or a name on the hub.

    Raises:
        UserError: `named` is no text.
    """
    if not isinstance(named, str):
        raise UserError(f"{folder / 'config.yaml'} names {named!r} as its {kind}: a folder was expected")
    for place in (folder, folder.resolve().parent, bundled):
        found = place / Path(named).name
        if found.is_dir() and not _is_other(found, kind):
            return str(found)
    return named


def _is_other(folder: Path, kind: str) -> bool:
    """Whether a folder is a release of another kind; other programs' files and damaged releases are their reader's."""
    try:
        return release_kind(folder) not in (kind, None)
    except UserError:
        return False


def rewrite_release(source: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write a release of any kind with its tensors changed; card and further files, such as a tokenizer's, stay.

    Raises:
        UserError: as `release_kind`, `read_release` and `save_release` do.
    """
    kind = release_kind(source)
    config, state = read_release(source, kind)
    card = source / "README.md"
    save_release(out, kind, config, change(state), card.read_text() if card.is_file() else "")
    for path in source.iterdir():
        if path.is_file() and not path.is_symlink() and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """`load_state_dict` that tells a user in one line which keys or shapes do not fit.

    `assign` makes the tensors of `state` the module's own: for a module built on the meta device.

    Raises:
        UserError: with the first missing, unexpected or wrongly shaped key.
    """
    own = module.state_dict()
    for what, keys in (("lacks", own.keys() - state.keys()), ("has an unexpected", state.keys() - own.keys())):
        if keys:
            raise UserError(f"{source} {what} tensor {min(keys)!r} ({len(keys)} such): config and weights do not match")
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise UserError(
                f"{source} has {key!r} with shape {tuple(state[key].shape)}, the config asks for {tuple(value.shape)}"
            )
    module.load_state_dict(state, assign=assign)


def load_release(folder: str | Path, kind: str, build: Callable[[dict[str, Any]], M]) -> M:
    """The module of a release of `kind` in eval mode; `build` makes it from the constructor arguments.

    Raises:
        UserError: as `read_release` and `load_strict`, or `build` does not take such arguments.
    """
    arguments, state = read_release(folder, kind)
    try:
        module = build(arguments)
    except TypeError as error:
        raise UserError(f"{Path(folder) / 'config.yaml'}: {error}") from error
    load_strict(module, state, folder)
    return module.eval()


def weights_digest(*modules: nn.Module) -> str:
    """Eight hex digits that change when, and only when, a tensor of the modules does: tells stale features apart."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]

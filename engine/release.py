"""Release folders: `config.yaml` (kind and constructor arguments), `model.safetensors`, `README.md`.

A release is what inference loads and what is published; training state lives in `engine.training.checkpoint`. Nothing
is unpickled.

Axes: R rows of a matrix, that is its first axis.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from engine.errors import UserError
from engine.hub import release_folder
from engine.untrusted import check_numbers, read_yaml

N = TypeVar("N", bound=nn.Module)


class Pretrained(nn.Module):
    """A network with release folders: `save`, `from_pretrained`, `digest`.

    A subclass sets `kind` and `Config`, and its constructor takes one `Config`. A class that is built from more than a
    dataclass, or that stores less than its state dict, overrides `arguments`, `from_arguments`, `stored` or
    `load_tensors`.

    Attributes:
        kind: names the class in config.yaml.
        Config: dataclass of the constructor's argument, which is `config`.
        max_extra_tensors, max_extra_params: how many tensors, and elements of them, the network may have that its
            release does not store, such as tables.
        release: the whole config.yaml of the folder that the network was loaded from, except for the kind; else {}.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    max_extra_tensors: ClassVar[int] = 500
    max_extra_params: ClassVar[int] = 2**24

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.release: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        """Return what `from_arguments` makes the same network from; YAML can hold it."""
        return asdict(self.config)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Self:
        """Create a network with random weights. `arguments` are the whole config.yaml except the kind."""
        return cls(cls.Config(**arguments))

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that a release holds."""
        return self.state_dict()

    def load_tensors(self, state: dict[str, Tensor], source: str | Path) -> None:
        """Load the tensors of a release."""
        load_strict(self, state, source)

    def save(self, folder: str | Path, card: str, extra: dict[str, Any] | None = None) -> Path:
        """Write a release folder in half precision, with `card` as its README.md; `extra` joins its config.yaml."""
        return save_release(folder, self.kind, self.arguments() | (extra or {}), to_float16(self.stored()), card)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load a release folder, here or on the hub (OWNER/NAME), or its official files. The network is in eval mode.

        Args:
            options: further arguments of `from_arguments`.

        Raises:
            UserError: the folder or a file is missing or damaged, or its tensors do not fit its config.
        """
        folder = release_folder(folder)
        if not (folder / "config.yaml").is_file() and (official := cls.read_official(folder)) is not None:
            return cls.from_tensors(*official, folder)
        config, state = read_release(folder, cls.kind)
        try:
            with _no_larger_than(state, cls.max_extra_tensors, cls.max_extra_params):
                network = cls.from_arguments(config, **options)
        except UserError as error:
            raise UserError(f"{folder / 'config.yaml'}: {error}") from error
        except Exception as error:  # sizes that do not go together raise whatever the layers raise
            raise UserError(f"{folder / 'config.yaml'} does not describe a {cls.__name__}: {error}") from error
        network.load_tensors(state, folder)
        network.release = config
        return network.eval()

    @staticmethod
    def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Read the fields of `Config`, and the tensors under our names, of official files at `path`, a file or a
        folder; None: it has none.
        """
        return None

    @classmethod
    def from_tensors(cls, sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> Self:
        """Create a network with these fields of its config and the tensors of `state`; none is initialised or
        copied."""
        return build_with(lambda: cls(cls.Config(**sizes)), state, source)

    def digest(self) -> str:
        """Return the first eight hex digits of the SHA-256 of all weights."""
        return weights_digest(self)


@contextmanager
def _no_larger_than(state: dict[str, Tensor], extra_tensors: int, extra_params: int) -> Iterator[None]:
    """Refuse networks built in the block that are far larger than the tensors of their release.

    The limit is twice the size of `state`, as weight normalisation registers a weight again in place of the first one,
    and `extra_tensors` with `extra_params` elements more.

    Raises:
        UserError: a module registers a tensor over the limit.
    """
    tensors_left = 2 * len(state) + extra_tensors
    params_left = 2 * sum(value.numel() for value in state.values()) + extra_params

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal tensors_left, params_left
        tensors_left -= 1
        params_left -= 0 if value is None else value.numel()
        if min(tensors_left, params_left) < 0:
            raise UserError("its sizes make a far larger model than model.safetensors holds")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_replaceable(folder: Path) -> None:
    """Raise UserError if `folder` holds something else than a release, which must not be overwritten."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not _kind(folder)):
        raise UserError(f"{folder} exists but is not a release folder and was not overwritten; choose another folder")


def save_release(
    folder: str | Path,
    kind: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    card: str,
    files: Path | None = None,
) -> Path:
    """Write a release folder in one move: `folder` either holds the whole release or is as it was before.

    Tensors keep their types; pass `to_float16(state)` or `compact(state)` to ship less.

    Args:
        files: folder whose files are copied into the release, such as a tokenizer's.
    """
    folder = Path(folder)
    _check_finite(state, f"release {folder}")
    check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            staging = Path(scratch) / "release"
            staging.mkdir()
            OmegaConf.save(OmegaConf.create({"kind": kind, **config}), staging / "config.yaml")
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, staging / "model.safetensors")
            (staging / "README.md").write_text(card)
            for path in files.iterdir() if files else ():
                if path.is_symlink() or (staging / path.name).exists():
                    raise UserError(f"{path} cannot join a release: it is a link, or has the name of another file")
                shutil.copyfile(path, staging / path.name)
            (staging / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner can read
            if folder.exists():
                previous = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
                os.replace(folder, previous / "release")
                os.replace(staging, folder)
                shutil.rmtree(previous)
            else:
                os.replace(staging, folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"release {folder} cannot be written: {why}") from error
    return folder


def _kind(folder: Path) -> str | None:
    """Return the kind of the model in a release folder; None if it has no kind, or cannot be read."""
    with suppress(UserError):
        return release_kind(folder)


def to_float16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return floating tensors as float16: half the download, and under 1e-3 relative rounding of each weight."""
    return {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in state.items()}


SCALE = "::scale"  # ending of the name of the scales of a tensor that is stored in 8 bits
COMPACT_FROM = 4096  # numbers; smaller tensors are not worth the rounding


def compact(state: dict[str, Tensor], exact: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return `to_float16(state)` with large matrices in 8 bits: a quarter of the download in float32.

    A tensor (R, ...) becomes int8 of the same shape and, under its name with `::scale`, one float32 per row: the row's
    largest magnitude over 127, so that rounding is at most 0.4 % of it. `read_release` undoes it.

    Args:
        exact: beginnings of names that stay in half precision.
    """
    out = to_float16(state)
    for key, value in state.items():
        large = value.is_floating_point() and value.ndim >= 2 and value.numel() >= COMPACT_FROM
        if large and not key.startswith(exact):
            rows = value.detach().float().flatten(1)
            scale = rows.abs().amax(1).clamp_min(1e-12) / 127
            out[key] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
            out[key + SCALE] = scale
    return out


def average(
    states: list[dict[str, Tensor]], shares: list[float], prefixes: tuple[str, ...] = ("",)
) -> dict[str, Tensor]:
    """Return the first state dict, with floating-point tensors whose names begin with a prefix averaged over all.

    `shares` are the weights of the state dicts, and are divided by their sum.
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
    weights = [share / sum(shares) for share in shares]
    return first | {name: sum(w * state[name] for w, state in zip(weights, states)) for name in names}


def _check_finite(state: dict[str, Tensor], source: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source} has weights that are not finite numbers ({key}): take an earlier checkpoint")


def _expand(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return stored tensors in float32, from half precision or from 8 bits with scales."""
    scales = {key.removesuffix(SCALE): state.pop(key) for key in [k for k in state if k.endswith(SCALE)]}
    out = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    for key, scale in scales.items():
        if key not in out or out[key].dtype != torch.int8 or scale.shape != out[key].shape[:1]:
            raise UserError(f"{key}{SCALE} does not go with a tensor of bytes of as many rows")
        out[key] = out[key].float() * scale.view(-1, *[1] * (out[key].ndim - 1))
    return out


def read_release(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (constructor arguments, state dict in float32) of a release of `kind`: a folder, or a name on the hub."""
    folder = release_folder(folder)
    config = _read_config(folder)
    actual = config.pop("kind", None)
    if actual != kind:
        raise UserError(f"weights folder {folder} holds a model of kind {actual!r}, but {kind!r} is needed")
    check_numbers(config, folder / "config.yaml")
    try:
        state = _expand(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError, UserError) as error:
        raise UserError(f"{folder / 'model.safetensors'} is damaged ({error}); copy or download it again") from error
    _check_finite(state, f"weights folder {folder}")
    return config, state


def release_kind(folder: Path) -> str | None:
    """Return the kind of the model in a release folder; None if its config.yaml has no `kind`."""
    kind = _read_config(folder).get("kind")
    return kind if isinstance(kind, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"weights folder not found: {folder} (give a folder with config.yaml and model.safetensors)")
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"weights folder {folder} has no {name}: it is not a release folder, or was copied in part")
    config = read_yaml(folder / "config.yaml")
    return config if isinstance(config, dict) else {}


def find_codec(folder: Path, name: Any, kinds: Collection[str], bundled: Path) -> str:
    """Return the folder of the codec of the model in `folder`; `name` is its path or hub name at training.

    Search `folder`, its parent and `bundled`, in this order, for a release of one of `kinds` whose folder has the last
    part of `name` as its name. Without a match, return `name`.
    """
    if not isinstance(name, str):
        raise UserError(f"{folder / 'config.yaml'} names {name!r} as its codec: a folder was expected")
    for parent in (folder, Path(os.path.realpath(folder)).parent, bundled):
        codec = parent / Path(name).name
        if codec.is_dir() and _kind(codec) in (*kinds, None):  # a damaged one is ours: reading reports the damage
            return str(codec)
    return name


def rewrite_release(source: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write a release of any kind with its tensors changed; card and further files, such as a tokenizer's, stay."""
    kind = release_kind(source)
    card = source / "README.md"
    config, state = read_release(source, kind)
    save_release(out, kind, config, change(state), card.read_text() if card.is_file() else "")
    for path in source.iterdir():
        if path.is_file() and not path.is_symlink() and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def without_retired(settings: Mapping[str, Any], retired: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of a release without those that have been removed since it was written.

    Args:
        retired: the removed settings, each with the value at which it had no effect.
        prefix: where the settings stand in config.yaml, for error messages.

    Raises:
        UserError: a removed setting has another value, so that the release depends on code that no longer exists.
    """
    for name, value in retired.items():
        if settings.get(name, value) != value:
            raise UserError(f"{prefix}{name}={settings[name]} has been removed: use an older version of this project")
    return {name: value for name, value in settings.items() if name not in retired}


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """Load a state dict; say in one line which keys or shapes do not fit.

    `assign` makes the tensors of `state` the module's own: for a module built on the meta device.
    """
    parameters = module.state_dict()
    lacking = parameters.keys() - state.keys()
    unexpected = state.keys() - parameters.keys()
    for what, keys in (("lacks", lacking), ("has an unexpected", unexpected)):
        if keys:
            raise UserError(f"{source} {what} tensor {min(keys)!r} ({len(keys)} such): config and weights do not match")
    for key, value in parameters.items():
        shape = tuple(state[key].shape)
        wanted = tuple(value.shape)
        if shape != wanted:
            raise UserError(f"{source} has {key!r} with shape {shape}, the config requires {wanted}")
    module.load_state_dict(state, assign=assign)


def build_with(make: Callable[[], N], state: Mapping[str, Tensor], source: str | Path) -> N:
    """Create a network with the tensors of `state`, strictly, in float32 and eval mode; no others are allocated."""
    with torch.device("meta"):
        network = make()
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    load_strict(network, state, source, assign=True)
    return network.eval()


def weights_digest(*modules: nn.Module) -> str:
    """Return the first eight hex digits of the SHA-256 of all tensors of the modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]

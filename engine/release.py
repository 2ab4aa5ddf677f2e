"""Release folders: `config.yaml` (kind and constructor arguments), `model.safetensors`, `README.md`.

Releases are loaded for inference and published. Training state is stored separately, see `engine.training.checkpoint`.
Nothing is unpickled.

Axes: R rows of a matrix (its first axis).
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
    """Base class of networks that are stored in release folders.

    Subclasses set `kind` and `Config`, and their constructor takes a `Config`. Subclasses that need further arguments,
    or store only a part of their state dict, override `arguments`, `from_arguments`, `stored` or `load_tensors`.

    Attributes:
        kind: identifier of the class in config.yaml.
        Config: dataclass of the constructor argument `config`.
        max_extra_tensors, max_extra_params: maximum number of tensors, and of their elements, that are not stored in a
            release, such as lookup tables.
        release: contents of config.yaml, without the kind, of the folder from which the network was loaded; else {}.
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
        """Return the arguments of `from_arguments` that recreate this network, as YAML-serialisable values."""
        return asdict(self.config)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Self:
        """Create a network with random weights. `arguments` are the contents of config.yaml without the kind."""
        return cls(cls.Config(**arguments))

    def release_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that are stored in a release."""
        return self.state_dict()

    def load_tensors(self, state: dict[str, Tensor], source: str | Path) -> None:
        """Load the tensors of a release."""
        load_strict(self, state, source)

    def save_pretrained(self, folder: str | Path, card: str, extra: dict[str, Any] | None = None) -> Path:
        """Write a release folder in half precision, with `card` as README.md. `extra` is added to config.yaml."""
        tensors = to_float16(self.release_state_dict())
        return save_release(folder, self.kind, self.arguments() | (extra or {}), tensors, card)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load a release folder, a release on the hub (OWNER/NAME), or upstream files. The network is in eval mode.

        Args:
            options: additional arguments of `from_arguments`.

        Raises:
            UserError: If the folder or a file is missing or damaged, or the tensors do not match the config.
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
        except Exception as error:  # inconsistent sizes raise errors of the layers
            raise UserError(f"{folder / 'config.yaml'} does not describe a {cls.__name__}: {error}") from error
        network.load_tensors(state, folder)
        network.release = config
        return network.eval()

    @staticmethod
    def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Read the fields of `Config` and the renamed tensors from upstream files at `path`, a file or folder. Return
        None if there are none.
        """
        return None

    @classmethod
    def from_tensors(cls, sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> Self:
        """Create a network with the fields `sizes` of its config and the tensors of `state`, without initialising or
        copying them.
        """
        return build_with(lambda: cls(cls.Config(**sizes)), state, source)

    def digest(self) -> str:
        """Return the first eight hex digits of the SHA-256 of all weights."""
        return weights_digest(self)


@contextmanager
def _no_larger_than(state: dict[str, Tensor], extra_tensors: int, extra_params: int) -> Iterator[None]:
    """Reject networks built in the block that are far larger than the tensors of their release.

    The limit is twice the size of `state`, as weight normalisation registers weights twice, plus `extra_tensors`
    tensors with `extra_params` elements.

    Raises:
        UserError: If a module registers a tensor beyond the limit.
    """
    tensors_left = 2 * len(state) + extra_tensors
    params_left = 2 * sum(value.numel() for value in state.values()) + extra_params

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal tensors_left, params_left
        tensors_left -= 1
        params_left -= 0 if value is None else value.numel()
        if min(tensors_left, params_left) < 0:
            raise UserError("its sizes require a far larger model than model.safetensors contains")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_replaceable(folder: Path) -> None:
    """Raise UserError if `folder` exists and is not a release, so that it must not be overwritten."""
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
    """Write a release folder: `folder` contains either the whole release or its previous contents.

    If the process is killed in the instant in which a release is replaced, its previous contents are in
    `.NAME-old-*/release` beside it.

    Tensors keep their dtypes. Pass `to_float16(state)`, or that of `engine.training.export.compact`, for smaller files.

    Args:
        files: folder whose files are copied into the release, such as those of a tokenizer.
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
                    raise UserError(f"{path} cannot be added to a release: it is a link, or its name is already used")
                shutil.copyfile(path, staging / path.name)
            (staging / "model.safetensors").chmod(0o644)  # safetensors creates files with mode 0600
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
    """Return the kind of a release folder, or None if it cannot be read."""
    with suppress(UserError):
        return release_kind(folder)


def to_float16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert floating-point tensors to float16, which halves the size. The relative rounding error of a weight is
    below 1e-3.
    """
    return {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in state.items()}


SCALE = "::scale"  # suffix of the scales of a quantised tensor
RELEASE_FILES = ("config.yaml", "model.safetensors", "README.md")  # files of every release


def _check_finite(state: dict[str, Tensor], source: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source} has non-finite weights ({key}): use an earlier checkpoint")


def _expand(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert stored tensors to float32, from half precision or from int8 with scales."""
    scales = {key.removesuffix(SCALE): state.pop(key) for key in [k for k in state if k.endswith(SCALE)]}
    out = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    for key, scale in scales.items():
        if key not in out or out[key].dtype != torch.int8 or scale.shape != out[key].shape[:1]:
            raise UserError(f"{key}{SCALE} does not match an int8 tensor with the same number of rows")
        if not scale.is_floating_point():
            raise UserError(f"{key}{SCALE} has the type {scale.dtype} instead of float32")
        out[key] = out[key].float() * scale.view(-1, *[1] * (out[key].ndim - 1))
    for key, value in out.items():
        if value.dtype == torch.int8:
            raise UserError(f"the int8 tensor {key} has no scales ({key}{SCALE})")
    return out


def read_release(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (constructor arguments, state dict in float32) of a release of `kind`, from a folder or the hub."""
    folder = release_folder(folder)
    config = _read_config(folder)
    actual = config.pop("kind", None)
    if actual != kind:
        raise UserError(f"weights folder {folder} contains a model of kind {actual!r}, but {kind!r} is needed")
    check_numbers(config, folder / "config.yaml")
    try:
        state = _expand(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError, UserError) as error:
        raise UserError(f"{folder / 'model.safetensors'} is damaged ({error}); copy or download it again") from error
    _check_finite(state, f"weights folder {folder}")
    return config, state


def release_kind(folder: Path) -> str | None:
    """Return the kind of a release folder, or None if its config.yaml has no `kind`."""
    kind = _read_config(folder).get("kind")
    return kind if isinstance(kind, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"weights folder not found: {folder} (expected a folder with config.yaml and model.safetensors)"
        )
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"weights folder {folder} has no {name}: it is not a release folder, or is incomplete")
    config = read_yaml(folder / "config.yaml")
    return config if isinstance(config, dict) else {}


def find_codec(folder: Path, name: Any, kinds: Collection[str], bundled: Path) -> str:
    """Return the folder of a codec of the model in `folder`. `name` is its path or hub name during training.

    Search `folder`, its parent and `bundled`, in this order, for a release of one of `kinds` in a folder named like the
    last component of `name`. Without a match, return `name`.
    """
    if not isinstance(name, str):
        raise UserError(f"{folder / 'config.yaml'} names {name!r} as its codec: a folder was expected")
    for parent in (folder, Path(os.path.realpath(folder)).parent, bundled):
        codec = parent / Path(name).name
        # A damaged release matches, too: the error is reported when it is read.
        if codec.is_dir() and _kind(codec) in (*kinds, None):
            return str(codec)
    return name


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """Load a state dict strictly. Missing or unexpected keys and shape mismatches raise a one-line UserError.

    `assign` uses the tensors of `state` directly, for a module on the meta device.
    """
    parameters = module.state_dict()
    missing = parameters.keys() - state.keys()
    unexpected = state.keys() - parameters.keys()
    for what, keys in (("has no", missing), ("has an unexpected", unexpected)):
        if keys:
            raise UserError(f"{source} {what} tensor {min(keys)!r} ({len(keys)} in all): config and weights differ")
    for key, value in parameters.items():
        shape = tuple(state[key].shape)
        wanted = tuple(value.shape)
        if shape != wanted:
            raise UserError(f"{source} has {key!r} with shape {shape}, the config requires {wanted}")
        if value.is_floating_point() and not state[key].is_floating_point():
            raise UserError(f"{source} has {key!r} of {state[key].dtype}, the config requires {value.dtype}")
    module.load_state_dict(state, assign=assign)


def build_with(make: Callable[[], N], state: Mapping[str, Tensor], source: str | Path) -> N:
    """Create a network from the tensors of `state`, strictly, in float32 and eval mode, without allocating other
    weights.
    """
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

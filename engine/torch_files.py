"""Reads files that `torch.save` wrote, without running anything that they name.

`torch.load(weights_only=True)` reads them. Released checkpoints also hold objects of their training programs: settings
(AV-HuBERT: argparse or OmegaConf), meters (POSTER V2), hyperparameters (WhisperX-VAE). Each class or function that
torch does not allow is replaced by an inert class of its own, by `torch.serialization.safe_globals`.
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from engine.errors import UserError

_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that torch.save began with before 1.6
# of the objects that `plain` follows
MAX_PARTS = 100_000
MAX_DEPTH = 50


class StandIn:
    """An inert object in place of one of any class: it remembers constructor arguments and state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        self = object.__new__(cls)
        self.arguments = args
        self.state = None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


def stand_in(name: str) -> type[StandIn]:
    """Create a class of inert objects in place of the class or function `name` (MODULE.NAME)."""
    return type(name.rpartition(".")[2], (StandIn,), {"__module__": f"stand_in.{name.rpartition('.')[0]}"})


def _substitute(name: str) -> Any:
    """Return what takes the place of the class or function `name` while a file is read."""
    if name == "collections.defaultdict":  # which torch fills with items only if it is a dict
        return lambda *_: {}
    return stand_in(name)


def read_torch(path: str | Path) -> Any:
    """Return what `torch.save` wrote to `path`, with stand-ins for foreign objects.

    Tensors of the zip format stay on disk until used; those of the format used until PyTorch 1.5 are read at once, and
    such a file must hold only tensors and plain containers.

    Raises:
        UserError: the file is missing, damaged, compressed, or a TorchScript program.
    """
    try:
        with open(path, "rb") as file:
            old = file.read(len(_OLD_MAGIC)) == _OLD_MAGIC and not tarfile.is_tarfile(path)
        foreign: list[Any] = []
        if not old:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if any(info.filename.endswith("constants.pkl") for info in members):
                raise ValueError("it is a TorchScript program, not a checkpoint")
            if sum(info.file_size for info in members) > Path(path).stat().st_size:  # torch.save never packs
                raise ValueError("it is compressed")
            foreign = [(_substitute(name), name) for name in get_unsafe_globals_in_checkpoint(path)]
        with safe_globals(foreign):
            content = torch.load(path, map_location="cpu", mmap=not old, weights_only=True)
        check_sizes(content)
        return content
    except FileNotFoundError:
        raise UserError(f"no such checkpoint: {path}") from None
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        reason = load_problem(error)
        raise UserError(f"{path} is not a readable checkpoint ({reason}): make or download it again") from error


def check_sizes(content: Any, depth: int = 0) -> None:
    """Raise ValueError if plain containers hold a tensor that is larger than its data, which strides of zero allow."""
    if isinstance(content, torch.Tensor):
        dense = content.layout == torch.strided
        if dense and content.numel() * content.itemsize > content.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(content.shape)} is larger than its data")
    elif depth < MAX_DEPTH and isinstance(content, dict | list | tuple):
        for item in content.values() if isinstance(content, dict) else content:
            check_sizes(item, depth + 1)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the dict that `torch.save` wrote to `path`, as `read_torch` does."""
    content = read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def read_state(path: str | Path, key: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict that `torch.save` wrote to `path`, at its entry `key` if it has one."""
    content = read_checkpoint(path)
    state = content.get(key, content)
    if not isinstance(state, dict):
        raise UserError(f"{path} has no state dict under {key!r}: it is another kind of checkpoint")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def read_matrix(path: str | Path, columns: int | None = None) -> torch.Tensor:
    """Return the finite numbers (rows, `columns`) of a torch file; None: any number of columns."""
    value = read_torch(path)
    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or not value.is_floating_point()
        or value.ndim != 2
        or len(value) == 0
        or columns not in (None, value.shape[1])
        or not value.isfinite().all()
    ):
        raise UserError(f"{path} must hold a tensor (frames, {columns or 'channels'}) of finite numbers")
    return value


def load_problem(error: BaseException) -> str:
    """Return one line on why torch.load failed, without its advice to allow that a file is executed."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def plain(value: Any, depth: int = 0, budget: list[int] | None = None) -> Any:
    """Turn stand-ins for configuration objects into dicts, lists and scalars; anything else becomes None.

    An OmegaConf container's state has `_content` (a dict or list of nodes), an OmegaConf value's has `_val`; any other
    object, such as an argparse namespace, becomes the dict of its attributes. Parts deeper than `MAX_DEPTH` or beyond
    the first `MAX_PARTS` become None; a list may hold itself.
    """
    budget = [MAX_PARTS] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        return None
    if isinstance(value, StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        return plain(state.get("_content", state.get("_val", state or None)), depth + 1, budget)
    if isinstance(value, dict):
        return {key: plain(item, depth + 1, budget) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1, budget) for item in value]
    return value if isinstance(value, str | int | float) else None

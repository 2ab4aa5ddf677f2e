"""Read tensors, arrays and plain containers from pickles without running anything that they name.

Training scripts pickle their configuration, meters and optimisers as objects of their own packages. Here every class or
function outside a short list of tensor builders becomes an inert stand-in that only remembers its arguments.
"""

from __future__ import annotations

import pickle
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import UserError

_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that torch.save began with before 1.6
_TENSOR_BUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")


class StandIn:
    """An inert object in place of one of any class: it remembers constructor arguments, items and state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        self = object.__new__(cls)
        self.arguments, self.items, self.state = args, [], None
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _TENSOR_BUILDERS:
            return lambda *arguments: _check_size(getattr(torch._utils, name)(*arguments))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (StandIn,), {"__module__": f"stand_in.{module}"})


def _check_size(value: Any) -> Any:
    """Return `value`, unless it is a tensor that is larger than its data, which strides of zero allow."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    if dense and value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(value.shape)} is larger than its data")
    return value


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


def read_torch(path: str | Path) -> Any:
    """Return what `torch.save` wrote to `path`, with stand-ins for foreign objects.

    Tensors of the zip format stay on disk until used; those of the format used until PyTorch 1.5 are read at once.
    """
    restricted = types.SimpleNamespace(__name__="restricted_pickle", Unpickler=_Unpickler, load=_load)
    try:
        with open(path, "rb") as file:
            old = file.read(len(_OLD_MAGIC)) == _OLD_MAGIC and not tarfile.is_tarfile(path)
        if not old:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if any(info.filename.endswith("constants.pkl") for info in members):  # torch.load would run its interpreter
                raise ValueError("it is a TorchScript program, not a checkpoint")
            if sum(info.file_size for info in members) > Path(path).stat().st_size:  # torch.save never packs
                raise ValueError("it is compressed")
        return torch.load(path, map_location="cpu", mmap=not old, weights_only=False, pickle_module=restricted)
    except FileNotFoundError:
        raise UserError(f"no such checkpoint: {path}") from None
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise UserError(f"{path} is not a readable checkpoint ({error!r}): make or download it again") from error


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


def load_problem(error: BaseException) -> str:
    """Say in a line why torch.load failed, without its advice to allow that a file is executed."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors"
    return str(error).strip().partition("\n")[0] or type(error).__name__


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


def read_arrays(path: Path) -> list[Any]:
    """Return a list of arrays of numbers, or None, that was pickled to `path`.

    numpy takes no part in unpickling, because it trusts the types that a pickle states. The bytes are read by hand.
    """
    try:
        with path.open("rb") as file:
            return [None if value is None else _array(value) for value in _load(file)]
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} cannot be read as a pickled list of arrays ({load_problem(error)})") from error


def _array(value: StandIn) -> np.ndarray:
    if len(value.arguments) == 4:  # protocol 5
        data, kind, shape, order = value.arguments
    else:
        _, shape, kind, fortran, data = value.state
        order = "F" if fortran else "C"
    if isinstance(data, StandIn):  # bytes in protocols before 3
        data = data.arguments[0].encode("latin1")
    numbers = np.dtype(str(kind.arguments[0])).newbyteorder(kind.state[1])
    if numbers.kind not in "fiu":
        raise ValueError(f"an array of {numbers}")
    return np.frombuffer(data, numbers).reshape(shape, order=order)


def plain(value: Any, depth: int = 0, budget: list[int] | None = None) -> Any:
    """Turn stand-ins for configuration objects into dicts, lists and scalars; anything else becomes None.

    An OmegaConf container's state has `_content` (a dict or list of nodes), an OmegaConf value's has `_val`; any other
    object, such as an argparse namespace, becomes the dict of its attributes. Parts deeper than 50 or beyond the first
    100,000 become None; a list may hold itself.
    """
    budget = [100_000] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > 50:
        return None
    if isinstance(value, StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        return plain(state.get("_content", state.get("_val", state or None)), depth + 1, budget)
    if isinstance(value, dict):
        return {key: plain(item, depth + 1, budget) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1, budget) for item in value]
    return value if isinstance(value, str | int | float) else None

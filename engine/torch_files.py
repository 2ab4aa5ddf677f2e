"""Safe reading of files written by `torch.save` and of pickled arrays, without executing code that they name.

Files are read by `torch.load(weights_only=True)`. Released checkpoints also contain objects of their training programs:
settings (AV-HuBERT: argparse or OmegaConf), meters (POSTER V2), hyperparameters (WhisperX-VAE). Each class or function
that torch does not allow is replaced by an inert placeholder class, by `torch.serialization.safe_globals`.
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from engine.errors import UserError
from engine.untrusted import load_problem

_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch.save before PyTorch 1.6
# limits of the nesting depth and number of objects in `plain`
MAX_PARTS = 100_000
MAX_DEPTH = 50


class StandIn:
    """Inert placeholder for an object of any class, which stores constructor arguments and state."""

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
    """Create an inert placeholder class for the class or function `name` (MODULE.NAME)."""
    return type(name.rpartition(".")[2], (StandIn,), {"__module__": f"stand_in.{name.rpartition('.')[0]}"})


def _substitute(name: str) -> Any:
    """Return the substitute for the class or function `name` during unpickling."""
    if name == "collections.defaultdict":  # torch only adds items if it is a dict
        return lambda *_: {}
    return stand_in(name)


def read_torch(path: str | Path) -> Any:
    """Read a file written by `torch.save`, with placeholders for foreign objects.

    Tensors of the zip format are memory-mapped. Files in the format of PyTorch 1.5 and earlier are read at once, and
    may only contain tensors and plain containers.

    Raises:
        UserError: If the file is missing, damaged, compressed, or a TorchScript program.
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
            if sum(info.file_size for info in members) > Path(path).stat().st_size:  # torch.save never compresses
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
        raise UserError(f"{path} is not a readable checkpoint ({reason}): create or download it again") from error


def check_sizes(content: Any, depth: int = 0) -> None:
    """Raise ValueError if a tensor in nested containers is larger than its storage, which zero strides allow."""
    if isinstance(content, torch.Tensor):
        dense = content.layout == torch.strided
        if dense and content.numel() * content.itemsize > content.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(content.shape)} is larger than its data")
    elif depth < MAX_DEPTH and isinstance(content, dict | list | tuple):
        for item in content.values() if isinstance(content, dict) else content:
            check_sizes(item, depth + 1)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a dict written by `torch.save`, see `read_torch`."""
    content = read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a checkpoint dict")
    return content


def read_state(path: str | Path, key: str = "") -> dict[str, torch.Tensor]:
    """Read a state dict written by `torch.save`, from its entry `key` if it has one."""
    content = read_checkpoint(path)
    state = content.get(key, content)
    if not isinstance(state, dict):
        raise UserError(f"{path} has no state dict under {key!r}: it is another kind of checkpoint")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def read_matrix(path: str | Path, columns: int | None = None) -> torch.Tensor:
    """Read a finite matrix (rows, `columns`) from a torch file. None allows any number of columns."""
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
        raise UserError(f"{path} must contain a tensor (frames, {columns or 'channels'}) of finite numbers")
    return value


class _InertUnpickler(pickle.Unpickler):
    """Unpickler that builds plain containers and inert placeholders; classes and functions named by the pickle are not
    used.
    """

    def find_class(self, module: str, name: str) -> Any:
        return stand_in(f"{module}.{name}")


def read_pickled_arrays(path: Path) -> list[np.ndarray | None]:
    """Read a pickled list of numeric arrays or None.

    numpy does not take part in unpickling, because it trusts the types in a pickle. The bytes are parsed here.
    """
    try:
        with path.open("rb") as file:
            return [None if value is None else _array(value) for value in _InertUnpickler(file).load()]
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
    """Convert placeholders of configuration objects to dicts, lists and scalars. Anything else becomes None.

    The state of an OmegaConf container has `_content` (a dict or list of nodes), that of an OmegaConf value `_val`.
    Other objects, such as an argparse namespace, become a dict of their attributes. Objects deeper than `MAX_DEPTH` or
    beyond the first `MAX_PARTS` become None, as a list may contain itself.
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

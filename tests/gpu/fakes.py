"""A CUDA device that is not there: programs run on fake tensors, which have shapes, types and a device but no data.

Without a driver PyTorch runs no backward pass of CUDA tensors: tests/gpu/test_cards.py does.
"""

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
SEEMS = {  # what makes CUDA seem to be there
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.is_bf16_supported": lambda *_, **__: True,
    "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
}
ROOT = f"{Path(__file__).resolve().parents[2]}/"


class Audit(FakeTensorMode):
    """A fake device: host reads give zeros, and are noted by the place in the code, for the message of a failure.

    Tensors of the device are fake. Those of the host are real, so that what it computes of lengths has values.

    Attributes:
        answer: what a copy of integers to the host holds.
        reads: copies to the host, values of tensors, and shapes that depend on data.
        waits: copies to the device from ordinary memory, during which the host waits, too.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.answer = 0
        self.reads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def dispatch(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if not any(isinstance(x, FakeTensor) for x in tensors):
            if target != "cuda":
                return func(*args, **kwargs)
            if tensors and not kwargs.get("non_blocking"):
                self.waits[_place()] += 1
            args, kwargs = tree_map(self._fake, (args, kwargs))
            return super().dispatch(func, types, args, kwargs)
        if func is aten._local_scalar_dense.default:
            self.reads[_place()] += 1
            return False if args[0].dtype == torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        if func is aten._to_copy.default and kwargs.get("device") is not None and target == "cpu":
            self.reads[_place()] += 1
            with _disable_current_modes():
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, 0 if dtype.is_floating_point else self.answer, dtype=dtype)
        if func is aten.copy_.default and isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor):
            (self.waits if isinstance(args[0], FakeTensor) else self.reads)[_place()] += 1
            return args[0]
        host = [x for x in tensors if not isinstance(x, FakeTensor) and x.ndim]
        assert not host, f"{func} takes tensors of the host and of the device, at {_place()}"
        args, kwargs = tree_map(self._fake, (args, kwargs))
        return super().dispatch(func, types, args, kwargs)

    def _fake(self, x: Any) -> Any:
        return self.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x


def _place() -> str:
    """Return FILE:FUNCTION of the innermost frame of the product; those of `to_device` are its callers'."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "/tests/" not in name and "/.venv" not in name and "engine/device.py" not in name:
            function = frame.f_code.co_qualname.removesuffix(".<locals>.<listcomp>").rsplit(".", 1)[-1]
            return f"{name.removeprefix(ROOT)}:{function}"
        frame = frame.f_back
    return "?"


@contextmanager
def audited() -> Iterator[Audit]:
    """Within the block CUDA seems to be there, and whole pipelines of networks made by `faked` run on it."""
    generator = torch.Generator
    rand = torch.rand
    as_tensor = torch.as_tensor
    answers = dict[str, Any]()

    def fake_rand(*size: Any, generator: Any = None, **how: Any) -> Tensor:
        on_device = torch.device(how.get("device") or "cpu").type == "cuda"
        return rand(*size, **how) if on_device else rand(*size, generator=generator, **how)

    def fake_as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        tensor = as_tensor(data, dtype=dtype)
        return tensor if device is None else tensor.to(device)

    answers |= {"torch.rand": fake_rand, "torch.as_tensor": fake_as_tensor}
    answers |= {"torch.Generator": lambda device="cpu": generator(), "torch.nn.Module.to": lambda m, *a, **k: m}
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(mock.patch("torch.Tensor.pin_memory", lambda tensor: tensor))
        audit = stack.enter_context(Audit())
        for name, answer in (answers | SEEMS).items():
            stack.enter_context(mock.patch(name, answer))
        yield audit


def faked(value: Any) -> Any:
    """Copy a module or tensors, in dicts, lists, tuples, dataclasses, to the fake device; inside `audited`."""
    if isinstance(value, nn.Module):
        memo = {id(t): faked(t) for t in [*value.parameters(), *value.buffers()]}
        with _disable_current_modes():  # other tensors of it stay on the host, and real
            return copy.deepcopy(value, memo)
    if isinstance(value, Tensor):
        if isinstance(value, FakeTensor):
            return value.to(CUDA)
        empty = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
        return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    if isinstance(value, dict):
        return {key: faked(part) for key, part in value.items()}
    if is_dataclass(value):
        return replace(value, **{field.name: faked(getattr(value, field.name)) for field in fields(value)})
    return type(value)(faked(part) for part in value) if isinstance(value, list | tuple) else value

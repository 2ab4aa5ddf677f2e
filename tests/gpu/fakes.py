"""A CUDA device that is not there: programs run on fake tensors, which have shapes, types and a device but no data.

Inside `fake_cuda`, reading a value on the host (`.item()`, `.tolist()`, `if tensor`) raises
DataDependentOutputException, a shape that depends on data (`nonzero`, a mask as index) raises
DynamicOutputShapeException, and an operation on tensors of two devices raises too. Copies to the
host are refused here. Without a driver PyTorch runs no backward pass of CUDA tensors: it is tried on fake tensors of
the processor instead (`device="cpu"`), for which the same is refused.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)


class Operators(TorchDispatchMode):
    """Counts operators by name (`counts`) and by the type of what they give (`types`); refuses copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.types: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        self.counts[name] += 1
        results = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        for result in results:
            self.types[name, result.dtype] += 1
        read = [x for x in args if isinstance(x, Tensor) and x.device.type == "cuda"]
        if read and any(result.device.type == "cpu" for result in results):
            raise AssertionError(f"{name} copies a tensor from the device to the host")
        return out


@contextmanager
def fake_cuda(device: torch.device | str = CUDA) -> Iterator[Operators]:
    """Within the block tensors are fake, and CUDA seems to be there; gives the operators that ran in it."""
    told = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
    }
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())  # first: where there is no driver it puts an idle one in its place
        for name, answer in told.items() if torch.device(device).type == "cuda" else ():
            stack.enter_context(mock.patch(name, answer))
        yield stack.enter_context(Operators())


def faked(value: Any, device: torch.device | str = CUDA) -> Any:
    """Inside `fake_cuda`: a module or tensors, in dicts, lists, tuples, dataclasses, copied to a fake device."""
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return copy.deepcopy(value, {id(t): faked(t, device) for t in tensors})
    if isinstance(value, Tensor):
        if isinstance(value, FakeTensor):
            return value.to(device)
        empty = torch.empty(value.shape, dtype=value.dtype, device=device)
        return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    if isinstance(value, dict):
        return {key: faked(part, device) for key, part in value.items()}
    if is_dataclass(value):
        return replace(value, **{field.name: faked(getattr(value, field.name), device) for field in fields(value)})
    return type(value)(faked(part, device) for part in value) if isinstance(value, list | tuple) else value

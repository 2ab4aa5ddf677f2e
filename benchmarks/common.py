"""Helpers of benchmarks: separate processes, time, memory, operator counts, configs."""

from __future__ import annotations

import copy
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config import CONFIGS
from engine.errors import UserError
from engine.precision import Int8Linear, prepare_inference
from engine.training.speed import counter, memory_gib

T = TypeVar("T")


def in_own_process(measure: Callable[..., T], *arguments: Any) -> T:
    """Return the result of a call in a new process, so that its peak memory can be measured."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_with_threads, torch.get_num_threads(), measure, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{measure.__name__}: the process was killed, probably because of insufficient memory"
            ) from error


def _with_threads(threads: int, measure: Callable[..., T], *arguments: Any) -> T:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return measure(*arguments)


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """Return the peak memory in MiB: allocated memory on CUDA, else resident memory of this process."""
    return 1024 * memory_gib(torch.device(device))


def now(device: torch.device) -> float:
    """Return the wall-clock time in seconds after synchronising the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compute_time(device: torch.device) -> float:
    """Return the time in seconds for benchmarks: CPU time on a CPU, which is less affected by other programs."""
    return now(device) if device.type == "cuda" else time.process_time()


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Operators(TorchDispatchMode):
    """Counts operators, FLOPs and memory in a block, for real and fake tensors.

    Args:
        model: the model whose matrices count as `weights`.

    Attributes:
        names: number of calls by operator.
        kernels: number of calls that are not views.
        weights: bytes of matrices that kernels read.
        touched: bytes that kernels other than matrix products read and write.
        flops: number of floating-point operations.
        alive, peak: bytes of tensors that were created in the block, or passed to `hold`.
        used: the peak without the bytes that were `reserved` at the start.
    """

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "scaled_dot_product")
    NO_KERNELS = ("empty", "new_empty", "detach", "_unsafe_view", "_local_scalar_dense")

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.alive = self.flops = self.weights = self.reserved = 0
        self.matrices = {p.untyped_storage()._cdata for p in model.parameters() if p.ndim > 1} if model else set()
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.begin()

    def begin(self) -> None:
        """Restart the measurement of the peak. Tensors that are alive remain counted."""
        self.peak = self.alive
        self.used = self.alive - self.reserved
        self.touched = 0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._opname
        self.names[name] += 1
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in results:
            self.hold(x)
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if func.namespace != "prim" and not is_view and not name.startswith(self.NO_KERNELS):
            # Packed weights have no storage that can be seen.
            inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and not x.is_mkldnn]
            self.kernels += 1
            if "embedding" not in name:  # it reads a few rows of its weight
                self.weights += nbytes(x for x in inputs if x.untyped_storage()._cdata in self.matrices)
            if not name.strip("_").startswith(self.PRODUCTS):
                self.touched += nbytes([*inputs, *results])
        return out

    def hold(self, x: Tensor) -> None:
        """Count the memory of a tensor until it is freed."""
        storage = x.untyped_storage()
        if storage not in self._sizes:
            self._sizes[storage] = size = storage.nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self.used = max(self.used, self.alive - self.reserved)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size

    @classmethod
    def of(cls, model: nn.Module, call: Callable[[], Any]) -> Operators:
        """Count the work of a call, which must not replay graphs."""
        with counter() as flops:
            call()
        with cls(model) as work:
            call()
        work.flops = flops.get_total_flops()
        return work


@torch.inference_mode()
def matrix_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, clock: Callable[[torch.device], float] = now
) -> float:
    """Measure the rate of matrix products of a dtype in FLOP/s. `clock` is also used to measure the models.

    torch.int8 measures an `Int8Linear`, including the rounding of its inputs.
    """
    n = 8192 if device.type == "cuda" else 2048
    eight = dtype == torch.int8
    kind = {"device": device, "dtype": torch.float32 if eight else dtype}
    a = torch.randn(n, n, **kind)
    plain = nn.Sequential(nn.Linear(n, n, bias=False, **kind))
    best = 0.0
    packed = prepare_inference(copy.deepcopy(plain), device=device)
    for layer in [Int8Linear(plain[0])] if eight else [plain, packed]:
        for _ in range(6):
            start = clock(device)
            layer(a)
            best = max(best, 2 * n**3 / (clock(device) - start))
    return best


def copy_rate(device: torch.device) -> float:
    """Measure the rate of copies within a device's memory in bytes/s, counting bytes read and written."""
    x = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    best = 0.0
    for _ in range(6):
        start = now(device)
        y.copy_(x)
        best = max(best, 2 * x.numel() / (now(device) - start))
    return best


def read_config(name: str) -> dict[str, Any]:
    """Return the contents of configs/NAME.yaml."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))


def tiny_encoders(model: dict[str, Any]) -> dict[str, int]:
    """Return the settings of tiny condition encoders with the widths in a HiCoDiT config."""
    return {"lip_dim": model["lip_dim"], "lip_heads": model["lip_dim"] // 32, "face_dim": model["face_dim"]}

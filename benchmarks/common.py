"""Helpers of the benchmarks: a separate process for each setting, time, memory, configs."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from torch import nn

from engine.config import CONFIGS
from engine.errors import UserError
from engine.precision import Int8Linear, pack_linear

T = TypeVar("T")


def in_own_process(measure: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a new process, so that its peak memory can be measured."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_with_threads, torch.get_num_threads(), measure, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(f"{measure.__name__}: the process was killed, probably for lack of memory") from error


def _with_threads(threads: int, measure: Callable[..., T], *arguments: Any) -> T:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return measure(*arguments)


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """Largest memory so far: allocated on a CUDA device, else resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now(device: torch.device) -> float:
    """Wall-clock time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compute_time(device: torch.device) -> float:
    """Seconds to measure work on a device with: on a CPU processor time, which other programs disturb little."""
    return now(device) if device.type == "cuda" else time.process_time()


@torch.inference_mode()
def matrix_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, clock: Callable[[torch.device], float] = now
) -> float:
    """Best measured rate of matrix products of a type, in FLOP/s of the clock by which the work is measured too.

    torch.int8 stands for an `Int8Linear`, with the rounding of its inputs.
    """
    n, eight = 8192 if device.type == "cuda" else 2048, dtype == torch.int8
    kind = {"device": device, "dtype": torch.float32 if eight else dtype}
    a = torch.randn(n, n, **kind)
    plain = nn.Sequential(nn.Linear(n, n, bias=False, **kind))
    best = 0.0
    ways = [Int8Linear(plain[0])] if eight else [plain, pack_linear(copy.deepcopy(plain), device)]  # as in inference
    for layer in ways:
        for _ in range(6):
            start = clock(device)
            layer(a)
            best = max(best, 2 * n**3 / (clock(device) - start))
    return best


def copy_rate(device: torch.device) -> float:
    """Best measured rate of copies within a device's memory, in bytes/s; a byte is read and written."""
    x = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y, best = torch.empty_like(x), 0.0
    for _ in range(6):
        start = now(device)
        y.copy_(x)
        best = max(best, 2 * x.numel() / (now(device) - start))
    return best


def read_config(name: str) -> dict[str, Any]:
    """configs/NAME.yaml."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))


def tiny_encoders(model: dict[str, Any]) -> dict[str, int]:
    """Settings of tiny condition encoders with the widths in a HiCoDiT config."""
    return {"lip_dim": model["lip_dim"], "lip_heads": model["lip_dim"] // 32, "face_dim": model["face_dim"]}

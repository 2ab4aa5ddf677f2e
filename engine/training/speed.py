"""Device utilisation of a run: model FLOPs utilisation (MFU), memory, and profiler traces."""

from __future__ import annotations

import gc
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense bf16 tensor-core TFLOP/s from NVIDIA's data sheets (those of H100, H200 and B200 state twice the value, with
# sparsity). The first name contained in the device name is used.
PEAKS = {
    "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "L40": 181.1,
    "L4": 121.0, "RTX 4090": 165.2,
}  # fmt: skip
_ATEN = torch.ops.aten


def _attention(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """Count the FLOPs of attention. torch's formula does not support grouped-query attention."""
    return sdpa_flop_count(query, *((x[0], query[1], *x[2:]) for x in (key, value)))


def _attention_backward(gradient: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, *((x[0], query[1], *x[2:]) for x in (key, value)))


# torch's counter has no formula for attention on a CPU.
_ATTENTION = {}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    _ATTENTION[getattr(_ATEN, f"_scaled_dot_product_{_name}")] = _attention
    _ATTENTION[getattr(_ATEN, f"_scaled_dot_product_{_name}_backward")] = _attention_backward


def peak_tflops(stated: float | None, device: torch.device) -> float | None:
    """Return the peak TFLOP/s of the device: `stated`, else the dense bf16 peak of a known GPU, else None."""
    if stated is not None or device.type != "cuda":
        return stated
    name = torch.cuda.get_device_name(device)
    return next((figure for key, figure in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


class Utilisation:
    """FLOPs of the training steps of a process relative to the peak of its device.

    FLOPs (matrix products, convolutions and attention, forward and backward, as counted by torch.utils.flop_counter)
    are counted in one step and scaled by the number of tokens. Hardware FLOPs utilisation (HFU) includes recomputation
    by activation checkpointing, MFU excludes it (PaLM, arXiv 2204.02311, app. B).

    Args:
        peak: peak of the device in TFLOP/s. None: unknown, nothing is counted.

    Attributes:
        tokens: number of tokens of the counted step, which the caller sets.
    """

    def __init__(self, peak: float | None):
        self.peak = peak
        self.tokens = 0
        self._counted: tuple[int, int] | None = None  # FLOPs, recomputed FLOPs among them

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the FLOPs of the training step in the block."""
        if self.peak is None:
            yield
            return
        _recomputed.clear()
        # Operations in compiled code are not counted.
        with torch.compiler.set_stance("force_eager"), counter() as flops:
            yield
        self._counted = flops.get_total_flops(), sum(_recomputed)

    def share(self, tokens: int, steps: int, seconds: float) -> dict[str, float]:
        """Return `mfu` and `hfu` of `steps` steps with `tokens` tokens in `seconds`; {} if the peak is unknown."""
        if self.peak is None or self._counted is None:
            return {}
        operations, again = self._counted
        rate = (tokens / self.tokens if self.tokens else steps) / seconds / (self.peak * 1e12)
        return {"mfu": (operations - again) * rate, "hfu": operations * rate}


def counter() -> FlopCounterMode:
    """Return a counter of FLOPs, including those of attention on a CPU."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


_recomputed: list[int] = []  # FLOPs of recomputed blocks since the counted step began


def recomputing() -> tuple[Any, Any]:
    """Return the contexts of the forward pass and of the recomputation, for `torch.utils.checkpoint`."""
    return nullcontext(), _recount() if torch.utils._python_dispatch._get_current_dispatch_mode() else nullcontext()


@contextmanager
def _recount() -> Iterator[None]:
    with counter() as again:
        try:
            yield
        finally:  # recomputation is ended by an exception as soon as all required tensors are available
            _recomputed.append(again.get_total_flops())


@contextmanager
def backend_options(device: torch.device, precision: str, fixed_shapes: bool) -> Iterator[str]:
    """Set backend options for a training loop and restore them afterwards. Yield a line that describes them.

    In bf16, operations that autocast keeps in float32 may use TF32; fp32 means float32 throughout. cuDNN benchmarking
    is enabled if batch shapes are fixed. Garbage is only collected at log lines, as a pause of one process delays all
    of them.
    """
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "bf16"
    cudnn.benchmark = fixed_shapes
    gc.collect()
    gc.disable()
    description = "garbage collection only at log lines"
    if device.type == "cuda":
        on = {True: "on", False: "off"}
        description = f"TF32 {on[matmul.allow_tf32]}, cuDNN benchmark {on[fixed_shapes]}, {description}"
    try:
        yield description
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        gc.enable()


def memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB of tensors on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB


def tracing(folder: Path, steps: int, rank: int) -> Any:
    """Profile `steps` steps within the block, from the sixth on, to FOLDER/rank0.json.gz, for Perfetto.

    Yield a profiler whose `step()` must be called after every step, or None if `steps` is 0.
    """
    if not steps:
        return nullcontext()

    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank{rank}.json.gz"))

    return torch.profiler.profile(
        schedule=torch.profiler.schedule(skip_first=3, wait=0, warmup=2, active=steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    )

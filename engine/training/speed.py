"""How well a run uses its device: model FLOPs utilisation, memory, and traces of single steps."""

from __future__ import annotations

import gc
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense bf16 tensor-core TFLOP/s without sparsity, as in NVIDIA's data sheets of the products (H100, H200 and B200 state
# twice the figure, with sparsity). The first name that is found in the device's name counts.
PEAKS = {
    "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "L40": 181.1,
    "L4": 121.0, "RTX 4090": 165.2,
}  # fmt: skip
_ATEN = torch.ops.aten


def _attention(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """Count operations of attention; torch's formula refuses fewer heads of keys and values than of queries."""
    return sdpa_flop_count(query, *((x[0], query[1], *x[2:]) for x in (key, value)))


def _attention_backward(gradient: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, *((x[0], query[1], *x[2:]) for x in (key, value)))


# For processors torch's counter has no formula.
_ATTENTION = {}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    _ATTENTION[getattr(_ATEN, f"_scaled_dot_product_{_name}")] = _attention
    _ATTENTION[getattr(_ATEN, f"_scaled_dot_product_{_name}_backward")] = _attention_backward


def peak_tflops(stated: float | None, device: torch.device) -> float | None:
    """Return the device's peak: `stated`, else the data sheet's dense bf16 figure of a known GPU, else None."""
    if stated is not None or device.type != "cuda":
        return stated
    name = torch.cuda.get_device_name(device)
    return next((figure for key, figure in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


class Utilisation:
    """Floating-point operations of a process's steps against its device's peak.

    Operations (matrix products, convolutions, attention; forward and backward, as torch.utils.flop_counter counts them)
    are counted in one step and scaled by the tokens of the others. Hardware utilisation (HFU) takes all of them, model
    utilisation (MFU) leaves out what activation checkpointing computes a second time (PaLM, arXiv 2204.02311, app. B).
    """

    def __init__(self, peak: float | None):
        self.peak = peak
        self._counted: tuple[int, int, int] | None = None  # operations, of them recomputed, tokens

    def count(self, step: Callable[..., int], *arguments: Any) -> None:
        """Do a step, which returns its tokens; count its operations unless one was counted or no peak is known."""
        if self.peak is None or self._counted:
            step(*arguments)
            return
        _recomputed.clear()
        with torch.compiler.set_stance("force_eager"), counter() as flops:  # compiled code hides its operations
            tokens = step(*arguments)
        self._counted = flops.get_total_flops(), sum(_recomputed), tokens

    def share(self, tokens: int, steps: int, seconds: float) -> dict[str, float]:
        """Return `mfu` and `hfu` of `steps` steps with `tokens` tokens in `seconds`; {} without a known peak."""
        if self.peak is None or self._counted is None:
            return {}
        operations, again, counted_tokens = self._counted
        rate = (tokens / counted_tokens if counted_tokens else steps) / seconds / (self.peak * 1e12)
        return {"mfu": (operations - again) * rate, "hfu": operations * rate}


def counter() -> FlopCounterMode:
    """Count floating-point operations within a block, those of attention on processors too."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


_recomputed: list[int] = []  # operations of blocks that were computed a second time since a step began to be counted


def recomputing() -> tuple[Any, Any]:
    """Return the contexts of the first and the second computation of a block, for `torch.utils.checkpoint`."""
    return nullcontext(), _recount() if torch.utils._python_dispatch._get_current_dispatch_mode() else nullcontext()


@contextmanager
def _recount() -> Iterator[None]:
    with counter() as again:
        try:
            yield
        finally:  # the second computation ends by an exception as soon as it has all that is needed
            _recomputed.append(again.get_total_flops())


@contextmanager
def steady(device: torch.device, precision: str, fixed_shapes: bool) -> Iterator[str]:
    """Change settings for a loop of training steps, and restore them; yield a line that says them.

    In bf16, what autocast leaves in float32 may use TF32; fp32 means float32 throughout. cuDNN tries its algorithms
    where the shapes of batches stay the same. Python collects garbage when it is told to, not in the middle of a step:
    a pause of one process is a pause of all.
    """
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "bf16"
    cudnn.benchmark = fixed_shapes
    gc.collect()
    gc.disable()
    said = "garbage collection at log lines"
    if device.type == "cuda":
        on = {True: "on", False: "off"}
        said = f"TF32 {on[matmul.allow_tf32]}, cuDNN benchmark {on[fixed_shapes]}, {said}"
    try:
        yield said
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        gc.enable()


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process's tensors on its GPU, or of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB


def tracing(folder: Path, steps: int, rank: int) -> Any:
    """Trace `steps` steps within a block, from the sixth on, into FOLDER/rank0.json.gz, for Perfetto.

    The block's value has `step()`, to be called after every step; with 0 steps it is None.
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

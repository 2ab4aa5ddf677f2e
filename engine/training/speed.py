"""How well a run uses its device: model FLOPs utilisation, memory, and traces of single steps."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense bf16 tensor-core TFLOP/s without sparsity, as in NVIDIA's data sheets of the products (H100, H200 and B200 state
# twice the figure, with sparsity). The first name that is found in the device's name counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.1,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
_ATEN = torch.ops.aten


def _attention(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """Operations of attention; keys and values may have fewer heads than queries, which torch's formula refuses."""
    return sdpa_flop_count(query, *((x[0], query[1], *x[2:]) for x in (key, value)))


def _attention_backward(gradient: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, *((x[0], query[1], *x[2:]) for x in (key, value)))


# For processors torch's counter has no formula.
_ATTENTION = {}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    _ATTENTION[getattr(_ATEN, f"_scaled_dot_product_{_name}")] = _attention
    _ATTENTION[getattr(_ATEN, f"_scaled_dot_product_{_name}_backward")] = _attention_backward


def peak_tflops(stated: float | None, device: torch.device) -> float | None:
    """The device's peak: `stated`, else the data sheet's dense bf16 figure of a known GPU, else None."""
    if stated is not None or device.type != "cuda":
        return stated
    name = torch.cuda.get_device_name(device)
    return next((figure for key, figure in PEAKS.items() if key in name), None)


class Utilisation:
    """Model FLOPs utilisation: the floating-point operations of a process's steps against its device's peak.

    Operations (matrix products, convolutions, attention; forward and backward, as torch.utils.flop_counter counts them)
    are counted in one step and scaled by the tokens of the others. What activation checkpointing computes twice counts
    twice.
    """

    def __init__(self, peak: float | None):
        self.peak = peak
        self._counted: tuple[int, int] | None = None  # operations, tokens

    @contextmanager
    def counting(self, tokens: int) -> Iterator[None]:
        """Count the step in this block, of so many tokens, unless one was counted or no peak is known."""
        if self.peak is None or self._counted:
            yield
            return
        # Compiled code hides its operations: this one step runs without.
        with (
            torch.compiler.set_stance("force_eager"),
            FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter,
        ):
            yield
        self._counted = counter.get_total_flops(), tokens

    def share(self, tokens: int, steps: int, seconds: float) -> dict[str, float]:
        """`mfu` of `steps` steps with `tokens` tokens in `seconds`; {} without a known peak."""
        if self.peak is None or self._counted is None:
            return {}
        operations, counted_tokens = self._counted
        done = operations * (tokens / counted_tokens if counted_tokens else steps)
        return {"mfu": done / seconds / (self.peak * 1e12)}


def memory_gib(device: torch.device) -> float:
    """Most memory that tensors of this process took on its GPU, or that the process took on a processor, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB


def tracing(folder: Path, steps: int, rank: int) -> Any:
    """A block that traces `steps` steps, from the sixth on, into FOLDER/rank0.json.gz, for Perfetto or chrome://tracing;
    its value has `step()`, to be called after every step. With 0 steps the value is None.
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

"""A card under test: what is measured on it, and the ranges by which a line becomes PASS, WARN or FAIL.

The checks are in benchmarks/card_checks.py. Their ranges come from `Card` (data sheets), or from the work that a call
does: `Operators` counts it, and `Machine.bounds` turns it into seconds.
"""

from __future__ import annotations

import ctypes
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Operators, copy_rate, in_own_process, matrix_rate, now, peak_memory_mb
from benchmarks.plan import EFFICIENCY, Card, find_card
from engine.cuda_graph import Backend
from engine.errors import printable

ROOT = Path(__file__).resolve().parents[1]
LEAST, MOST, STARTED = 1.5, 6.0, 3.0  # a loop at batch 1: times the roofline; at most, times what its kernels take
REPLAYED = 2e-6  # seconds that a small kernel takes in a CUDA graph, at least: an assumption
MIB = 2**20


@dataclass(frozen=True)
class Line:
    """One finding. low, high: the range of a PASS; None: no bound on that side."""

    name: str
    verdict: str
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.verdict}  {self.name}"
        if self.value is not None:
            text += f": {self.value:.4g}{f' {self.unit}' if self.unit else ''}"
        if self.low is not None or self.high is not None:
            ends = ("" if end is None else f"{end:.4g}" for end in (self.low, self.high))
            text += f" [{' to '.join(ends).strip()}]"
        return f"{text}; {self.note}" if self.note else text


def judge(value: float, low: float | None = None, high: float | None = None) -> str:
    """Return PASS for a value in the range, WARN for one within a factor of two of it, FAIL for others."""
    if not math.isfinite(value):
        return "FAIL"
    if (low is None or value >= low) and (high is None or value <= high):
        return "PASS"
    near = (low is None or 2 * value >= low) and (high is None or value <= 2 * high)
    return "WARN" if near else "FAIL"


@dataclass(frozen=True)
class Rates:
    """Measured rates: matrix products in FLOP/s, and copies in bytes/s, read and written bytes counted."""

    bf16: float
    fp32: float
    copy: float


class Machine:
    """The card under test, and what is measured on it.

    Whatever a measurement gives passes `reading`. Tests put in a machine that runs all checks on a processor and gives
    readings of a card.

    Args:
        device: a CUDA device.
        cards: how many take part.

    Attributes:
        backend: what captures graphs; None: `engine.cuda_graph.CudaGraphs`.
        tests: folder of the tests of cards.
    """

    backend: Backend | None = None
    tests: Path = ROOT / "tests" / "gpu"

    def __init__(self, device: torch.device, cards: int = 1) -> None:
        self.device, self.cards = device, cards

    @cached_property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @property
    def card(self) -> Card | None:
        """The data sheet; None: the card is unknown."""
        return find_card(self.name)

    @cached_property
    def stated(self) -> Card:
        """The data sheet; of an unknown card, what was measured, with the efficiency that predictions assume."""
        if self.card is not None:
            return self.card
        memory, share = torch.cuda.get_device_properties(self.device).total_memory, EFFICIENCY["compute"]
        peak, single = self.rates.bf16 / 1e12 / share, self.rates.fp32 / 1e12 / share
        return Card(peak, single, memory, self.rates.copy / EFFICIENCY["memory"], math.inf, math.inf)

    def versions(self) -> tuple[float, float]:
        """Return the newest CUDA version that the driver has, and the one of PyTorch, such as 12.8."""
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        return number.value // 1000 + number.value % 1000 / 100, float(torch.version.cuda or "nan")

    @cached_property
    def rates(self) -> Rates:
        bf16, fp32 = (matrix_rate(self.device, dtype) for dtype in (torch.bfloat16, torch.float32))
        return Rates(bf16, fp32, copy_rate(self.device))

    def reading(self, name: str, measured: float) -> float:
        """Return the value of the measurement of a name."""
        return measured

    def time(self, name: str, call: Callable[[], Any], repeats: int = 3) -> float:
        """Return the median seconds of a call, after one call that does not count."""
        durations = []
        for _ in range(repeats + 1):
            begin = now(self.device)
            call()
            durations.append(now(self.device) - begin)
        return self.reading(f"{name} seconds", statistics.median(durations[1:]))

    def forget_peak(self) -> None:
        """Begin to measure the peak memory anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self, name: str) -> float:
        """Return the peak memory in MiB."""
        return self.reading(f"{name} MiB", peak_memory_mb(self.device))

    def in_process(self, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a call in a process that has the card's memory to itself."""
        self.forget_peak()
        return in_own_process(measure, *arguments)

    def bounds(self, work: Operators) -> tuple[float, float, str]:
        """Return the range of the seconds of work that is replayed as CUDA graphs, and where the range comes from."""
        roofline = work.flops / self.rates.bf16 + work.weights / self.rates.copy
        kernels = work.kernels * REPLAYED
        note = (
            f"{work.flops / 1e12:.3g} TFLOP and {work.weights / 1e9:.3g} GB of weights at the measured rates: "
            f"{1e3 * roofline:.3g} ms; {work.kernels:,} kernels: {1e3 * kernels:.3g} ms; "
            f"range {LEAST:g} to {MOST:g} times the first, or {STARTED:g} times the second where that is more"
        )
        return LEAST * roofline, max(MOST * roofline, STARTED * kernels), note


Check = Callable[[Machine, str], Iterator[Line]]


def run_checks(machine: Machine, size: str, checks: dict[str, Check]) -> Iterator[Line]:
    """Yield the lines of all checks; one that raises becomes a FAIL, and the others go on."""
    for name, check in checks.items():
        try:
            yield from check(machine, size)
        except Exception as error:
            yield Line(name, "FAIL", note=printable(f"{type(error).__name__}: {error}")[:300])
        machine.forget_peak()

"""The least time that arithmetic and memory allow a step: of cards that are not here, and of this machine.

A step must do its multiplications, and must read its weights once from memory (caches hold less than these models'
weights). The larger of both times bounds it from below; launches, activations and whatever is not a matrix product come
on top. Peaks of cards are those of their data sheets: dense matrix products, float32 without TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

BUFFER = 2**26  # bytes that are copied to measure memory: more than caches hold


@dataclass(frozen=True)
class Machine:
    """flops: a second, by precision. memory: bytes a second."""

    flops: Mapping[str, float]
    memory: float

    def least_ms(self, precision: str, flops: float, read: float) -> float:
        """Milliseconds that so many operations and bytes take at least."""
        return 1e3 * max(flops / self.flops[precision], read / self.memory)


CARDS = {
    "h200_ms": Machine({"fp32": 67e12, "bf16": 989e12}, 4.8e12),  # H200 SXM
    "rtx4090_ms": Machine({"fp32": 82.6e12, "bf16": 165.2e12}, 1.008e12),  # bf16 with sums in float32
}


def this_machine(rates: Mapping[str, float], device: torch.device, clock: Callable[[torch.device], float]) -> Machine:
    """With the measured rates of matrix products, and of a copy, which reads and writes."""
    a, best = torch.zeros(BUFFER, dtype=torch.uint8, device=device), 0.0
    b = torch.empty_like(a)
    for _ in range(6):
        start = clock(device)
        b.copy_(a)
        best = max(best, 2 * BUFFER / (clock(device) - start))
    return Machine(dict(rates), best)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of the parameters, but for tables of embeddings, of which a step reads a few rows."""
    tables = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return sum(p.numel() * p.element_size() for p in network.parameters() if id(p) not in tables)


def bounds(machine: Machine, precision: str, flops: float, read: float) -> dict[str, float]:
    """Least milliseconds of `machine` (`machine_ms`) and of each of `CARDS`, with what they follow from."""
    least = {name: card.least_ms(precision, flops, read) for name, card in CARDS.items()}
    return {
        "gflops": flops / 1e9,
        "weights_mb": read / 2**20,
        "machine_ms": machine.least_ms(precision, flops, read),
        **least,
    }

"""Bus bandwidth of NCCL collectives between the GPUs of one or several machines.

    torchrun --nproc_per_node=8 -m benchmarks.collectives
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -m benchmarks.collectives

The bus bandwidth is that of NVIDIA's nccl-tests: the bytes that each rank sends in a ring, per second. Rank 0 prints a
line for each collective; `--json FILE` writes them. Sums are checked, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.arguments import Parser, within
from engine.errors import UserError, exit_process, run_cli
from engine.files import write_json
from engine.settings import DEVICES
from engine.training import distributed

BYTES = 2**28  # 256 MiB, more than a block of either paper's model
REPEATS = 10


def bandwidths(device: torch.device, size: int = BYTES, repeats: int = REPEATS) -> dict[str, float]:
    """Return the bus bandwidth in bytes/s of each collective; all ranks of the process group have to call this.

    Args:
        device: device of this rank.
        size: bytes of the whole tensor.
        repeats: number of calls of each collective; the result is the median of the slowest rank.

    Raises:
        UserError: If a sum is wrong.
    """
    rank = distributed.rank()
    ranks = distributed.world_size()
    count = size // 2 // ranks * ranks  # in bfloat16
    whole = torch.full((count,), rank + 1.0, device=device, dtype=torch.bfloat16)
    shard = torch.full((count // ranks,), rank + 1.0, device=device, dtype=torch.bfloat16)
    dist.all_reduce(whole)
    expected = ranks * (ranks + 1) / 2
    if not torch.allclose(whole, torch.full_like(whole, expected), rtol=0.02):
        raise UserError(f"an all-reduce on rank {rank} returned {whole[0].item():g} instead of {expected:g}")
    ring = (ranks - 1) / ranks * 2 * count
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "all-reduce": (2 * ring, lambda: dist.all_reduce(whole)),
        "all-gather": (ring, lambda: dist.all_gather_into_tensor(whole, shard)),
        "reduce-scatter": (ring, lambda: dist.reduce_scatter_tensor(shard, whole)),
    }
    return {name: sent / _seconds(call, whole, repeats) for name, (sent, call) in calls.items()}


def _seconds(call: Callable[[], object], tensor: Tensor, repeats: int) -> float:
    """Return the median seconds of a call on the slowest rank."""
    durations = []
    for _ in range(repeats + 2):
        tensor.zero_()  # sums would overflow
        _synchronise(tensor.device)
        dist.barrier()
        begin = time.perf_counter()
        call()
        _synchronise(tensor.device)
        durations.append(time.perf_counter() - begin)
    return max(distributed.all_gather(statistics.median(durations[2:])))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where the tensors are")
    parser.add_argument("--bytes", type=within(2**10), default=BYTES, help="size of the tensors")
    args = parser.parse_args()
    device = distributed.init(args.device)
    if distributed.world_size() < 2:
        raise UserError("at least two processes are required: run with torchrun --nproc_per_node=N")
    found = bandwidths(device, args.bytes)
    if distributed.is_main():
        for name, rate in found.items():
            print(f"{name}: {rate / 1e9:.1f} GB/s bus bandwidth, {distributed.world_size()} ranks", flush=True)
        if args.json:
            write_json(args.json, found)
    exit_process(0)


if __name__ == "__main__":
    run_cli(main)

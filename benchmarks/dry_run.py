"""Dry run of three training steps as one of many ranks, without GPUs and data; `scripts/dry_run.py` runs it.

The trainer and FSDP2 run in a fake process group, whose collectives do not communicate. Weights, gradients and
activations are fake tensors (shapes without data, see `benchmarks.fake_step`); lengths of clips are drawn from a
log-normal distribution.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.common import Operators, nbytes
from benchmarks.fake_step import HostOrFake
from benchmarks.lengths import FPS, MadeUpClips, padding_efficiency
from benchmarks.plan import read_recipe
from benchmarks.training import build_task, random_batch
from engine.errors import UserError
from engine.training import distributed, parallel
from engine.training.parallel import without_weights
from engine.training.task import Task
from engine.training.tracking import Window
from engine.training.trainer import Trainer

STEPS = 3
COLLECTIVES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


class MadeUpBatches(MadeUpClips):
    """Random batches for clips with synthetic lengths.

    Args:
        rows: number of rows per sample: two for pairs of T2AV and TTS.
    """

    def __init__(self, task: Task, rows: int) -> None:
        super().__init__()
        self.task = task
        self.rows = rows

    def collate(self, items: list[int]) -> dict[str, Tensor]:
        frames = torch.tensor(items * self.rows)
        with _disable_current_modes():
            batch = random_batch(self.task, len(frames), int(frames.max()) / FPS)
        if "frames" in batch:
            return batch | {"frames": frames}
        words = batch["speech_span"][0, 0]
        ends = words + -(-frames // self.task.model.config.patch_size)
        batch["speech_span"][:, 1] = ends
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < ends[:, None]).long()
        motion = frames * (batch["motion_frames"] > 0)
        return batch | {"speech_frames": frames, "motion_frames": motion}


class Collectives(Operators):
    """Counts memory as `Operators` does, and the collectives by kind, type and size."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _count(self, name: str, args: tuple) -> None:
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
        if tensors and name in COLLECTIVES:
            largest = max(tensors, key=lambda x: nbytes([x]))
            self.calls[COLLECTIVES[name], str(largest.dtype).removeprefix("torch."), nbytes([largest])] += 1

    def hold(self, x: Tensor) -> None:
        super().hold(x.to_local() if isinstance(x, DTensor) else x)


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """Act as rank 0 of `ranks` in a fake process group, whose collectives do not communicate."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with mock.patch.object(distributed, "new_cpu_group", lambda: dist.group.WORLD):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def without_data() -> Iterator[None]:
    """Make `ParallelTask` create shards without data, and copy a task without counting the copy."""

    def copied(task: Task) -> Task:
        with _disable_current_modes():
            return without_weights(task)

    def empty(task: Task, state: dict[str, Tensor], device: torch.device) -> None:
        task.to_empty(device=device)

    with mock.patch.object(parallel, "_fill", empty), mock.patch.object(parallel, "without_weights", copied):
        yield


def fake_task(model: str, sizes: dict[str, Any], mode: HostOrFake) -> Task:
    """Return a task whose parameters and buffers have no data."""
    with mode, nullcontext() if model == "talker_t2av" else _disable_current_modes():
        task = build_task(model, "base", **sizes)
    with mode:
        empty: dict[int, Any] = {id(p): nn.Parameter(torch.empty(p.shape), p.requires_grad) for p in task.parameters()}
        empty |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in task.buffers()}
    return copy.deepcopy(task, empty)


def dry_run(name: str, words: Sequence[str], ranks: int) -> dict[str, Any]:
    """Run three steps of a recipe as rank 0 of `ranks`. Return bytes by part, collectives, and padding efficiency.

    Raises:
        UserError: If the recipe does not use shards, or its batch cannot be divided.
    """
    model, sizes, settings, rows, _ = read_recipe(name, list(words))
    if settings.parallel == "ddp":
        raise UserError("trainer.parallel=ddp is not supported: use fsdp or hybrid, or scripts/plan_run.py")
    sizes.pop("lora", None)
    settings = replace(settings, workers=0, wandb="off", tensorboard=False, sanity_validation=False)
    with fake_group(ranks), TemporaryDirectory() as folder:
        mode = HostOrFake(allow_non_fake_inputs=True)
        task = fake_task(model, sizes, mode)
        data = MadeUpBatches(task, rows)
        with mode, Collectives() as seen, mock.patch.object(Trainer, "_stop_unless_finite"):
            with without_data():
                trainer = Trainer(task, data, settings.shared_among(ranks), Path(folder))
            trainer.task.train()
            numbers = trainer._numbers(STEPS * trainer.config.accumulate)
            batches = iter([trainer.batches[number] for number in numbers])
            for _ in range(STEPS):
                seen.begin()
                seen.calls.clear()
                trainer._train_step(batches, Window())
        states = [state for optimiser in trainer.optimisers.values() for state in optimiser.state.values()]
        memory = {
            "weights": local_bytes(trainer.task.parameters()),
            "optimiser": local_bytes(value for state in states for value in state.values()),
            "average": local_bytes(trainer.ema.averages.values()),
        }
        memory["peak of gathered weights, gradients and activations"] = seen.peak - sum(memory.values())
        batch = trainer.config
        return {
            "recipe": name, "parallel": settings.parallel, "ranks": ranks,
            "batch": f"{ranks} x {batch.accumulate} x {batch.batch_size}", "memory": memory,
            "collectives": [[*key, count] for key, count in sorted(seen.calls.items(), key=lambda each: -each[0][2])],
            "padding": padding_efficiency(trainer.batches, ranks),
        }  # fmt: skip


def local_bytes(tensors: Any) -> int:
    """Return the bytes of this rank's shards."""
    return nbytes(map(distributed.local, tensors))


def report(found: dict[str, Any]) -> str:
    """Return the results of `dry_run` as lines of text."""
    total = sum(found["memory"].values())
    lines = [f"{found['recipe']}, {found['parallel']}, {found['ranks']} ranks: {found['batch']} samples per step"]
    lines += [f"memory per rank: {total / 2**30:.2f} GiB"]
    lines += [f"  {name}: {size / 2**30:.3f} GiB" for name, size in found["memory"].items()]
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for kind, dtype, size, count in found["collectives"]:
        totals[f"{kind} {dtype}"][0] += count
        totals[f"{kind} {dtype}"][1] += count * size
    lines += ["collectives per step:"]
    for kind, (count, size) in totals.items():
        largest = max(size for k, d, size, _ in found["collectives"] if f"{k} {d}" == kind)
        lines += [f"  {kind}: {count} calls, {size / 1e6:,.1f} MB, the largest {largest / 1e6:,.1f} MB"]
    return "\n".join([*lines, f"padding efficiency: {found['padding']:.2f}"])

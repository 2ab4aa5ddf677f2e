"""Predicted cost of a recipe on N GPUs, based on steps measured by `benchmarks.fake_step` without a GPU."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

from omegaconf import OmegaConf
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.fake_step import Measured, Size, measure_fake
from benchmarks.lengths import MadeUpClips, padding_efficiency
from benchmarks.training import MODELS, build_task, random_batch
from engine.charts import chart_file
from engine.config import compose, plain
from engine.errors import UserError
from engine.training.batches import MicroBatches
from engine.training.settings import TrainerConfig
from engine.training.speed import PEAKS
from engine.training.task import Task

WAYS = ("ddp", "fsdp", "hybrid")


@dataclass(frozen=True)
class Card:
    """A GPU and its network, as data sheets state them.

    Attributes:
        peak: dense bf16, TFLOP/s.
        single: float32 without tensor cores, TFLOP/s.
        memory: bytes.
        bandwidth: memory bandwidth, bytes/s.
        link: bytes/s that a GPU sends to the others of its machine.
        network: bytes/s to other machines, through the network adapter of the GPU.
        machine: number of GPUs per machine.
    """

    peak: float
    single: float
    memory: float
    bandwidth: float
    link: float
    network: float
    machine: int = 8


CARDS = {
    "b200": Card(PEAKS["B200"], 75.0, 180e9, 8.0e12, 900e9, 50e9),
    "h200": Card(PEAKS["H200"], 67.0, 141e9, 4.8e12, 450e9, 50e9),
    "h100": Card(PEAKS["H100"], 67.0, 80e9, 3.35e12, 450e9, 50e9),
    "a100": Card(PEAKS["A100"], 19.5, 80e9, 2.04e12, 300e9, 25e9),
    "l40s": Card(PEAKS["L40S"], 91.6, 48e9, 0.864e12, 32e9, 12.5e9),
    # NVIDIA's Ada architecture paper, table of the GeForce RTX 4090; its link is PCIe 4.0 x16
    "rtx4090": Card(PEAKS["RTX 4090"], 82.6, 24e9, 1.008e12, 32e9, 12.5e9),
}


def find_card(name: str) -> Card | None:
    """Return the card of a device's name; None: unknown, or a variant with other rates (PCIe, NVL, 40 GB, MIG)."""
    if re.search("pcie|nvl|40gb|mig", name, re.IGNORECASE):
        return None
    words = name.lower().replace("rtx ", "rtx")
    return next((card for key, card in CARDS.items() if re.search(rf"\b{key}\b", words)), None)


EFFICIENCY = {  # assumptions, not measurements
    "compute": 0.5,  # of the peak, in matrix products and attention
    "memory": 0.7,  # of the bandwidth, in other operators, each of which reads and writes its tensors (no fusion)
    "network": 0.7,  # of link and network
    "hidden": 0.7,  # of the computing time, behind which exchange continues
    "latency": 10e-6,  # seconds of a collective, for each doubling of its ranks
    "launch": 5e-6,  # seconds in which the host starts an operator; a step takes at least that for all of them
    "full": 0.92,  # of the memory that may be used
}


@dataclass(frozen=True)
class Plan:
    """Cost of a recipe with one kind of parallelism, in bytes and seconds per process and step.

    Attributes:
        padding: see `padding_efficiency`; compute_s and memory_s are of the process with the longest batch.
    """

    parallel: str
    gpus: int
    samples: int  # of a process's batch
    padding: float
    memory: dict[str, float]
    fits: bool
    largest_batch: int
    sent: dict[str, float]
    flops: float
    compute_s: float
    memory_s: float
    host_s: float
    network_s: float
    step_s: float
    steps: float
    days: float


def network_seconds(measured: Measured, parallel: str, gpus: int, card: Card) -> float:
    """Return the time of a step's collectives with ring algorithms.

    Each rank sends (n - 1) / n of the bytes that it gathers or scatters, and twice that for an all-reduce. A ring over
    several machines crosses the border of each machine once and shares the adapters of all its GPUs. `hybrid` shards
    within a machine, and reduces between machines in as many concurrent rings as a machine has GPUs.
    """
    seconds = 0.0
    for kind, size in measured.sent.items():
        if parallel == "hybrid" and kind == "allreduce":
            ranks = max(1, gpus // card.machine)
            rate = card.network
        else:
            ranks = min(gpus, card.machine) if parallel == "hybrid" else gpus
            rate = card.link if ranks <= card.machine else min(card.link, card.machine * card.network)
        seconds += (2 if kind == "allreduce" else 1) * (ranks - 1) / ranks * size / (rate * EFFICIENCY["network"])
        seconds += measured.calls[kind] * EFFICIENCY["latency"] * math.log2(max(2, ranks))
    return seconds


def plan(
    one: Measured, two: Measured, parallel: str, gpus: int, card: Card, samples: int, total: float, half: bool = False,
    padding: float = 1.0,
) -> Plan:  # fmt: skip
    """Predict the cost of steps with `samples` samples per process.

    The prediction is based on measurements of one process with one sample and with two: activations and operations grow
    with the batch, communication does not.

    Args:
        total: samples of the whole run.
        half: blocks are gathered in half precision.
        padding: padding efficiency; the longest batch has 1 / `padding` times the operations of the mean.
    """
    one = on_each_process(one, parallel, gpus, card.machine, half)
    two = on_each_process(two, parallel, gpus, card.machine, half)

    def at(first: float, second: float) -> float:
        return first + (second - first) * (samples - 1)

    memory = {name: at(one.memory[name], two.memory[name]) for name in one.memory}
    fixed = sum(memory.values()) - memory["activations"]
    room = card.memory * EFFICIENCY["full"] - fixed
    each = two.memory["activations"] - one.memory["activations"]
    largest = int((room - one.memory["activations"]) // max(each, 1)) + 1
    compute = at(one.flops, two.flops) / padding / (card.peak * 1e12 * EFFICIENCY["compute"])
    moved = (at(one.touched, two.touched) / padding + one.moved) / (card.bandwidth * EFFICIENCY["memory"])
    network = network_seconds(one, parallel, gpus, card)
    host = one.kernels * EFFICIENCY["launch"]  # as many for any batch
    busy = max(compute + moved, host)
    step = busy + max(0.0, network - EFFICIENCY["hidden"] * busy)
    steps = total / (samples * gpus)
    return Plan(
        parallel, gpus, samples, padding, memory, fits=sum(memory.values()) <= card.memory * EFFICIENCY["full"],
        largest_batch=max(0, largest), sent=dict(one.sent), flops=at(one.flops, two.flops), compute_s=compute,
        memory_s=moved, host_s=host, network_s=network, step_s=step, steps=steps, days=steps * step / 86_400,
    )  # fmt: skip


def padding_of(trainer: TrainerConfig, gpus: int, samples: int) -> float:
    """Return the padding efficiency for synthetic clip lengths on `gpus` GPUs with `samples` samples each."""
    if gpus == 1:
        return 1.0
    batches = MicroBatches(MadeUpClips(), samples, trainer.seed, trainer.by_length, step=samples * gpus)
    return padding_efficiency(batches, gpus)


def on_each_process(one: Measured, parallel: str, gpus: int, machine: int, half: bool = False) -> Measured:
    """Return a measurement of one process as it would be on each of `gpus`, `machine` of them in one machine.

    `hybrid` is FSDP in each machine, which also reduces the shards of gradients over machines.
    """
    if gpus == 1:
        return one
    if parallel == "ddp":
        return _with_ddp(one)
    return _with_shards(one, gpus if parallel == "fsdp" else min(gpus, machine), gpus, half)


def _with_ddp(one: Measured) -> Measured:
    """Return the measurement of a process with DDP, which reduces all gradients, in a bucket of 1 MiB and others of
    25.
    """
    gradients = one.memory["gradients"]
    memory = one.memory | {"activations": one.beside}
    buckets = 1 + math.ceil(max(0, gradients - 2**20) / 25 / 2**20)
    return replace(one, memory=memory, sent={"allreduce": gradients}, calls={"allreduce": buckets})


@dataclass(frozen=True)
class Gathered:
    """Numbers of elements of parameters that FSDP gathers together, with the padding of their shards."""

    every: int
    trained: int


def _with_shards(one: Measured, shards: int, gpus: int, half: bool) -> Measured:
    """Return the measurement of a process with FSDP, which keeps one of `shards` shards of each parameter.

    Parameters are divided along their first dimension. A block is gathered for its forward and again for its backward
    pass, the rest once, and the gradients of each group are scattered; parameters that are not sharded are all-reduced.
    If there are more GPUs than shards, shards of gradients are reduced over those that have the same. Two gathered
    blocks are counted at the peak, and not the rest: in one process, large gradients of the rest take as much. For both
    recipes of the papers, this is within 7 % of a step in a fake process group.

    Args:
        half: blocks are gathered in half precision.
    """
    divided = [size for sizes in one.groups for size in sizes]

    def share(trained: bool) -> Fraction:
        """Return the fraction of all parameters, or of the trained ones, that a process keeps."""
        kept = _elements(divided, shards, trained) + _elements(one.whole, 1, trained)
        return Fraction(kept, max(1, _elements([*divided, *one.whole], 1, trained)))

    share_of_weights = share(trained=False)
    share_of_trained = share(trained=True)
    groups = [
        Gathered(shards * _elements(sizes, shards, trained=False), shards * _elements(sizes, shards, trained=True))
        for sizes in one.groups
    ]
    *blocks, rest = groups
    block_bytes = 2 if half else 4  # of a gathered element
    gathered = 2 * block_bytes * sum(block.every for block in blocks) + 4 * rest.every
    scattered = 4 * sum(group.trained for group in groups)
    whole = 4 * _elements(one.whole, 1, trained=True)
    between = scattered // shards if gpus > shards else 0
    sent = {"allgather": gathered, "reduce_scatter": scattered}
    calls = {
        "allgather": 2 * len(blocks) + bool(rest.every),
        "reduce_scatter": sum(group.trained > 0 for group in groups),
    }
    if between or whole:
        sent["allreduce"] = between + whole
        calls["allreduce"] = calls["reduce_scatter"] * bool(between) + len(one.whole)
    memory = {
        part: int(size * (share_of_weights if part == "weights" else share_of_trained))
        for part, size in one.memory.items()
    }
    memory["activations"] = one.sharded + 2 * block_bytes * max((block.every for block in blocks), default=0)
    return replace(one, memory=memory, moved=int(one.moved * share_of_trained), sent=sent, calls=calls)


def _elements(sizes: Iterable[Size], shards: int, trained: bool) -> int:
    """Return the number of elements of one of `shards` shards of parameters, or only of the trained ones."""
    return sum(-(-first // shards) * others for first, others, learns in sizes if learns or not trained)


def read_recipe(name: str, words: list[str]) -> tuple[str, dict[str, Any], TrainerConfig, int, float]:
    """Return a recipe's (model, model settings, trainer settings, rows per sample, samples of the whole run)."""
    config = compose("train", [f"experiment={name}", *words])
    target = str(OmegaConf.select(config, "task._target_") or "")
    model = target.partition(".")[0]
    if model not in MODELS:
        raise UserError(f"{name} trains {target}: only recipes of HiCoDiT and Talker-T2AV are supported")
    settings = TrainerConfig(**plain(config.trainer) | {"device": "cpu", "compile": False})
    sizes = plain(config.task.model)
    if model == "talker_t2av":
        sizes["freeze_embeddings"] = bool(config.task.freeze_embeddings)
    elif config.task.encoders.kind == "tiny":  # released encoders do not run in training
        sizes["encoders"] = plain(config.task.encoders)
    if config.lora.rank:
        sizes["lora"] = plain(config.lora)
    whole = settings.global_batch_size or settings.batch_size * settings.accumulate
    rows = 2 if model == "talker_t2av" else 1
    return model, sizes, settings, rows, whole * settings.steps


def measure_samples(
    model: str, sizes: dict[str, Any], trainer: TrainerConfig, rows: int, seconds: float, most: int,
    shards: bool = False,
) -> tuple[Measured, Measured]:  # fmt: skip
    """Measure a step with one sample per process, and interpolate a step with two from one with `most` samples.

    Args:
        rows: rows of the batch per sample.
        seconds: length of the clips.
        shards: also measure what FSDP needs.
    """
    lora = sizes.get("lora", {"rank": 0})
    sizes = {key: value for key, value in sizes.items() if key != "lora"}

    def make_task() -> Task:
        # HiCoDiT's task reads a tokenizer's files, and is small; a Talker may be larger than this machine's memory.
        with nullcontext() if model == "talker_t2av" else _disable_current_modes():
            task = build_task(model, "base", **sizes)
        if lora["rank"]:  # PEFT would move the updates to the device on which a model without data is
            with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
                task.adapt(**lora)
        return task

    def run(samples: int, half: bool = False) -> Measured:
        print(f"{samples} sample{'s' * (samples > 1)} a process ...", file=sys.stderr, flush=True)
        return measure_fake(make_task, trainer, lambda task: random_batch(task, samples * rows, seconds), half)

    one = run(1)
    many = run(most)
    if shards and trainer.precision == "bf16":
        one = replace(one, sharded=run(1, half=True).beside)

    def two(first: float, last: float) -> float:
        return first + (last - first) / (most - 1)

    memory = one.memory | {"activations": two(one.memory["activations"], many.memory["activations"])}
    counts = {name: two(getattr(one, name), getattr(many, name)) for name in ("flops", "touched", "beside")}
    return one, replace(one, memory=memory, **counts, sharded=one.sharded + counts["beside"] - one.beside)


def draw(plans: list[Plan], room: float, title: str, path: Path) -> None:
    numbers = sorted({p.gpus for p in plans})
    with chart_file(path, 2, 2, title, figsize=(9, 3.4)) as (left, right):
        for way in WAYS:
            mine = [p for p in plans if p.parallel == way]
            left.plot([p.gpus for p in mine], [sum(p.memory.values()) / 2**30 for p in mine], "o-", label=way)
            right.plot([p.gpus for p in mine], [p.days for p in mine], "o-", label=way)
        left.axhline(room / 2**30, color="grey", linestyle="--", label="the card's")
        for axis, name in ((left, "memory of a GPU, GiB"), (right, "days of the recipe's samples")):
            axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=name)
            axis.set_xticks(numbers, [f"{n:,}" for n in numbers], minor=False)
            axis.minorticks_off()
            axis.legend()

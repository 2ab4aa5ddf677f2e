"""What a recipe costs on N GPUs, predicted from steps that `benchmarks.fake_step` measures without one."""

from __future__ import annotations

import math
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from omegaconf import OmegaConf
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.fake_step import Measured, measure_fake
from benchmarks.training import MODELS, build_task
from engine.config import compose
from engine.errors import UserError
from engine.evaluation.charts import chart_file
from engine.training.settings import TrainerConfig
from engine.training.speed import PEAKS
from engine.training.task import Task

WAYS = ("ddp", "fsdp", "hybrid")
PARTS = ("weights", "gradients", "optimiser", "average", "activations")


@dataclass(frozen=True)
class Card:
    """A GPU and its network, as data sheets state them.

    peak: dense bf16, TFLOP/s. single: float32 without tensor cores, TFLOP/s. memory: bytes. bandwidth: of the memory,
    bytes/s. link: bytes/s that a GPU sends to the others of its machine; network: to other machines, through an adapter
    of its own. machine: GPUs in one.
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


@dataclass(frozen=True)
class Efficiency:
    """Shares of the stated rates that are reached, and the network's hidden part; assumptions, not measurements.

    compute: of the peak, in matrix products and attention. memory: of the bandwidth, in all other operators, each
    of which reads and writes its tensors (no fusion). network: of link and network. hidden: share of the computing time
    behind which exchange goes on. latency: seconds of a collective, for each doubling of its ranks. launch: seconds in
    which the host starts an operator; a step takes at least that for all of them. full: share of the memory that may be
    used.
    """

    compute: float = 0.5
    memory: float = 0.7
    network: float = 0.7
    hidden: float = 0.7
    latency: float = 10e-6
    launch: float = 5e-6
    full: float = 0.92


@dataclass(frozen=True)
class Plan:
    """What one way of spreading a recipe costs. Bytes and seconds of a process and step; see `Efficiency`."""

    parallel: str
    gpus: int
    samples: int  # of a process's batch
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


def network_seconds(measured: Measured, parallel: str, gpus: int, card: Card, rates: Efficiency) -> float:
    """Time of a step's collectives in rings: each rank sends (n - 1) / n of what it gathers or scatters, twice that of
    what it reduces to all. Rings over whole machines cross a machine's border once and share the adapters of all its
    GPUs. `hybrid` shards within a machine, and reduces between machines in as many rings at once as one has GPUs."""
    seconds = 0.0
    for kind, size in measured.sent.items():
        ranks = gpus
        if parallel == "hybrid":
            ranks = max(1, gpus // card.machine) if kind == "allreduce" else min(gpus, card.machine)
        if parallel == "hybrid" and kind == "allreduce":
            rate = card.network
        else:
            rate = card.link if ranks <= card.machine else min(card.link, card.machine * card.network)
        seconds += (2 if kind == "allreduce" else 1) * (ranks - 1) / ranks * size / (rate * rates.network)
        seconds += measured.calls[kind] * rates.latency * math.log2(max(2, ranks))
    return seconds


def plan(
    one: Measured, two: Measured, parallel: str, gpus: int, card: Card, samples: int, total: float,
    rates: Efficiency | None = None,
) -> Plan:  # fmt: skip
    """What steps of `samples` a process cost, from measurements with one sample and with two: activations and
    operations grow with the batch, what is exchanged does not.

    Args:
        total: samples of the whole run.
    """
    rates = rates or Efficiency()

    def at(first: float, second: float) -> float:
        return first + (second - first) * (samples - 1)

    memory = {name: at(one.memory[name], two.memory[name]) for name in one.memory}
    fixed = sum(memory.values()) - memory["activations"]
    room, each = card.memory * rates.full - fixed, two.memory["activations"] - one.memory["activations"]
    largest = int((room - one.memory["activations"]) // max(each, 1)) + 1
    compute = at(one.flops, two.flops) / (card.peak * 1e12 * rates.compute)
    moved = at(one.touched, two.touched) / (card.bandwidth * rates.memory)
    network = network_seconds(one, parallel, gpus, card, rates) if gpus > 1 else 0.0
    host = one.kernels * rates.launch  # as many for any batch
    busy = max(compute + moved, host)
    step = busy + max(0.0, network - rates.hidden * busy)
    steps = total / (samples * gpus)
    fits, days = sum(memory.values()) <= card.memory * rates.full, steps * step / 86_400
    flops, sent = at(one.flops, two.flops), dict(one.sent)
    costs = compute, moved, host, network, step, steps, days
    return Plan(parallel, gpus, samples, memory, fits, max(0, largest), sent, flops, *costs)


def spread(measured: Measured, parallel: str, before: int, now: int, machine: int) -> Measured:
    """A measurement on `before` processes as it would be on `now`: shards shrink, what travels does not change. (Rows
    that pad a shard, and what the optimiser reads and writes of its shards, are not counted anew.)"""
    if parallel == "ddp":
        return measured
    shards = [min(count, machine) if parallel == "hybrid" else count for count in (before, now)]
    memory = {k: v if k == "activations" else v * shards[0] // shards[1] for k, v in measured.memory.items()}
    return replace(measured, memory=memory)


def read_recipe(name: str, words: list[str]) -> tuple[str, dict[str, Any], TrainerConfig, int, float]:
    """(model, its settings, the trainer's, rows of a sample, samples of the whole run) of a recipe."""
    config = compose("train", [f"experiment={name}", *words])
    target = str(OmegaConf.select(config, "task._target_") or "")
    model = next((model for model in MODELS if target.startswith(model)), None)
    if model is None:
        raise UserError(f"{name} trains {target}: recipes of HiCoDiT and Talker-T2AV can be planned")
    trainer = OmegaConf.to_container(config.trainer, resolve=True)
    settings = TrainerConfig(**trainer | {"device": "cpu", "compile": False})
    sizes = OmegaConf.to_container(config.task.model, resolve=True)
    if model == "talker":
        sizes["freeze_embeddings"] = bool(config.task.freeze_embeddings)
    elif config.task.encoders.kind == "tiny":  # released encoders do not run in training
        sizes["encoders"] = OmegaConf.to_container(config.task.encoders, resolve=True)
    lora = OmegaConf.to_container(config.lora)
    if lora["rank"]:
        sizes["lora"] = lora
    whole = settings.global_batch_size or settings.batch_size * settings.accumulate
    rows = 2 if model == "talker" else 1
    return model, sizes, settings, rows, whole * settings.steps


def measure_ways(
    model: str,
    sizes: dict[str, Any],
    trainer: TrainerConfig,
    rows: int,
    seconds: float,
    most: int,
    gpus: int,
    machine: int,
) -> dict[str, tuple[Measured, Measured]]:
    """By way of spreading: a step with one sample a process, and with two on the line to a step with `most`."""
    name, make_batch, _ = MODELS[model]
    lora = sizes.get("lora", {"rank": 0})
    sizes = {key: value for key, value in sizes.items() if key != "lora"}

    def make_task() -> Task:
        # HiCoDiT's task reads a tokenizer's files, and is small; a Talker may be larger than this machine's memory.
        with nullcontext() if model == "talker" else _disable_current_modes():
            task = build_task(f"{name}_base", **sizes)
        if lora["rank"]:
            _adapt(task, lora)
        return task

    def run(way: str, samples: int) -> Measured:
        print(f"{way}, {samples} sample{'s' * (samples > 1)} a process ...", file=sys.stderr, flush=True)
        config = TrainerConfig(**asdict(trainer) | {"parallel": way})
        count = samples * rows
        return measure_fake(make_task, config, lambda task: make_batch(task, count, seconds), gpus, machine)

    found, growth = {}, (0.0, 0.0, 0.0)
    for way in WAYS if gpus > 1 else WAYS[:1]:
        one = run(way, 1)
        if way != "hybrid":  # which computes what fsdp does
            many, n = run(way, most), most - 1
            more = many.memory["activations"] - one.memory["activations"]
            growth = more / n, (many.flops - one.flops) / n, (many.touched - one.touched) / n
        memory = one.memory | {"activations": one.memory["activations"] + growth[0]}
        found[way] = one, replace(one, memory=memory, flops=one.flops + growth[1], touched=one.touched + growth[2])
    return found


def _adapt(task: Task, lora: dict[str, Any]) -> None:
    """Give a task without data low-rank updates, where PEFT would move them to the device on which they are."""
    with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
        task.adapt(**lora)


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

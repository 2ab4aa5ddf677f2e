"""Simulated steps: their memory beside that of a real one, the largest batch, and the collectives of one rank of 32."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from toy_task import CONFIG

from benchmarks import dry_run
from benchmarks.fake_step import Measured, measure, measure_fake
from benchmarks.plan import CARDS, padding_of, plan
from engine.training import parallel
from engine.training.settings import TrainerConfig
from engine.training.task import Task


class Tower(Task):
    """Blocks of a width that divides by four, and a choice of rows that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True)
        self.model = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = torch.nn.Linear(128, 30)

    def parts(self):
        return {"all": self}

    def blocks(self):
        return list(self.model.layers)

    def forward(self, batch, part):
        chosen = batch["x"].mean(-1) > 0
        return {"loss": self.head(self.model(batch["x"]))[chosen].square().mean()}


def config():
    return TrainerConfig(**CONFIG | {"parallel": "ddp", "precision": "fp32"})


def batch(task=None):
    return {"x": torch.randn(4, 12, 128, generator=torch.Generator().manual_seed(0))}


def allocated(call):
    """Return most bytes that PyTorch's allocator gave out in a call at once."""
    gc.collect()  # what died before would be subtracted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_a_simulated_step_has_the_memory_of_a_real_one():
    found = measure_fake(Tower, config(), batch)
    real = measure(Tower(), config(), batch())
    assert (found.memory, found.flops, found.groups) == (real.memory, real.flops, real.groups)
    assert sum(found.memory.values()) == pytest.approx(allocated(lambda: measure(Tower(), config(), batch())), rel=0.1)


SIZES = {"weights": 2**30, "gradients": 2**30, "activations": 2**28}


def plan_of(parallel="ddp", gpus=64, samples=3, padding=1.0):
    """Plan a run of a model with one block, whose activations and operations are proportional to the samples."""
    one = Measured(SIZES, 10**12, 2**30, 7, 0, [[(2**28, 1, True)]], beside=2**28)
    more = {"memory": SIZES | {"activations": 2**29}, "flops": 2 * 10**12, "touched": 2**31, "beside": 2**29}
    return plan(one, replace(one, **more), parallel, gpus, CARDS["h200"], samples, 1920, padding=padding)


def test_the_largest_batch_is_the_largest_that_fits():
    largest = plan_of().largest_batch
    assert plan_of(samples=largest).fits and not plan_of(samples=largest + 1).fits


def test_weights_are_divided_among_the_gpus_of_a_group_or_of_a_machine():
    memory = {parallel: plan_of(parallel).memory["weights"] for parallel in ("ddp", "fsdp", "hybrid")}
    assert memory == {"ddp": 2**30, "fsdp": 2**30 // 64, "hybrid": 2**30 // 8}
    assert plan_of(gpus=1).network_s == 0 < plan_of(gpus=64).network_s


def test_a_rank_with_short_clips_waits_for_the_longest_batch():
    trainer = TrainerConfig(**CONFIG)
    mixed = padding_of(replace(trainer, by_length=False), 64, 3)
    sorted_by_length = padding_of(replace(trainer, by_length=True), 64, 3)
    assert mixed < sorted_by_length < padding_of(trainer, 1, 3) == 1
    assert plan_of(padding=mixed).compute_s > plan_of().compute_s


SMALL = ["trainer.parallel=fsdp", "task.model.low_blocks=1", "task.model.high_blocks=1"]


def test_a_rank_holds_its_shards_and_gathers_blocks_in_bfloat16():
    found = dry_run.dry_run("hicodit_paper", SMALL, 32)
    assert found["batch"] == "32 x 1 x 1"
    memory = found["memory"]
    calls = found["collectives"]
    assert memory["optimiser"] == pytest.approx(2 * memory["weights"], rel=0.01)
    gathered = [(dtype, size) for kind, dtype, size, _ in calls if kind == "all-gather"]
    assert {dtype for dtype, _ in gathered} == {"bfloat16", "float32"}
    largest = max(size for dtype, size in gathered if dtype == "float32")
    assert memory["weights"] < largest < 32 * memory["weights"]  # what is in no block
    assert "padding efficiency" in dry_run.report(found)


class Tied(Task):
    """A large embedding, whose weight a head that is not used has, too; and a small rest."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 64, bias=False)
        self.rest = nn.Linear(8, 4)
        self.head.weight = self.words.weight

    def parts(self):
        return {"model": self}

    def forward(self, batch, part):
        return {"loss": self.rest(self.words(batch["x"]).float()).square().mean()}


def test_a_large_embedding_is_gathered_separately_in_bfloat16_and_stays_tied(monkeypatch):
    monkeypatch.setattr(parallel, "LARGE_EMBEDDING", 256)
    config = TrainerConfig(parallel="fsdp", precision="bf16")
    with dry_run.fake_group(2), dry_run.without_data(), dry_run.Collectives() as seen:
        wrapped = parallel.ParallelTask(Tied(), config, torch.device("cpu"))
        task = wrapped.task
        assert isinstance(task.words.weight, DTensor) and task.head.weight is task.words.weight
        wrapped.losses({"x": torch.arange(4)}, "model")["loss"].backward()
        assert task.head.weight is task.words.weight and task.words.weight.grad is not None
    gathered = {(dtype, size) for kind, dtype, size in seen.calls if kind == "all-gather"}
    assert gathered == {("bfloat16", 2 * 64 * 8), ("float32", 4 * (8 * 4 + 4))}

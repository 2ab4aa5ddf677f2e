"""The planner: memory of a simulated step against a real one, and the largest batch."""

import gc
from dataclasses import replace

import pytest
import torch
from toy_task import CONFIG

from benchmarks.fake_step import Measured, measure, measure_fake
from benchmarks.plan import CARDS, padding_of, plan
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

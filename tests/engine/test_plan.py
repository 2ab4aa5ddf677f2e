"""What the planner predicts: memory of a step within 10 % of a real one's, and sums."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy_task import CONFIG

from benchmarks.fake_step import Measured, measure, measure_fake
from benchmarks.plan import CARDS, EFFICIENCY, padding_of, plan
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


def test_fake_step_takes_the_memory_of_a_real_one():
    found = measure_fake(Tower, config(), batch)
    real = measure(Tower(), config(), batch())
    assert (found.memory, found.flops, found.groups) == (real.memory, real.flops, real.groups)
    assert sum(found.memory.values()) == pytest.approx(allocated(lambda: measure(Tower(), config(), batch())), rel=0.1)


@pytest.mark.parametrize(("gpus", "least"), [(8, 0.9), (32, 0.9)])
def test_ranks_of_a_recipe_wait_for_the_longest_batch(gpus, least):
    sorted_, mixed = (TrainerConfig(**CONFIG | {"by_length": by_length}) for by_length in (True, False))
    assert least < padding_of(sorted_, gpus, 4) < 1
    assert padding_of(mixed, gpus, 4) < padding_of(sorted_, gpus, 4) - 0.05
    assert padding_of(sorted_, 1, 4) == 1


def test_a_plan_adds_up():
    sizes = {"weights": 8, "gradients": 8, "activations": 4}
    one = Measured(sizes, 100, 50, 7, 0, [[(2, 1, True)]], beside=4)
    two = replace(one, memory=sizes | {"activations": 7}, flops=200, touched=100, beside=7)
    card = CARDS["h200"]
    rates = SimpleNamespace(**EFFICIENCY)
    found = plan(one, two, "ddp", 64, card, 3, 1920)
    assert found.memory == sizes | {"activations": 10} and found.fits and found.flops == 300
    assert found.compute_s == pytest.approx(300 / (card.peak * 1e12 * rates.compute)) and found.steps == 10
    wire = 2 * 63 / 64 * 8 / (8 * card.network * rates.network) + 6 * rates.latency  # eight adapters at once
    assert found.network_s == pytest.approx(wire)
    assert found.largest_batch == (card.memory * rates.full - 16 - 4) // 3 + 1
    alone = plan(one, two, "ddp", 1, card, 1, 10)
    assert alone.network_s == 0 and alone.step_s == alone.host_s == pytest.approx(7 * rates.launch)
    waiting = plan(one, two, "ddp", 64, card, 3, 1920, padding=0.8)
    assert (waiting.compute_s, waiting.padding) == (pytest.approx(found.compute_s / 0.8), 0.8)
    large = replace(one, flops=10**18)
    slow = plan(large, large, "ddp", 1, card, 1, 10)
    assert slow.step_s == pytest.approx(slow.compute_s + slow.memory_s)
    shared = plan(one, two, "hybrid", 64, card, 3, 1920)  # in eight machines, each GPU with an adapter of its own
    assert shared.memory["weights"] == 4 and shared.sent == {"allgather": 32, "reduce_scatter": 32, "allreduce": 4}
    inside = 2 * 7 / 8 * 32 / card.link
    between = 2 * 7 / 8 * 4 / card.network
    assert shared.network_s == pytest.approx((inside + between) / rates.network + 9 * rates.latency)

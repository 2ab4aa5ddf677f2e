"""What the planner finds without devices against real processes: memory within 10 %, exchanged bytes exactly."""

import gc
import json
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_parallel import together
from toy_task import CONFIG

from benchmarks.fake_step import Measured, measure, measure_fake
from benchmarks.plan import CARDS, Efficiency, measure_ways, plan, read_recipe
from engine.errors import exit_process
from engine.training import distributed
from engine.training.settings import TrainerConfig
from engine.training.task import Task

CASES = [("ddp", "fp32"), ("fsdp", "fp32"), ("hybrid", "fp32")]


class Tower(Task):
    """Blocks of a width that divides by four, and a choice of rows that depends on the data.

    Weights weigh more than activations, so that what a shard saves shows in the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True)
        self.model = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = torch.nn.Linear(128, 32)

    def parts(self):
        return {"all": self}

    def blocks(self):
        return list(self.model.layers)

    def forward(self, batch, part):
        chosen = batch["x"].mean(-1) > 0
        return {"loss": self.head(self.model(batch["x"]))[chosen].square().mean()}


def config(way, precision):
    return TrainerConfig(**CONFIG | {"parallel": way, "precision": precision})


def batch(task=None):
    return {"x": torch.randn(4, 12, 128, generator=torch.Generator().manual_seed(0))}


@contextmanager
def patient_gloo():
    """Gloo's threads let go of tensors a moment after a collective has ended, the later the busier the machine. Each
    collective of FSDP ends here when they have."""

    def patient(collective):
        def call(*args, async_op=False, **kwargs):
            held = [value.untyped_storage() for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            before = [torch._C._storage_Use_Count(each._cdata) for each in held]
            collective(*args, **kwargs)
            end = time.monotonic() + 30
            while any(torch._C._storage_Use_Count(each._cdata) > n for each, n in zip(held, before, strict=True)):
                assert time.monotonic() < end, "gloo keeps a tensor"
                time.sleep(0.001)

        return call

    names = "reduce_scatter_tensor", "all_gather_into_tensor"
    with mock.patch.multiple(torch.distributed, **{name: patient(getattr(torch.distributed, name)) for name in names}):
        yield


def allocated(call):
    """(result of a call, most bytes that PyTorch's allocator gave out in it at once).

    What gloo's threads free, no profiler sees: it would stay in the sum for ever, and is taken off.
    """
    gc.collect()  # what died before would be subtracted
    gc.disable()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
        gc.collect()
    gc.enable()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return result, most - now


def worker(folder: Path) -> None:
    """A real process; the first writes FOLDER/facts.json."""
    distributed.init("cpu")
    facts = {}
    for way, precision in CASES:

        def step(way=way, precision=precision):
            torch.manual_seed(0)
            return measure(Tower(), config(way, precision), batch())

        with patient_gloo():
            tries = [allocated(step) for _ in range(2)]
        found, most = tries[0][0], max(most for _, most in tries)  # less where a thread freed after the peak
        facts[f"{way} {precision}"] = {"sent": found.sent, "most": most, "memory": found.memory}
    if distributed.is_main():
        (folder / "facts.json").write_text(json.dumps(facts))
    exit_process(0)


@pytest.mark.slow
def test_fake_processes_cost_what_real_ones_do(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # four processes are two machines
    together(tmp_path, 4, worker, tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text())
    for way, precision in CASES:
        real, found = (
            facts[f"{way} {precision}"],
            measure_fake(Tower, config(way, precision), batch, 4, 2),
        )
        sent = {k: v for k, v in real["sent"].items() if k != "broadcast"}  # DDP's, once when it begins
        assert found.sent == sent, (way, precision)
        for part in ("weights", "gradients", "optimiser", "average"):
            assert found.memory[part] == real["memory"][part], (way, precision, part)
        assert sum(found.memory.values()) == pytest.approx(real["most"], rel=0.1), (way, precision)


def test_a_plan_adds_up():
    one = Measured({"weights": 10, "activations": 4}, {"allreduce": 8}, {"allreduce": 1}, 100, 50, 7)
    two = Measured({"weights": 10, "activations": 7}, {"allreduce": 8}, {"allreduce": 1}, 200, 100, 7)
    card, rates = CARDS["h200"], Efficiency()
    found = plan(one, two, "ddp", 64, card, 3, 1920)
    assert found.memory == {"weights": 10, "activations": 10} and found.fits and found.flops == 300
    assert found.compute_s == pytest.approx(300 / (card.peak * 1e12 * rates.compute)) and found.steps == 10
    wire = 2 * 63 / 64 * 8 / (8 * card.network * rates.network) + 6 * rates.latency  # eight adapters at once
    assert found.network_s == pytest.approx(wire)
    between = plan(one, two, "hybrid", 64, card, 3, 1920).network_s  # of eight machines, each GPU by its own adapter
    assert between == pytest.approx(2 * 7 / 8 * 8 / (card.network * rates.network) + 3 * rates.latency)
    assert found.largest_batch == (card.memory * rates.full - 10 - 4) // 3 + 1
    alone = plan(one, two, "ddp", 1, card, 1, 10)
    assert alone.network_s == 0 and alone.step_s == alone.host_s == pytest.approx(7 * rates.launch)
    large = replace(one, flops=10**18)
    slow = plan(large, large, "ddp", 1, card, 1, 10)
    assert slow.step_s == pytest.approx(slow.compute_s + slow.memory_s)


def test_lora_has_gradients_and_optimiser_of_its_updates_alone():
    pytest.importorskip("peft")
    llm = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    llm |= {"num_key_value_heads": 1, "intermediate_size": 96}
    words = [f"task.model.llm.{name}={value}" for name, value in llm.items()]
    words += [
        f"task.model.{part}_{name}={n}" for part in ("encoder", "head") for name, n in (("layers", 1), ("heads", 2))
    ]

    def memory(*changes):
        name, sizes, trainer, rows, _ = read_recipe("talker_finetune", ["init=x", *words, *changes])
        return measure_ways(name, sizes, trainer, rows, 1.0, 2, 1, 8)["ddp"][0].memory

    low, whole = memory("lora.rank=2"), memory("lora.rank=0")
    assert whole["weights"] <= low["weights"] < 1.3 * whole["weights"]
    assert low["gradients"] < 0.3 * whole["gradients"] and low["optimiser"] < 0.3 * whole["optimiser"]

"""What the planner predicts against real processes: memory of a step within 10 %, shards and exchanged bytes alike."""

import gc
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_parallel import together
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_task import CONFIG

from benchmarks.common import nbytes
from benchmarks.fake_step import Measured, measure, measure_fake
from benchmarks.plan import CARDS, EFFICIENCY, measure_samples, plan, read_recipe, spread
from engine.errors import exit_process
from engine.training import distributed
from engine.training.parallel import ParallelTask
from engine.training.settings import TrainerConfig
from engine.training.task import Task

WAYS = ("ddp", "fsdp", "hybrid")


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


def config(way="ddp"):
    return TrainerConfig(**CONFIG | {"parallel": way, "precision": "fp32"})


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


class Sent(TorchDispatchMode):
    """Counts bytes and calls by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what is done to a shard comes here by itself
        if func.namespace == "c10d":
            kind = func._opname.strip("_").replace("_base", "")
            self.sent[kind] += max(nbytes([x]) for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x))
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def worker(folder: Path) -> None:
    """A real process; the first writes FOLDER/facts.json."""
    distributed.init("cpu")
    facts = {}
    for way in WAYS:
        task = Tower()
        parallel = ParallelTask(task.train(), config(way), torch.device("cpu"))
        with Sent() as seen, parallel.micro_batch(last=True):
            parallel.losses(batch(), "all")["loss"].backward()
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in task.parameters()]
        facts[way] = {"sent": seen.sent, "calls": seen.calls, "weights": nbytes(shards)}
    if distributed.is_main():
        (folder / "facts.json").write_text(json.dumps(facts))
    exit_process(0)


@pytest.mark.slow
def test_shards_and_exchanged_bytes_are_those_of_real_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # four processes are two machines
    together(tmp_path, 4, worker, tmp_path)
    facts, one = json.loads((tmp_path / "facts.json").read_text()), measure_fake(Tower, config(), batch)
    for way in WAYS:
        found = spread(one, way, 4, 2)
        assert {"sent": found.sent, "calls": found.calls, "weights": found.memory["weights"]} == facts[way], way


def test_a_plan_adds_up():
    sizes = {"weights": 8, "gradients": 8, "activations": 4}
    one = Measured(sizes, 100, 50, 7, 0, [[(2, 1, True)]], beside=4)
    two = replace(one, memory=sizes | {"activations": 7}, flops=200, touched=100, beside=7)
    card, rates = CARDS["h200"], SimpleNamespace(**EFFICIENCY)
    found = plan(one, two, "ddp", 64, card, 3, 1920)
    assert found.memory == sizes | {"activations": 10} and found.fits and found.flops == 300
    assert found.compute_s == pytest.approx(300 / (card.peak * 1e12 * rates.compute)) and found.steps == 10
    wire = 2 * 63 / 64 * 8 / (8 * card.network * rates.network) + 6 * rates.latency  # eight adapters at once
    assert found.network_s == pytest.approx(wire)
    assert found.largest_batch == (card.memory * rates.full - 16 - 4) // 3 + 1
    alone = plan(one, two, "ddp", 1, card, 1, 10)
    assert alone.network_s == 0 and alone.step_s == alone.host_s == pytest.approx(7 * rates.launch)
    large = replace(one, flops=10**18)
    slow = plan(large, large, "ddp", 1, card, 1, 10)
    assert slow.step_s == pytest.approx(slow.compute_s + slow.memory_s)
    shared = plan(one, two, "hybrid", 64, card, 3, 1920)  # in eight machines, each GPU with an adapter of its own
    assert shared.memory["weights"] == 4 and shared.sent == {"allgather": 32, "reduce_scatter": 32, "allreduce": 4}
    inside, between = 2 * 7 / 8 * 32 / card.link, 2 * 7 / 8 * 4 / card.network
    assert shared.network_s == pytest.approx((inside + between) / rates.network + 9 * rates.latency)


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
        return measure_samples(name, sizes, trainer, rows, 1.0, 2)[0].memory

    low, whole = memory("lora.rank=2"), memory("lora.rank=0")
    assert whole["weights"] <= low["weights"] < 1.3 * whole["weights"]
    assert low["gradients"] < 0.3 * whole["gradients"] and low["optimiser"] < 0.3 * whole["optimiser"]

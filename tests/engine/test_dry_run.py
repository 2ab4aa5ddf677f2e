"""A simulated step of one rank of 32: its memory and its collectives."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks import dry_run
from engine.errors import UserError
from engine.training import parallel
from engine.training.settings import TrainerConfig
from engine.training.task import Task

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
    with pytest.raises(UserError, match=r"trainer\.parallel=ddp is not supported"):
        dry_run.dry_run("hicodit_paper", [], 32)


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

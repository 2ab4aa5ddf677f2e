"""Activation checkpointing and compilation of blocks change no loss and no gradient."""

from functools import partial
from typing import Any

import pytest
import torch

from engine.training.parallel import prepare_blocks
from engine.training.task import Task
from tests.golden.golden_runs import RUNS
from tests.tiny import batch_of


def losses_of(task: Task, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """Losses and gradients of a step of a task, by part and name."""
    found = {}
    batch = dict(batch)
    task.train().begin_step(step)
    for part in task.parts():
        torch.manual_seed(0)
        task.zero_grad()
        losses = task(batch, part)
        losses["loss"].backward()
        found |= {f"{part}/{name}": value.detach() for name, value in losses.items()}
        found |= {f"{part}/{name}": p.grad for name, p in task.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize(
    ("name", "step", "compiled"),
    [
        ("hicodit", 0, True),
        ("talker_t2av", 0, True),
        ("rvq_codec", 2, False),  # with discriminators
        ("whisperx_vae", 2, False),
        ("lia_x", 2, False),
    ],
)
def test_checkpointed_and_compiled_blocks_have_equal_losses_and_gradients(name, step, compiled, tmp_path, monkeypatch):
    """Compiled here means captured: the graphs are run by PyTorch, as a C++ compiler would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def made(number: int) -> tuple[Task, dict[str, Any]]:
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(0)
        task, data = RUNS[name](folder)
        for parameter in task.parameters() if name == "hicodit" else ():  # gates and heads begin at zero: no gradients
            torch.nn.init.normal_(parameter, std=0.1)
        return task, batch_of(data)

    plain = losses_of(*made(0), step)
    task, batch = made(1)
    calls = []
    for block in task.blocks():
        block.register_forward_hook(lambda *_: calls.append(1))
    prepare_blocks(task, compiled=False, recomputed=True)
    others = [losses_of(task, batch, step)]
    assert len(calls) >= len(task.blocks()) > 0
    if compiled:
        task, batch = made(2)
        one_of_each = list({type(block): block for block in task.blocks()}.values())
        task.blocks = lambda: one_of_each
        prepare_blocks(task, compiled=True, recomputed=True)
        others.append(losses_of(task, batch, step))
    for other in others:
        assert other.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=key)

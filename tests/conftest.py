from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import processes
from engine.evaluation.validation import Share, figures_of
from engine.training.parallel import prepare_blocks
from engine.training.task import Task
from tests import forked

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # tests run in a process for each core
os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "codecs"))), "OMP_NUM_THREADS": "1"}

processes.get_context = lambda _: forked.SERVER  # in place of "spawn": as separate, and there at once

# Files that take longest, longest first, so that none is left for the end in several processes (`-n 2`).
LONG = [
    f"tests/{name}.py"
    for name in (
        "rehearsal/test_rehearsal", "hicodit/test_inference", "engine/test_plan", "engine/test_parallel",
        "rehearsal/test_grid_recipe", "talker_t2av/test_talker_pipeline", "hicodit/test_hard_videos",
        "corpora/test_synthetic_corpus", "corpora/test_prepare_job", "talker_t2av/test_evaluation_tables",
        "scripts/test_kill_test", "scripts/test_late_errors", "hicodit/test_task", "hicodit/test_pipeline",
        "engine/test_trainer", "talker_t2av/test_talker_inference",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(name) if (name := item.nodeid.split("::")[0]) in LONG else len(LONG))


@pytest.fixture(autouse=True)
def signals_end_processes_again():
    """A handler that a test leaves would keep processes that are forked later from ending."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _losses(task: Task, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Losses and gradients of one step of a task."""
    found, batch = {}, dict(batch)
    task.train()
    for part in task.parts():
        torch.manual_seed(0)
        task.zero_grad()
        losses = task(batch, part)
        losses["loss"].backward()
        found |= {f"{part}/{name}": value.detach() for name, value in losses.items()}
        found |= {f"{part}/{name}": p.grad for name, p in task.named_parameters() if p.grad is not None}
    return found


@pytest.fixture
def prepared_blocks_change_nothing(monkeypatch) -> Callable[..., None]:
    """Asserts that losses and gradients stay the same when blocks are recomputed, and one of each kind compiled.

    Compiled here means captured: the graphs are run by PyTorch, as a C++ compiler would take minutes.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def check(make_task: Callable[[], Task], batch: dict[str, Any], compiled: bool = True) -> None:
        plain, task, calls = _losses(make_task(), batch), make_task(), []
        for block in task.blocks():
            block.register_forward_hook(lambda *_: calls.append(1))
        prepare_blocks(task, compiled=False, recomputed=True)
        found = [_losses(task, batch)]
        assert len(calls) >= len(task.blocks()) > 0
        if compiled:
            task = make_task()
            chosen = list({type(block): block for block in task.blocks()}.values())
            task.blocks = lambda: chosen
            prepare_blocks(task, compiled=True, recomputed=True)
            found.append(_losses(task, batch))
        for other in found:
            assert other.keys() == plain.keys()
            for name, value in plain.items():
                torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)

    return check


@pytest.fixture
def shares_give_the_same_figures(tmp_path) -> Callable[..., None]:
    """Asserts that a validation in two and in four processes gives the figures of one, and each has a part in it."""

    def measured(task: Task, step: int, share: Share) -> dict[str, Any]:
        torch.manual_seed(0)  # as the trainer does in every process
        folder = tmp_path / f"share-{share.rank}-of-{share.count}"
        folder.mkdir()
        with torch.no_grad():
            return task.measure(step, folder, share)

    def written(count: int) -> list[str]:
        folders = [tmp_path / f"share-{rank}-of-{count}" for rank in range(count)]
        return sorted(path.name for folder in folders for path in folder.rglob("*") if path.is_file())

    def check(task: Task, step: int = 0, tolerance: float = 1e-4) -> None:
        whole = figures_of([measured(task, step, Share())])
        files = written(1)
        for count in (2, 4):
            shares = [measured(task, step, Share(rank, count)) for rank in range(count)]
            assert sum(map(bool, shares)) >= 2
            assert figures_of(shares) == pytest.approx(whole, rel=tolerance, nan_ok=True)
            assert written(count) == files

    return check

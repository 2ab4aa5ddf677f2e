"""Two processes of a group: flags, timeouts, and tasks that are built by one of them."""

import json
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from toy_task import ToyBlocks

from engine.errors import exit_process
from engine.training import distributed
from engine.training.parallel import build_once
from tests.forked import run_group


def worker(folder: Path) -> None:
    """One of two processes; writes what it saw into FOLDER/RANK.json."""
    distributed.TIMEOUT = timedelta(seconds=1)
    distributed.init("cpu")
    rank = distributed.rank()
    seen = {}
    flags = distributed.AsyncFlags()
    seen["flags"] = [flags.all_reduce(rank == 1 and step == 1, rank == 0 and step == 2) for step in range(4)]
    made = []

    def make():
        made.append(rank)
        torch.manual_seed(7)
        return ToyBlocks()

    task = build_once(make)
    seen["made"] = made
    seen["devices"] = sorted({p.device.type for p in task.parameters()})
    seen["tied"] = task.tied.weight is task.discriminator.weight
    begin = time.monotonic()
    if rank == 0:
        try:
            dist.all_reduce(torch.zeros(1))  # the other one does not come
        except RuntimeError as error:
            seen["error"] = str(error)[:200]
        seen["seconds"] = time.monotonic() - begin
        (folder / "failed").touch()
    else:
        while not (folder / "failed").exists() and time.monotonic() - begin < 60:
            time.sleep(0.1)
    objects = distributed.all_gather(rank)  # patient: takes as long as it takes
    (folder / f"{rank}.json").write_text(json.dumps(seen | {"objects": objects}))
    exit_process(0)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    run_group(folder, 2, worker, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_flags_reach_all_ranks_one_step_later(seen):
    assert seen[0]["flags"] == seen[1]["flags"] == [[False, False], [False, False], [True, False], [False, True]]
    assert distributed.AsyncFlags().all_reduce(True, False) == [True, False]  # alone: at once


def test_a_task_is_built_on_rank_0_and_on_meta_elsewhere(seen):
    assert [one["made"] for one in seen] == [[0], []]
    assert [one["devices"] for one in seen] == [["cpu"], ["meta"]] and seen[1]["tied"]


def test_a_hanging_collective_times_out_and_gathering_objects_does_not(seen):
    assert seen[0]["seconds"] < 30 and "imed out" in seen[0]["error"]
    assert [one["objects"] for one in seen] == [[0, 1], [0, 1]]

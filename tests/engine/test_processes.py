"""Worker processes that crash, hang, are killed or cannot restart."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.processes import Lost, Processes, Work
from tests.waiting import wait_until

KILLED = """
import os, signal
from engine.evaluation.workers import Workers

def who(_):
    return os.getpid()

if __name__ == "__main__":
    with Workers(2) as workers:
        print(*set(workers.map(who, range(2))), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


class Squares(Work):
    """Squares of numbers; words are disasters, of which some happen once only."""

    def __init__(self, folder, number):
        self.folder = folder
        self.details = number
        if number == 1 and (folder / "card").exists():
            (folder / "refused").touch()
            raise UserError("card 1 is lost")

    def run(self, item):
        if item == "refuse":
            raise UserError("the disk is full")
        if item == "hang":
            time.sleep(60)
        if item == "die" or (item == "die once" and not (self.folder / item).exists()):
            (self.folder / item).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "lose a card" and self.details == 1:
            (self.folder / "card").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item in ("lose a card", "wait"):
            wait_until((self.folder / ("card" if item == "lose a card" else "refused")).exists)
        return f"by {self.details}" if isinstance(item, str) else item**2


class Ahead(Squares):
    """Takes each item before it returns the result of the one before, as work that prepares ahead does."""

    ahead = 1

    def run_all(self, items):
        item = next(items)
        while True:
            with ThreadPoolExecutor(1) as pool:
                following = pool.submit(next, items)
                yield self.run(item)
                item = following.result()


def squares(folder, items, count=2, timeout=60.0, work=Squares):
    with Processes(count, partial(work, folder), timeout) as processes:
        return list(processes.run(items))


@pytest.mark.parametrize("work", [Squares, Ahead])
def test_an_item_whose_process_dies_is_retried_once(tmp_path, work):
    items = [1, "die once", 2, "die", *range(3, 20)]
    results = squares(tmp_path, items, work=work)
    assert sorted(map(str, (item for item, _ in results))) == sorted(map(str, items))
    named = dict(results)
    assert isinstance(named.pop("die"), Lost) and named.pop("die once").startswith("by ")
    assert all(result == item**2 for item, result in named.items())


def test_an_item_that_hangs_times_out(tmp_path):
    results = dict(squares(tmp_path, ["hang", 3], 1, 0.5))
    assert isinstance(results["hang"], Lost) and results[3] == 9


def test_a_lost_gpu_is_dropped_and_its_item_is_retried(tmp_path):
    results = squares(tmp_path, ["lose a card", "lose a card", "wait", 5])
    assert sorted(result for _, result in results if isinstance(result, int)) == [25]
    assert [result for _, result in results if isinstance(result, str)] == ["by 0"] * 3


def test_results_of_an_abandoned_run_do_not_reach_the_next_one(tmp_path):
    with Processes(2, partial(Squares, tmp_path)) as processes:
        abandoned = processes.run([2, "wait", 3])  # one process waits for a file
        next(abandoned)
        abandoned.close()
        (tmp_path / "refused").touch()
        assert sorted(processes.run([5, 6])) == [(5, 25), (6, 36)]


def test_user_errors_of_workers_are_raised(tmp_path):
    with pytest.raises(UserError, match="the disk is full"):
        squares(tmp_path, [1, "refuse"])
    (tmp_path / "card").touch()
    with pytest.raises(UserError, match="card 1 is lost"):
        squares(tmp_path, [1])


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py")]
    path = os.pathsep.join(sys.path)
    # a pipe would stay open as long as a worker lives
    said = tmp_path / "said.txt"
    warned = tmp_path / "warned.txt"
    with said.open("w") as out, warned.open("w") as err:  # apart: multiprocessing's own warnings may come between
        ended = subprocess.run(command, stdout=out, stderr=err, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert ended.returncode == -signal.SIGKILL, warned.read_text()
    workers = [int(word) for word in said.read_text().split()]
    assert workers
    wait_until(lambda: not any(map(is_alive, workers)), 10)

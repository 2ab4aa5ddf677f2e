"""A killed command leaves no worker process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLED = """
import os, signal
from engine.evaluation.measure import Workers

def who(_):
    return os.getpid()

if __name__ == "__main__":
    with Workers(2) as workers:
        print(*set(workers.map(who, range(2))), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_workers_of_an_evaluation_end_when_it_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py")]
    path = os.pathsep.join(sys.path)
    said, warned = tmp_path / "said.txt", tmp_path / "warned.txt"  # a pipe would stay open as long as a worker lives
    with said.open("w") as out, warned.open("w") as err:  # apart: multiprocessing's own warnings may come between
        ended = subprocess.run(command, stdout=out, stderr=err, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert ended.returncode == -signal.SIGKILL, warned.read_text()
    workers = [int(word) for word in said.read_text().split()]
    assert workers
    end = time.monotonic() + 10
    while any(map(is_alive, workers)):
        assert time.monotonic() < end, "workers are left"
        time.sleep(0.1)

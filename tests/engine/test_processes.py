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
    with (tmp_path / "said.txt").open("w") as said:  # a pipe would stay open as long as a worker lives
        ended = subprocess.run(command, stdout=said, stderr=said, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    said = (tmp_path / "said.txt").read_text()
    assert ended.returncode == -signal.SIGKILL, said
    workers = [int(word) for word in said.split()]
    end = time.monotonic() + 10
    while any(map(is_alive, workers)):
        assert time.monotonic() < end, "workers are left"
        time.sleep(0.1)

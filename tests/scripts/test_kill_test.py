"""The kill test with seven kills, and the exit code that a scheduler sees."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.training.signals import REQUEUE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_run_that_is_killed_seven_times_ends_as_an_uninterrupted_one(tmp_path):
    command = [sys.executable, "-m", "tests.trials.kill_test", "--kills", "7", "--pause", "0.5"]
    command += ["--folder", tmp_path / "runs", "--record", tmp_path / "record"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (tmp_path / "record").glob("*.json")
    results = json.loads(record.read_text())["results"]
    assert results["different"] == [] and set(results["kills"].values()) == {1} and results["resumed"] >= 3


@pytest.mark.slow
def test_launcher_saves_and_asks_for_a_requeue_on_a_stop_signal(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "scripts.launch", "--standalone", "--nproc_per_node=1"]
    command += ["-m", "tests.trials.kill_test", "--worker", run]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not (run / "log.jsonl").exists():
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    launcher.send_signal(signal.SIGUSR1)
    said, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == REQUEUE
    assert "saved; the same command goes on from here" in said
    assert list((run / "checkpoints").glob("step-*/info.json"))

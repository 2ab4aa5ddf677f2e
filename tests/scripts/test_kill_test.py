"""The kill test with seven kills, and the exit code that a scheduler sees."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.training.signals import REQUEUE
from tests import forked
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_run_that_is_killed_seven_times_ends_as_an_uninterrupted_one(tmp_path):
    folders = ("--folder", tmp_path / "runs", "--record", tmp_path / "record")
    done = forked.run("-m", "tests.trials.kill_test", "--kills", 7, "--pause", 0.5, *folders)
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
    wait_until(lambda: (run / "log.jsonl").exists() or launcher.poll() is not None, 200)
    launcher.send_signal(signal.SIGUSR1)
    said, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == REQUEUE
    assert "saved; the same command goes on from here" in said
    assert list((run / "checkpoints").glob("step-*/info.json"))

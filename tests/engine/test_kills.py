"""Interruptions at random moments: a run that continues after each equals one that was never interrupted.

`KILLS=100 python -m pytest tests/engine/test_kills.py` is the long trial, with four processes on two nodes. There are
seven kinds; after each, the same group of processes starts again:

    group     SIGKILL to all processes
    node      SIGKILL to the processes of a node; the others have to exit by themselves
    rank      SIGKILL to one process; the others have to exit by themselves
    term      SIGTERM to all processes, as a scheduler sends it before it takes the machines away
    usr1      SIGUSR1 to one process; all have to save and exit
    disk      no file can be written any more (RLIMIT_FSIZE 0 in every process)
    slow      every file takes half a second to reach the disk; SIGKILL to all while a checkpoint is being written
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_trainer import records, train_arguments
from toy_task import read_lines

from engine.training import checkpoint
from engine.training.signals import REQUEUE
from tests import forked
from tests.waiting import wait_until

KINDS = ("group", "node", "rank", "term", "usr1", "disk", "slow")
KILLS = int(os.environ.get("KILLS", len(KINDS)))
RANKS = 2 if len(KINDS) >= KILLS else 4  # half of them on each node
STARTING = 0.15  # fraction of interruptions that may fall before the first step after a start
SECONDS = 600.0  # in which a group has to start or to exit, on a machine that others use too
GRACE = 10.0  # seconds for the others if one ends before the first step: torchrun ends them, here as there
ROOT = Path(__file__).resolve().parents[2]


def train_on_a_slow_disk(folder, words):
    os.fsync = lambda file, sync=os.fsync: (time.sleep(0.5), sync(file))
    forked.program(folder, words)


def start(run, output, steps=1_000_000, call=forked.program):
    """Start train.py in a group of processes that prints to `output`; a longer run begins as a shorter one."""
    words = train_arguments(
        run, steps=steps, schedule="constant", validate_every=30, checkpoint_every=10, best="min weight", device="cpu"
    )
    return forked.start_group([output] * RANKS, call, run.parent, ["train.py", *words])


def wait_for_a_step(log, processes):
    """Return as soon as the log is written to, or the first process has ended."""
    began = time.time()
    wait_until(lambda: (log.exists() and log.stat().st_mtime > began) or not processes[0].is_alive(), SECONDS)


def interrupt(kind, processes, chance):
    nodes = processes[: RANKS // 2], processes[RANKS // 2 :]
    chosen = {"node": chance.choice(nodes), "rank": [chance.choice(processes)], "usr1": [chance.choice(processes)]}
    for process in chosen.get(kind, processes):
        if kind == "disk":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
        else:
            os.kill(process.pid, {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}.get(kind, signal.SIGKILL))


@pytest.mark.slow
def test_a_run_that_is_interrupted_again_and_again_equals_an_unbroken_one(tmp_path):
    chance = random.Random(0)
    run = tmp_path / "killed"
    log = tmp_path / "killed" / "log.jsonl"
    kinds = [KINDS[number % len(KINDS)] for number in range(KILLS)]
    chance.shuffle(kinds)
    os.mkfifo(output := tmp_path / "output")  # what is printed must be kept even when no file can be written
    stays_open = os.open(output, os.O_RDWR)
    with (tmp_path / "said.txt").open("w") as file:
        sink = subprocess.Popen(["cat", output], stdout=file)
    for kind in kinds:
        early = kind != "slow" and chance.random() < STARTING
        processes = start(run, output, call=train_on_a_slow_disk if kind == "slow" else forked.program)
        if not early:
            wait_for_a_step(log, processes)
        time.sleep(chance.uniform(0, 0.5))
        if kind == "slow":
            wait_until(lambda: any((run / "checkpoints").glob(".step-*.writing")), SECONDS)
        interrupt(kind, processes, chance)
        for process in processes:
            process.join(GRACE if early else SECONDS)
            assert early or process.exitcode is not None, f"after {kind}, a process was still there"
            process.kill()
            process.join()
        codes = {process.exitcode for process in processes}
        assert early or codes <= {"term": {REQUEUE}, "usr1": {REQUEUE}, "disk": {2}}.get(kind, codes), (kind, codes)
    steps = 25 + max((line["step"] for line in read_lines(log)), default=0)
    for folder in (run, tmp_path / "unbroken"):
        processes = start(folder, output, steps)
        for process in processes:
            process.join(SECONDS)
        assert {process.exitcode for process in processes} == {0}
    os.close(stays_open)
    sink.wait()
    assert (tmp_path / "said.txt").read_text(errors="replace").count("resumed from") > KILLS // 2
    last = f"checkpoints/step-{steps:08d}"
    one, two = (checkpoint.read(folder / last, ("model.", "ema.", "optim."))[0] for folder in (run, folder))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert records(run) == records(folder)


@pytest.mark.slow
def test_launcher_saves_and_asks_for_a_requeue_on_a_stop_signal(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "scripts.launch", "--standalone", "--nproc_per_node=1", "train.py"]
    command += train_arguments(run, steps=1_000_000)
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: (run / "log.jsonl").exists() or launcher.poll() is not None, 200)
    launcher.send_signal(signal.SIGUSR1)
    said, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == REQUEUE
    assert "saved; the same command continues from here" in said
    assert list((run / "checkpoints").glob("step-*/info.json"))

"""Kills a short training repeatedly at random moments, and compares the result with that of an uninterrupted run.

    python -m tests.trials.kill_test --kills 100 --nodes 2 --ranks 4

The run uses `engine.training.trainer` in `--ranks` processes over gloo, with a checkpoint every few steps, validation,
and the best checkpoint kept. There are seven kinds of kill; after each, the same group of processes is started again:

    group     SIGKILL to all processes
    node      SIGKILL to all processes of one of the `--nodes`; the others have to exit by themselves
    rank      SIGKILL to one process; the others have to exit by themselves
    term      SIGTERM to all processes, as a scheduler sends it before it takes the machines away
    usr1      SIGUSR1 to one process; all have to save and exit
    disk      no file can be written any more (RLIMIT_FSIZE 0 in every process)
    slow      every file takes half a second to reach the disk; SIGKILL to all while a checkpoint is being written

Processes are forked from this one, so that a start costs no imports; all are on this machine, and a node is a group of
them. Exit code 1: the results differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimisers import it at their first step: here it is once for all processes

from engine.errors import UserError, run_cli
from engine.record import write_record
from engine.training import checkpoint, distributed
from engine.training.settings import TrainerConfig
from engine.training.signals import REQUEUE
from engine.training.trainer import Trainer
from tests.engine.toy_task import ToyGAN, ToySet

KINDS = ("group", "node", "rank", "term", "usr1", "disk", "slow")
FAR = 1_000_000  # steps of a run that is killed
STARTING = 0.15  # share of kills that may fall before the first step after a start
TIMEOUT = 600.0  # seconds in which a group has to start or to exit, on a machine that others use too
GRACE = 10.0  # seconds after the end of one process before the first step
SLOW = 0.5  # seconds that a file takes to reach a slow disk


def settings(steps: int) -> dict[str, Any]:
    """Constant learning rate: a longer run begins as a shorter one."""
    return asdict(TrainerConfig()) | {
        "steps": steps, "batch_size": 4, "lr": 1e-3, "warmup": 10, "schedule": "constant", "log_every": 1,
        "validate_every": 30, "checkpoint_every": 10, "best": "min weight", "device": "cpu",
    }  # fmt: skip


def train(run: str, steps: int) -> int:
    """Do the work of one process of the group and return its exit code."""
    torch.set_num_threads(1)
    distributed.init("cpu")
    torch.manual_seed(0)
    finished = Trainer(ToyGAN(), ToySet(), settings(steps), run).fit() is not None
    distributed.shutdown()
    return 0 if finished else REQUEUE


class Group:
    """Processes of one run, forked from here as torchrun would start them; their output goes to a file descriptor."""

    def __init__(self, run: Path, steps: int, ranks: int, output: int, slow_disk: bool = False):
        sys.stdout.flush(), sys.stderr.flush()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        self.processes: list[int] = []
        for rank in range(ranks):
            process = os.fork()
            if process == 0:
                os.dup2(output, 1), os.dup2(output, 2)
                sys.stdout, sys.stderr = (os.fdopen(file, "w", closefd=False) for file in (1, 2))
                os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                if slow_disk:
                    os.fsync = lambda file, sync=os.fsync: (time.sleep(SLOW), sync(file))
                code = 1
                try:
                    run_cli(lambda: train(str(run), steps))
                except SystemExit as leaving:
                    code = leaving.code
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush(), sys.stderr.flush()
                    os._exit(code)
            self.processes.append(process)

    def signal(self, number: int, processes: list[int] | None = None) -> None:
        for process in self.processes if processes is None else processes:
            os.kill(process, number)  # not waited for yet, so its id is still its own

    def wait(self, seconds: float, grace: float | None = None) -> list[int]:
        """Wait until all have exited; return their exit codes (negative: a signal).

        Args:
            grace: seconds after the end of one in which the others must end, or they get SIGKILL, as from torchrun.

        Raises:
            UserError: a process does not exit in time.
        """
        end, codes, stopping = time.monotonic() + seconds, dict.fromkeys(self.processes), False
        while left := [process for process, code in codes.items() if code is None]:
            for process in left:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    if grace is not None and not stopping:
                        end, stopping = time.monotonic() + grace, True
                elif time.monotonic() > end and stopping:
                    os.kill(process, signal.SIGKILL)
                elif time.monotonic() > end:
                    raise UserError(f"process {process} was still there after {seconds:.0f} s; see the output")
            time.sleep(0.02)
        return list(codes.values())


def last_step(run: Path) -> int:
    """Last step in the log; a record that was cut short does not count."""
    try:
        return max(int(step) for step in re.findall(r'^\{"step": (\d+),.*\}$', (run / "log.jsonl").read_text(), re.M))
    except (OSError, ValueError):
        return 0


def wait_for(what: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while not what():
        if time.monotonic() - begin > TIMEOUT:
            raise UserError("the group does not train; see the output")
        time.sleep(0.02)


def kill(kind: str, group: Group, nodes: int, chance: random.Random) -> None:
    one, each = [chance.choice(group.processes)], len(group.processes) // nodes
    first = each * chance.randrange(nodes)
    if kind == "disk":
        for process in group.processes:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (0, 0))
    elif kind in ("term", "usr1"):
        group.signal(signal.SIGTERM if kind == "term" else signal.SIGUSR1, one if kind == "usr1" else None)
    else:
        some = {"rank": one, "node": group.processes[first : first + each]}
        group.signal(signal.SIGKILL, some.get(kind))


def train_with_kills(
    run: Path, kills: int, nodes: int, ranks: int, pause: float, seed: int, output: int, until: float
) -> list[dict[str, Any]]:
    """Train, killed `kills` times or until so late; return the events."""
    chance, events, log = random.Random(seed), [], run / "log.jsonl"
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    chance.shuffle(kinds)
    for number, kind in enumerate(kinds, 1):
        begin = time.monotonic()
        if begin > until:
            break
        started, slow = time.time(), kind == "slow"
        group = Group(run, FAR, ranks, output, slow)
        early = chance.random() <= STARTING and not slow
        if not early:  # until it has done a step
            wait_for(lambda started=started: log.exists() and log.stat().st_mtime > started)
        time.sleep(chance.uniform(0, pause))
        if slow:
            wait_for(lambda: any((run / "checkpoints").glob(".step-*.writing")))
        kill(kind, group, nodes, chance)
        # Before the first step the others may wait for the one that is gone: torchrun ends them, here as there.
        codes = group.wait(TIMEOUT, GRACE if early else None)
        reached, saved = last_step(run), checkpoint.newest(run / "checkpoints", lambda line: print(line, flush=True))
        kept = int(saved.name.split("-")[1]) if saved else 0
        event = {"kind": kind, "early": early, "codes": codes, "reached": reached, "kept": kept}
        events.append(event | {"lost": max(0, reached - kept)})
        print(f"{number}/{kills} {events[-1]} {time.monotonic() - begin:.1f} s", flush=True)
    return events


def differences(one: Path, two: Path, steps: int) -> list[str]:
    """Name what differs between two runs after `steps` steps: tensors of the last checkpoint, lines of the log."""
    folders = [run / "checkpoints" / f"step-{steps:08d}" for run in (one, two)]
    a, b = (checkpoint.read(folder, ("model.", "ema.", "optim."))[0] for folder in folders)
    shared = a.keys() & b.keys()
    names = [name for name in a.keys() | b.keys() if name not in shared or not torch.equal(a[name], b[name])]
    left, right = logged(one), logged(two)
    places = sorted(place for place in left.keys() | right.keys() if left.get(place) != right.get(place))
    return names + [f"log of step {step}" for step, _ in places]


def logged(run: Path) -> dict[tuple[int, bool], dict[str, float]]:
    """(step, whether of a validation) -> line of the log, without what was timed."""
    timed, lines = ("samples_per_s", "tokens_per_s", "data_wait", "step_s", "memory_gib"), {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        lines[line["step"], "lr" not in line] = {k: v for k, v in line.items() if k not in timed}
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the group")
    parser.add_argument("--nodes", type=int, default=2, help="equal parts of the group, one of which `node` kills")
    parser.add_argument("--minutes", type=float, default=600.0, help="no kills after so long (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=1.5, help="most seconds from the first step to the kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the order of the kinds")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--record", type=Path, help="folder for a dated record, such as benchmarks/results")
    parser.add_argument("--worker", type=Path, help="run as one process of a torchrun group that trains in this folder")
    args = parser.parse_args()
    if args.worker:
        return train(str(args.worker), FAR)
    if not 1 <= args.nodes <= args.ranks or args.ranks % args.nodes:
        raise UserError(f"--nodes={args.nodes} does not divide the {args.ranks} processes of --ranks")
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        one, two = root / "killed", root / "uninterrupted"
        if one.exists() or two.exists():
            raise UserError(f"--folder={root} holds runs already; give another")
        begin = time.monotonic()
        with (root / "output.txt").open("wb") as output:
            # Through a pipe: the training's output must be kept even when it can write no file.
            sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output, start_new_session=True)
            until = begin + 60 * args.minutes
            events = train_with_kills(
                one, args.kills, args.nodes, args.ranks, args.pause, args.seed, sink.stdin.fileno(), until
            )
            steps = last_step(one) + 25
            for run in (one, two):
                if any(codes := Group(run, steps, args.ranks, sink.stdin.fileno()).wait(1800)):
                    raise UserError(f"{run} ended with exit codes {codes}; see the output")
            sink.stdin.close()
            sink.wait()
        said = (root / "output.txt").read_text(errors="replace")
        full_disk = r"^error: training stopped after step \d+: .*File too large"
        results = {
            "kills": {kind: sum(e["kind"] == kind for e in events) for kind in KINDS},
            "resumed": said.count("resumed from"),
            "steps": steps,
            "different": differences(one, two, steps),
            "most_steps_lost": {k: max((e["lost"] for e in events if e["kind"] == k), default=0) for k in KINDS},
            "full_disk_lines": len(re.findall(full_disk, said, re.M)),
            "saved_on_signal": len(re.findall(r"^stopped at step", said, re.M)),
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "events": events,
        }
        print(*(f"{name}: {value}" for name, value in results.items() if name != "events"), sep="\n")
        if args.record:
            what = f"{len(events)} kills of {args.ranks} processes on {args.nodes} nodes, against an uninterrupted run"
            write_record(args.record, "training-kills", what, results)
    return 1 if results["different"] else 0


if __name__ == "__main__":
    run_cli(main)

"""Kills a short training again and again at random moments and compares the end with that of an unbroken run.

The run is a real one: `engine.trainer` in a torchrun agent with restarts, `--ranks` processes over gloo, each with a
data loading process, checkpoints every few steps, validation, the best one kept. The five ways to die:

    group     SIGKILL to the agent and all its processes
    rank      SIGKILL to one process; the agent has to bring the group back by itself
    term      SIGTERM to the agent
    usr1      SIGUSR1 to one process; all have to save and leave, and the agent starts them again
    disk      from now on no file can be written (RLIMIT_FSIZE 0 in every process)

Processes are forked from this one, so that a life costs no imports; everything else is as under torchrun. Exit code 1:
a difference, a step lost that had to be kept, or a group that did not come back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from engine import checkpoint, distributed
from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from engine.signals import REQUEUE
from engine.task import Task
from engine.trainer import Trainer
from scripts.record import write_record

KINDS = ("group", "rank", "term", "usr1", "disk")
STARTING = 0.15  # share of kills that may fall before the first step after a start
PATIENCE = 120.0  # seconds until a group that does not come back is a failure


class Vectors:
    """101 vectors of 16 numbers with noise, an odd number so that batches straddle epochs."""

    def __len__(self) -> int:
        return 101

    def __getitem__(self, index: int, generator: torch.Generator) -> Tensor:
        return torch.sin(torch.arange(16.0) * (index + 1)) + 0.1 * torch.randn(16, generator=generator)

    def collate(self, items: list[Tensor]) -> dict[str, Tensor]:
        return {"x": torch.stack(items)}


class Autoencoder(Task):
    """With dropout, so that random numbers count, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def parts(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        self.seen += len(batch["x"])
        return {"loss": (self.net(batch["x"]) - batch["x"]).square().mean()}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        (folder / "note.txt").write_text(f"step {step}\n")
        return {"weight": float(self.net[0].weight.square().sum())}


def settings(steps: int) -> dict[str, Any]:
    """Constant learning rate: a longer run begins as a shorter one."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "trainer/cpu.yaml")) | {
        "steps": steps, "batch_size": 4, "lr": 1e-3, "warmup": 10, "schedule": "constant", "workers": 1, "log_every": 1,
        "validate_every": 30, "checkpoint_every": 10, "best": "min weight",
    }  # fmt: skip


def train(run: str, steps: int) -> int:
    """One process of the group."""
    torch.set_num_threads(1)
    distributed.start("cpu")
    try:
        torch.manual_seed(0)
        return REQUEUE if Trainer(Autoencoder(), Vectors(), settings(steps), run).fit() is None else 0
    finally:
        distributed.stop()


def worker(run: str, steps: int) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # as in a fresh interpreter, not as in the agent it is forked from
    run_cli(lambda: train(run, steps))


class Group:
    """An agent with its processes, in a process group of its own, forked from here."""

    def __init__(self, run: Path, steps: int, ranks: int, output: int):
        sys.stdout.flush(), sys.stderr.flush()
        self.agent = os.fork()
        if self.agent == 0:
            os.setsid()
            os.dup2(output, 1), os.dup2(output, 2)
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                run_id=str(os.getpid()),
                max_restarts=1000,
                monitor_interval=0.1,
                start_method="fork",
            )
            code = 1
            try:
                elastic_launch(config, worker)(str(run), steps)
                code = 0
            finally:
                os._exit(code)

    def processes(self) -> list[int]:
        """Ids of the training processes, as far as they are there."""
        try:
            text = Path(f"/proc/{self.agent}/task/{self.agent}/children").read_text()
        except OSError:
            return []
        return [int(word) for word in text.split() if b"resource_tracker" not in _command(int(word))]

    def alive(self) -> bool:
        if self.agent and os.waitpid(self.agent, os.WNOHANG)[0]:
            self.agent = 0
        return self.agent != 0

    def wait(self, seconds: float) -> None:
        """Until the agent has left."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                self.kill()
                raise UserError(f"the agent was still there after {seconds:.0f} s")
            time.sleep(0.05)

    def kill(self) -> None:
        os.killpg(self.agent, signal.SIGKILL)
        os.waitpid(self.agent, 0)
        self.agent = 0


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def last_step(run: Path) -> int:
    """Last step in the log; a record that was cut short does not count."""
    try:
        return max(int(step) for step in re.findall(r'^\{"step": (\d+),.*\}$', (run / "log.jsonl").read_text(), re.M))
    except (OSError, ValueError):
        return 0


def wait_for_life(group: Group, run: Path, starting: bool) -> None:
    """Until all processes are there and, unless they may still be `starting`, they train."""
    begin, log = time.time(), run / "log.jsonl"
    while not group.processes() or not (starting or (log.exists() and log.stat().st_mtime > begin)):
        if time.time() - begin > PATIENCE or not group.alive():
            raise UserError("the group did not come back; see the output")
        time.sleep(0.02)


def strike(kind: str, group: Group, chance: random.Random) -> None:
    """Do it; afterwards the agent has left (group, term) or has a new group to start (the others)."""
    processes = group.processes()
    if kind == "group":
        group.kill()
    elif kind == "term":
        os.kill(group.agent, signal.SIGTERM)
        group.wait(PATIENCE)
    elif processes:
        for process in processes if kind == "disk" else [chance.choice(processes)]:
            try:
                if kind == "disk":
                    resource.prlimit(process, resource.RLIMIT_FSIZE, (0, 0))
                else:
                    os.kill(process, signal.SIGKILL if kind == "rank" else signal.SIGUSR1)
            except ProcessLookupError:  # it has just left
                continue


def broken(
    run: Path, kills: int, ranks: int, pause: float, seed: int, sink: subprocess.Popen
) -> tuple[int, list[dict]]:
    """Kill `kills` times; gives the steps to train altogether and what happened."""
    chance, events, group, far = random.Random(seed), [], None, 1_000_000
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    chance.shuffle(kinds)
    for number, kind in enumerate(kinds, 1):
        if group is None or not group.alive():
            group = Group(run, far, ranks, sink.stdin.fileno())
        wait_for_life(group, run, starting=chance.random() < STARTING)
        time.sleep(chance.uniform(0, pause))
        before = {"processes": len(group.processes()), "step": last_step(run)}
        begin, strike_processes = time.monotonic(), set(group.processes())
        strike(kind, group, chance)
        if kind in ("rank", "usr1", "disk") and strike_processes:  # they must all go, and others must come
            while strike_processes & set(group.processes()) or not group.processes():
                if time.monotonic() - begin > PATIENCE or not group.alive():
                    raise UserError(f"kill {number} ({kind}): the group did not come back; see the output")
                time.sleep(0.05)
        reached = last_step(run)
        saved = checkpoint.newest(run / "checkpoints", lambda line: print(line, flush=True))
        kept = int(saved.name.split("-")[1]) if saved else 0
        events.append({"kind": kind, **before, "reached": reached, "kept": kept, "lost": max(0, reached - kept)})
        print(f"{number}/{kills} {events[-1]} {time.monotonic() - begin:.1f} s", flush=True)
    if group.alive():
        group.kill()
    return last_step(run) + 25, events


def whole(run: Path, steps: int, ranks: int, sink: subprocess.Popen) -> None:
    group = Group(run, steps, ranks, sink.stdin.fileno())
    group.wait(3600)
    if last_step(run) != steps:
        raise UserError(f"{run} ended at step {last_step(run)}, not {steps}; see the output")


def differences(one: Path, two: Path, steps: int) -> list[str]:
    """Names of what differs between two runs after `steps` steps: tensors of the last checkpoint, lines of the log."""
    folders = [run / "checkpoints" / f"step-{steps:08d}" for run in (one, two)]
    a, b = (checkpoint.read(folder, ("model.", "ema.", "optim."))[0] for folder in folders)
    found = [
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]
    timed = ("samples_per_s", "tokens_per_s", "data_wait", "step_s", "memory_gib")
    logs = []
    for run in (one, two):
        lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        logs.append([{k: v for k, v in line.items() if k not in timed} for line in lines])
    for left, right in zip(*logs):
        if left != right:
            found.append(f"log of step {left['step']}")
    return found + (["length of the log"] if len(logs[0]) != len(logs[1]) else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the group")
    parser.add_argument(
        "--pause", type=float, default=1.5, help="at most so many seconds from the first step after a start to the kill"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the order of kinds")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary one if not given")
    parser.add_argument("--record", type=Path, help="folder for a dated record, as benchmarks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        one, two = root / "broken", root / "whole"
        if one.exists() or two.exists():
            raise UserError(f"--folder={root} holds runs already; give another")
        begin = time.monotonic()
        with (root / "output.txt").open("wb") as output:
            # Through a pipe: where no file can be written the training's words must still come out.
            sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output, start_new_session=True)
            steps, events = broken(one, args.kills, args.ranks, args.pause, args.seed, sink)
            whole(one, steps, args.ranks, sink)
            whole(two, steps, args.ranks, sink)
            sink.stdin.close()
            sink.wait()
        found, said = differences(one, two, steps), (root / "output.txt").read_text(errors="replace")
        results = {
            "kills": {kind: sum(e["kind"] == kind for e in events) for kind in KINDS},
            "resumed": said.count("resumed from"),
            "steps": steps,
            "different": found,
            "most_steps_lost": {k: max((e["lost"] for e in events if e["kind"] == k), default=0) for k in KINDS},
            "full_disk_lines": len(
                re.findall(r"^error: training stopped after step \d+: .*File too large", said, re.M)
            ),
            "saved_on_signal": len(re.findall(r"^stopped at step", said, re.M)),
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "events": events,
        }
        print(json.dumps({k: v for k, v in results.items() if k != "events"}, indent=1))
        if args.record:
            write_record(
                args.record,
                "kill-test",
                f"{args.kills} kills at random moments of a run of {args.ranks} processes, against an unbroken run",
                {"machine": platform.machine(), "processes": args.ranks, "cores": os.cpu_count()},
                results,
                command=["python", "-m", "scripts.kill_test", *sys.argv[1:]],
            )
    return 1 if found else 0


if __name__ == "__main__":
    run_cli(main)

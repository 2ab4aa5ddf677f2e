"""Prepare shards, or speak clips, on a Ray cluster whose processes and nodes are killed; compare with plain processes.

    python -m tests.trials.ray_kill_test preparation --root data/synthetic --split unseen --clips 40 --kills 10
    python -m tests.trials.ray_kill_test inference --root data/synthetic --split unseen --clips 40 --kills 10

The cluster runs on this machine: a head and three nodes of one processor each. At even distances over the clips a
random process at work gets SIGKILL (one that decodes, or an actor with networks), and once a whole node goes away.
Preparation: decoding, face tracking, and a stand-in of a network (`tests.corpora.preparation_fakes.Mean`). Inference:
the bundled HiCoDiT in two actors, a clip a batch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from corpora.preparation.job import prepare
from engine.config import load
from engine.errors import UserError, run_cli
from engine.record import write_record
from hicodit import inference
from hicodit.settings import read_settings

PER_SHARD = 8
NODES = 3


def prepare_clips(args: argparse.Namespace, output: Path, *more: str) -> None:
    """Decoding, face tracking and the stand-in: other steps take long to load, and a killed process loads anew."""
    words = [f"source.root={args.root}", f"splits=[{args.split}]", f"output={output}", f"limit={args.clips}"]
    words += ["device=cpu", f"clips_per_shard={PER_SHARD}", *more]
    words += ["ray.batch=2"] if "executor=ray" in more else ["workers=2"]
    config = load("prepare", words, "")
    stages = {name: config.stages[name] for name in ("decode", "face")}
    config.stages = stages | {"mean": {"use": True, "_target_": "tests.corpora.preparation_fakes.Mean"}}
    prepare(config)


def speak_clips(args: argparse.Namespace, output: Path, *more: str) -> None:
    """Speak the first clips of the split with the bundled HiCoDiT."""
    clips = output.parent / "clips"
    clips.mkdir(exist_ok=True)
    for path in sorted((args.root / args.split).glob("*.mp4"))[: args.clips]:
        if not (clips / path.name).exists():
            (clips / path.name).symlink_to(path.resolve())
    words = [f"input={clips}", f"output={output}", "batch_size=1", "device=cpu", "figure=false", *more]
    words += ["ray.encoders=2"] if "executor=ray" in more else ["devices=2"]
    if inference.run(*read_settings(load("infer", words, ""))):
        raise UserError("a clip failed")


def clips_done(output: Path) -> int:
    """Return about how many clips are in work folders and finished shards, or spoken."""
    done = len(list(output.rglob(".work-0*/*.tar"))) + PER_SHARD * len(list(output.rglob("0*.tar")))
    return done + len(list(output.glob("*.wav")))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def processes_at_work(parent: int) -> list[tuple[int, str]]:
    """(id, title) of the Ray processes below this one that run a task or an actor."""
    children: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            own = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        children.setdefault(own, []).append((int(path.name), title))
    found, waiting = [], [parent]
    while waiting:
        for pid, title in children.get(waiting.pop(), []):
            if not title.startswith("ray::"):
                waiting.append(pid)  # below a worker are programs that it starts, under its title at first
            elif "IDLE" not in title and "Agent" not in title:
                found.append((pid, title))
    return found


def killer(cluster, nodes: list, output: Path, clips: int, kills: int, until: float, log: list[dict]) -> None:
    """Kill at even distances over the clips, until `kills` are done or the time is up."""
    draw, node_at = random.Random(0), kills // 2
    while len(log) < kills and time.monotonic() < until:
        time.sleep(0.2)
        if clips_done(output) < clips * (len(log) + 1) // (kills + 1):
            continue
        if len(log) == node_at:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            what = "a node"
        else:
            there = processes_at_work(os.getpid())
            if not there:
                continue
            pid, what = draw.choice(there)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        log.append({"killed": what, "clips_done": clips_done(output)})
        print(f"killed {what} with {log[-1]['clips_done']} clips done", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("preparation", "inference"))
    parser.add_argument("--root", type=Path, required=True, help="a synthetic corpus")
    parser.add_argument("--split", default="unseen")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=60.0, help="no kills after so long (default: %(default)s)")
    parser.add_argument("--record", type=Path, help="folder that gets a dated JSON of the result")
    args = parser.parse_args()
    import ray
    from ray.cluster_utils import Cluster

    work = Path(tempfile.mkdtemp())
    start = time.monotonic()
    small = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    nodes, log = [cluster.add_node(num_cpus=1, **small) for _ in range(NODES)], []
    act = prepare_clips if args.what == "preparation" else speak_clips
    until = start + 60 * args.minutes
    thread = threading.Thread(
        target=killer, args=(cluster, nodes, work / "killed", args.clips, args.kills, until, log), daemon=True
    )
    thread.start()
    with contextlib.redirect_stdout(io.StringIO()) as report:  # seconds by stage, clips a second; or a line for a clip
        act(args, work / "killed", "executor=ray", f"ray.address={cluster.address}")
    lines = report.getvalue().splitlines()  # those of Ray come before
    print(*lines, sep="\n")
    seconds = time.monotonic() - start
    ray.shutdown()
    cluster.shutdown()
    act(args, work / "whole")
    ours, theirs = files_of(work / "killed"), files_of(work / "whole")
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    result = {
        "clips": args.clips,
        "kills": log,
        "files": len(theirs),
        "bytes": sum(map(len, theirs.values())),
        "different_files": different,
        "seconds": round(seconds, 1),
        "report": lines[next((i for i, line in enumerate(lines) if line.startswith("stage ")), len(lines) - 1) :],
    }
    spoken = [line.partition(",")[0] for line in lines if " -> " in line]
    doubled = sorted({name for name in spoken if spoken.count(name) > 1})
    result |= {"doubled": doubled}
    print(result)
    if args.record is not None:
        what = f"{args.what} on a Ray cluster of {NODES} nodes, processes and a node killed, against one of processes"
        write_record(args.record, f"{args.what}-ray-kills", what, result)
    shutil.rmtree(work)
    return 0 if log and not different and not doubled else 1


if __name__ == "__main__":
    run_cli(main)

"""Two nodes on one machine: two torchrun agents joined by c10d rendezvous, one process of which is killed.

With the rights of root, each agent gets a network namespace of its own, joined by a veth pair. After the kill, both
agents have to restart the group, and the run must end with the same weights as a run on one node with two processes.

    python -m tests.trials.two_nodes --folder runs/two_nodes
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from engine.record import write_record
from tests.trials.kill_test import differences, last_step

ROOT = CONFIGS.parent
SPACES, ADDRESSES = ("speaking-a", "speaking-b"), ("10.77.0.1", "10.77.0.2")
TIMEOUT = 600.0  # seconds for one run


def connect() -> bool:
    """Make two namespaces with a veth pair between them; False: not allowed here."""
    commands = [
        *(f"ip netns add {space}" for space in SPACES),
        f"ip link add {SPACES[0]} netns {SPACES[0]} type veth peer name {SPACES[1]} netns {SPACES[1]}",
        *(f"ip -n {space} addr add {address}/24 dev {space}" for space, address in zip(SPACES, ADDRESSES)),
        *(f"ip -n {space} link set {device} up" for space in SPACES for device in (space, "lo")),
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        disconnect()
        return False
    return True


def disconnect() -> None:
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


def agent(run: Path, steps: int, nodes: int, node: int, apart: bool, output: Path) -> subprocess.Popen:
    """Start one torchrun; with one node it has two processes, else one."""
    address = ADDRESSES[0] if apart else "127.0.0.1"
    enter = ["ip", "netns", "exec", SPACES[node]] if apart else []
    command = [
        *enter, sys.executable, "-m", "scripts.launch", f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}",
        "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=two", f"--rdzv_endpoint={address}:29577",
        f"--local-addr={ADDRESSES[node] if apart else '127.0.0.1'}", f"--rdzv_conf=is_host={int(node == 0)}",
        "-m", "tests.trials.kill_test", "--worker", str(run), "--worker-steps", str(steps),
    ]  # fmt: skip
    path = os.pathsep.join(map(str, (ROOT, ROOT / "codecs")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if apart:
        environment["GLOO_SOCKET_IFNAME"] = SPACES[node]
    with output.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def trainers(of: subprocess.Popen) -> list[int]:
    """Ids of the training processes under an agent."""
    text = Path(f"/proc/{of.pid}/task/{of.pid}/children").read_text()
    return [int(word) for word in text.split() if b"--worker" in Path(f"/proc/{word}/cmdline").read_bytes()]


def wait(agents: list[subprocess.Popen], outputs: list[Path]) -> None:
    end = time.monotonic() + TIMEOUT
    try:
        for one, output in zip(agents, outputs):
            if one.wait(max(1.0, end - time.monotonic())) != 0:
                raise UserError(f"an agent ended with exit code {one.returncode}; see {output}")
    except subprocess.TimeoutExpired as error:
        raise UserError(f"a run took more than {TIMEOUT:.0f} s; see {outputs[0].parent}") from error
    finally:
        for one in agents:
            one.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--record", type=Path, help="folder for a dated record, as benchmarks")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    two, one = args.folder / "two", args.folder / "one"
    outputs = [args.folder / f"node{node}.txt" for node in range(2)]
    apart = connect()
    print("two namespaces" if apart else "no namespaces here: both nodes on the loopback device", flush=True)
    try:
        agents = [agent(two, args.steps, 2, node, apart, outputs[node]) for node in range(2)]
        end = time.monotonic() + TIMEOUT
        while last_step(two) < args.steps // 3:
            if time.monotonic() > end or any(each.poll() is not None for each in agents):
                raise UserError(f"the nodes do not train; see {args.folder}")
            time.sleep(0.05)
        (victim,) = trainers(agents[1])
        killed = last_step(two)
        os.kill(victim, signal.SIGKILL)
        print(f"killed the process of node 1 at step {killed}", flush=True)
        wait(agents, outputs)
    finally:
        if apart:
            disconnect()
    output = args.folder / "one.txt"
    wait([agent(one, args.steps, 1, 0, False, output)], [output])
    found = differences(one, two, args.steps)
    resumed = "".join(path.read_text() for path in outputs).count("resumed from")
    results = {"namespaces": apart, "steps": args.steps, "killed_at": killed, "resumed": resumed, "different": found}
    print(*(f"{name}: {value}" for name, value in results.items()), sep="\n")
    if args.record:
        what = "Two torchrun agents, c10d rendezvous, one process killed, against one node with two processes"
        write_record(args.record, "two-nodes", what, results)
    return 1 if found or not resumed else 0


if __name__ == "__main__":
    run_cli(main)

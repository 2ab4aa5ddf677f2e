"""Launching: setup.sh, scripts/cluster with a fake `srun` and `scontrol`, and what launch.py makes of torchrun."""

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing import PContext, SignalException

from engine.training.signals import REQUEUE
from scripts import launch
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
# One task per node, with as many cores as srun is told to bind: by Slurm's rules since 22.05, not what sbatch was told.
SRUN = """#!/bin/bash
env > "$RECORD/srun.env"
printf '%s\\n' "$@" > "$RECORD/srun.args"
if [ -n "$SLEEP" ]; then
    trap 'exit $CODE' USR1
    touch "$RECORD/running"
    while true; do sleep 0.05; done
fi
taskset -c "0-$((${SRUN_CPUS_PER_TASK:-1} - 1))" env -u OMP_NUM_THREADS nproc > "$RECORD/cores"
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
printf '%s\\n' "$*" >> "$RECORD/scontrol.log"
[ "$1" = show ] && printf 'node7\\nnode8\\n'
"""


@pytest.fixture
def cluster(tmp_path):
    """Return a function that starts a script in a job of two nodes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(ROOT), "RECORD": str(tmp_path), "SLEEP": "",
        "SLURM_CPUS_PER_TASK": str(min(2, os.cpu_count())), "CODE": "0",
    }  # fmt: skip

    def start(script="train", words=("experiment=hicodit_paper", "run=/shared/runs/a b"), **changes):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SRUN", "NCCL", "GLOO"))}
        command = ["bash", ROOT / f"scripts/cluster/{script}.sbatch", *words]
        return subprocess.Popen(command, env=plain | job | {"PATH": path} | changes)

    return start


def test_each_node_starts_torchrun_with_its_cores(cluster, tmp_path):
    assert cluster().wait(30) == 0
    arguments = (tmp_path / "srun.args").read_text().splitlines()
    assert arguments[-3:] == ["train.py", "experiment=hicodit_paper", "run=/shared/runs/a b"]
    assert {"--nnodes=2", "--nproc_per_node=8", "--rdzv_endpoint=node7:29500", "--rdzv_id=42-0"} <= set(arguments)
    assert int((tmp_path / "cores").read_text()) == min(2, os.cpu_count())
    assert "IFNAME" not in (tmp_path / "srun.env").read_text()


def test_a_failed_job_is_not_requeued_and_its_interface_is_set_for_both_libraries(cluster, tmp_path):
    assert cluster(CODE="1", INTERFACE="ib0").wait(30) == 1
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
    lines = (tmp_path / "srun.env").read_text().splitlines()
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0"} <= set(lines)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, True), (2, False)])
def test_a_job_that_receives_a_stop_signal_is_requeued(cluster, tmp_path, code, requeued):
    """75: a checkpoint was saved. 1: not saved in time, an earlier one counts. 2: an error that would come again."""
    job = cluster(SLEEP="1", CODE=str(code))
    wait_until((tmp_path / "running").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    assert ("requeue 42" in (tmp_path / "scontrol.log").read_text()) == requeued


def test_preparation_starts_ray_on_all_nodes(cluster, tmp_path):
    assert cluster("prepare_slurm", ["output=a b"], PYTHON="bin/python").wait(30) == 0
    cores = min(2, os.cpu_count())
    assert (tmp_path / "srun.args").read_text().splitlines() == [
        "bin/ray", "symmetric-run", "--address", "node7:6379", "--num-cpus", str(cores), "--", "bin/python",
        "scripts/prepare_data.py", "executor=ray", "ray.address=auto", f"ray.workers={2 * cores}", "output=a b",
    ]  # fmt: skip


def test_unknown_extra_is_refused_in_one_line_with_exit_code_2():
    done = subprocess.run(["bash", ROOT / "scripts" / "setup.sh", "dev,nosuch"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "nosuch" in done.stderr and done.stderr.count("\n") == 1


class Processes(PContext):
    """Processes that end with the given codes."""

    def __init__(self, codes):
        self._tail_logs = []
        self.filtered_stdout = None
        self.filtered_stderr = None
        self.subprocess_handlers = {i: SimpleNamespace(proc=SimpleNamespace(returncode=c)) for i, c in enumerate(codes)}

    def _close(self, death_sig, timeout=30):
        self.timeout = timeout

    def _start(self): ...
    def _poll(self): ...
    def pids(self): ...


@pytest.mark.parametrize(
    ("number", "codes", "answer"),
    [
        (signal.SIGUSR1, [REQUEUE, -9], REQUEUE),  # all saved before one could leave
        (signal.SIGTERM, [-9, -9], 1),  # nothing was saved in time
        (signal.SIGINT, [REQUEUE, REQUEUE], 130),
    ],
)
def test_a_stop_has_time_to_save_and_says_whether_it_did(monkeypatch, number, codes, answer):
    processes = Processes(codes)

    def run(_):
        try:
            raise SignalException("told to stop", sigval=number)
        except SignalException as stop:  # as the agent does
            processes.close(stop.sigval)
            raise

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr("sys.argv", ["launch", "train.py"])
    assert launch.main() == answer
    assert processes.timeout > 200  # seconds


@pytest.mark.parametrize("argument", ["--nproc_per_node=many", "--nnodes=0", "--rdzv_backend=post"])
def test_an_invalid_argument_is_one_line(monkeypatch, capsys, argument):
    monkeypatch.setattr("sys.argv", ["launch", argument, "train.py"])
    assert launch.main() == 2
    assert capsys.readouterr().err.startswith("error: ")

"""Shell scripts: setup.sh, and scripts/cluster with a fake `srun` and `scontrol`, as a SLURM cluster runs them."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

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
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


def test_the_network_interface_is_set_for_both_libraries(cluster, tmp_path):
    assert cluster(INTERFACE="ib0").wait(30) == 0
    lines = (tmp_path / "srun.env").read_text().splitlines()
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0"} <= set(lines)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, True), (2, False)])
def test_a_job_that_receives_a_stop_signal_is_requeued(cluster, tmp_path, code, requeued):
    """75: a checkpoint was saved. 1: not saved in time, an earlier one counts. 2: an error that would come again."""
    job = cluster(SLEEP="1", CODE=str(code))
    while not (tmp_path / "running").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    assert ("requeue 42" in (tmp_path / "scontrol.log").read_text()) == requeued


def test_a_failure_without_a_stop_signal_is_not_requeued(cluster, tmp_path):
    assert cluster(CODE="1").wait(30) == 1
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


def test_preparation_starts_ray_on_all_nodes(cluster, tmp_path):
    assert cluster("prepare_slurm", ["output=a b"], PYTHON="bin/python").wait(30) == 0
    cores = min(2, os.cpu_count())
    assert (tmp_path / "srun.args").read_text().splitlines() == [
        "bin/ray", "symmetric-run", "--address", "node7:6379", "--num-cpus", str(cores), "--", "bin/python",
        "scripts/prepare_data.py", "executor=ray", "ray.address=auto", f"ray.workers={2 * cores}", "output=a b",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["dev", "nosuch"], ["dev,nosuch"]])
def test_unknown_extra_is_refused_in_one_line_with_exit_code_2(words):
    done = subprocess.run(["bash", ROOT / "scripts" / "setup.sh", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no extra nosuch; choose from") and done.stderr.count("\n") == 1

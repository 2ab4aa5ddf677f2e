"""Losses of one recipe in one process, in two with DDP and in two with FSDP2, with the same global batch.

    python -m tests.trials.compare_parallel experiment=hicodit_synthetic data.corpus=CORPUS data.make=null \\
        task.validate_clips=1 task.sampler.steps=2

Arguments are those of train.py. Runs are in float32 and must differ by rounding only: the largest relative difference
of any loss at any step is recorded in benchmarks/results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.errors import UserError, run_cli
from engine.record import RESULTS, write_record

STEPS, BATCH, ACCUMULATE = 50, 1, 2  # the global batch: BATCH x ACCUMULATE
ROOT = Path(__file__).resolve().parents[2]
NOT_LOSSES = (
    "step",
    "lr",
    "skipped",
    "grad_norm",
    "samples_per_s",
    "tokens_per_s",
    "data_wait",
    "step_s",
    "memory_gib",
)
WAYS = {  # name -> (processes, trainer.parallel)
    "1 process": (1, "ddp"),
    "2 processes, ddp": (2, "ddp"),
    "2 processes, fsdp": (2, "fsdp"),
}


def train(run: Path, processes: int, kind: str, arguments: list[str]) -> list[dict[str, float]]:
    """Losses by name of every step of a run.

    Raises:
        UserError: training failed.
    """
    settings = {
        "parallel": kind, "steps": STEPS, "batch_size": BATCH, "accumulate": ACCUMULATE // processes,
        "precision": "fp32", "log_every": 1, "checkpoint_every": STEPS, "validate_every": STEPS,
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [f"run={run}", *arguments, *(f"trainer.{name}={value}" for name, value in settings.items())]
    done = subprocess.run([sys.executable, *launcher, str(ROOT / "train.py"), *words], stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"training with {processes} processes ({kind}) failed, exit code {done.returncode}")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in NOT_LOSSES} for line in lines if "lr" in line]


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    with TemporaryDirectory() as folder:
        losses = {name: train(Path(folder) / str(i), *way, arguments) for i, (name, way) in enumerate(WAYS.items())}
    first, *others = losses
    results = {}
    for name in others:
        pairs = [
            (abs(b[key] - a[key]) / max(abs(a[key]), 1e-12), step + 1, key)
            for step, (a, b) in enumerate(zip(losses[first], losses[name], strict=True))
            for key in a
        ]
        worst, total = max(pairs), max(pair for pair in pairs if pair[2] == "loss")
        results[name] = {
            "largest_relative_difference": worst[0], "at_step": worst[1], "of": worst[2],
            "largest_relative_difference_of_the_sum": total[0],
        }  # fmt: skip
        print(f"{name}: {worst[0]:.2e} at most ({worst[2]}, step {worst[1]}); {total[0]:.2e} of the sum", flush=True)
    results["sum by step, 1 process"] = [line["loss"] for line in losses[first]]
    what = f"losses of {STEPS} steps, float32, global batch {BATCH * ACCUMULATE}, against those of one process"
    print(write_record(RESULTS, "parallel-losses", what, results))


if __name__ == "__main__":
    run_cli(main)

"""Train HiCoDiT and its four ablations equally long, and measure each on the held-out splits.

    python -m benchmarks.ablations --steps 600 --clips 50

Runs `train.py experiment=hicodit_synthetic` five times with one switch changed (runs/ablation_NAME, continued if they
are there), then `evaluate.py hicodit` on each release, and writes DATE-ablations.json with one row a variant.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.record import write_record
from engine.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "full": [],
    "flat": ["task.model.hierarchical=false"],
    "single_scale": ["task.model.dual_scale=false"],
    "no_identity_loss_voice": ["task.identity_weight=0"],  # the adapter from face to voice stays untrained
    "no_identity_loss_face": ["task.identity_weight=0", "task.identity_input=face"],  # the score loss trains it
}


def call(*arguments: str) -> None:
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    if code != 0:
        raise UserError(f"{' '.join(arguments)} failed (exit {code})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=50, help="clips of each split (default: %(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--corpus", default="data/synthetic")
    parser.add_argument("--codec", default="assets/rvq_tiny")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="of train.py, for all, e.g. data.clips=2000")
    args = parser.parse_args()
    if args.steps < 1 or args.clips < 2:
        raise UserError("--steps must be at least 1 and --clips at least 2")
    rows = {}
    for name, overrides in VARIANTS.items():
        run, out = args.runs / f"ablation_{name}", args.runs / f"ablation_{name}" / "evaluation"
        settings = [
            f"trainer.steps={args.steps}",
            f"trainer.validate_every={10**9}",
            f"data.corpus={args.corpus}",
            "trainer.checkpoint_every=1000000",
            f"trainer.warmup={args.steps // 10}",
        ]
        settings += [f"task.codec={args.codec}", f"run={run}", "task.validate_clips=2", "trainer.ema_decay=0.99"]
        call("train.py", "experiment=hicodit_synthetic", *settings, *args.overrides, *overrides)
        call(
            "scripts/evaluate.py", "hicodit", "--corpus", args.corpus, "--weights", str(run / "release"),
            "--codec", args.codec, "--clips", str(args.clips), "--steps", str(args.sampling_steps), "--out", str(out),
        )  # fmt: skip
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses = [row for row in log if "dse_low" in row][-4:]
        measured = json.loads(max(out.glob("*-release.json")).read_text())["results"]
        rows[name] = {
            "dse_low": sum(r["dse_low"] for r in losses) / len(losses),
            "dse_high": sum(r["dse_high"] for r in losses) / len(losses),
            **{f"{key}_{split}": value for split, r in measured.items() for key, value in r.items()},
        }
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in rows[name].items()), flush=True)
    print(
        write_record(
            args.out,
            "ablations",
            "HiCoDiT ablations, equal training",
            rows,
            arguments={k: str(v) for k, v in vars(args).items()},
        )
    )


if __name__ == "__main__":
    run_cli(main)

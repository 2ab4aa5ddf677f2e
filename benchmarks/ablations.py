"""HiCoDiT and its ablations, trained for the same number of steps and measured on the held-out splits.

Runs `train.py experiment=hicodit_synthetic` for each variant with one switch changed (runs/ablation_NAME, resumed if
they exist), then `evaluate.py hicodit` on each release.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "full": [],
    "flat": ["task.model.hierarchical=false"],
    "single_scale": ["task.model.dual_scale=false"],
    "no_identity_loss_voice": ["task.identity_weight=0"],  # the adapter from face to voice stays untrained
    "no_identity_loss_face": ["task.identity_weight=0", "task.identity_input=face"],  # the score loss trains it
}
LEAST = {"steps": 1, "clips": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=600, help="training steps of each variant")
    parser.add_argument("--clips", type=int, default=50, help="number of clips of each split")
    parser.add_argument("--sampling-steps", type=int, default=16, help="sampling steps in the evaluation")
    parser.add_argument("--corpus", default="data/synthetic", help="folder of the corpus")
    parser.add_argument("--codec", default="assets/rvq_tiny", help="release folder of the tokenizer")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument(
        "overrides", nargs="*", metavar="SETTING", help="setting of train.py for all variants, e.g. data.clips=2000"
    )


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    for name, overrides in VARIANTS.items():
        folder = args.runs / f"ablation_{name}"
        call(
            "train.py", "experiment=hicodit_synthetic", f"run={folder}", f"trainer.steps={args.steps}",
            f"trainer.warmup={args.steps // 10}", "trainer.ema_decay=0.99", "trainer.checkpoint_every=1000000",
            f"trainer.validate_every={10**9}", "task.validate_clips=2", f"task.codec={args.codec}",
            f"data.corpus={args.corpus}", *args.overrides, *overrides,
        )  # fmt: skip
        out = folder / "evaluation"
        call(
            "scripts/evaluate.py", "hicodit", "--corpus", args.corpus, "--weights", str(folder / "release"),
            "--codec", args.codec, "--clips", str(args.clips), "--steps", str(args.sampling_steps), "--out", str(out),
        )  # fmt: skip
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [row for row in log if "dse_low" in row][-4:]
        result = {key: sum(row[key] for row in losses) / len(losses) for key in ("dse_low", "dse_high")}
        measured = json.loads(max(out.glob("*-release.json")).read_text())["results"]
        for split in ("seen", "unseen"):
            result |= {f"{key}_{split}": value for key, value in measured[split].items()}
        yield (
            {"variant": name, **result},
            f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()),
        )


def call(*arguments: str) -> None:
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    if code != 0:
        raise UserError(f"{' '.join(arguments)} failed (exit {code})")

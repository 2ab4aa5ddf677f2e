"""Make a release folder from a training run: `python scripts/export.py runs/NAME FOLDER`.

The folder gets the averaged weights of the run's newest whole checkpoint (model.safetensors, half precision),
config.yaml, and a card with data, recipe and the figures of the last validation. It works while the run goes on, on any
machine that has the run's folder, whichever number of processes wrote it; `from_pretrained` reads the result. A release
that is there is replaced in one move; a folder with anything else is left alone. For 8-bit weights:
scripts/compact_release.py.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from engine.errors import UserError, run_cli
from engine.training import checkpoint
from engine.training.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, with checkpoints/")
    parser.add_argument("folder", type=Path, help="release folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="checkpoint to take instead of the newest one")
    which.add_argument("--best", metavar="RULE", help="the best of the kept checkpoints, by 'min NAME' or 'max NAME'")
    args = parser.parse_args()
    if not args.run.is_dir():
        raise UserError(f"no run in {args.run}: give the folder that train.py wrote")
    step = args.step if args.best is None else best_step(args.run, args.best)
    found = export(args.run, args.folder, step)
    print(
        f"{args.folder}: {found.name} of {args.run}, {(args.folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    )


def best_step(run: Path, rule: str) -> int:
    """Step of the checkpoint with the best figure of the validation at that step.

    Raises:
        UserError: the rule is none, or no checkpoint has such a figure.
    """
    if not re.fullmatch(r"(min|max) \S+", rule):
        raise UserError(f"--best {rule} is not 'min NAME' or 'max NAME', as in 'min wer_seen'")
    step = checkpoint.best(run / "checkpoints", rule)
    if step is None:
        raise UserError(f"--best {rule}: no checkpoint of {run} was validated with such a figure; see its log.jsonl")
    return step


if __name__ == "__main__":
    run_cli(main)

"""Create a release folder: from a training run, from several releases, or a smaller copy of one.

    python scripts/export.py runs/NAME FOLDER [--step N | --best 'min wer_seen']
    python scripts/export.py --average A:0.7 B:0.3 FOLDER [--only decoder.]
    python scripts/export.py --compact RELEASE FOLDER [--exact encoder.]

From a run, the folder gets the averaged weights of the newest complete checkpoint in half precision, config.yaml, and
a model card with data, recipe and the figures of the last validation. This also works during training, on any machine
that has the run's folder, for any number of training processes.

--average averages the weights of several releases of one model. Fine-tuned weights averaged with those they started
from, or with each other, are often better on held-out data than each alone (Wortsman et al. 2022, arXiv 2203.05482 and
2109.01903). Settings, card, other files and tensors that are not averaged are taken from the first release.

--compact stores large matrices in 8 bits, half the size; the result loads like any other release. Measure its quality:
rounding changes a weight by up to 0.4 % of the largest weight in its row. The card is copied; add a note to it.

An existing release is replaced atomically; any other existing folder is an error.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import re
from pathlib import Path

from torch import Tensor

from engine.arguments import Parser
from engine.errors import UserError, run_cli
from engine.release import read_release, release_kind, to_float16
from engine.training import checkpoint
from engine.training.export import average, compact, export, rewrite_release


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="run folder; with --average RELEASE:WEIGHT ...; with --compact a release folder",
    )
    parser.add_argument("out", type=Path, metavar="FOLDER", help="release folder to write")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--average", action="store_true", help="average releases; WEIGHTs are normalised to sum 1")
    how.add_argument("--compact", action="store_true", help="store a release in 8 bits")
    how.add_argument("--step", type=int, help="export this checkpoint of the run (default: the newest)")
    how.add_argument("--best", metavar="RULE", help="export the best checkpoint by 'min NAME' or 'max NAME'")
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="name prefixes of the tensors to average")
    parser.add_argument(
        "--exact", nargs="+", metavar="PREFIX", help="name prefixes of tensors to keep in half precision"
    )
    args = parser.parse_args()
    if args.only and not args.average:
        raise UserError("--only requires --average")
    if args.exact and not args.compact:
        raise UserError("--exact requires --compact")
    if len(args.source) > 1 and not args.average:
        raise UserError(f"{' '.join(args.source)}: expected one run or release, or --average for several releases")
    if args.average:
        summary = average_releases(args.source, args.out, tuple(args.only or [""]))
    elif args.compact:
        summary = compact_release(Path(args.source[0]), args.out, tuple(args.exact or ()))
    else:
        summary = export_run(Path(args.source[0]), args.out, args.step, args.best)
    print(f"{args.out}: {summary}, {_megabytes(args.out):.1f} MB")


def export_run(run: Path, out: Path, step: int | None, best: str | None) -> str:
    """Write the release of a checkpoint of a run. Return a description of it."""
    if not run.is_dir():
        raise UserError(f"no run in {run}: expected a folder written by train.py")
    return f"{export(run, out, step if best is None else best_step(run, best)).name} of {run}"


def best_step(run: Path, rule: str) -> int:
    """Return the step of the checkpoint whose validation has the best value of a metric."""
    if not re.fullmatch(r"(min|max) \S+", rule):
        raise UserError(f"--best {rule} is not 'min NAME' or 'max NAME', as in 'min wer_seen'")
    step = checkpoint.best(run / "checkpoints", rule)
    if step is None:
        raise UserError(f"--best {rule}: no checkpoint of {run} was validated with this metric; see its log.jsonl")
    return step


def average_releases(sources: list[str], out: Path, prefixes: tuple[str, ...]) -> str:
    """Write the weighted average of releases, FOLDER:WEIGHT each. Return a description of it.

    Args:
        sources: the releases. Everything except the averaged tensors is copied from the first.
        out: folder to write.
        prefixes: prefixes of the tensors to average. Empty: all tensors.
    """
    folders, weights = zip(*map(split_weight, sources))
    kind = release_kind(folders[0])
    others = [read_release(folder, kind)[1] for folder in folders[1:]]
    rewrite_release(folders[0], out, lambda first: to_float16(average([first, *others], list(weights), prefixes)))
    return " + ".join(f"{weight:g} x {folder}" for folder, weight in zip(folders, weights))


def split_weight(text: str) -> tuple[Path, float]:
    """Split FOLDER:WEIGHT into folder and weight."""
    folder, _, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        value = -1.0
    if not folder or not 0 < value < float("inf"):
        raise UserError(f"{text}: expected FOLDER:WEIGHT with a weight above 0, such as runs/a/release:0.5")
    return Path(folder), value


def compact_release(release: Path, out: Path, exact: tuple[str, ...]) -> str:
    """Write a release with large matrices in 8 bits. Return a description of it.

    Args:
        release: folder to read.
        out: folder to write.
        exact: prefixes of the tensors that stay unchanged.
    """

    def smaller(state: dict[str, Tensor]) -> dict[str, Tensor]:
        unknown = [prefix for prefix in exact if not any(key.startswith(prefix) for key in state)]
        if unknown:
            raise UserError(
                f"--exact {unknown[0]}: no tensor name of {release} has this prefix; the first is {min(state)}"
            )
        return compact(state, exact)

    rewrite_release(release, out, smaller)
    return f"{release} ({_megabytes(release):.1f} MB) in 8 bits"


def _megabytes(release: Path) -> float:
    return (release / "model.safetensors").stat().st_size / 1e6


if __name__ == "__main__":
    run_cli(main)

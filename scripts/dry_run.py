"""Three steps of training as one rank of many, without GPUs and without data: memory, collectives, padding efficiency.

    python scripts/dry_run.py hicodit_paper trainer.parallel=fsdp --ranks 32
    python scripts/dry_run.py talker_paper trainer.parallel=hybrid --ranks 256 trainer.global_batch_size=256

The trainer and FSDP2 run in a fake process group, and tensors have shapes without data. It takes a minute or two on a
CPU. The other arguments are settings of the recipe, as for train.py.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from benchmarks.dry_run import dry_run, report
from engine.arguments import Parser, within
from engine.errors import run_cli


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recipe", help="name in configs/experiment")
    parser.add_argument("settings", nargs="*", help="key=value of the recipe")
    parser.add_argument("--ranks", type=within(2, 2**16), default=32, help="number of processes, one per GPU")
    args = parser.parse_intermixed_args()
    print(report(dry_run(args.recipe, args.settings, args.ranks)))


if __name__ == "__main__":
    run_cli(main)

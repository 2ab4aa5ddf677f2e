"""Evaluate the outputs of any system: `python scripts/evaluate.py table=NAME outputs=DIR references=DIR output=REPORT`.

The tables `synthetic_hicodit`, `synthetic_talker` and `synthetic_codec` first generate outputs for held-out clips of a
synthetic corpus.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from engine.evaluation.run import evaluate, print_summary
from engine.program import run_program, runs

HELP = """
Compute a table of metrics for the outputs of any system, from two folders or a manifest. The table has 95 % intervals
and a row for the ground truth; the tables of the paper follow. OUTPUT gets report.html (one file, no network needed),
results.json and a cache: the same command continues where it stopped. Unusable files, and metrics whose network was not
downloaded, are listed and skipped; the exit code is 1 if a file was skipped, 2 if there are no results.

A manifest has a clip per line, {"id": ..., "text": ..., "speaker": ...}; its files are ID.wav or ID.mp4 in outputs= and
references=, or those that output, reference and video name (paths from the manifest's folder). Several systems side by
side, with tests that say which figures show one to be better: outputs={one: DIR, other: DIR}. model=NAME generates the
outputs first, in float32 unless generate.precision says otherwise; systems= several of them.

table=synthetic_hicodit, synthetic_talker and synthetic_codec generate outputs for held-out clips of corpus=. The last
has all bundled codecs; model=rvq_codec, whisperx_vae or lia_x chooses one of them.

Examples:
python scripts/evaluate.py table=synthetic_hicodit clips=40
python scripts/evaluate.py table=synthetic_talker only=[t2av,tts] split=[seen,unseen] generate.weights=runs/own/release
python scripts/evaluate.py table=hicodit outputs=spoken references=recorded manifest=test.jsonl output=report
python scripts/evaluate.py table=hicodit outputs="{ours: a, theirs: b}" references=recorded output=report
python scripts/evaluate.py table=codec metrics=[pesq_wide,stoi] outputs=decoded references=recorded output=report
"""


@hydra.main(config_path=str(CONFIGS), config_name="evaluate", version_base="1.3")
@runs(output="output")
def evaluate_splits(config: DictConfig) -> int:
    """Evaluate each split of `config`. Return the exit code: 1 if an output could not be read."""
    splits = list(config.split) or [None]
    if config.corpus and splits == [None]:
        raise UserError(f"corpus={config.corpus} requires split=[NAME], such as [seen]")
    if config.corpus and not Path(config.corpus).is_dir():
        make = f"python scripts/make_synthetic_corpus.py --version 2 --out {config.corpus}"
        raise UserError(f"corpus={config.corpus} is not a folder: choose another one, or create it ({make})")
    output = Path(config.output)
    codes = []
    for split in splits:
        summary = evaluate(config, split, output / split if len(splits) > 1 else output)
        if len(splits) > 1:
            print(f"--- {split} ---")
        print_summary(summary)
        codes.append(1 if any(row["where"] == "file" for row in summary["left_out"]["files"]) else 0)
    return max(codes)


def main() -> int:
    return run_program(evaluate_splits, "evaluate", HELP, sys.argv[1:])


if __name__ == "__main__":
    run_cli(main)

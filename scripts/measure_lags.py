"""Measure by how much the audio of each clip of GRID is late against its video.

    python scripts/measure_lags.py data/shards/hicodit_grid /data/grid lags.csv

The first argument is the folder of the prepared clips, whose mouth crops are used, the second the folder of GRID. The
table has a row per clip, with its key in the column `clip` and seconds in the column `lag`, relative to the median.
Clips whose lag is unclear are not listed. `source.lags=lags.csv` of scripts/prepare_data.py moves the audio by them.
The method is described in corpora/preparation/lags.py. It needs 0.1 MB of memory per clip.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import csv
from pathlib import Path

import torch

from corpora.preparation.lags import LagMeter
from engine.arguments import Parser, existing_folder
from engine.errors import UserError, run_cli
from engine.files import atomic_output, writable
from engine.media.audio import read_audio
from engine.nn.mel import RATE
from engine.progress import progress_bar
from engine.shards.reader import ShardSplit

LEAST = 100  # clips, with which the model still predicts


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", type=existing_folder, help="folder of the prepared splits")
    parser.add_argument("corpus", type=existing_folder, help="folder of GRID")
    parser.add_argument("table", type=Path, help="CSV file to write")
    args = parser.parse_args()
    splits = [ShardSplit(index.parent) for index in sorted(args.shards.glob("*/index.json"))]
    for split in splits:
        split.require("mouth")
    count = sum(map(len, splits))
    if count < LEAST:
        raise UserError(
            f"{args.shards} has {count} clips: at least {LEAST} are required to measure lags (grid.sh: LAGS=null)"
        )
    with writable(args.table.parent, "table"):
        write_lags(args.table, args.corpus, splits, count)


def write_lags(table: Path, corpus: Path, splits: list[ShardSplit], count: int) -> None:
    """Measure the lags of the `count` clips of all splits, write the table, and print a summary."""
    meter = LagMeter()
    keys = []
    clips = ((split, number) for split in splits for number in range(len(split)))
    for split, number in progress_bar(clips, count, "clips"):
        info, tensors = split.read(number, ("mouth",))
        meter.add(tensors["mouth"], torch.from_numpy(read_audio(corpus / info["source"], RATE)))
        keys.append(info["key"])
    lags = meter.measure()
    known = 1000 * lags[~lags.isnan()]
    if not len(known):
        raise UserError(f"the lags of all {count} clips are unclear: do the clips show the speakers' mouths?")
    rows = [(key, f"{lag:.4f}") for key, lag in zip(keys, lags.tolist()) if lag == lag]
    with atomic_output(table) as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "lag"), *rows])
    frames = int((known.abs() >= 40).sum())
    print(
        f"{table}: {len(rows)} clips with a standard deviation of {known.std():.0f} ms, {frames} out of sync by a "
        f"frame (40 ms) or more; {count - len(rows)} are unclear and not listed"
    )


if __name__ == "__main__":
    run_cli(main)

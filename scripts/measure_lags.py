"""Measure by how much the audio of each clip of a corpus is late against its video.

    python scripts/measure_lags.py data/shards/grid /data/grid lags.csv
    python scripts/prepare_data.py source=grid source.root=/data/grid source.lags=lags.csv ...

The first argument is the folder of the prepared clips, whose mouth crops are used, the second the root of the source
with the recordings. The table has a row per clip, with its key in the column `clip` and seconds in the column `lag`,
relative to the median. Clips whose lag is unclear are not listed. The method is described in
corpora/preparation/lags.py.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import csv
from pathlib import Path

import torch

from corpora.preparation.lags import RATE, LagMeter
from engine.arguments import Parser, existing_folder
from engine.errors import UserError, run_cli
from engine.files import atomic_output
from engine.media.audio import read_audio
from engine.progress import track
from engine.shards.reader import ShardSplit

LEAST = 100  # clips, with which the model still predicts


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", type=existing_folder, help="folder of the prepared splits")
    parser.add_argument("corpus", type=existing_folder, help="root of the source, with the recordings")
    parser.add_argument("table", type=Path, help="CSV file to write")
    args = parser.parse_args()
    splits = [ShardSplit(index.parent) for index in sorted(args.shards.glob("*/index.json"))]
    count = sum(map(len, splits))
    if count < LEAST:
        raise UserError(f"{args.shards} has {count} clips: at least {LEAST} are required")
    meter = LagMeter()
    keys = []
    clips = ((split, number) for split in splits for number in range(len(split)))
    for split, number in track(clips, count, "clips"):
        info, tensors = split.read(number, ("mouth",))
        meter.add(tensors["mouth"], torch.from_numpy(read_audio(args.corpus / info["source"], RATE)))
        keys.append(info["key"])
    lags = meter.measure()
    rows = [(key, f"{lag:.4f}") for key, lag in zip(keys, lags.tolist()) if lag == lag]
    with atomic_output(args.table) as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "lag"), *rows])
    known = 1000 * lags[~lags.isnan()]
    frames = int((known.abs() >= 40).sum())
    print(
        f"{args.table}: {len(rows)} clips with a standard deviation of {known.std():.0f} ms, {frames} out of step by a "
        f"frame (40 ms) or more; {count - len(rows)} are unclear and not listed"
    )


if __name__ == "__main__":
    run_cli(main)

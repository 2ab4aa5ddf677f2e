"""Create a corpus of human and synthetic speech for training the speech codecs.

Sources: GRID (a folder with s1, s2, ...), the G.722 prompts of Debian's packages asterisk-core-sounds-*-g722,
recordings of a CSV file, and a synthetic corpus. Splits: train; val and test (other sentences of GRID's
training speakers); new (held-out speakers). Run the same command again to continue after an interruption.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from pathlib import Path

from corpora.preparation.speech_corpus import (
    grid_recordings,
    listed_recordings,
    prompt_recordings,
    synthetic_recordings,
    write_corpus,
)
from engine.arguments import Parser, existing_folder, names, within
from engine.errors import run_cli


def names_or_null(text: str) -> list[str] | None:
    """Return the names in a list; None for "null", as in the settings of prepare_data.py."""
    return None if text == "null" else names(text)


def main() -> None:
    parser = Parser(__doc__, "python scripts/make_speech_corpus.py")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the corpus; created if it does not exist")
    add("--grid", type=existing_folder, required=True, help="folder of the GRID corpus")
    add(
        "--speakers",
        type=names_or_null,
        default="s1,s3,s5",
        help="GRID's training speakers; null: all but the new ones",
    )
    add("--new-speakers", type=names, default="s31,s32,s33,s34", help="speakers of GRID in the split `new`; '': none")
    add("--repeat", type=within(1), default=3, help="how often an epoch visits each of GRID's recordings")
    add("--recordings", type=Path, help="CSV file of source=folder: path, speaker, and start and end of a part")
    add("--recordings-others", type=within(0), default=4, help="copies of each of these at other speeds: more voices")
    add("--seed", type=within(0), default=0, help="random seed of the speeds")
    add("--prompts", type=existing_folder, help="folder of the prompts, as in /usr/share/asterisk/sounds")
    add("--synthetic", type=existing_folder, help="folder of a synthetic corpus")
    add("--synthetic-clips", type=within(1), default=1200, help="number of clips of the synthetic corpus")
    args = parser.parse_args()
    found = grid_recordings(args.grid, args.speakers, args.new_speakers)
    splits = {name: [(row, args.repeat if name == "train" else 1) for row in rows] for name, rows in found.items()}
    if args.prompts:
        splits["train"] += [(row, 1) for row in prompt_recordings(args.prompts)]
    if args.recordings:
        splits["train"] += [(row, 1) for row in listed_recordings(args.recordings, args.recordings_others)]
    if args.synthetic:
        splits["train"] += [(row, 1) for row in synthetic_recordings(args.synthetic, args.synthetic_clips)]
    details = {name: str(value) for name, value in vars(args).items() if value is not None and name != "out"}
    write_corpus(args.out, splits, {"command": details}, args.seed)


if __name__ == "__main__":
    run_cli(main)

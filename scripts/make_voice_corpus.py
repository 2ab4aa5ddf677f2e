"""Create a speech corpus with texts and phoneme times for training Talker-T2AV, from human and synthetic speech.

Sources: GRID (--grid), the English prompts of Debian's package asterisk-core-sounds-en-g722 (--prompts), recordings
of a CSV file (--recordings), the voices of the program flite, which were built from recordings of people, and
a corpus of make_synthetic_corpus.py (--synthetic).
Splits: train; val and test (other sentences of the same speakers). Run the same command again to continue after an
interruption.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from dataclasses import replace
from pathlib import Path

from corpora.preparation.speech_corpus import listed_recordings
from corpora.preparation.voice_corpus import flite_sentences, grid_sentences, prompt_sentences, write_voices
from engine.arguments import Parser, existing_folder, names, within
from engine.errors import UserError, run_cli
from engine.files import writable

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


def main() -> None:
    parser = Parser(__doc__, "python scripts/make_voice_corpus.py")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the corpus; created if it does not exist")
    add("--grid", type=existing_folder, required=True, help="folder of the GRID corpus")
    add("--speakers", type=names, default="s1,s3,s5", help="speakers of GRID that train")
    add("--prompts", type=Path, default=SOUNDS, help="folder of the English prompts")
    add("--transcripts", type=Path, default=TRANSCRIPTS, help="text file with a line for each prompt")
    add("--recordings", type=Path, help="CSV file of source=folder: path, speaker, text, and start and end of a part")
    add("--recordings-others", type=within(0), default=4, help="copies of each of these at other speeds: more voices")
    add("--flite", type=within(0), default=0, help="sentences that each voice of the program flite speaks")
    add("--others", type=within(0), default=1, help="copies of other training recordings at other speeds: more voices")
    add("--pictures", type=within(1), help="instead, gather this many of GRID's recordings with their images")
    add("--synthetic", type=existing_folder, help="synthetic corpus: of version 3, with --pictures of version 2")
    add("--synthetic-clips", type=within(1), default=1500, help="its training clips that are used")
    add("--seed", type=within(0), default=0, help="random seed of the sentences and speeds")
    args = parser.parse_args()
    if args.pictures and (args.flite or args.recordings):
        raise UserError("--pictures selects recordings with video: omit --flite and --recordings")
    if not args.pictures:
        if not args.prompts.is_dir():
            raise UserError(f"--prompts {args.prompts} is not a folder: apt-get install asterisk-core-sounds-en-g722")
        if not args.transcripts.is_file():
            raise UserError(f"--transcripts {args.transcripts} does not exist: apt-get install asterisk-core-sounds-en")
    listed = listed_recordings(args.recordings, args.recordings_others, texts=True) if args.recordings else []
    people = grid_sentences(args.grid, args.speakers)
    facts = {"command": {name: str(value) for name, value in vars(args).items() if name != "out"}}
    with writable(args.out, "--out"):
        if args.pictures:
            step = max(1, len(people["train"]) // args.pictures)
            people["train"] = people["train"][::step][: args.pictures]
        else:
            people["train"] += prompt_sentences(args.prompts, args.transcripts)
            if args.flite:
                people["train"] += flite_sentences(args.out / "flite", args.flite, args.seed)
            people["train"] = [replace(recording, others=args.others) for recording in people["train"]] + listed
        counts = write_voices(
            args.out, people, args.synthetic, args.synthetic_clips, facts, bool(args.pictures), args.seed
        )
    print(", ".join(f"{split}: {count} clips" for split, count in counts.items()))


if __name__ == "__main__":
    run_cli(main)

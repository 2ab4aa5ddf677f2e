"""Create the synthetic talking-face corpus: GRID-style sentences spoken by espeak-ng voices and shown by cartoon faces.

Splits: train; seen (training voices, held-out sentences); unseen (held-out voices, held-out sentences). Each clip is
H.264 video (128 x 128, 25 fps, no audio), a 24 kHz mono WAV of exactly 960 samples per frame, and a JSON description. A
clip depends only on version, seed, split and its number. Run the same command again to finish an interrupted corpus, or
with larger numbers of clips to extend one.

Version 2 has 460 voices that can be predicted from the faces; a split dev, half of it with training voices, for
choosing settings; a change of expression at a word in half of the clips; and free sentences of about 2,600 words in
half of the clips. Version 3 has speech without video by the same voices: sentences of arbitrary words and, in the split
`plain`, the sentences of assets/demo/sentences.txt by held-out voices."""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from corpora.synthetic.corpus import RATE, ClipMaker, clip_id, is_done
from corpora.synthetic.sentences import SPLITS, grammar, language_model, plain_sentences
from corpora.synthetic.voices import load_voices
from engine.arguments import Parser, within
from engine.errors import UserError, run_cli
from engine.files import require_space, writable, write_json, write_text
from engine.processes import end_with_parent, without_interrupts
from engine.progress import progress_bar
from engine.untrusted import read_json

_maker = lru_cache(ClipMaker)  # one for a process


def _make(corpus: tuple[Path, int, int, int], split: str, index: int) -> None:
    _maker(*corpus).make(split, index)


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "python scripts/make_synthetic_corpus.py")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the corpus; created if it does not exist")
    add("--clips", type=within(1), default=4000, help="training clips")
    add("--test-clips", type=within(0), default=240, help="number of clips in each held-out split")
    add("--version", type=int, choices=SPLITS, default=2, help="version of the corpus")
    add("--seed", type=within(0), default=0, help="seed of the corpus")
    add("--more-voices", type=within(0), default=0, help="number of training voices in addition to the 400")
    add("--workers", type=within(1), default=2, help="number of processes; does not change the result")
    return parser.parse_args()


def prepare(root: Path, seed: int, version: int, more: int) -> None:
    """Create the folders. Raise UserError if `root` contains another corpus."""
    about = root / "corpus.json"
    if about.is_file():
        old = read_json(about)
        voices = old.get("voices", {}) if isinstance(old, dict) else None
        if not isinstance(voices, dict):
            raise UserError(f"{about} does not describe a synthetic corpus: choose another --out")
        there = old.get("seed"), old.get("version"), voices.get("more", 0)
        if there != (seed, version, more):
            words = "seed {}, version {}, {} more voices"
            raise UserError(
                f"--out {root} contains a corpus of {words.format(*there)}; this one would be "
                f"{words.format(seed, version, more)}: choose another folder"
            )
    with writable(root, "--out"):
        require_space(root, "--out")
        for split in SPLITS[version]:
            (root / split).mkdir(parents=True, exist_ok=True)


def generate(jobs: list[tuple[str, int]], corpus: tuple[Path, int, int, int], workers: int) -> None:
    """Create clips of a corpus in worker processes.

    Args:
        jobs: pairs (split, index), one per clip.
        corpus: folder, seed, version and number of additional voices.
        workers: maximum number of processes.

    Raises:
        UserError: If a worker was killed.
    """
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), end_with_parent)
    try:
        with without_interrupts():  # workers start here: at Ctrl-C this process ends them
            clips = [pool.submit(_make, corpus, *job) for job in jobs]
        for made in progress_bar(as_completed(clips), len(jobs), "clips"):
            made.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, probably because of insufficient memory: use fewer --workers; "
            "the command then continues with the remaining clips"
        ) from error
    finally:  # a killed worker would leave its ffmpeg process running: let each finish its clip and exit
        with without_interrupts():  # a second Ctrl-C must not stop the stopping
            pool.shutdown(wait=True, cancel_futures=True)
        remove_parts(corpus[0])


def remove_parts(root: Path) -> None:
    """Delete partial files of killed processes."""
    for part in root.glob("*/.*_*-*.*"):
        part.unlink(missing_ok=True)


def main() -> None:
    args = parse()
    root = args.out
    splits = SPLITS[args.version]
    counts = {split: args.clips if split == "train" else args.test_clips for split in splits}
    if "plain" in counts:
        counts["plain"] = min(args.test_clips, len(plain_sentences()))
    prepare(root, args.seed, args.version, args.more_voices)
    about = {
        "version": args.version,
        "seed": args.seed,
        "clips": counts,
        "rate": RATE,
        "voices": Counter(voice.group for voice in load_voices(args.more_voices)),
    }
    write_json(root / "corpus.json", about)
    write_text(root / "grammar.jsgf", grammar())
    write_text(root / "free.arpa", language_model())
    jobs = [(split, i) for split in splits for i in range(counts[split]) if not is_done(root, split, i, args.version)]
    total = sum(counts.values())
    print(f"{total} clips in {root}: {total - len(jobs)} there already, {len(jobs)} to make", flush=True)
    remove_parts(root)
    if jobs:
        generate(jobs, (root, args.seed, args.version, args.more_voices), args.workers)
    for split in splits:
        lines = ((root / split / clip_id(split, i)).with_suffix(".json").read_text() for i in range(counts[split]))
        write_text(root / f"{split}.jsonl", "".join(line + "\n" for line in lines))
    print(f"done: {root}", flush=True)


if __name__ == "__main__":
    run_cli(main)

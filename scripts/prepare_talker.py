"""Make the features that Talker-T2AV trains on: speech latents, motion codes, voices.

    python scripts/prepare_talker.py --corpus data/synthetic --workers 2

Reads a corpus in the layout of make_synthetic_corpus.py and writes OUT/talker/SPLIT/ID.safetensors and
OUT/talker/stats.json; an OUT that is not the corpus gets the manifests of the clips too. A killed run continues where
it stopped; features that other weights made are made again, and only those. A clip that cannot be used (damaged file,
sound and picture of different lengths) is listed, and the rest go on.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch

from engine.errors import UserError, run_cli
from engine.media.corpus import read_manifest
from engine.progress import track
from talker_t2av.features import FeatureEncoders, copy_manifests, make_features, stale_clips, write_stats

CLIPS = 24  # of a job: neighbours in length, so that many of them share a batch

_load = cache(FeatureEncoders.load)


def _make(
    job: tuple[str, list[str]], out: Path, corpus: Path, weights: tuple[Path, Path, Path]
) -> list[tuple[str, str]]:
    torch.set_num_threads(1)
    split, names = job
    return list(make_features(out, corpus, split, names, _load(*weights)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder of talker/ (default: the corpus)")
    parser.add_argument("--speech", type=Path, default=Path("assets/whisperx_vae_tiny"), help="default: %(default)s")
    parser.add_argument("--motion", type=Path, default=Path("assets/lia_x_tiny"), help="default: %(default)s")
    parser.add_argument("--speaker", type=Path, default=Path("assets/voice_tiny"), help="default: %(default)s")
    parser.add_argument("--splits", nargs="+", default=["train", "seen", "unseen"], help="default: all three")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: give 1 or more")
    out = args.out or args.corpus
    weights = (args.speech, args.motion, args.speaker)
    digests = _load(*weights).digests()
    jobs: list[tuple[str, list[str]]] = []
    for split in args.splits:
        names = stale_clips(out, args.corpus, split, digests)
        jobs += [(split, names[i : i + CLIPS]) for i in range(0, len(names), CLIPS)]
    total = sum(len(names) for _, names in jobs)
    done = []
    if jobs:
        work = partial(_make, out=out, corpus=args.corpus, weights=weights)
        with ExitStack() as stack:
            several = min(args.workers, len(jobs)) > 1
            each = stack.enter_context(get_context("spawn").Pool(args.workers)).imap if several else map
            done = list(track((pair for made in each(work, jobs) for pair in made), total, "clips"))
    left_out = [(name, why) for name, why in done if why]
    for name, why in left_out:
        print(f"left out {name}: {why}")
    if out.resolve() != args.corpus.resolve():
        copy_manifests(out, args.corpus, args.splits, {name for name, _ in left_out})
    stats = write_stats(out, args.corpus, digests, left_out)
    kept = sum(len(read_manifest(args.corpus, split)) for split in args.splits) - len(left_out)
    print(f"{total} clips made, {kept} there, {len(left_out)} left out; {stats}")


if __name__ == "__main__":
    run_cli(main)

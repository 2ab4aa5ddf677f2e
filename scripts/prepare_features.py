"""Make the features that HiCoDiT trains on: mouth and face crops, GE2E embeddings, RVQ tokens.

    python scripts/prepare_features.py --corpus data/synthetic --codec assets/rvq_tiny --workers 2

Reads a corpus in the layout of make_synthetic_corpus.py and writes shards of 200 clips to CORPUS/features. Shards that
are there already are kept, so a killed run continues, and another tokenizer only adds its tokens; those of a corpus
that was larger once are deleted. A clip that cannot be used (no face found, damaged file) is listed at the end and in
its shard's JSON, and the rest go on.
"""

from __future__ import annotations

import argparse
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from engine.errors import UserError, run_cli
from engine.media.corpus import read_manifest
from engine.progress import track
from hicodit.conditions.released import encoder_config
from hicodit.features import drop_shards_beyond, make_token_shard, make_visual_shard, shard_count, shard_is_made
from rvq_codec import RVQCodec


def _make(
    job: tuple[str, int], corpus: Path, out: Path, codec: Path | None, symbols: list[str], encoders: str
) -> list[tuple[str, str]]:
    split, index = job
    torch.set_num_threads(1)
    skipped = make_visual_shard(corpus, split, index, out, encoder_config({"kind": encoders}), symbols)
    if codec is not None:
        make_token_shard(corpus, split, index, out, RVQCodec.from_pretrained(codec))
    return skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, default=Path("data/synthetic"), help="corpus folder (default: %(default)s)"
    )
    parser.add_argument(
        "--codec", default="assets/rvq_tiny", help="tokenizer release, or 'none' (default: %(default)s)"
    )
    parser.add_argument("--splits", nargs="+", default=["train", "seen", "unseen"], help="default: all three")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--encoders",
        choices=("tiny", "released"),
        default="tiny",
        help="whose pictures: of the tiny encoders or of the released ones (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: give 1 or more")
    out = args.corpus / ("features" if args.encoders == "tiny" else f"features_{args.encoders}")
    codec = None if args.codec == "none" else Path(args.codec)
    loaded = RVQCodec.from_pretrained(codec) if codec is not None else None
    symbols = sorted({p[0] for clip in read_manifest(args.corpus, "train") for p in clip["phonemes"]})
    out.mkdir(parents=True, exist_ok=True)
    if dropped := sum(drop_shards_beyond(args.corpus, split, out) for split in args.splits):
        print(f"deleted {dropped} shards of {out}: the corpus has fewer clips than when they were made")
    jobs = [(split, i) for split in args.splits for i in range(shard_count(args.corpus, split))]
    jobs = [job for job in jobs if not shard_is_made(args.corpus, *job, out, symbols, loaded)]
    if not jobs:
        print(f"all features in {out} are there")
        return
    work = partial(_make, corpus=args.corpus, out=out, codec=codec, symbols=symbols, encoders=args.encoders)
    with get_context("spawn").Pool(min(args.workers, len(jobs))) as pool:
        results = list(track(pool.imap(work, jobs), len(jobs), "shards"))
    skipped = [pair for shard in results for pair in shard]
    for clip, reason in skipped:
        print(f"left out {clip}: {reason}")
    print(f"{len(jobs)} shards in {out}, {len(skipped)} clips left out, {len(symbols)} phoneme symbols")


if __name__ == "__main__":
    run_cli(main)

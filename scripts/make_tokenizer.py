"""Make a small tokenizer for Talker-T2AV: bytes, with merges for the words of a corpus.

python scripts/make_tokenizer.py --corpus data/synthetic --out data/synthetic/tokenizer
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from pathlib import Path

from engine.errors import run_cli
from engine.files import writable
from engine.shards.recordings import read_manifest
from scripts.arguments import Parser, within
from talker_t2av.text import byte_tokenizer


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic"), help="folder of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer to")
    parser.add_argument("--merges", type=within(0), default=240, help="largest number of merges; 0: bytes only")
    args = parser.parse_args()
    with writable(args.out, "--out"):
        texts = [row["text"] for row in read_manifest(args.corpus, "train")] if args.merges else []
        words = byte_tokenizer(texts, args.merges)
        words.save(args.out)
    print(f"{args.out}: {words.vocab_size} ids")


if __name__ == "__main__":
    run_cli(main)

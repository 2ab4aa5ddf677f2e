"""Store a release's large matrices in 8 bits: `python scripts/compact_release.py runs/NAME/release assets/NAME`.

Half the size of the half precision that training releases; loading is the same. Measure the result: rounding is up to
0.4 % of the largest weight of a row. The card is copied, so say there what was done.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from engine.errors import UserError, run_cli
from engine.release import compact, read_release, save_release


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="release folder to read")
    parser.add_argument("out", type=Path, help="release folder to write; replaced if it exists")
    parser.add_argument(
        "--exact", nargs="*", default=[], metavar="PREFIX", help="tensors that keep half precision, by how names begin"
    )
    args = parser.parse_args()
    if not (args.release / "config.yaml").is_file():
        raise UserError(f"no release in {args.release}: give a folder with config.yaml and model.safetensors")
    kind = OmegaConf.load(args.release / "config.yaml").get("kind")
    config, state = read_release(args.release, kind)
    unknown = [p for p in args.exact if not any(key.startswith(p) for key in state)]
    if unknown:
        raise UserError(f"--exact {unknown[0]}: no tensor of {args.release} begins so; the first is {min(state)}")
    card = args.release / "README.md"
    save_release(args.out, kind, config, compact(state, tuple(args.exact)), card.read_text() if card.is_file() else "")
    for path in args.release.iterdir():  # a tokenizer's files
        if path.is_file() and not (args.out / path.name).exists():
            shutil.copyfile(path, args.out / path.name)
    before, after = ((folder / "model.safetensors").stat().st_size / 1e6 for folder in (args.release, args.out))
    print(f"{args.out}: {after:.1f} MB, was {before:.1f} MB")


if __name__ == "__main__":
    run_cli(main)

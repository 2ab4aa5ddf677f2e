"""Average the weights of releases of one model: `python scripts/average_releases.py OUT A:0.7 B:0.3 --only decoder.`

Fine-tuned weights averaged with those they began from, or with each other, often do better on held-out data than any of
them (Wortsman et al. 2022, arXiv 2203.05482 and 2109.01903). Settings, card, other files and all that is not averaged
are the first release's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from engine.errors import UserError, run_cli
from engine.release import half, read_release, release_kind, rewrite_release


def average(
    states: list[dict[str, Tensor]], shares: list[float], prefixes: tuple[str, ...] = ("",)
) -> dict[str, Tensor]:
    """The first state dict; its floating-point tensors whose names begin with a prefix are means with weights `shares`.

    Raises:
        UserError: the names or shapes of the state dicts differ, or no tensor is averaged.
    """
    first = states[0]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    for other in shapes[1:]:
        unlike = sorted(name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name))
        if unlike:
            raise UserError(f"not the same model: {unlike[0]} is missing or of another shape in one of the releases")
    names = [name for name, value in first.items() if name.startswith(prefixes) and value.is_floating_point()]
    if not names:
        raise UserError(f"--only {' '.join(prefixes)}: no tensor begins so; the first is {min(first)}")
    total = sum(shares)
    means = {name: sum(share / total * state[name] for share, state in zip(shares, states)) for name in names}
    return first | means


def _split(text: str) -> tuple[Path, float]:
    folder, _, share = text.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not folder or not 0 < value < float("inf"):
        raise UserError(f"{text}: give FOLDER:WEIGHT with a weight above 0, such as runs/a/release:0.5")
    return Path(folder), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="release folder to write; replaced if it exists")
    parser.add_argument("releases", nargs="+", metavar="FOLDER:WEIGHT", help="weights are divided by their sum")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PREFIX", help="average these tensors (default: all)"
    )
    args = parser.parse_args()
    folders, shares = zip(*map(_split, args.releases))
    kind = release_kind(folders[0])
    others = [read_release(folder, kind)[1] for folder in folders[1:]]
    rewrite_release(folders[0], args.out, lambda first: half(average([first, *others], list(shares), tuple(args.only))))
    print(f"{args.out}: " + " + ".join(f"{share:g} x {folder}" for folder, share in zip(folders, shares)))


if __name__ == "__main__":
    run_cli(main)

"""What the RVQ codec leaves of held-out speech: word error rate, PESQ, STOI, code book perplexity.

    python scripts/evaluate_codec.py --weights assets/rvq_tiny --data data/synthetic

Decodes whole clips from the first 1, 2, 4 and all levels, prints a table, and writes benchmarks/DATE-NAME.json. Figures
whose package (pocketsphinx, pesq, pystoi; the `eval` extra) is not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from engine.errors import run_cli
from engine.files import atomic_output
from rvq_codec.codec import RVQCodec
from rvq_codec.data import load_clips
from rvq_codec.evaluation import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="assets/rvq_tiny", help="release folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/synthetic"), help="corpus (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=["seen", "unseen"], help="default: seen unseen")
    parser.add_argument("--clips", type=int, default=100, help="first clips of each split (default: %(default)s)")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4, 12], help="default: 1 2 4 12")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/DATE-NAME.json)")
    args = parser.parse_args()

    codec = RVQCodec.from_pretrained(args.weights)
    report = {"weights": args.weights, "data": str(args.data), "clips": args.clips, "splits": {}}
    for split in args.splits:
        clips = load_clips(args.data, split, args.clips, codec.sample_rate)
        start = time.monotonic()
        results = evaluate(codec, clips, args.levels, args.data / "grammar.jsgf")
        report["splits"][split] = results
        seconds = sum(len(clip.wave) for clip in clips) / codec.sample_rate
        print(f"\n{split}: {len(clips)} clips, {seconds:.0f} s of speech, {time.monotonic() - start:.0f} s")
        print(_table(results, args.levels))
    report["machine"] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine()}
    name = f"{datetime.now(UTC):%Y-%m-%d}-{Path(args.weights).resolve().name}.json"
    out = args.out or Path("benchmarks") / name
    with atomic_output(out) as staging:
        staging.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {out}")


def _table(results: dict, levels: list[int]) -> str:
    lines = ["levels   WER %   PESQ-wb   STOI"]
    if "wer_clean" in results:
        lines.append(f"clean   {100 * results['wer_clean']:6.2f}")
    for n in levels:
        wer, pesq, stoi = (results.get(f"{name}_{n}") for name in ("wer", "pesq", "stoi"))
        cells = [f"{100 * wer:6.2f}" if wer is not None else "     -"]
        cells.append(f"{pesq:8.2f}" if pesq is not None else "       -")
        cells.append(f"{stoi:5.3f}" if stoi is not None else "    -")
        lines.append(f"{n:6d}  " + "  ".join(cells))
    for name in ("perplexity", "used"):
        lines.append(f"{name} by level: " + " ".join(f"{x:g}" for x in results[name]))
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)

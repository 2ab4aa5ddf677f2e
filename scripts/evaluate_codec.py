"""What a speech codec leaves of held-out speech: word error rate, PESQ, STOI.

    python scripts/evaluate_codec.py --weights assets/rvq_tiny --data data/synthetic
    python scripts/evaluate_codec.py --kind whisperx_vae --weights assets/whisperx_vae_tiny --data data/synthetic

Resynthesises whole clips, prints a table, and writes benchmarks/results/DATE-NAME.json. The RVQ codec decodes from
the first 1, 2, 4 and all levels, and the use of its code books is counted; of the WhisperX-VAE the statistics of its
latents are given. Figures whose package (pocketsphinx, pesq, pystoi; the `eval` extra) is not installed are left out.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch

from benchmarks.record import write_record
from engine.errors import run_cli
from engine.media.corpus import Clip, load_clips
from rvq_codec import evaluation as rvq
from rvq_codec.codec import RVQCodec
from whisperx_vae import evaluation as vae
from whisperx_vae.codec import WhisperXVAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("rvq_codec", "whisperx_vae"), default="rvq_codec", help="default: rvq_codec")
    parser.add_argument("--weights", default="assets/rvq_tiny", help="release folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/synthetic"), help="corpus (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=["seen", "unseen"], help="default: seen unseen")
    parser.add_argument("--clips", type=int, default=100, help="first clips of each split (default: %(default)s)")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4, 12], help="of RVQ; default: 1 2 4 12")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    args = parser.parse_args()

    codec = (RVQCodec if args.kind == "rvq_codec" else WhisperXVAE).from_pretrained(args.weights)
    versions = [str(n) for n in args.levels] if args.kind == "rvq_codec" else ["decoded"]
    results = {}
    for split in args.splits:
        clips = load_clips(args.data, split, args.clips, codec.sample_rate)
        start = time.monotonic()
        results[split] = _evaluate(codec, clips, args.levels, args.data / "grammar.jsgf")
        seconds = sum(len(clip.wave) for clip in clips) / codec.sample_rate
        print(f"\n{split}: {len(clips)} clips, {seconds:.0f} s of speech, {time.monotonic() - start:.0f} s")
        print(_table(results[split], versions))
    hardware = {"threads": torch.get_num_threads(), "cpu": platform.machine()}
    about = {"weights": args.weights, "data": str(args.data), "clips": args.clips}
    name = Path(args.weights).resolve().name
    print(f"\nwritten to {write_record(args.out, name, 'resynthesis of held-out speech', hardware, results, **about)}")


def _evaluate(codec: RVQCodec | WhisperXVAE, clips: list[Clip], levels: list[int], grammar: Path) -> dict:
    if isinstance(codec, RVQCodec):
        return rvq.evaluate(codec, clips, levels, grammar)
    return vae.evaluate(codec, clips, grammar)


def _table(results: dict, versions: list[str]) -> str:
    lines = ["           WER %   PESQ-wb   STOI"]
    if "wer_clean" in results:
        lines.append(f"clean     {100 * results['wer_clean']:6.2f}")
    for version in versions:
        wer, pesq, stoi = (results.get(f"{name}_{version}") for name in ("wer", "pesq", "stoi"))
        cells = [f"{100 * wer:6.2f}" if wer is not None else "     -"]
        cells.append(f"{pesq:8.2f}" if pesq is not None else "       -")
        cells.append(f"{stoi:5.3f}" if stoi is not None else "    -")
        lines.append(f"{version:8}  " + "  ".join(cells))
    for name, value in results.items():
        if not name.startswith(("wer", "pesq", "stoi")):
            lines.append(
                f"{name}: " + (" ".join(f"{x:g}" for x in value) if isinstance(value, list) else f"{value:.3f}")
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)

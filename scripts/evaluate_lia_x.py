"""How well LIA-X rebuilds held-out clips from their first frame and motion codes, and how fast.

    python scripts/evaluate_lia_x.py --weights assets/lia_x_tiny --data data/synthetic

PSNR and SSIM of the frames, PSNR and explained movement of mouth and eyes, correlation of the mouth's opening read off
true and rebuilt frames (drawn faces only), frames a second in batches over time and one by one. Prints a table, and
writes benchmarks/results/DATE-NAME.json and a strip of true frames above rebuilt ones, NAME.jpg.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.record import write_record
from corpora.synthetic.mouth_opening import MouthReader
from engine.errors import UserError, run_cli
from engine.files import atomic_output
from lia_x import LiaX
from lia_x.evaluation import RebuiltClip, measure, rebuild_clips, strip

REGIONS = {
    "eyes": {"left": 0.27, "top": 0.36, "right": 0.73, "bottom": 0.58},
    "mouth": {"left": 0.30, "top": 0.63, "right": 0.70, "bottom": 0.92},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="assets/lia_x_tiny", help="release folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/synthetic"), help="corpus (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=["seen", "unseen"], help="default: seen unseen")
    parser.add_argument("--clips", type=int, default=24, help="first clips of each split (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=16, help="frames of a batch when timing (default: %(default)s)")
    parser.add_argument("--strip", type=Path, help="picture to write (default: OUT/NAME.jpg)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}: give 1 or more")

    codec = LiaX.from_pretrained(args.weights)
    reader, results, shown = MouthReader(), {}, []
    for split in args.splits:
        clips = rebuild_clips(codec, args.data, split, args.clips)
        results[split] = measure(clips, REGIONS) | {"mouth_opening_correlation": _mouth_correlation(clips, reader)}
        shown += clips[:3]
        print(f"{split}: {len(clips)} clips")
        print("\n".join(f"  {name:26} {value:8.3f}" for name, value in results[split].items()))
    results["speed"] = _speed(codec, shown[0], args.chunk)
    print(
        "speed, frames a second\n" + "\n".join(f"  {name:26} {value:8.2f}" for name, value in results["speed"].items())
    )

    name = Path(args.weights).resolve().name
    picture = args.strip or args.out / f"{name}.jpg"
    with atomic_output(picture) as partial:
        cv2.imwrite(str(partial), cv2.cvtColor(strip(shown), cv2.COLOR_RGB2BGR))
    hardware = {"threads": torch.get_num_threads(), "cpu": platform.machine()}
    about = {"weights": args.weights, "data": str(args.data), "clips": args.clips, "chunk": args.chunk}
    record = write_record(args.out, name, "reconstruction of held-out clips", hardware, results, **about)
    print(f"written to {record} and {picture}")


def _show(title: str, figures: dict[str, float]) -> None:
    print(title, *(f"  {name:26} {value:8.3f}" for name, value in figures.items()), sep="\n")


def _mouth_correlation(clips: list[RebuiltClip], reader: MouthReader) -> float:
    """Mean over clips of the correlation in time of the openings read off true and rebuilt frames."""
    pairs = [(reader(clip.true), reader(clip.rebuilt)) for clip in clips]
    return float(np.mean([np.corrcoef(true, rebuilt)[0, 1] for true, rebuilt in pairs]))


def _speed(codec: LiaX, clip: RebuiltClip, chunk: int) -> dict[str, float]:
    """Frames a second, the best of three passes over one clip."""
    video = torch.from_numpy(clip.true).permute(0, 3, 1, 2).float() / 127.5 - 1
    identity = codec.identity(video[0])

    def rate(run) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return len(video) / min(times)

    found = {}
    for name, frames in (("batched", chunk), ("one_by_one", 1)):
        found[f"motion_{name}"] = rate(lambda frames=frames: codec.encode(video, frames))
        found[f"render_{name}"] = rate(lambda frames=frames: codec.decode(clip.motion, identity, frames))
    return found


if __name__ == "__main__":
    run_cli(main)

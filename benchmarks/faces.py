"""Peak memory of what `infer.py` does with a clip before its networks run: decoding, face tracking, crops; by length.

    python -m benchmarks.faces --seconds 10 60 600

The bundled silent clip is repeated to each length. Each part runs in a process of its own, so that its peak is its own:
`track` decodes and follows the face; `tiny` and `released` also cut the pictures out, in the sizes of those encoders;
`encoded` also runs the bundled model's encoders on them. Crops grow with the clip, as the model needs them all.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from benchmarks.record import write_record
from engine.errors import UserError, run_cli
from engine.faces.clip import ClipFrames, find_face
from engine.media.ffmpeg import command, last_line
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.conditions.released import ReleasedEncoderConfig
from hicodit.pipeline import BUNDLED, FPS, HiCoDiTPipeline

CONFIGS = {"tiny": TinyEncoderConfig, "released": ReleasedEncoderConfig}
PARTS = ("track", *CONFIGS, "encoded")


def repeated(source: Path, seconds: float, height: int, out: Path) -> Path:
    """`source` over and over for so many seconds, `height` pixels high.

    Raises:
        UserError: ffmpeg cannot read it.
    """
    options = [
        "-t",
        str(seconds),
        "-vf",
        f"scale=-2:{height}",
        "-an",
        "-preset",
        "ultrafast",
        "-threads",
        "1",
        str(out),
    ]
    call = command("-v", "error", "-stream_loop", "-1", "-i", str(source), *options)
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{source}: {last_line(done.stderr)}")
    return out


def measure(clip: str, part: str) -> dict[str, float]:
    """Peak memory in MB and CPU seconds of one part, the decoder's process apart."""
    start = time.process_time()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frames = ClipFrames(clip, FPS)
    track = find_face(frames, FPS)
    stored = 0
    if part == "encoded":
        pipeline = HiCoDiTPipeline.from_pretrained()
        crops = pipeline._cut(frames, track, None)
        stored = crops.mouth.nbytes + crops.faces.nbytes
        pipeline.conditions([crops])
    elif part != "track":
        system = SimpleNamespace(encoders=SimpleNamespace(config=CONFIGS[part]()))
        crops = HiCoDiTPipeline._cut(SimpleNamespace(system=system), frames, track, None)
        stored = crops.mouth.nbytes + crops.faces.nbytes
    mine, decoder = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "frames": len(track),
        "peak_mb": mine.ru_maxrss / 1024,
        "before_mb": base / 1024,
        "crops_mb": stored / 2**20,
        "cpu_seconds": time.process_time() - start,
        "decoder_cpu_seconds": decoder.ru_utime + decoder.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=BUNDLED.parent / "demo" / "silent.mp4", help="%(default)s")
    parser.add_argument("--seconds", nargs="+", type=float, default=[10.0, 60.0, 600.0], help="default: 10 60 600")
    parser.add_argument("--heights", nargs="+", type=int, default=[128], help="of the picture (default: 128)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if min(args.seconds) < 1 or min(args.heights) < 16:
        raise UserError("--seconds must be at least 1, --heights at least 16")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for height in args.heights:
            for seconds in args.seconds:
                clip = repeated(args.input, seconds, height, Path(scratch) / f"{height}-{seconds:g}.mp4")
                for part in args.parts:
                    with get_context("spawn").Pool(1) as pool:
                        result = pool.apply(measure, (str(clip), part))
                    results.append({"seconds": seconds, "height": height, "part": part, **result})
                    print(
                        f"{seconds:g} s, {height} pixels high, {part}: peak {result['peak_mb']:.0f} MB "
                        f"({result['before_mb']:.0f} MB before; crops are {result['crops_mb']:.0f} MB), "
                        f"{result['cpu_seconds'] + result['decoder_cpu_seconds']:.1f} s of CPU time",
                        flush=True,
                    )
                clip.unlink()
    what = "peak memory of decoding, face tracking and crops by the length of the clip"
    print(write_record(args.out, "faces-memory", what, results))


if __name__ == "__main__":
    run_cli(main)

"""Peak memory of decoding, face tracking and cropping for clips of several lengths.

The bundled silent clip is repeated to each length. Each part runs in a separate process: `track` decodes the clip and
tracks the face; `tiny` and `upstream` also cut the crops for these encoders, with random weights; `encoded` also runs
the bundled model's encoders on them. Networks are loaded before the measurement starts. The memory of the mouth crops
grows with the clip, as the model needs all of them.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import in_own_process, peak_memory_mb, read_config
from engine.arguments import within
from engine.codec import load_codec
from engine.errors import UserError
from engine.faces.clip import ClipFrames, find_faces
from engine.media.ffmpeg import command, last_line
from hicodit.conditions import ENCODERS, encoder_config
from hicodit.conditions.types import FPS
from hicodit.model import ModelConfig
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import BUNDLED, GuidanceScales, SamplerConfig
from hicodit.system import CODECS, HiCoDiTSystem

CLIP = BUNDLED.parent / "demo" / "silent.mp4"  # which is repeated
PARTS = ("track", *ENCODERS, "encoded")
CPU_ONLY = True  # no other device is used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", nargs="+", type=within(1, kind=float), default=[10, 60, 600], help="durations of the clips"
    )
    parser.add_argument("--heights", nargs="+", type=within(16), default=[128], help="frame heights in pixels")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    with tempfile.TemporaryDirectory() as scratch:
        clip = Path(scratch) / "clip.mp4"
        for height, seconds in itertools.product(args.heights, args.seconds):
            options = f"-t {seconds} -vf scale=-2:{height} -an -preset ultrafast -threads 1".split()
            repeat = ["-v", "error", "-y", "-stream_loop", "-1", "-i", str(CLIP), *options, str(clip)]
            done = subprocess.run(command(*repeat), capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{CLIP}: {last_line(done.stderr)}")
            for part in args.parts:
                result = in_own_process(measure, str(clip), part)
                line = (
                    f"{seconds:g} s, {height} pixels high, {part}: peak {result['peak_mb']:.0f} MB "
                    f"({result['before_mb']:.0f} MB before; crops are {result['crops_mb']:.0f} MB), "
                    f"{result['cpu_seconds'] + result['decoder_cpu_seconds']:.1f} s of CPU time"
                )
                yield {"seconds": seconds, "height": height, "part": part, **result}, line


def measure(clip: str, part: str) -> dict[str, float]:
    """Return peak memory in MB and CPU seconds of one part; the decoder is a separate process."""
    pipeline = None
    if part in ENCODERS:  # with the bundled model's sizes and tokenizer, and random weights
        encoders = encoder_config({"kind": part})
        sizes = read_config("task/model/hicodit_tiny") | {"lip_dim": encoders.lip_dim, "face_dim": encoders.face_dim}
        system = HiCoDiTSystem(ModelConfig(**sizes), encoders)
        codec = load_codec(BUNDLED.parent / "rvq_speech", CODECS)
        pipeline = HiCoDiTPipeline(system, codec, SamplerConfig(), GuidanceScales())
    elif part == "encoded":
        pipeline = HiCoDiTPipeline.from_pretrained()
    start = time.process_time()
    before = peak_memory_mb()
    stored = 0
    if pipeline is None:
        track = find_faces(ClipFrames(clip, FPS), FPS)[0]
    else:
        crops = pipeline.crops(clip)
        track = crops.track
        stored = crops.mouth.nbytes + crops.voice_faces.nbytes
        if part == "encoded":
            pipeline.conditions([crops])
    decoder = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "frames": len(track),
        "peak_mb": peak_memory_mb(),
        "before_mb": before,
        "crops_mb": stored / 2**20,
        "cpu_seconds": time.process_time() - start,
        "decoder_cpu_seconds": decoder.ru_utime + decoder.ru_stime,
    }

"""Time and memory of `infer.py` at full size on a given clip, with random weights.

AV-HuBERT Large, ArcFace (iresnet100), POSTER V2, HiCoDiT base and the MaskGCT codec have the sizes of their released or
published weights, none of which is needed. The output is noise; only time, memory and shapes are meaningful. A release
folder with random weights is written, and `python infer.py` runs on it in a separate process. Its encoders have
`folder: null`, so they get random weights at their first use (included in the time of the stage `conditions`).

Sampling time is linear in the number of steps, so it is measured with few `--steps` and extrapolated to the paper's 64.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import read_config
from engine.errors import UserError
from hicodit.conditions.released import ReleasedEncoderConfig, ReleasedEncoders
from hicodit.model import ModelConfig
from hicodit.system import HiCoDiTSystem
from rvq_codec import RVQCodec, RVQCodecConfig

ROOT = Path(__file__).resolve().parents[1]
PAPER_STEPS = 64
CARD = "Random weights, to measure time and memory."
LEAST = {"steps": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="a clip of a talking face")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps (the paper: 64)")
    parser.add_argument("--output", type=Path, help="folder for the results (None: they are deleted)")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    with tempfile.TemporaryDirectory() as scratch:
        sizes = write_random_release(Path(scratch))
        print("random weights: " + ", ".join(f"{name} {size:.0f} M" for name, size in sizes.items()), flush=True)
        call = [sys.executable, str(ROOT / "infer.py"), f"weights={scratch}/hicodit", f"input={args.input}"]
        call += [f"output={args.output or scratch + '/out'}", f"sampler.steps={args.steps}", "debug=true"]
        start = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, env=environment)
        wall = time.monotonic() - start
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise UserError(f"infer.py ended with exit code {done.returncode}; its messages are above")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, cpu = used.ru_maxrss / 2**20, used.ru_utime + used.ru_stime
    stages, speech = read_summary(done.stdout)
    estimate = cpu / wall * (wall + stages["sampling"] * (PAPER_STEPS / args.steps - 1))
    yield (
        {
            "wall_seconds_by_stage": stages,
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "peak_gb": peak,
            "speech_seconds": speech,
            "estimated_cpu_seconds_64_steps": estimate,
            "parameters_millions": sizes,
        },
        f"peak memory {peak:.1f} GB; {wall:.0f} s of wall time, {cpu:.0f} s of CPU time, start and loading included; "
        f"with {PAPER_STEPS} steps about {estimate:.0f} s of CPU time for {speech:.1f} s of speech",
    )


def read_summary(printed: str) -> tuple[dict[str, float], float]:
    """Seconds of each stage, and seconds of speech, from what `infer.py` printed (`batch_runner.Summary.report`)."""
    stages = re.findall(r"(\w+) ([\d.]+) s", printed.split("of which")[-1])
    return {name: float(value) for name, value in stages}, float(re.search(r"([\d.]+) s of speech", printed)[1])


def write_random_release(folder: Path) -> dict[str, float]:
    """Write FOLDER/hicodit and FOLDER/codec; returns the millions of parameters of each network."""
    torch.manual_seed(0)
    codec = RVQCodec(RVQCodecConfig(**read_config("codec/rvq_maskgct")))
    codec.save(folder / "codec", CARD)
    system = HiCoDiTSystem(ModelConfig(**read_config("model/hicodit_base")), ReleasedEncoderConfig())
    guidance = {"all": 2.5, "identity": 1.25, "expression": 1.5, "lip": 2.0, "reading": "D"}
    extra = {"codec": "codec", "sampler": {"method": "euler", "steps": PAPER_STEPS}, "guidance": guidance}
    system.save(folder / "hicodit", CARD, extra)
    networks = {"codec": codec, "hicodit": system.model}
    with torch.device("meta"):
        encoders = ReleasedEncoders(ReleasedEncoderConfig())
        networks |= {name: encoders._read(name) for name in ("lip", "identity", "expression")}
    return {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in networks.items()}

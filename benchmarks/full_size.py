"""The whole of `infer.py` at full size on a real clip, with random weights: how long it takes, how much memory.

    python -m benchmarks.full_size --input clip.mp4 --steps 2

AV-HuBERT Large, ArcFace (iresnet100), POSTER V2, HiCoDiT base and the MaskGCT codec, of the sizes of their released or
published weights, which this needs none of. What comes out is noise: only time, memory and shapes mean something. A
release folder with random weights is written and handed to `python infer.py` in a process of its own. Its encoders have
`folder: null`, which fills them with random weights when they are first used (the time of it is in `encoders`).

Sampling time is linear in steps, so `--steps` few tell how long the paper's 64 take; that estimate is printed too.
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
from pathlib import Path

import torch
from omegaconf import OmegaConf

from benchmarks.record import write_record
from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from hicodit.conditions.released import ReleasedEncoderConfig, ReleasedEncoders
from hicodit.model import ModelConfig
from hicodit.system import HiCoDiTSystem
from rvq_codec import RVQCodec, RVQCodecConfig

PAPER_STEPS = 64
CARD = "Random weights, to measure time and memory: this says nothing."


def write_random_release(folder: Path) -> dict[str, float]:
    """Write FOLDER/hicodit and FOLDER/codec; gives the millions of parameters of each network."""
    torch.manual_seed(0)
    codec_config, model_config = (
        OmegaConf.to_container(OmegaConf.load(CONFIGS / name))
        for name in ("codec/rvq_maskgct.yaml", "model/hicodit_base.yaml")
    )
    codec = RVQCodec(RVQCodecConfig(**codec_config))
    codec.save(folder / "codec", CARD)
    system = HiCoDiTSystem(ModelConfig(**model_config), ReleasedEncoderConfig())
    guidance = {"all": 2.5, "identity": 1.25, "expression": 1.5, "lip": 2.0, "reading": "D"}
    extra = {"codec": "codec", "sampler": {"method": "euler", "steps": PAPER_STEPS}, "guidance": guidance}
    system.save(folder / "hicodit", CARD, extra)
    networks = {"codec": codec, "hicodit": system.model}
    with torch.device("meta"):
        encoders = ReleasedEncoders(ReleasedEncoderConfig())
        networks |= {name: encoders._read(name) for name in ("lip", "identity", "expression")}
    return {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in networks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a clip of a talking face")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps (default: %(default)s; the paper: 64)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="keep the results in this folder")
    parser.add_argument("--record", type=Path, help="write the measurement into this folder, as in benchmarks/")
    args = parser.parse_args()
    if args.steps < 1 or args.threads < 1:
        raise UserError("--steps and --threads must be at least 1")
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        sizes = write_random_release(Path(scratch))
        print("random weights: " + ", ".join(f"{name} {size:.0f} M" for name, size in sizes.items()), flush=True)
        call = [sys.executable, str(root / "infer.py"), f"weights={scratch}/hicodit", f"input={args.input}"]
        call += [f"output={args.output or scratch + '/out'}", f"sampler.steps={args.steps}", "debug=true"]
        start = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, env=environment)
        wall = time.monotonic() - start
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise UserError(f"infer.py ended with exit code {done.returncode}; what it said stands above")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, cpu, load = used.ru_maxrss / 2**20, used.ru_utime + used.ru_stime, os.getloadavg()[1]
    stages = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s", done.stdout.split("of which")[-1])}
    spoken = float(re.search(r"([\d.]+) s of speech", done.stdout)[1])
    estimate = cpu / wall * (wall + stages["tokens"] * (PAPER_STEPS / args.steps - 1))
    print(f"peak memory {peak:.1f} GB; {wall:.0f} s of wall time, {cpu:.0f} s of CPU time, start and loading included")
    print(f"(load average {load:.1f} on {os.cpu_count()} cores: other work stretches wall time)")
    print(f"with {PAPER_STEPS} steps about {estimate:.0f} s of CPU time for {spoken:.1f} s of speech")
    if args.record:
        results = {"wall_seconds_by_stage": stages, "wall_seconds": wall, "cpu_seconds": cpu, "peak_gb": peak}
        results |= {"speech_seconds": spoken, "estimated_cpu_seconds_64_steps": estimate}
        results |= {"parameters_millions": sizes}
        what = "infer.py on a real clip, all networks at full size with random weights"
        print(write_record(args.record, "full-size-infer-cpu", what, results))


if __name__ == "__main__":
    run_cli(main)

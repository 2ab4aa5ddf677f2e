"""Measure HiCoDiT sampling: real-time factor, network calls, peak memory, share of the machine's matrix rate.

    python scripts/benchmark.py                              # tiny and base, 2 and 10 s clips, 64 steps with guidance
    python scripts/benchmark.py --models tiny --seconds 2 --against-plain

Base runs at random weights: its released ones do not exist. Each setting runs in a process of its own, so that peak
memory is its own. Sampling is timed by the step, after one step to warm up; a run is `steps` times the median step plus
what is done once. `--against-plain` also times the plain reading of the paper, guidance branches one by one and all
condition work done again each time, and checks that both give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from datetime import date
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.errors import UserError, run_cli
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.guidance import GuidanceScales, guided_log_posterior
from hicodit.model import ModelConfig
from hicodit.pipeline import generate
from hicodit.samplers import SamplerConfig, sample
from hicodit.system import HiCoDiTSystem

GUIDANCE = GuidanceScales(2.5, 1.25, 1.5, 2.0, "D")  # the paper's for LRS3


def build(name: str) -> HiCoDiTSystem:
    """A system of the named size with random weights: speed does not depend on them."""
    torch.manual_seed(0)
    if name == "base":
        model, encoders = ModelConfig(dropout=0.0), TinyEncoderConfig(lip_dim=1024, lip_heads=16, face_dim=512)
    else:
        sizes = {"codes": 256, "width": 192, "heads": 6, "low_blocks": 4, "high_blocks": 3}
        model, encoders = ModelConfig(**sizes, lip_dim=192, face_dim=128, dropout=0.0), TinyEncoderConfig()
    system = HiCoDiTSystem(model, encoders)
    for parameter in system.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return system.eval()


def pictures(seconds: float, encoders: TinyEncoderConfig, device: torch.device) -> tuple[torch.Tensor, ...]:
    frames = round(25 * seconds)
    g = torch.Generator().manual_seed(0)
    mouth = torch.rand(1, frames, encoders.mouth_size, encoders.mouth_size, generator=g)
    faces = torch.rand(1, frames, 3, encoders.face_size, encoders.face_size, generator=g)
    return mouth.to(device), faces.to(device), torch.tensor([frames], device=device)


def plain_posterior(system: HiCoDiTSystem, crops: tuple[torch.Tensor, ...]):
    """The plain reading: for every step and branch, conditions and all heads at all positions are computed again."""
    model, noise = system.model, LogLinearNoise()

    def posterior(tokens, t, where):
        sigma = noise.sigma(t.float())
        everywhere = torch.ones_like(where)
        rows = []
        for branch in GUIDANCE.branches:
            prepared = model.prepare(system.conditions(*crops), (branch,))
            log_p = model.log_posterior(model(tokens, sigma, prepared), prepared, everywhere)[0]
            rows.append(log_p[where[everywhere]])
        clip = where.nonzero(as_tuple=True)[0]
        return guided_log_posterior(torch.stack(rows), GUIDANCE, -log_expm1(sigma)[clip, None])

    return posterior


def matrix_rate(device: torch.device) -> float:
    """Best measured float32 matrix product rate, in FLOP/s."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    best = 0.0
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure(job: dict) -> dict:
    """One setting: medians over steps, spread as the quartile range."""
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    system = build(job["model"]).to(device)
    crops = pictures(job["seconds"], system.encoders.config, device)
    steps, timed = job["steps"], job["timed_steps"]
    stamps: list[float] = []

    def stamp(_: int) -> None:
        _wait(device)
        stamps.append(time.perf_counter())

    def run(plain: bool) -> torch.Tensor:
        stamps.clear()
        stamp(0)
        generator = torch.Generator().manual_seed(0)
        sampler = SamplerConfig("euler", timed)
        if plain:
            return sample(
                plain_posterior(system, crops), 2 * crops[2], system.model.config.levels, system.model.mask_id, sampler,
                [generator], on_step=stamp,
            )[0].cpu()  # fmt: skip
        return generate(system.model, system.conditions(*crops), sampler, GUIDANCE, [0], stamp)[0]

    run(False)  # warm up
    begin = time.perf_counter()
    fast = run(False)
    whole = time.perf_counter() - begin
    per_step = sorted(b - a for a, b in pairwise(stamps))
    windows = len(per_step) / timed
    once = max(0.0, whole - sum(per_step))
    median = statistics.median(per_step)
    quartiles = statistics.quantiles(per_step, n=4) if len(per_step) > 3 else [median] * 3
    with FlopCounterMode(display=False) as counter:
        generate(system.model, system.conditions(*crops), SamplerConfig("euler", 1), GUIDANCE, [0])
    # one step and the last denoise of every window were counted
    flops = counter.get_total_flops() / 2
    seconds = once + steps * windows * median
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * _peak_rss()
    result = {
        **{k: job[k] for k in ("model", "seconds", "steps", "threads", "device")},
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "windows": windows,
        "step_ms_median": 1e3 * median,
        "step_ms_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "sampling_s": seconds,
        "real_time_factor": seconds / job["seconds"],
        "network_evaluations": int((steps + 1) * windows * len(GUIDANCE.branches)),
        "forward_passes": int((steps + 1) * windows),
        "peak_memory_mb": peak / 2**20,
        "matrix_rate_gflops": job["matrix_rate"] / 1e9,
        "share_of_matrix_rate": flops / windows / median / job["matrix_rate"],
    }
    if job["against_plain"] and windows == 1:
        slow = run(True)
        slow_steps = [b - a for a, b in pairwise(stamps)]
        result["plain_step_ms_median"] = 1e3 * statistics.median(slow_steps)
        result["speed_up"] = statistics.median(slow_steps) / median
        result["same_tokens"] = torch.equal(fast, slow)
    return result


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "base"), default=["tiny", "base"])
    parser.add_argument("--seconds", nargs="+", type=float, default=[2.0, 10.0], help="clip lengths (default: 2 10)")
    parser.add_argument("--steps", type=int, default=64, help="sampling steps (default: %(default)s)")
    parser.add_argument("--timed-steps", type=int, default=8, help="steps to time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against-plain", action="store_true", help="time the plain reading too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.timed_steps, args.threads) < 1 or min(args.seconds) < 0.2:
        raise UserError("--steps, --timed-steps and --threads must be at least 1, --seconds at least 0.2")
    torch.set_num_threads(args.threads)
    rate = matrix_rate(torch.device(args.device))
    results = []
    for model in args.models:
        for seconds in args.seconds:
            job = {k: getattr(args, k) for k in ("steps", "timed_steps", "threads", "device", "against_plain")}
            job |= {"model": model, "seconds": seconds, "matrix_rate": rate}
            with get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (job,)))
            r = results[-1]
            extra = (
                f", {r['speed_up']:.2f}x the plain reading, same tokens: {r['same_tokens']}" if "speed_up" in r else ""
            )
            print(
                f"{model} {seconds:g} s: {r['step_ms_median']:.1f} ms a step, RTF {r['real_time_factor']:.2f}, "
                f"{r['network_evaluations']} network evaluations, {r['peak_memory_mb']:.0f} MB, "
                f"{r['share_of_matrix_rate']:.0%} of {rate / 1e9:.0f} GFLOP/s{extra}",
                flush=True,
            )
    name = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    record = {
        "date": date.today().isoformat(),
        "what": "HiCoDiT sampling",
        "hardware": {"device": name, "threads": args.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "guidance": GUIDANCE.__dict__,
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{date.today().isoformat()}-sampling-{args.device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    run_cli(main)

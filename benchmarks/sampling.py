"""HiCoDiT sampling: real-time factor, network calls, peak memory, share of the measured matrix product rate.

Weights are random, and guidance has the paper's five branches and scales for LRS3; base has condition encoders of the
released sizes (AV-HuBERT Large, ArcFace, POSTER V2). Each setting runs in a separate process, so that its peak memory
can be measured. After a whole run as warm-up, `--timed-steps` steps of each window are timed; the time of a run is
`--steps` times the median step, plus the work done once per clip.

The baseline follows the paper literally: it runs the guidance branches one by one, prepares their conditions again at
every step and computes all heads at all positions; the benchmark checks that it gives the same tokens. `speed_up`
leaves the condition encoders out of both; `speed_up_with_encoders` has the baseline run them in every branch and step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import in_own_process, matrix_rate, now, peak_memory_mb, read_config, tiny_encoders
from hicodit.conditions import Conditions, EncoderConfig
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.conditions.released import ReleasedEncoderConfig
from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.generation import GuidedPosterior, generate, window, windows
from hicodit.guidance import combine
from hicodit.model import TOKENS_PER_FRAME, HiCoDiT, ModelConfig
from hicodit.settings import GuidanceScales, SamplerConfig
from hicodit.system import HiCoDiTSystem

GUIDANCE = GuidanceScales(2.5, 1.25, 1.5, 2.0, "D")  # the paper's for LRS3
LEAST = {"steps": 1, "timed_steps": 1, "seconds": 0.2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=("tiny", "base"), default=["tiny", "base"], help="model sizes")
    parser.add_argument("--seconds", nargs="+", type=float, default=[2.0, 10.0], help="lengths of the clips")
    parser.add_argument("--steps", type=int, default=64, help="sampling steps")
    parser.add_argument("--timed-steps", type=int, default=8, help="number of steps to time")
    parser.add_argument("--no-plain", action="store_true", help="do not run the baseline")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    rate = matrix_rate(args.device)
    for model in args.models:
        for seconds in args.seconds:
            job = {k: getattr(args, k) for k in ("steps", "timed_steps", "device", "no_plain")}
            r = in_own_process(measure, job | {"model": model, "seconds": seconds, "matrix_rate": rate})
            line = (
                f"{model} {seconds:g} s: {r['step_ms_median']:.1f} ms a step, RTF {r['real_time_factor']:.2f}, "
                f"{r['network_evaluations']} network evaluations, {r['peak_memory_mb']:.0f} MB, "
                f"{r['share_of_matrix_rate']:.0%} of {rate / 1e9:.0f} GFLOP/s"
            )
            if "speed_up" in r:
                line += f", {r['speed_up']:.2f}x the baseline, same tokens: {r['same_tokens']}"
            yield r, line


def build(name: str) -> HiCoDiTSystem:
    """The system of configs/model/hicodit_NAME.yaml with random weights: speed does not depend on them."""
    torch.manual_seed(0)
    model = read_config(f"model/hicodit_{name}")
    encoders = TinyEncoderConfig(**tiny_encoders(model)) if name == "tiny" else ReleasedEncoderConfig()
    system = HiCoDiTSystem(ModelConfig(**model), encoders)
    for parameter in system.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return system.eval()


def pictures(seconds: float, encoders: EncoderConfig, device: torch.device) -> tuple[torch.Tensor, ...]:
    frames = round(25 * seconds)
    g = torch.Generator().manual_seed(0)
    mouth = torch.rand(1, frames, encoders.mouth_size, encoders.mouth_size, generator=g)
    faces = torch.rand(1, -(-frames // encoders.picture_every), 3, encoders.face_size, encoders.face_size, generator=g)
    return mouth.to(device), faces.to(device), torch.tensor([frames], device=device)


class PlainPosterior:
    """The baseline: a forward for each branch, its conditions prepared again, all heads at all positions."""

    def __init__(self, model: HiCoDiT, conditions: Conditions, scales: GuidanceScales) -> None:
        self.model, self.conditions, self.scales = model, conditions, scales

    def moments(self, times: Tensor) -> Tensor:
        return LogLinearNoise().sigma(times.float()).to(self.conditions.lip.device)

    def __call__(self, tokens: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
        rows = []
        for branch in self.scales.branches:
            prepared = self.model.prepare(self.conditions, (branch,))
            log_q = self.model(tokens, sigma, prepared)[0]
            rows.append(log_q.gather(2, where[..., None].expand(-1, -1, -1, log_q.shape[-1])))
        return combine(torch.stack(rows), self.scales, -log_expm1(sigma)[:, None, None, None])


def flops_of_step(model: HiCoDiT, conditions: Conditions, steps: int) -> int:
    """Operations of one of `steps` steps of a window with these conditions."""
    posterior = GuidedPosterior(model, conditions, GUIDANCE)
    length, device = TOKENS_PER_FRAME * conditions.lip.shape[1], conditions.lip.device
    tokens = torch.full((1, model.config.levels, length), model.mask_id, device=device)
    where = torch.zeros(*tokens.shape[:2], -(-length // steps), dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter:
        posterior(tokens, next(posterior.moments(torch.ones(1, 1))), where)
    return counter.get_total_flops()


@torch.inference_mode()
def measure(job: dict) -> dict:
    """One setting: medians over steps, spread as quartiles."""
    device = torch.device(job["device"])
    system = build(job["model"]).to(device)
    crops = pictures(job["seconds"], system.encoders.config, device)
    model, steps, timed = system.model, job["steps"], job["timed_steps"]
    settings = SamplerConfig("euler", timed)
    spans = windows(int(crops[2]), settings)
    rounds = len(spans)

    def run(posterior_of: Callable) -> tuple[Tensor, list[float], float]:
        """Tokens, seconds of each step, seconds of the whole."""
        begin, ends = now(device), []

        def on_step(_: int) -> None:
            ends.append(now(device))

        conditions = system.conditions(*crops)
        tokens = generate(model, conditions, settings, GUIDANCE, [0], posterior_of, on_step)[0]
        whole = now(device) - begin
        # A window's first step also holds what is done once; it is left out of the step times.
        each = [b - a for i, (a, b) in enumerate(pairwise(ends), 1) if i % timed]
        return tokens, each or [whole / timed], whole

    run(GuidedPosterior)  # warm up
    fast, each, whole = run(GuidedPosterior)
    median = statistics.median(each)
    quartiles = statistics.quantiles(each, n=4) if len(each) > 3 else [median] * 3
    once = max(0.0, whole - timed * rounds * median)
    seconds = once + steps * rounds * median
    start = now(device)
    conditions = system.conditions(*crops)
    encoders = now(device) - start

    flops = flops_of_step(model, window(conditions, [0], spans[:1]), steps)
    result = {
        **{k: job[k] for k in ("model", "seconds", "steps", "timed_steps")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "windows": rounds,
        "step_ms_median": 1e3 * median,
        "step_ms_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "once_s": once,
        "encoders_s": encoders,
        "sampling_s": seconds,
        "real_time_factor": seconds / job["seconds"],
        "network_evaluations": (steps + 1) * rounds * len(GUIDANCE.branches),
        "forward_passes": (steps + 1) * rounds,
        "peak_memory_mb": peak_memory_mb(device),
        "matrix_rate_gflops": job["matrix_rate"] / 1e9,
        "share_of_matrix_rate": flops / median / job["matrix_rate"],
    }
    if not job["no_plain"]:
        slow, slow_each, _ = run(PlainPosterior)
        plain = statistics.median(slow_each)
        result |= {
            "plain_step_ms_median": 1e3 * plain,
            "speed_up": plain / median,
            "speed_up_with_encoders": steps * (rounds * plain + len(GUIDANCE.branches) * encoders) / seconds,
            "same_tokens": torch.equal(fast, slow),
        }
    return result

"""Speed and memory of inference: one table for both models, the reference loops and streaming.

Weights are random unless said otherwise. Each precision and a reference loop in float32 alternate in one process, so
that other programs affect both equally. Times are CPU time on a CPU, of all threads, or wall-clock time (`--wall`).

HiCoDiT: steps of the first window are timed; the time of a clip follows from its windows and steps. Encoders and codec
are left out. The reference loop follows the paper literally: it runs the guidance branches one by one, prepares their
conditions in every step and computes all heads at all positions.
Talker-T2AV: patches of t2av after a prompt of 40 tokens. The reference loop is shaped as the official program's.
Streams run the bundled HiCoDiT from frames to audio.

step_ms: a step (HiCoDiT), a patch (Talker-T2AV) or a hop (stream). rtf: real-time factor.
first_s: computing seconds before the first audio. of_rate: fraction of the machine's measured rate of matrix products.
speed_up: against the reference loop in float32. That of Talker-T2AV takes 10 solver steps, whatever `--sampling` is.
Operators and host reads are those of a step or patch.

    python scripts/benchmark.py inference              tiny models, a few minutes
    python scripts/benchmark.py inference --full       also released sizes, 60 s and batches of 8
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    Operators,
    compute_time,
    in_own_process,
    matrix_rate,
    now,
    peak_memory_mb,
    read_config,
    tiny_encoders,
)
from benchmarks.official_talker import official_t2av
from engine.arguments import within
from engine.charts import chart_file
from engine.precision import can_int8, convert_matrices, prepare_inference
from engine.record import dated
from engine.training.speed import counter
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.conditions.types import FPS, Conditions, num_expression_windows
from hicodit.conditions.upstream import UpstreamEncoderConfig
from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.generation import generate, sampling_windows
from hicodit.guidance import combine, guided_posterior
from hicodit.model import FLOAT32_MODULES, HiCoDiT, ModelConfig
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import BUNDLED, GuidanceScales, SamplerConfig, with_preset
from hicodit.system import HiCoDiTSystem
from talker_t2av.fused import fuse_layers
from talker_t2av.generation import BatchedDecoder
from talker_t2av.model import TalkerConfig, TalkerT2AV
from talker_t2av.request import MODES, Request, Sampling
from talker_t2av.settings import with_preset as with_sampling

GUIDANCE = GuidanceScales(2.5, 1.25, 1.5, 2.0)  # the paper's for LRS3
CLIP = BUNDLED.parent / "demo" / "silent.mp4"
LOOKAHEADS = 0.2, 0.4, 0.8  # seconds, of the streams
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
COLUMNS = ("model", "size", "batch", "seconds", "sampler", "precision", "step_ms", "rtf", "first_s", "evaluations",
           "operators", "host_reads", "peak_memory_mb", "of_rate", "speed_up")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ("hicodit", "talker_t2av", "stream")
    parser.add_argument("--full", action="store_true", help="also released sizes, 60 s, batches of 8")
    parser.add_argument("--models", nargs="*", choices=kinds, default=list(kinds), help="what to measure")
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "base"), help="(default: tiny, with --full both)")
    parser.add_argument("--seconds", nargs="+", type=within(1, kind=float), help="(default: 2 10, with --full 2 10 60)")
    parser.add_argument("--batch", nargs="+", type=within(1), help="(default: 1, with --full 1 8)")
    parser.add_argument("--samplers", nargs="+", choices=("paper", "fast"), default=["paper", "fast"], help="HiCoDiT's")
    parser.add_argument(
        "--sampling", nargs="+", choices=("release", "fast"), default=["release", "fast"], help="Talker-T2AV's"
    )
    parser.add_argument("--precisions", nargs="+", choices=TYPES, help="(default: those that the device has)")
    parser.add_argument(
        "--wall", action="store_true", help="measure wall-clock time: for several threads, on idle cores"
    )
    parser.add_argument("--timed-steps", type=within(2), default=3, help="number of HiCoDiT's sampling steps to time")
    parser.add_argument("--patches", type=within(2), default=4, help="patches of Talker-T2AV to time")
    parser.add_argument("--rounds", type=within(1), default=3, help="turns that each way takes; the median counts")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    sizes = args.sizes or (["tiny", "base"] if args.full else ["tiny"])
    lengths = args.seconds or ([2.0, 10.0, 60.0] if args.full else [2.0, 10.0])
    names = args.precisions or [name for name in TYPES if name != "int8" or can_int8(args.device)]
    rates = {name: matrix_rate(args.device, TYPES[name], now if args.wall else compute_time) for name in names}
    facts = {"matrix_rate_gflops": {k: round(v / 1e9) for k, v in rates.items()}, "load_average": os.getloadavg()}
    yield facts, f"{facts}\n{_line(dict(zip(COLUMNS, COLUMNS)))}"
    jobs: list[tuple[Any, ...]] = []  # a function and its arguments after `args`
    for size, batch in itertools.product(sizes, args.batch or ([1, 8] if args.full else [1])):
        if "hicodit" in args.models:
            settings = itertools.product(lengths, args.samplers, rates.items())
            jobs += [(hicodit, size, batch, *setting) for setting in settings]
        if "talker_t2av" in args.models:
            jobs += [(talker, size, batch, *setting) for setting in itertools.product(args.sampling, rates.items())]
    if "stream" in args.models:
        jobs += [(stream, lookahead) for lookahead in LOOKAHEADS]
    rows = []
    for measure, *setting in jobs:
        row = in_own_process(measure, args, *setting)
        rows.append(row)
        yield row, _line(row)
    chart(rows, dated(args.out, f"inference-{args.device.type}.png"))


def paper_posterior(model: HiCoDiT, conditions: Conditions, scales: GuidanceScales) -> Callable[..., Tensor]:
    """Return the reference implementation of HiCoDiT's posterior.

    Each branch is a separate forward pass, which also prepares the conditions and evaluates all heads at all positions.
    """

    def posterior(tokens: Tensor, t: Tensor, frames: Tensor | None) -> Tensor:
        branches = []
        sigma = LogLinearNoise().sigma(t)
        for branch in scales.branches:
            log_q = model(tokens, sigma, model.prepare(conditions, (branch,)))[0]
            if frames is not None:
                log_q = log_q.gather(2, frames[..., None].expand(-1, -1, -1, log_q.shape[-1]))
            branches.append(log_q)
        return combine(torch.stack(branches), scales, -log_expm1(sigma)[:, None, None, None])

    return posterior


def build_hicodit(size: str) -> HiCoDiT:
    """Return the network of configs/task/model/hicodit_SIZE.yaml with random weights."""
    torch.manual_seed(0)
    sizes = read_config(f"task/model/hicodit_{size}")
    encoders = TinyEncoderConfig(**tiny_encoders(sizes)) if size == "tiny" else UpstreamEncoderConfig()
    model = HiCoDiTSystem(ModelConfig(**sizes), encoders).model
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def random_conditions(model: HiCoDiT, batch: int, seconds: float, device: torch.device) -> Conditions:
    """Return random conditions of clips of equal length."""
    frames = round(FPS * seconds)
    return Conditions(
        torch.randn(batch, frames, model.config.lip_dim, device=device), torch.rand(batch, 256, device=device),
        torch.randint(0, 7, (batch, num_expression_windows(frames)), device=device), torch.full((batch,), frames),
    )  # fmt: skip


@torch.inference_mode()
def hicodit(
    args: argparse.Namespace, size: str, batch: int, seconds: float, preset: str, rate: tuple[str, float]
) -> dict[str, Any]:
    """Measure one setting of HiCoDiT.

    Args:
        rate: a precision, and the rate of matrix products in it (`matrix_rate`).
    """
    device = args.device
    precision, peak = rate
    sampler, guidance = with_preset(preset, SamplerConfig(), GUIDANCE)
    plain = build_hicodit(size).to(device)
    clock = now if args.wall else compute_time
    conditions = random_conditions(plain, batch, min(seconds, sampler.window), device)

    def first_window(
        model: HiCoDiT, steps: int = args.timed_steps, posterior: Callable = guided_posterior
    ) -> list[float]:
        """Generate the first window; return the seconds of each step."""
        times = [clock(device)]
        generate(
            model, conditions, replace(sampler, steps=steps), guidance, range(batch), posterior,
            lambda: times.append(clock(device)),
        )  # fmt: skip
        return np.diff(times).tolist()

    # Counted before packing: PyTorch's counter does not know products with packed weights.
    flops = _flops(lambda: first_window(plain, 3)) - _flops(lambda: first_window(plain, 2))
    model = copy.deepcopy(plain)
    if precision == "bf16":
        convert_matrices(model, torch.bfloat16, FLOAT32_MODULES)
    prepare_inference(model, precision == "int8", device)
    times = take_turns(args.rounds, lambda: first_window(model), lambda: first_window(plain, posterior=paper_posterior))
    first = times[..., 0]  # it also prepares the conditions
    each = times[..., 1:]
    once = statistics.median(first[0] - np.median(each[0], 1))
    step = float(np.median(each[0]))
    reference = float(np.median(each[1]))
    count = len(sampling_windows(round(FPS * seconds), sampler))
    operators = _operators(lambda: first_window(model, 3))
    operators.subtract(_operators(lambda: first_window(model, 2)))
    window = max(0.0, once) + sampler.steps * step
    return {
        "model": "hicodit", "size": size, "batch": batch, "seconds": seconds, "sampler": preset,
        "precision": precision, "step_ms": 1e3 * step, "rtf": count * window / seconds / batch, "first_s": window,
        "evaluations": count * sampler.steps * len(guidance.branches), **operators,
        "peak_memory_mb": peak_memory_mb(device), "of_rate": flops / step / peak, "speed_up": reference / step,
    }  # fmt: skip


def build_talker(size: str) -> TalkerT2AV:
    """Return the network of configs/task/model/talker_t2av_SIZE.yaml with random weights."""
    torch.manual_seed(0)
    return TalkerT2AV(TalkerConfig(**read_config(f"task/model/talker_t2av_{size}"))).eval()


def random_request(model: TalkerT2AV, patches: int, seed: int) -> Request:
    """Return a t2av request of 40 prompt tokens that ends after exactly `patches` patches."""
    c = model.config
    g = torch.Generator().manual_seed(seed)
    return Request(
        prompt=torch.randint(0, c.llm["vocab_size"], (40,), generator=g).tolist(),
        speaker=torch.randn(c.speaker_dim, generator=g),
        speech=torch.zeros(0, c.speech_dim),
        motion=torch.zeros(0, c.motion_dim),
        first_motion=torch.randn(c.motion_dim, generator=g),
        max_patches=patches,
        min_patches=patches,
        seed=seed,
    )


@torch.inference_mode()
def talker(args: argparse.Namespace, size: str, batch: int, preset: str, rate: tuple[str, float]) -> dict[str, Any]:
    """Measure one setting of Talker-T2AV; see `hicodit`. The reference loop has a batch size of 1."""
    device = args.device
    patches = args.patches
    precision, peak = rate
    sampling = with_sampling(preset, Sampling())
    clock = now if args.wall else compute_time
    plain = build_talker(size).to(device)
    model = copy.deepcopy(plain)
    if precision == "bf16":
        model.to_precision(torch.bfloat16)
    fuse_layers(model)
    prepare_inference(model, precision == "int8", device)
    requests = [random_request(plain, patches, seed) for seed in range(batch)]

    def loop(model: TalkerT2AV) -> list[float]:
        """Return the seconds of each patch."""
        times = [clock(device)]
        decoder = BatchedDecoder(model, MODES["t2av"], sampling, batch, use_stop=False)
        decoder.generate(requests, on_step=lambda _: times.append(clock(device)))
        return np.diff(times).tolist()

    def official() -> list[float]:
        begin = clock(device)
        official_t2av(plain, requests[0], Sampling())
        return [(clock(device) - begin) / patches] * patches

    own, theirs = take_turns(args.rounds, lambda: loop(model), official)  # (rounds, patches)
    took = float(np.median(own.mean(1)))
    reference = float(np.median(theirs.mean(1)))
    flops = _flops(lambda: loop(plain)) / patches
    operators = _operators(lambda: loop(model))
    return {
        "model": "talker_t2av", "size": size, "batch": batch, "seconds": 0.16 * patches,
        "sampler": f"{sampling.steps} steps", "precision": precision, "step_ms": 1e3 * took,
        "rtf": took / 0.16 / batch, "first_s": float(np.median(own[:, 0])),
        "evaluations": 2 * (2 * (sampling.steps - 1) - sampling.unguided),
        **{k: round(v / patches) for k, v in operators.items()},
        "peak_memory_mb": peak_memory_mb(device), "of_rate": flops / took / peak,
        "speed_up": reference * batch / took, "reference_step_ms": 1e3 * reference,
    }  # fmt: skip


def stream(args: argparse.Namespace, lookahead: float) -> dict[str, Any]:
    """Measure the bundled HiCoDiT on the demo clip while its frames arrive."""
    pipeline = HiCoDiTPipeline.from_pretrained(device=args.device)
    list(pipeline.stream(CLIP, lookahead=lookahead))  # warms up
    begin = compute_time(args.device)
    firsts = []
    hops = []
    for _ in range(args.rounds):
        chunks = list(pipeline.stream(CLIP, lookahead=lookahead))
        firsts.append(chunks[0].compute)
        hops += [chunk.compute for chunk in chunks[1:-1]]
    seconds = sum(len(chunk.wave) for chunk in chunks) / pipeline.codec.sample_rate
    return {
        "model": "stream", "size": "bundled", "batch": 1, "seconds": seconds, "sampler": f"{lookahead:g} s ahead",
        "step_ms": 1e3 * statistics.median(hops), "rtf": (compute_time(args.device) - begin) / args.rounds / seconds,
        "first_s": statistics.median(firsts), "pictures_before_first_s": chunks[0].needed / FPS,
        "peak_memory_mb": peak_memory_mb(args.device),
    }  # fmt: skip


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw real-time factors as bars on a logarithmic axis."""
    names = [f"{r['model']} {r['size']}, {r['sampler']}, {r['seconds']:g} s x {r['batch']}" for r in rows]
    labels = list(dict.fromkeys(names))
    with chart_file(path, 1, 1, figsize=(9, 1 + 0.45 * len(labels))) as (axes,):
        for i, precision in enumerate(TYPES):
            factors = {name: r["rtf"] for name, r in zip(names, rows) if r.get("precision", "fp32") == precision}
            positions = np.arange(len(labels)) + 0.4 * i
            axes.barh(positions, [factors.get(name, np.nan) for name in labels], 0.38, label=precision)
        axes.set(xscale="log", xlabel="real-time factor (processor seconds for a second of speech; less is faster)")
        axes.set_yticks(np.arange(len(labels)) + 0.2, labels)
        axes.axvline(1, color="grey", linestyle=":")
        axes.invert_yaxis()
        axes.legend()


def take_turns(rounds: int, *ways: Callable[[], list[float]]) -> np.ndarray:
    """Return the durations (variants, rounds, steps) of variants that run alternately, after a warm-up round."""
    return np.array([[way() for way in ways] for _ in range(rounds + 1)][1:]).swapaxes(0, 1)


def _operators(call: Callable[[], Any]) -> Counter[str]:
    with Operators() as counted:
        call()
    reads = counted.names["_local_scalar_dense"]
    return Counter(operators=sum(counted.names.values()) - reads, host_reads=reads)


def _flops(call: Callable[[], Any]) -> int:
    with counter() as flops:
        call()
    return flops.get_total_flops()


def _line(row: dict[str, Any]) -> str:
    values = (row.get(name, "") for name in COLUMNS)
    return "  ".join(f"{value:.3g}".rjust(11) if isinstance(value, float) else str(value).rjust(11) for value in values)

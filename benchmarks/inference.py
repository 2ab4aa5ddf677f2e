"""Inference of both models, one table: speed, first sound, network evaluations, operators, host reads, memory.

Weights are random, the work is real. float32 and bfloat16 (and, for Talker-T2AV, a loop of the official program's
shape) take turns in one process, so that whatever else runs on the machine disturbs all alike; times are processor time
on a CPU. HiCoDiT: `--timed-steps` steps of the first window are timed, and a whole clip follows from the number of its
windows and steps; encoders and the codec's decoder are left out. Talker-T2AV: `--patches` patches of t2av after a
prompt of 40 tokens. `first_s`: seconds of computing before the first sound can be decoded: HiCoDiT's first window, or
Talker's first patch. `of_rate`: share of the machine's measured rate of matrix products in the same precision.
`step_ms`: a step (HiCoDiT) or a patch (Talker); `machine_ms`, `h200_ms`, `rtx4090_ms`: what it takes at least on this
machine and on cards that are not here, see `benchmarks/roofline.py`. `--minutes` measures the memory of whole clips
through encoders, sampler and codec.

    python -m benchmarks.inference              tiny models, a few minutes
    python -m benchmarks.inference --full       released sizes, 60 s and batches of 8, too
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import talker as talker_benchmark
from benchmarks.charts import chart_file
from benchmarks.common import compute_time, in_own_process, matrix_rate, peak_memory_mb
from benchmarks.official_talker import official_t2av
from benchmarks.roofline import bounds, this_machine, weight_bytes
from benchmarks.sampling import GUIDANCE, build
from engine.precision import convert_matrices, pack_linear
from engine.record import dated
from hicodit.conditions.types import Conditions, Crops, windows_of
from hicodit.generation import generate, windows
from hicodit.model import FLOAT32
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import SamplerConfig, with_preset
from talker_t2av.generation import PatchLoop
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import MODES, Sampling

LEAST = {"timed_steps": 2, "patches": 2, "rounds": 1, "seconds": 1.0, "batch": 1, "minutes": 0.1}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = ("model", "size", "batch", "seconds", "sampler", "precision", "rtf", "first_s", "evaluations", "operators",
           "host_reads", "peak_memory_mb", "of_rate", "to_official", "step_ms", "machine_ms", "h200_ms",
           "rtx4090_ms")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="also released sizes, 60 s, batches of 8")
    parser.add_argument("--models", nargs="+", choices=("hicodit", "talker_t2av"), default=["hicodit", "talker_t2av"])
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "base"), help="(None: tiny, with --full both)")
    parser.add_argument("--seconds", nargs="+", type=float, help="of HiCoDiT's clips (None: 2 10, with --full 2 10 60)")
    parser.add_argument("--batch", nargs="+", type=int, help="(None: 1, with --full 1 8)")
    parser.add_argument("--timed-steps", type=int, default=3, help="steps of HiCoDiT's samplers to time")
    parser.add_argument("--patches", type=int, default=4, help="patches of Talker-T2AV to time")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each precision takes; the median counts")
    parser.add_argument("--minutes", nargs="+", type=float, default=[], help="of clips whose memory is measured")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    sizes = args.sizes or (["tiny", "base"] if args.full else ["tiny"])
    lengths = args.seconds or ([2.0, 10.0, 60.0] if args.full else [2.0, 10.0])
    rates = {name: matrix_rate(args.device, dtype, compute_time) for name, dtype in TYPES.items()}
    job = {k: getattr(args, k) for k in ("timed_steps", "patches", "rounds", "device")} | {"rates": rates}
    job["machine"] = this_machine(rates, args.device, compute_time)
    rows, head = [], "  ".join(f"{name:>11}" for name in COLUMNS)
    yield {"matrix_rate_gflops": {k: round(v / 1e9) for k, v in rates.items()}}, head
    for size in sizes:
        for batch in args.batch or ([1, 8] if args.full else [1]):
            settings = []
            if "hicodit" in args.models:
                settings += [(hicodit, {"seconds": s, "sampler": k}) for s in lengths for k in ("paper", "fast")]
            if "talker_t2av" in args.models:
                settings += [(talker, {})]
            for measure, more in settings:
                for row in in_own_process(measure, job | {"size": size, "batch": batch} | more):
                    rows.append(row)
                    yield row, "  ".join(f"{_shown(row.get(name)):>11}" for name in COLUMNS)
    for minutes in args.minutes:
        memory = in_own_process(whole_clip, minutes, str(args.device))
        yield memory, f"whole clip of {minutes:g} min, tiny: {memory['peak_memory_mb']:.0f} MB"
    if rows:
        chart(rows, dated(args.out, f"inference-{args.device.type}.png"))


class Counted(TorchDispatchMode):
    """Counts operators, and values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def figures(self) -> dict[str, int]:
        reads = self.names["aten::_local_scalar_dense"]
        return {"operators": sum(self.names.values()) - reads, "host_reads": reads}


@torch.inference_mode()
def hicodit(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one setting of HiCoDiT, a precision each."""
    device, batch, seconds, steps = torch.device(job["device"]), job["batch"], job["seconds"], job["timed_steps"]
    sampler, guidance = with_preset(job["sampler"], SamplerConfig(), GUIDANCE)
    models, weights, frames = {}, {}, round(25 * min(seconds, sampler.window))
    for name, dtype in TYPES.items():
        models[name] = convert_matrices(build(job["size"]).model.to(device), dtype, FLOAT32)
        weights[name] = weight_bytes(models[name])
    c = models["fp32"].config
    conditions = Conditions(
        torch.randn(batch, frames, c.lip_dim, device=device), torch.rand(batch, 256, device=device),
        torch.randint(0, 7, (batch, windows_of(frames)), device=device), torch.full((batch,), frames, device=device),
    )  # fmt: skip

    def window(name: str, on_step: Callable[[int], None], steps: int = steps) -> None:
        generate(models[name], conditions, replace(sampler, steps=steps), guidance, range(batch), on_step=on_step)

    # Before the weights are packed: PyTorch's counter does not know products with packed weights.
    flops = _per_step(lambda n: _flops(lambda: window("fp32", lambda _: None, n)))
    for model in models.values():
        pack_linear(model, device)
    each: dict[str, list[float]] = {name: [] for name in TYPES}
    once: dict[str, list[float]] = {name: [] for name in TYPES}
    for turn in range(job["rounds"] + 1):  # the first turn warms up
        for name in TYPES:
            times = [compute_time(device)]
            window(name, lambda _, times=times: times.append(compute_time(device)))
            if turn:
                durations = np.diff(times).tolist()
                each[name] += durations[1:]
                once[name].append(durations[0] - statistics.median(durations[1:]))
    rounds, total = len(windows(round(25 * seconds), sampler)), sampler.steps
    rows = []
    for name in TYPES:
        step, before = statistics.median(each[name]), max(0.0, statistics.median(once[name]))
        figures = _per_step(lambda n, name=name: _operators(lambda: window(name, lambda _: None, n)))
        whole = rounds * (before + total * step)
        rows.append({
            "model": "hicodit", "size": job["size"], "batch": batch, "seconds": seconds, "sampler": job["sampler"],
            "precision": name, "step_ms": 1e3 * step, "rtf": whole / seconds / batch, "first_s": before + total * step,
            "evaluations": rounds * total * len(guidance.branches), **figures, "peak_memory_mb": peak_memory_mb(device),
            "of_rate": flops["flops"] / step / job["rates"][name],
            **bounds(job["machine"], name, flops["flops"], weights[name]),
        })  # fmt: skip
    return rows


def _patch_bytes(model: TalkerT2AV, steps: int) -> int:
    """Weights that a patch reads: all once, and those of the heads in each step of the solver but the first."""
    heads = weight_bytes(model.speech_cfm) + weight_bytes(model.motion_cfm)
    return weight_bytes(model) + (steps - 2) * heads


@torch.inference_mode()
def talker(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of Talker-T2AV, a precision each; the loop of the official program's shape runs for one row of a batch."""
    device, batch, patches = torch.device(job["device"]), job["batch"], job["patches"]
    sampling = Sampling()

    def build_model(dtype: torch.dtype) -> TalkerT2AV:
        torch.manual_seed(0)
        return talker_benchmark.build(job["size"]).eval().to(device).to_precision(dtype)

    plain, models, read = build_model(torch.float32), {}, {}
    for name, dtype in TYPES.items():
        models[name] = build_model(dtype)
        read[name] = _patch_bytes(models[name], sampling.steps)
        pack_linear(models[name], device)
    requests = [talker_benchmark.random_request(plain, patches, seed, 40) for seed in range(batch)]
    requests = [replace(request, min_patches=patches) for request in requests]  # none ends before

    def loop(model: TalkerT2AV) -> list[float]:
        times = [compute_time(device)]
        for _ in PatchLoop(model, requests, MODES["t2av"], sampling, use_stop=False):
            times.append(compute_time(device))
        return np.diff(times).tolist()

    def official() -> list[float]:
        begin = compute_time(device)
        official_t2av(plain, requests[0], sampling)
        return [(compute_time(device) - begin) / patches] * patches

    ways: dict[str, Callable[[], list[float]]] = {name: lambda name=name: loop(models[name]) for name in TYPES}
    each: dict[str, list[list[float]]] = {name: [] for name in (*ways, "official")}
    for turn in range(job["rounds"] + 1):
        for name, way in (ways | ({"official": official} if device.type == "cpu" else {})).items():
            durations = way()
            if turn:
                each[name].append(durations)
    rows = []
    reference = statistics.median(sum(d) / patches for d in each["official"]) if each["official"] else None
    flops = _flops(lambda: loop(plain))["flops"] / patches
    for name in TYPES:
        mean = statistics.median(sum(d) / patches for d in each[name])
        operators = _operators(lambda name=name: loop(models[name]))
        rows.append({
            "model": "talker_t2av", "size": job["size"], "batch": batch, "seconds": 0.16 * patches,
            "sampler": f"{sampling.steps} steps", "precision": name, "step_ms": 1e3 * mean, "rtf": mean / 0.16 / batch,
            "first_s": statistics.median(d[0] for d in each[name]), "evaluations": 2 * 2 * (sampling.steps - 1),
            **{k: round(v / patches) for k, v in operators.items()}, "peak_memory_mb": peak_memory_mb(device),
            "of_rate": flops / mean / job["rates"][name], "to_official": reference and reference * batch / mean,
            **bounds(job["machine"], name, flops, read[name]),
        })  # fmt: skip
    return rows


def whole_clip(minutes: float, device: str) -> dict[str, Any]:
    """Peak memory of a clip of the bundled model, from cut pictures to sound; the sampler takes two steps."""
    pipeline = HiCoDiTPipeline.from_pretrained(device=device)
    frames, rng = round(1500 * minutes), np.random.default_rng(0)
    mouth = rng.integers(0, 255, (frames, 48, 48), np.uint8)
    crops = Crops(mouth, rng.integers(0, 255, (frames, 64, 64, 3), np.uint8))
    sampler, pipeline.guidance = with_preset("fast", pipeline.sampler, pipeline.guidance)
    wave = pipeline.run([crops], [0], sampler=replace(sampler, steps=2))[0].wave
    return {"minutes": minutes, "sound_s": len(wave) / 24_000, "peak_memory_mb": peak_memory_mb(device)}


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Real-time factors as bars, on a logarithmic axis."""
    names = [f"{r['model']} {r['size']}, {r['sampler']}, {r['seconds']:g} s x {r['batch']}" for r in rows]
    labels = list(dict.fromkeys(names))
    with chart_file(path, figsize=(9, 1 + 0.45 * len(labels))) as (_, axes):
        for i, precision in enumerate(TYPES):
            own = {name: r["rtf"] for name, r in zip(names, rows) if r["precision"] == precision}
            place = np.arange(len(labels)) + 0.4 * i
            axes.barh(place, [own.get(name, np.nan) for name in labels], 0.38, label=precision)
        axes.set(xscale="log", xlabel="real-time factor (processor seconds for a second of speech; less is faster)")
        axes.set_yticks(np.arange(len(labels)) + 0.2, labels)
        axes.axvline(1, color="grey", linestyle=":")
        axes.invert_yaxis()
        axes.legend()


def _operators(call: Callable[[], Any]) -> dict[str, int]:
    with Counted() as counted:
        call()
    return counted.figures


def _flops(call: Callable[[], Any]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        call()
    return {"flops": counter.get_total_flops()}


def _per_step(measure: Callable[[int], dict[str, int]]) -> dict[str, int]:
    """What one more step adds."""
    few, more = measure(2), measure(3)
    return {name: more[name] - few[name] for name in more}


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from scripts.benchmark import main

    sys.argv.insert(1, "inference")
    main()

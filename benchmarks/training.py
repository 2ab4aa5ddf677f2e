"""Training steps of both models: time and memory by part, tokens/s and MFU, for several batch sizes.

    python scripts/benchmark.py training --batches 1           # a step of both base models on the processor
    python scripts/benchmark.py training --batches 1 2 4 8 16 --compile both --checkpointing both --precision bf16

Weights and data are random, as speed depends on neither. On CUDA, a batch size that does not fit is reported, and
larger ones are skipped. Each setting runs in a separate process. Utilisation (MFU) is relative to `--peak-tflops`, else
to the data sheet's peak of a known GPU, else to the measured rate of float32 matrix products.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import in_own_process, matrix_rate, nbytes, now, read_config, tiny_encoders
from engine.training import distributed
from engine.training.ema import ExponentialMovingAverage
from engine.training.parallel import ParallelTask, adamw
from engine.training.settings import TrainerConfig
from engine.training.speed import Utilisation, memory_gib, peak_tflops
from engine.training.task import Task
from hicodit.conditions.types import windows_of
from hicodit.model import TOKENS_PER_FRAME
from hicodit.task import HiCoDiTTask
from rvq_codec import RVQCodec, RVQCodecConfig
from talker_t2av.task import TalkerTask

SWITCH = {"off": (False,), "on": (True,), "both": (False, True)}
LEAST = {"steps": 1, "batches": 1, "warmup": 0, "seconds": 0.2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to measure")
    parser.add_argument("--size", default="base", choices=("tiny", "base"), help="size of the models")
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=2.4, help="seconds of each row")
    parser.add_argument("--compile", choices=SWITCH, default="off", help="torch.compile")
    parser.add_argument("--checkpointing", choices=SWITCH, default="off", help="recompute activations")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the networks")
    parser.add_argument("--ema-decay", type=float, default=0.0, help="decay of the averaged weights; 0: no averaging")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps after the first one")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device, for the utilisation")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    peak = peak_tflops(args.peak_tflops, args.device) or matrix_rate(args.device) / 1e12
    names = ("size", "seconds", "precision", "ema_decay", "warmup", "steps")
    shared = {name: getattr(args, name) for name in names} | {"device": args.device.type, "peak_tflops": peak}
    for model, compiled, recomputed in itertools.product(args.models, SWITCH[args.compile], SWITCH[args.checkpointing]):
        for batch in sorted(args.batches):
            job = shared | {"model": model, "batch": batch, "compile": compiled, "checkpointing": recomputed}
            result = in_own_process(measure, job)
            yield result, line(result)
            if result.get("out_of_memory"):
                break


def build_task(
    name: str, freeze_embeddings: bool = True, encoders: dict[str, Any] | None = None, **changes: Any
) -> Task:
    """The training task of configs/model/NAME.yaml with random weights: speed does not depend on them.

    HiCoDiT has the given encoders, else tiny ones; Talker's word embeddings are frozen or not, by default frozen as in
    the released recipe.
    """
    model = read_config(f"model/{name}") | changes
    if name.startswith("talker"):
        return TalkerTask(model, {}, freeze_embeddings=freeze_embeddings)
    with TemporaryDirectory() as folder:  # the task reads a tokenizer's sizes
        sizes = RVQCodecConfig(encoder_width=4, levels=model["levels"], codebook_size=model["codes"])
        RVQCodec(sizes).save(f"{folder}/codec", "")
        encoders = encoders or tiny_encoders(model) | {"phonemes": 48}
        return HiCoDiTTask(model, encoders, f"{folder}/codec", "", None)


def hicodit_batch(task: Task, rows: int, seconds: float) -> dict[str, Tensor]:
    frames, model, size = round(25 * seconds), task.system.model.config, task.system.encoders.config
    return {
        "mouth": torch.rand(rows, frames, size.mouth_size, size.mouth_size),
        "face": torch.rand(rows, 3, size.face_size, size.face_size),
        "tokens": torch.randint(model.codes, (rows, model.levels, TOKENS_PER_FRAME * frames)),
        "ge2e": torch.rand(rows, 256),
        "expression": torch.randint(7, (rows, windows_of(frames))),
        "face_expression": torch.randint(7, (rows,)),
        "phoneme": torch.randint(48, (rows, frames)),
        "frames": torch.full((rows,), frames),
    }


def talker_batch(task: Task, rows: int, seconds: float) -> dict[str, Tensor]:
    """Rows of T2AV (the first half) and of TTS, three words a second."""
    c, frames, words = task.model.config, round(25 * seconds), max(1, round(3 * seconds))
    patches = -(-frames // c.patch_size)
    with_motion = torch.arange(rows) < -(-rows // 2)
    return {
        "input_ids": torch.randint(200, (rows, words + patches)),
        "attention_mask": torch.ones(rows, words + patches, dtype=torch.long),
        "speech_span": torch.tensor([[words, words + patches]]).expand(rows, -1).clone(),
        "speech": torch.randn(rows, frames, c.speech_dim),
        "speech_frames": torch.full((rows,), frames),
        "motion": torch.randn(rows, patches * c.patch_size, c.motion_dim) * with_motion[:, None, None],
        "motion_frames": frames * with_motion.long(),
        "speaker": torch.randn(rows, c.speaker_dim),
    }


MODELS: dict[str, tuple[str, Callable[..., dict[str, Tensor]], tuple[str, ...]]] = {
    "hicodit": (
        "hicodit",
        hicodit_batch,
        ("system.encoders.lip", "system.model.stages.0", "system.model.stages.1"),
    ),
    "talker": (
        "talker_t2av",
        talker_batch,
        (
            "model.llm.model", "model.speech_patch_encoder", "model.motion_patch_encoder",
            "model.speech_cfm.estimator", "model.motion_cfm.estimator",
        ),
    ),
}  # fmt: skip


class Clock:
    """Sums of seconds by name; waits for the device."""

    def __init__(self, device: torch.device):
        self.device, self.sums, self.last = device, defaultdict(float), 0.0

    def start(self) -> None:
        self.last = now(self.device)

    def stop(self, name: str) -> None:
        """Time since the last start or stop goes to `name`."""
        before, self.last = self.last, now(self.device)
        self.sums[name] += self.last - before


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One setting: seconds of each part of a step (mean), forward seconds by module, GiB by part, tokens/s, MFU."""
    device = distributed.init(job["device"])
    name, make_batch, modules = MODELS[job["model"]]
    settings = {name: job[name] for name in ("precision", "device", "compile", "checkpointing", "ema_decay")}
    config = TrainerConfig(**settings)
    task = build_task(f"{name}_{job['size']}", **job.get("changes", {})).to(device).train()
    parallel = ParallelTask(task, config, device)
    (part, module), *_ = task.parts().items()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser, ema = adamw(parameters, config), ExponentialMovingAverage(task, config.ema_decay)
    batch = {k: v.to(device) for k, v in make_batch(task, job["batch"], job["seconds"]).items()}
    tokens, clock, use = task.tokens(batch), Clock(device), Utilisation(job["peak_tflops"])
    losses: list[float] = []

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return parallel.losses(batch, part)["loss"]

    def step() -> int:
        clock.start()
        loss = forward()
        clock.stop("forward")
        loss.backward()
        clock.stop("backward")
        parallel.clip(parameters, 1.0)
        clock.stop("clip")
        optimiser.step()
        clock.stop("optimiser")
        ema.update(0)
        optimiser.zero_grad()
        clock.stop("average")
        losses.append(float(loss.detach()))
        return tokens

    try:
        use.count(step)
        for _ in range(job["warmup"]):
            step()
        clock.sums.clear()
        for _ in range(job["steps"]):
            step()
        peak = memory_gib(device)
    except torch.cuda.OutOfMemoryError:
        return {**job, "out_of_memory": True}
    seconds = {name: value / job["steps"] for name, value in clock.sums.items()}
    whole = sum(seconds.values())
    memory = {
        "weights": nbytes(task.parameters()) / 2**30,
        "gradients": nbytes(parameters) / 2**30,
        "optimiser": nbytes(t for state in optimiser.state.values() for t in state.values()) / 2**30,
        "average": nbytes(ema.averages.values()) / 2**30,
    }
    inside = Clock(device)
    for name in modules:
        _time_forward(task.get_submodule(name), name, inside)
    with torch.no_grad():
        forward()
    return {
        **job,
        "parameters_m": sum(p.numel() for p in task.parameters()) / 1e6,
        "tokens": tokens,
        "loss": losses[-1],
        "step_s": whole,
        "tokens_per_s": tokens / whole,
        **use.share(tokens, 1, whole),
        "seconds_by_part": seconds,
        "forward_seconds_by_module": dict(inside.sums),
        "peak_gib": peak,
        "gib_by_part": memory | {"activations and the rest": peak - sum(memory.values())},
    }


def _time_forward(module: nn.Module, name: str, clock: Clock) -> None:
    begun: list[float] = []

    def end(*_: Any) -> None:
        clock.sums[name] += now(clock.device) - begun.pop()

    module.register_forward_pre_hook(lambda *_: begun.append(now(clock.device)))
    module.register_forward_hook(end)


def line(r: dict[str, Any]) -> str:
    how = f"{r['model']} {r['size']}, batch {r['batch']} x {r['seconds']:g} s, {r['precision']}"
    how += ", compiled" * r["compile"] + ", recomputed" * r["checkpointing"]
    if r.get("out_of_memory"):
        return f"{how}: does not fit"
    parts = ", ".join(f"{name} {value:.2f}" for name, value in r["seconds_by_part"].items())
    memory = ", ".join(f"{name} {value:.1f}" for name, value in r["gib_by_part"].items())
    return (
        f"{how}: {r['step_s']:.2f} s a step ({parts}), {r['tokens_per_s']:,.0f} tokens/s, MFU {r['mfu']:.0%}, "
        f"{r['peak_gib']:.1f} GiB ({memory})"
    )

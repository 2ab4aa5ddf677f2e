"""Training steps of both models: time and memory by part, tokens/s and MFU, for several batch sizes.

    python scripts/benchmark.py training --batches 1           # a step of both base models on the CPU
    python scripts/benchmark.py training --batches 1 2 4 8 16 --compile both --checkpointing both --precision bf16

Weights and data are random, as speed depends on neither. On CUDA, a batch size that does not fit is reported, and
larger ones are skipped. Each setting runs in a separate process. Utilisation (MFU) is relative to `--peak-tflops`, else
to the data sheet's peak of a known GPU, else to the measured rate of float32 matrix products.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import in_own_process, matrix_rate, nbytes, now, read_config, tiny_encoders
from engine.arguments import within
from engine.training import distributed
from engine.training.ema import ExponentialMovingAverage
from engine.training.parallel import ParallelTask, adamw
from engine.training.settings import TrainerConfig
from engine.training.speed import Utilisation, memory_gib, peak_tflops
from engine.training.task import Task
from hicodit.conditions.types import num_expression_windows
from hicodit.model import TOKENS_PER_FRAME
from hicodit.task import HiCoDiTTask
from rvq_codec import RVQCodec, RVQCodecConfig
from talker_t2av.task import TalkerTask

MODELS = ("hicodit", "talker_t2av")
PARTS = ("forward", "backward", "clip", "optimiser", "average")  # of a step
SWITCH = {"off": (False,), "on": (True,), "both": (False, True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="models to measure")
    parser.add_argument("--size", default="base", choices=("tiny", "base"), help="size of the models")
    parser.add_argument("--batches", nargs="+", type=within(1), default=[1], help="batch sizes")
    parser.add_argument("--seconds", type=within(0.2, kind=float), default=2.4, help="duration of each row in seconds")
    parser.add_argument("--compile", choices=SWITCH, default="off", help="torch.compile")
    parser.add_argument("--checkpointing", choices=SWITCH, default="off", help="recompute activations")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the networks")
    parser.add_argument(
        "--ema-decay", type=within(0, 0.999999, float), default=0.0, help="decay of the averaged weights; 0: none"
    )
    parser.add_argument("--warmup", type=within(0), default=1, help="untimed steps after the first one")
    parser.add_argument("--steps", type=within(1), default=3, help="timed steps")
    parser.add_argument("--peak-tflops", type=within(0.001, kind=float), help="peak of the device, for the utilisation")


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
    name: str, size: str, /, freeze_embeddings: bool = True, encoders: dict[str, Any] | None = None, **changes: Any
) -> Task:
    """Return the training task of configs/task/model/NAME_SIZE.yaml with random weights. NAME is one of `MODELS`.

    HiCoDiT has the given encoders, else tiny ones; Talker's word embeddings are frozen or not, by default frozen as in
    the released recipe.
    """
    model = read_config(f"task/model/{name}_{size}") | changes
    if name == "talker_t2av":
        tokenizer = {"kind": "phonemes", "language": "en-us"} if model.get("phonemes") else None
        return TalkerTask(model, {}, tokenizer=tokenizer, freeze_embeddings=freeze_embeddings)
    with TemporaryDirectory() as folder:  # the task reads a tokenizer's sizes
        sizes = RVQCodecConfig(encoder_width=4, levels=model["levels"], codebook_size=model["codes"])
        RVQCodec(sizes).save_pretrained(f"{folder}/codec", "")
        encoders = encoders or tiny_encoders(model) | {"phonemes": 48}
        return HiCoDiTTask(model, encoders, f"{folder}/codec", "", None)


def random_batch(task: Task, rows: int, seconds: float) -> dict[str, Tensor]:
    """Return a random batch of `rows` samples. Those of Talker-T2AV have three words per second; half of them are T2AV,
    the others TTS."""
    frames = round(25 * seconds)
    if isinstance(task, HiCoDiTTask):
        model = task.system.model.config
        size = task.system.encoders.config
        return {
            "mouth": torch.rand(rows, frames, size.mouth_size, size.mouth_size),
            "face": torch.rand(rows, 3, size.face_size, size.face_size),
            "tokens": torch.randint(model.codes, (rows, model.levels, TOKENS_PER_FRAME * frames)),
            "ge2e": torch.rand(rows, 256),
            "expression": torch.randint(7, (rows, num_expression_windows(frames))),
            "face_expression": torch.randint(7, (rows,)),
            "phoneme": torch.randint(48, (rows, frames)),
            "frames": torch.full((rows,), frames),
        }
    c = task.model.config
    words = max(1, round(3 * seconds))
    patches = -(-frames // c.patch_size)
    with_motion = torch.arange(rows) < -(-rows // 2)
    return {
        "input_ids": torch.randint(c.llm["vocab_size"], (rows, words + patches)),
        "attention_mask": torch.ones(rows, words + patches, dtype=torch.long),
        "speech_span": torch.tensor([[words, words + patches]]).expand(rows, -1).clone(),
        "speech": torch.randn(rows, frames, c.speech_dim),
        "speech_frames": torch.full((rows,), frames),
        "motion": torch.randn(rows, patches * c.patch_size, c.motion_dim) * with_motion[:, None, None],
        "motion_frames": frames * with_motion.long(),
        "speaker": torch.randn(rows, c.speaker_dim),
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one setting: mean seconds of each part of a step, GiB by part, tokens/s and MFU."""
    device = distributed.init(job["device"])
    settings = {name: job[name] for name in ("precision", "device", "compile", "checkpointing", "ema_decay")}
    config = TrainerConfig(**settings)
    task = build_task(job["model"], job["size"], **job.get("changes", {})).to(device).train()
    parallel = ParallelTask(task, config, device)
    (part, module), *_ = task.parts().items()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = adamw(parameters, config)
    ema = ExponentialMovingAverage(task, config.ema_decay)
    batch = random_batch(task, job["batch"], job["seconds"])
    batch = {name: x if name in task.on_host else x.to(device) for name, x in batch.items()}
    tokens = task.tokens(batch)
    use = Utilisation(job["peak_tflops"])
    durations: list[np.ndarray] = []

    def step() -> int:
        """Run a training step, record the seconds of its `PARTS`, and return the number of tokens."""
        times = [now(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = parallel.losses(batch, part)["loss"]
        times.append(now(device))
        loss.backward()
        times.append(now(device))
        parallel.clip(parameters, 1.0)
        times.append(now(device))
        optimiser.step()
        times.append(now(device))
        ema.update(0)
        optimiser.zero_grad()
        times.append(now(device))
        durations.append(np.diff(times))
        return tokens

    try:
        with use.counting():
            use.tokens = step()
        for _ in range(job["warmup"] + job["steps"]):
            step()
        seconds = np.mean(durations[-job["steps"] :], 0).tolist()
        peak = memory_gib(device)
    except torch.cuda.OutOfMemoryError:
        return {**job, "out_of_memory": True}
    memory = {
        "weights": nbytes(task.parameters()) / 2**30,
        "gradients": nbytes(parameters) / 2**30,
        "optimiser": nbytes(t for state in optimiser.state.values() for t in state.values()) / 2**30,
        "average": nbytes(ema.averages.values()) / 2**30,
    }
    return {
        **job,
        "parameters_m": sum(p.numel() for p in task.parameters()) / 1e6,
        "tokens": tokens,
        "step_s": sum(seconds),
        "tokens_per_s": tokens / sum(seconds),
        **use.share(tokens, 1, sum(seconds)),
        "seconds_by_part": dict(zip(PARTS, seconds)),
        "peak_gib": peak,
        "gib_by_part": memory | {"activations and the rest": peak - sum(memory.values())},
    }


def line(r: dict[str, Any]) -> str:
    how = f"{r['model']} {r['size']}, batch {r['batch']} x {r['seconds']:g} s, {r['precision']}"
    how += ", compiled" * r["compile"] + ", recomputed" * r["checkpointing"]
    if r.get("out_of_memory"):
        return f"{how}: does not fit"
    parts = ", ".join(f"{name} {value:.2f}" for name, value in r["seconds_by_part"].items())
    memory = ", ".join(f"{name} {value:.1f}" for name, value in r["gib_by_part"].items())
    return (
        f"{how}: {r['step_s']:.2f} s per step ({parts}), {r['tokens_per_s']:,.0f} tokens/s, MFU {r['mfu']:.0%}, "
        f"{r['peak_gib']:.1f} GiB ({memory})"
    )

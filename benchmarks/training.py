"""Measure training steps of the base models: time and memory by part, tokens/s and MFU, by batch size.

    python -m benchmarks.training --batches 1                  # a step of both base models on the processor
    python -m benchmarks.training --batches 1 2 4 8 16 32 64 --compile both --checkpointing both --precision bf16

Weights and data are random: speed depends on neither. On CUDA batch sizes that do not fit are said so, and larger ones
left out. Each setting runs in a process of its own, so that its peak memory is its own. Utilisation (MFU) is against
`--peak-tflops`, else the data sheet's figure of a known GPU, else the machine's own float32 matrix products.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.record import write_record
from benchmarks.sampling import matrix_rate
from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from engine.training import distributed
from engine.training.ema import ExponentialMovingAverage
from engine.training.parallel import ParallelTask, adamw
from engine.training.speed import Utilisation, memory_gib, peak_tflops
from engine.training.task import Task, TrainerConfig
from hicodit.model import TOKENS_PER_FRAME
from hicodit.task import HiCoDiTTask
from rvq_codec import RVQCodec, RVQCodecConfig
from talker_t2av.task import TalkerTask

SWITCH = {"off": (False,), "on": (True,), "both": (False, True)}


def read_config(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))


def hicodit(size: str) -> Task:
    """With the tiny encoders at the widths of the released ones."""
    model = read_config(f"model/hicodit_{size}")
    encoders = {"lip_dim": model["lip_dim"], "lip_heads": model["lip_dim"] // 32, "face_dim": model["face_dim"]}
    codec = RVQCodec(RVQCodecConfig(encoder_width=4, levels=model["levels"], codebook_size=model["codes"]))
    with TemporaryDirectory() as folder:  # the task asks a tokenizer for its sizes
        return HiCoDiTTask(model, encoders | {"phonemes": 48}, str(codec.save(Path(folder) / "codec", "")), "", None)


def hicodit_batch(task: HiCoDiTTask, rows: int, seconds: float) -> dict[str, Tensor]:
    frames, model, size = round(25 * seconds), task.system.model.config, task.system.encoders.config
    return {
        "mouth": torch.rand(rows, frames, size.mouth_size, size.mouth_size),
        "face": torch.rand(rows, 3, size.face_size, size.face_size),
        "tokens": torch.randint(model.codes, (rows, model.levels, TOKENS_PER_FRAME * frames)),
        "ge2e": torch.rand(rows, 256),
        "expression": torch.randint(7, (rows,)),
        "phoneme": torch.randint(48, (rows, frames)),
        "frames": torch.full((rows,), frames),
    }


def talker(size: str) -> Task:
    """The word embeddings are frozen, as in the released recipe."""
    return TalkerTask(read_config(f"model/talker_t2av_{size}"), {}, freeze_embeddings=True)


def talker_batch(task: TalkerTask, rows: int, seconds: float) -> dict[str, Tensor]:
    """As many rows of T2AV as of TTS (the first half), three words a second."""
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


MODELS: dict[str, tuple[Callable[[str], Task], Callable[..., dict[str, Tensor]], tuple[str, ...]]] = {
    "hicodit": (hicodit, hicodit_batch, ("system.encoders.lip", "system.model.stages.0", "system.model.stages.1")),
    "talker": (
        talker,
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

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.last = self.now()

    def stop(self, name: str) -> None:
        """Time since the last start or stop goes to `name`."""
        before, self.last = self.last, self.now()
        self.sums[name] += self.last - before


def gib(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**30


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One setting: seconds of each part of a step (mean), forward seconds by module, GiB by part, tokens/s, MFU."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = distributed.init(job["device"])
    make, make_batch, modules = MODELS[job["model"]]
    settings = {name: job[name] for name in ("precision", "device", "compile", "checkpointing", "ema_decay")}
    config = TrainerConfig(**read_config("trainer/cpu") | settings)
    task = make(job["size"]).to(device).train()
    parallel = ParallelTask(task, config, device)
    (part, module), *_ = task.parts().items()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser, ema = adamw(parameters, config), ExponentialMovingAverage(task, config.ema_decay)
    batch = {k: v.to(device) for k, v in make_batch(task, job["batch"], job["seconds"]).items()}
    tokens, clock, use = task.tokens(batch), Clock(device), Utilisation(job["peak_tflops"])

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return parallel.losses(batch, part)["loss"]

    def step() -> float:
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
        return float(loss.detach())

    try:
        with use.counting(tokens):
            step()
        for _ in range(job["warmup"]):
            step()
        clock.sums.clear()
        losses = [step() for _ in range(job["steps"])]
        peak = memory_gib(device)
    except torch.cuda.OutOfMemoryError:
        return {**job, "out_of_memory": True}
    seconds = {name: value / job["steps"] for name, value in clock.sums.items()}
    whole = sum(seconds.values())
    memory = {
        "weights": gib(task.parameters()),
        "gradients": gib(parameters),
        "optimiser": gib(t for state in optimiser.state.values() for t in state.values()),
        "average": gib(ema.averages.values()),
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
    module.register_forward_pre_hook(lambda *_: begun.append(clock.now()))
    module.register_forward_hook(lambda *_: clock.sums.__setitem__(name, clock.sums[name] + clock.now() - begun.pop()))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="rows of a batch (default: 1)")
    parser.add_argument("--seconds", type=float, default=2.4, help="of each row (default: %(default)s)")
    parser.add_argument("--compile", choices=SWITCH, default="off", help="torch.compile (default: %(default)s)")
    parser.add_argument("--checkpointing", choices=SWITCH, default="off", help="recompute (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--ema-decay", type=float, default=0.0, help="0 keeps no average (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before, after a first one (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--peak-tflops", type=float, help="that utilisation is measured against")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.threads, *args.batches) < 1 or args.warmup < 0 or args.seconds < 0.2:
        raise UserError("--steps, --threads and --batches must be at least 1, --seconds at least 0.2")
    torch.set_num_threads(args.threads)
    device = distributed.pick_device(args.device)
    peak = peak_tflops(args.peak_tflops, device) or matrix_rate(device) / 1e12
    names = ("size", "seconds", "precision", "ema_decay", "warmup", "steps", "threads")
    shared = {name: getattr(args, name) for name in names} | {"device": device.type, "peak_tflops": peak}
    results = []
    for model, compiled, recomputed in itertools.product(args.models, SWITCH[args.compile], SWITCH[args.checkpointing]):
        for batch in sorted(args.batches):
            job = shared | {"model": model, "batch": batch, "compile": compiled, "checkpointing": recomputed}
            with get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (job,)))
            print(line(results[-1]), flush=True)
            if results[-1].get("out_of_memory"):
                break
    print(write_record(args.out, f"training-{args.size}-{device.type}", "training steps", results, device.type))


if __name__ == "__main__":
    run_cli(main)

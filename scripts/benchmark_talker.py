"""Measure Talker-T2AV against the plain reading of the method.

    python scripts/benchmark_talker.py training              # tiny, batches of 8, one thread

training: a forward and backward pass of the batched training forward and of the loop over rows and patches
(scripts/plain_talker.py), on the same batches and draws, in turn; the losses must agree. Half of the rows are T2AV,
lengths are drawn between `--shortest` and `--longest`. Times are processor time, which other programs disturb less.

Axes: none beyond those of talker_t2av/losses.py.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from scripts.plain_talker import plain_losses
from scripts.record import write_record
from talker_t2av.flow_matching import FlowDraws
from talker_t2av.losses import TalkerBatch, training_forward, training_losses
from talker_t2av.model import FPS, TalkerConfig, TalkerT2AV

PROMPT, TAIL = 10, 1  # tokens before and after the placeholders
AGREE = 1e-4  # relative


def build(name: str) -> TalkerT2AV:
    """configs/model/talker_t2av_NAME.yaml with random weights: speed does not depend on them."""
    path = CONFIGS / "model" / f"talker_t2av_{name}.yaml"
    if not path.is_file():
        raise UserError(f"--model {name} is unknown: there is no {path}")
    torch.manual_seed(0)
    return TalkerT2AV(TalkerConfig(**OmegaConf.to_container(OmegaConf.load(path))))


def random_batch(model: TalkerT2AV, rows: int, shortest: float, longest: float) -> TalkerBatch:
    """`rows` rows between so many seconds, every second one T2AV."""
    c = model.config
    frames = torch.linspace(FPS * shortest, FPS * longest, rows).long()
    slots = -(-frames // c.patch_size)
    motion = torch.where(torch.arange(rows) % 2 == 0, frames // c.patch_size * c.patch_size, 0)
    lengths, total = PROMPT + slots + TAIL, int(PROMPT + slots.max() + TAIL)
    return TalkerBatch(
        input_ids=torch.randint(0, c.llm["vocab_size"], (rows, total)),
        attention_mask=(torch.arange(total) < lengths[:, None]).long(),
        speech_span=torch.stack([torch.full_like(slots, PROMPT), PROMPT + slots], 1),
        speech=torch.randn(rows, int(frames.max()), c.speech_dim),
        speech_frames=frames,
        motion=torch.randn(rows, int(motion.max()), c.motion_dim),
        motion_frames=motion,
        speaker=torch.randn(rows, c.speaker_dim),
    )


def measure_training(args: argparse.Namespace) -> dict:
    """Seconds of a step, batched and plain, and their ratio."""
    model = build(args.model).train()
    batch = random_batch(model, args.batch, args.shortest, args.longest)
    with torch.no_grad():
        examples = training_forward(model, batch)
    draws = {name: FlowDraws.sample(getattr(examples, name).x1) for name in ("speech", "motion")}
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "batched": lambda: training_losses(model, training_forward(model, batch), **draws),
        "plain": lambda: plain_losses(model, batch, **draws),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for repeat in range(args.repeats + 1):
        for name, way in ways.items():
            begin = time.process_time()
            loss = way()["loss"]
            loss.backward()
            if repeat:  # the first one warms up
                seconds[name].append(time.process_time() - begin)
            model.zero_grad()
            losses[name] = float(loss.detach())
    if abs(losses["batched"] - losses["plain"]) > AGREE * abs(losses["plain"]):
        raise UserError(f"the losses differ: {losses['batched']} batched, {losses['plain']} plain")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds_a_step": medians,
        "ratio": medians["plain"] / medians["batched"],
        "examples": {name: len(value.x1) for name, value in (("speech", examples.speech), ("motion", examples.motion))},
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("training", help="a training step, batched against row by row")
    training.add_argument("--model", default="tiny", help="tiny or base (default: %(default)s)")
    training.add_argument("--batch", type=int, default=8, help="rows (default: %(default)s)")
    training.add_argument("--shortest", type=float, default=1.6, help="seconds (default: %(default)s)")
    training.add_argument("--longest", type=float, default=3.2, help="seconds (default: %(default)s)")
    training.add_argument("--repeats", type=int, default=5, help="timed steps of each (default: %(default)s)")
    for command in (training,):
        command.add_argument("--threads", type=int, default=1, help="default: %(default)s")
        command.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the record")
    args = parser.parse_args()
    if args.batch < 1 or args.repeats < 1 or not 0.4 <= args.shortest <= args.longest:
        raise UserError("--batch and --repeats must be 1 or more, and --shortest from 0.4 to --longest")
    torch.set_num_threads(args.threads)
    results = measure_training(args)
    times = results["seconds_a_step"]
    print(f"{args.model}, batch {args.batch}: {times['batched']:.3f} s a step, plain {times['plain']:.3f} s")
    print(f"ratio {results['ratio']:.2f}")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    hardware = {"machine": platform.machine(), "threads": args.threads}
    what = "Talker-T2AV training step (forward and backward): batched against the loop over rows and patches"
    path = write_record(args.out, f"talker-training-{args.model}", what, hardware, results, arguments=settings)
    print(path)


if __name__ == "__main__":
    run_cli(main)

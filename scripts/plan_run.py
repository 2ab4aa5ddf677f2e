"""What a recipe costs on N GPUs, found without one: memory, exchange, time and days, for DDP, FSDP2 and hybrid.

    python scripts/plan_run.py hicodit_paper --gpus 8 64 --device h200
    python scripts/plan_run.py talker_paper trainer.global_batch_size=128 --seconds 6 --gpus 8 64 --json plan.json
    python scripts/plan_run.py talker_paper --gpus 64 --figure plan.png task.model.llm.num_hidden_layers=36

The training program runs on tensors without data in a fake group of processes (benchmarks/plan.py); rates of the
card and their efficiency are stated there. One clip of `--seconds` is a sample, for Talker-T2AV a pair of clips. The
samples of a step over all GPUs are trainer.global_batch_size, else batch_size x accumulate; a GPU takes one at least,
so with more GPUs a step takes more samples, and the run fewer steps. Takes minutes for the models of the papers.
Further words are settings of the recipe, as train.py takes them.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.plan import CARDS, Efficiency, Measured, Plan, measure_fake, plan, spread
from benchmarks.training import MODELS, build_task
from engine.config import compose
from engine.errors import UserError, run_cli
from engine.files import atomic_output
from engine.record import record, write_json
from engine.training.settings import TrainerConfig
from engine.training.task import Task

WAYS = ("ddp", "fsdp", "hybrid")
PARTS = ("weights", "gradients", "optimiser", "average", "activations")


def read_recipe(name: str, words: list[str]) -> tuple[str, dict[str, Any], TrainerConfig, int, float]:
    """(model, its settings, the trainer's, rows of a sample, samples of the whole run) of a recipe."""
    config = compose("train", [f"experiment={name}", *words])
    target = str(OmegaConf.select(config, "task._target_") or "")
    model = next((model for model in MODELS if target.startswith(model)), None)
    if model is None:
        raise UserError(f"{name} trains {target}: recipes of HiCoDiT and Talker-T2AV can be planned")
    trainer = OmegaConf.to_container(config.trainer, resolve=True)
    settings = TrainerConfig(**trainer | {"device": "cpu", "compile": False})
    sizes = OmegaConf.to_container(config.task.model, resolve=True)
    if model == "talker":
        sizes["freeze_embeddings"] = bool(config.task.freeze_embeddings)
    whole = settings.global_batch_size or settings.batch_size * settings.accumulate
    rows = 2 if model == "talker" else 1
    return model, sizes, settings, rows, whole * settings.steps


def measure_ways(
    model: str,
    sizes: dict[str, Any],
    trainer: TrainerConfig,
    rows: int,
    seconds: float,
    most: int,
    gpus: int,
    machine: int,
) -> dict[str, tuple[Measured, Measured]]:
    """By way of spreading: a step with one sample a process, and with two on the line to a step with `most`."""
    name, make_batch, _ = MODELS[model]

    def make_task() -> Task:
        # HiCoDiT's task reads a tokenizer's files, and is small; a Talker may be larger than this machine's memory.
        with nullcontext() if model == "talker" else _disable_current_modes():
            return build_task(f"{name}_base", **sizes)

    def run(way: str, samples: int) -> Measured:
        print(f"{way}, {samples} sample{'s' * (samples > 1)} a process ...", file=sys.stderr, flush=True)
        config = TrainerConfig(**asdict(trainer) | {"parallel": way})
        count = samples * rows
        return measure_fake(make_task, config, lambda task: make_batch(task, count, seconds), gpus, machine)

    found, growth = {}, (0.0, 0.0, 0.0)
    for way in WAYS if gpus > 1 else WAYS[:1]:
        one = run(way, 1)
        if way != "hybrid":  # which computes what fsdp does
            many, n = run(way, most), most - 1
            more = many.memory["activations"] - one.memory["activations"]
            growth = more / n, (many.flops - one.flops) / n, (many.touched - one.touched) / n
        memory = one.memory | {"activations": one.memory["activations"] + growth[0]}
        found[way] = one, replace(one, memory=memory, flops=one.flops + growth[1], touched=one.touched + growth[2])
    return found


def line(p: Plan) -> str:
    memory = ", ".join(f"{name} {p.memory[name] / 2**30:.2f}" for name in PARTS)
    sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in p.sent.items()) or "nothing"
    return (
        f"{p.gpus:>5} GPUs {p.parallel:<6} {p.samples} samples: {sum(p.memory.values()) / 2**30:.1f} GiB ({memory})"
        f"{'' if p.fits else ', does not fit'}; exchanged GB: {sent}; {p.flops / 1e12:.1f} TFLOP; "
        f"step {p.step_s:.3f} s (compute {p.compute_s:.3f}, memory {p.memory_s:.3f}, host {p.host_s:.3f}, "
        f"network {p.network_s:.3f}); "
        f"{p.steps:,.0f} steps, {p.days:.2f} days; at most {p.largest_batch} samples"
    )


def draw(plans: list[Plan], room: float, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for way in WAYS:
        mine = [p for p in plans if p.parallel == way]
        left.plot([p.gpus for p in mine], [sum(p.memory.values()) / 2**30 for p in mine], "o-", label=way)
        right.plot([p.gpus for p in mine], [p.days for p in mine], "o-", label=way)
    left.axhline(room / 2**30, color="grey", linestyle="--", label="the card's")
    numbers = sorted({p.gpus for p in plans})
    for axis, name in ((left, "memory of a GPU, GiB"), (right, "days of the recipe's samples")):
        axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=name)
        axis.set_xticks(numbers, [f"{n:,}" for n in numbers], minor=False)
        axis.minorticks_off()
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_output(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name in configs/experiment")
    parser.add_argument("settings", nargs="*", help="key=value of the recipe")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="numbers of GPUs (default: 8)")
    parser.add_argument("--device", choices=CARDS, default="h200", help="the card (default: h200)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a clip (default: 8)")
    parser.add_argument("--json", type=Path, help="write the plans to this file")
    parser.add_argument("--figure", type=Path, help="draw memory and days into this PNG file")
    args = parser.parse_intermixed_args()
    if min(args.gpus) < 1 or max(args.gpus) > 2**17 or not 0.5 <= args.seconds <= 30:
        raise UserError(f"--gpus {args.gpus} --seconds {args.seconds}: give 1 to 131072 GPUs and 0.5 to 30 seconds")
    for option, path in (("--json", args.json), ("--figure", args.figure)):
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK) or not path.parent.is_dir()):
            raise UserError(f"{option} {path} cannot be written: name a file in a folder that exists")
    card, first = CARDS[args.device], max(args.gpus[0], min(8, max(args.gpus)))
    model, sizes, trainer, rows, total = read_recipe(args.recipe, args.settings)
    whole, plans = total / trainer.steps, []
    each_gpu = {gpus: max(1, min(trainer.batch_size, round(whole / gpus))) for gpus in args.gpus}
    most = max(2, *each_gpu.values())
    found = measure_ways(model, sizes, trainer, rows, args.seconds, most, first, card.machine)
    for gpus in args.gpus:
        for way, both in found.items():
            each = [spread(one, way, first, gpus, card.machine) for one in both]
            plans.append(plan(*each, way, gpus, card, each_gpu[gpus], total))
            print(line(plans[-1]), flush=True)
    if args.json:
        about = {"recipe": args.recipe, "settings": args.settings, "seconds": args.seconds, "card": args.device}
        about |= {"rates": asdict(card), "efficiency": asdict(Efficiency()), "measured_as_if_on": first}
        what = "memory, exchange and time of a training step, predicted without a GPU"
        write_json(args.json, record(what, [asdict(p) for p in plans], **about))
    if args.figure:
        size = found["ddp"][0].memory["weights"] / 4e9
        title = f"{args.recipe}, {size:.2g} billion parameters, {args.seconds:g} s clips, on {args.device}"
        draw(plans, card.memory, title, args.figure)


if __name__ == "__main__":
    run_cli(main)

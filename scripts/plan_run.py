"""Predict the cost of a recipe on N GPUs without a GPU: memory, communication and time, for DDP, FSDP2 and hybrid.

    python scripts/plan_run.py hicodit_paper --gpus 8 64 --device h200
    python scripts/plan_run.py hicodit_grid --gpus 1 --device rtx4090 --seconds 3
    python scripts/plan_run.py talker_paper trainer.global_batch_size=128 --seconds 6 --gpus 8 64 --json plan.json
    python scripts/plan_run.py talker_paper --gpus 64 --figure plan.png task.model.llm.num_hidden_layers=36

A training step of one process is run on fake tensors (benchmarks/fake_step.py). Communication and sharding are computed
from the sizes of the parameters (benchmarks/plan.py, which also states the rates and the efficiency of the GPUs).

A sample is a clip of `--seconds`, for Talker-T2AV a pair of clips. As the clips of a corpus differ in length and a step
takes as long as the longest batch of a rank, times are divided by the padding efficiency of log-normal lengths (median
5 s, cropped at 10 s) in the recipe's order of batches. A training step has trainer.global_batch_size samples on all
GPUs together, or else batch_size x accumulate, and at least one per GPU: with more GPUs than that, a step has more
samples, and the run fewer steps. Each GPU processes it in batches of at most trainer.batch_size samples; the figures
are those of one batch, as if it were a step of its own. The command takes minutes for the models of the papers. Further
arguments are settings of the recipe, as for train.py.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from dataclasses import asdict
from pathlib import Path

from benchmarks.plan import CARDS, EFFICIENCY, WAYS, Plan, draw, measure_samples, padding_of, plan, read_recipe
from engine.arguments import Parser, within
from engine.errors import UserError, run_cli
from engine.files import require_space, write_json
from engine.record import portable, record


def line(p: Plan) -> str:
    """Return the printed line of a plan: GiB of memory by part, GB exchanged, and seconds of a step by bottleneck."""
    memory = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in p.memory.items())
    sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in p.sent.items()) or "nothing"
    return (
        f"{p.gpus:>5} GPUs {p.parallel:<6} {p.samples} samples: {sum(p.memory.values()) / 2**30:.1f} GiB ({memory})"
        f"{'' if p.fits else ', does not fit'}; exchanged GB: {sent}; {p.flops / 1e12:.1f} TFLOP; "
        f"step {p.step_s:.3f} s (compute {p.compute_s:.3f}, memory {p.memory_s:.3f}, host {p.host_s:.3f}, "
        f"network {p.network_s:.3f}), padding efficiency {p.padding:.2f}; "
        f"{p.steps:,.0f} batches, {p.days:.2f} days ({24 * p.days:.1f} h); at most {p.largest_batch} samples"
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recipe", help="name in configs/experiment")
    parser.add_argument("settings", nargs="*", help="key=value of the recipe")
    parser.add_argument("--gpus", type=within(1, 2**17), nargs="+", default=[8], help="numbers of GPUs to compare")
    parser.add_argument("--device", choices=CARDS, default="h200", help="the card")
    parser.add_argument("--seconds", type=within(0.5, 30, float), default=8.0, help="length of a clip")
    parser.add_argument("--json", type=Path, help="write the plans to this file")
    parser.add_argument("--figure", type=Path, help="draw memory and days into this PNG file")
    args = parser.parse_intermixed_args()
    for option, path in (("--json", args.json), ("--figure", args.figure)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{option} {path} cannot be written: choose a file in an existing folder")
        if path:
            require_space(path.parent, option)
    if args.figure and args.figure.suffix.lower() != ".png":
        raise UserError(f"--figure {args.figure}: its name must end in .png")
    card = CARDS[args.device]
    model, sizes, trainer, rows, total = read_recipe(args.recipe, args.settings)
    whole = total / trainer.steps
    plans = []
    each_gpu = {gpus: max(1, min(trainer.batch_size, round(whole / gpus))) for gpus in args.gpus}
    max_samples = max(2, *each_gpu.values())
    shards = max(args.gpus) > 1
    pair = measure_samples(model, sizes, trainer, rows, args.seconds, max_samples, shards)
    for gpus in args.gpus:
        samples = each_gpu[gpus]
        padding = padding_of(trainer, gpus, each_gpu[gpus])
        for way in WAYS if gpus > 1 else WAYS[:1]:
            plans.append(plan(*pair, way, gpus, card, samples, total, trainer.precision == "bf16", padding))
            print(line(plans[-1]), flush=True)
    if args.json:
        about = {"recipe": args.recipe, "settings": args.settings, "seconds": args.seconds, "card": args.device}
        about |= {"rates": asdict(card), "efficiency": EFFICIENCY}
        what = "memory, exchange and time of a training step, predicted without a GPU"
        write_json(args.json, portable(record(what, [asdict(p) for p in plans], **about)))
    if args.figure:
        size = pair[0].memory["weights"] / 4e9
        title = f"{args.recipe}, {size:.2g} billion parameters, {args.seconds:g} s clips, on {args.device}"
        draw(plans, card.memory, title, args.figure)


if __name__ == "__main__":
    run_cli(main)

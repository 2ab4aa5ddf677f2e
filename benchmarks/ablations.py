"""HiCoDiT's claims put to the test: the model and its ablations, several seeds each, on the dev split of a corpus.

Trains `experiment=hicodit_synthetic_2` for each variant and seed with one switch changed, in RUNS/VARIANT-SEED; what is
finished is not done again. Score networks and identity adapters start from random weights; `--encoders` may give all
variants the same trained lip and expression encoders. Models of one seed see the same clips, masks and dropped
conditions in the same order. The result: means over seeds, paired differences to the full model with 95 % intervals
(`benchmarks.paired.estimate`), and a figure of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.common import in_own_process
from benchmarks.paired import chart, compare, correlation, line, ratio
from benchmarks.per_clip import measure
from benchmarks.trained import make_once, measure_once, train
from engine.config import compose
from engine.errors import UserError
from engine.record import dated
from engine.shards.recordings import read_manifest
from hicodit.conditions import encoder_config
from hicodit.model import ModelConfig
from hicodit.system import HiCoDiTSystem

VARIANTS = {
    "full": [],
    "flat": ["task.model.hierarchical=false"],
    "single_scale": ["task.model.dual_scale=false"],
    "no_identity_loss_voice": ["task.identity_weight=0"],  # the adapter from face to voice stays untrained: see DERIVED
    "no_identity_loss_face": ["task.identity_weight=0", "task.identity_input=face"],  # the score loss trains it
    "levels_1_11": ["task.model.low_levels=1"],
    "levels_4_8": ["task.model.low_levels=4"],
}
# The identity loss reaches the parts IDENTITY alone, and with the true voice as its input the score network does not
# see them: without that loss it is trained exactly as in the full model, so it is not trained again.
DERIVED = {"no_identity_loss_voice": "full"}
IDENTITY = ("model.identity_adapter.", "encoders.identity.")
SHARED = ("encoders.lip.", "encoders.expression.")  # parts that may start trained: no claim is about them
FIGURES = {  # name -> what it is of the pairs, and which way is better
    "dse_low": (ratio, "lower"),
    "dse_high": (ratio, "lower"),
    "expression_gain_high": (ratio, "higher"),
    "identity_gain_low": (ratio, "higher"),
    "wer": (ratio, "lower"),
    "wer_free": (ratio, "lower"),
    "own_voice_first": (ratio, "higher"),
    "voice_similarity": (ratio, "higher"),
    "pitch_range_correlation": (correlation, "higher"),
    "energy_correlation": (correlation, "higher"),
    "pitch_range_right_way": (ratio, "higher"),
    "energy_right_way": (ratio, "higher"),
}
ONE_AT_A_TIME = Lock()  # Hydra and the generator of initial weights are of the whole process
LEAST = {"steps": 1, "clips": 4, "jobs": 1, "seeds": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="what is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each variant")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each model")
    parser.add_argument("--clips", type=int, default=200, help="clips of the dev split that are measured")
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic_2"), help="corpus, version 2")
    parser.add_argument("--shards", type=Path, help="its prepared shards; default: CORPUS/shards/hicodit_tiny")
    parser.add_argument("--split", default="dev", help="split that is measured")
    parser.add_argument("--codec", default="assets/rvq_tiny", help="release folder of the tokenizer")
    parser.add_argument("--encoders", help="release folder whose lip and expression encoders all models start with")
    parser.add_argument("--trained", type=Path, help="release that stands for `full`: what derives from it is measured")
    parser.add_argument("--sampler", default="fast", help="preset in configs/sampler")
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained at the same time")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument(
        "overrides", nargs="*", metavar="SETTING", help="setting of train.py for all variants, e.g. trainer.lr=1e-3"
    )


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    args.runs.mkdir(parents=True, exist_ok=True)
    args.shards = args.shards or args.corpus / "shards" / "hicodit_tiny"
    models = [(variant, seed) for variant in args.variants for seed in args.seeds]
    models.sort(key=lambda model: model[0] in DERIVED)  # what they come from is there by then
    with ThreadPoolExecutor(args.jobs) as pool:
        coming = {model: pool.submit(train_and_measure, args, *model) for model in models}
        try:
            measured = {model: done.result() for model, done in coming.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what was not begun
            raise
    speakers = {row["id"]: str(row["voice"]) for row in read_manifest(args.corpus, args.split)}
    by_variant = {variant: [measured[variant, seed] for seed in args.seeds] for variant in args.variants}
    rows = compare(by_variant, FIGURES, speakers)
    yield from ((row, line(row)) for row in rows)
    path = dated(args.out, f"ablations-{args.device.type}.png")
    chart(rows, FIGURES, path)
    yield {"chart": path.name, "figures_are": "[mean over seeds, half of the 95 % interval]"}, str(path)


def train_and_measure(args: argparse.Namespace, variant: str, seed: int) -> dict[str, dict]:
    """Figure -> clip -> pair of one model, from its folder if they are there.

    Raises:
        UserError: with --trained, the variant has to be trained itself.
    """
    if args.trained and variant in DERIVED.values():
        return figures_of(args, args.runs / "trained", args.trained)
    if args.trained and variant not in DERIVED:
        raise UserError(f"--trained {args.trained} cannot be made {variant}: only {', '.join(DERIVED)}")
    folder, settings = args.runs / f"{variant}-{seed}", settings_of(args, variant, seed)

    def make() -> None:
        begin = start(folder / "start", settings, seed, args.encoders)
        if variant in DERIVED:
            trained = args.trained or args.runs / f"{DERIVED[variant]}-{seed}" / "release"
            derive(trained, begin, folder / "release")
        else:
            train(folder, [*settings, f"init={begin}"])

    make_once(folder, [*settings, f"trained={args.trained}"] if args.trained else settings, make)
    return figures_of(args, folder, folder / "release")


def figures_of(args: argparse.Namespace, folder: Path, release: Path) -> dict[str, dict]:
    truth, split = args.runs / f"truth-{args.split}-{args.clips}.json", args.shards / args.split

    def measure_release() -> dict[str, dict]:
        clock = time.monotonic()
        measured = release, Path(args.codec), args.corpus, split, args.clips, args.sampler, truth
        figures = in_own_process(measure, *measured)
        print(f"{folder.name} measured in {time.monotonic() - clock:.0f} s", flush=True)
        return figures

    return measure_once(folder / f"figures-{args.split}-{args.clips}-{args.sampler}.json", measure_release)


def settings_of(args: argparse.Namespace, variant: str, seed: int) -> list[str]:
    """Settings of train.py for one model."""
    return [
        "experiment=hicodit_synthetic_2", "task.model.expression_context=false",  # the paper's model
        f"data.corpus={args.corpus}", f"data.root={args.shards}", "data.held_out=[]", f"task.codec={args.codec}",
        f"trainer.seed={seed}", f"trainer.steps={args.steps}", f"trainer.warmup={args.steps // 10}",
        "trainer.lr=6e-4", "trainer.ema_decay=0.99",
        *args.overrides, *VARIANTS[variant],
    ]  # fmt: skip


def start(folder: Path, settings: list[str], seed: int, encoders: str | None) -> Path:
    """A release with random weights, but for the `SHARED` parts if those of a release `encoders` are to be taken."""
    with ONE_AT_A_TIME:
        task = OmegaConf.to_container(compose("train", settings).task, resolve=True)
        torch.manual_seed(seed)
        system = HiCoDiTSystem(ModelConfig(**task["model"]), encoder_config(task["encoders"]))
    if encoders:
        take(system, HiCoDiTSystem.from_pretrained(encoders), SHARED)
    return system.save(folder, "Where the training of an ablation starts.\n")


def derive(trained: Path, begin: Path, folder: Path) -> None:
    """The release `trained` with the `IDENTITY` parts of the start `begin`, untrained.

    Raises:
        UserError: it is not trained yet.
    """
    system = HiCoDiTSystem.from_pretrained(trained)
    take(system, HiCoDiTSystem.from_pretrained(begin), IDENTITY)
    system.save(folder, f"{trained}, with an untrained adapter from face to voice.\n", system.release)


def take(system: HiCoDiTSystem, other: HiCoDiTSystem, parts: tuple[str, ...]) -> None:
    """Load the tensors of `other` whose names begin with one of `parts`."""
    state = {key: value for key, value in other.state_dict().items() if key.startswith(parts)}
    system.load_state_dict(state, strict=False)

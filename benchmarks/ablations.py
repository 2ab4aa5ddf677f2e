"""HiCoDiT's claims put to the test: the model and its ablations, several seeds each, on the dev split of a corpus.

Trains `experiment=hicodit_synthetic_2` for each variant and seed with one switch changed, in RUNS/VARIANT-SEED; what is
finished is not done again. Score networks and identity adapters start from random weights; `--encoders` may give all
variants the same trained lip and expression encoders. Models of one seed see the same clips, masks and dropped
conditions in the same order. The result: means over seeds, paired differences to the full model with 95 % intervals
(`benchmarks.claims.estimate`), and a figure of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.claims import HeldOut, correlation, estimate, measure, ratio
from benchmarks.common import in_own_process, read_config
from engine.config import compose
from engine.errors import UserError
from engine.files import atomic_output
from engine.media.corpus import read_manifest
from hicodit.conditions import encoder_config
from hicodit.model import ModelConfig
from hicodit.system import HiCoDiTSystem

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "full": [],
    "flat": ["task.model.hierarchical=false"],
    "single_scale": ["task.model.dual_scale=false"],
    "no_identity_loss_voice": ["task.identity_weight=0"],  # the adapter from face to voice stays untrained
    "no_identity_loss_face": ["task.identity_weight=0", "task.identity_input=face"],  # the score loss trains it
    "levels_1_11": ["task.model.low_levels=1"],
    "levels_4_8": ["task.model.low_levels=4"],
}
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
    with ThreadPoolExecutor(args.jobs) as pool:
        coming = [pool.submit(train_and_measure, args, *model) for model in models]
        try:
            measured = {model: done.result() for model, done in zip(models, coming)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what was not begun
            raise
    rows, baseline = [], args.variants[0]
    speakers = {row["id"]: str(row["voice"]) for row in read_manifest(args.corpus, args.split)}
    for variant in args.variants:
        row = {"variant": variant, "seeds": len(args.seeds)}
        for name, (figure, _) in FIGURES.items():
            own, full = (pairs(measured, which, args.seeds, name) for which in (variant, baseline))
            voices = [speakers[clip] for clip in measured[variant, args.seeds[0]][name]]
            row[name] = estimate(figure, own, voices)
            if variant != baseline:
                row[f"{name}_minus_{baseline}"] = estimate(figure, own, voices, minus=full)
        rows.append({key: [round(v, 4) for v in x] if isinstance(x, tuple) else x for key, x in row.items()})
        yield (
            rows[-1],
            f"{variant}: " + ", ".join(f"{name} {row[name][0]:.4g} +- {row[name][1]:.2g}" for name in FIGURES),
        )
    path = args.out / f"{time.strftime('%Y-%m-%d')}-ablations-{args.device.type}.png"
    chart(rows, baseline, path)
    yield {"chart": path.name, "figures_are": "[mean over seeds, half of the 95 % interval]"}, str(path)


def train_and_measure(args: argparse.Namespace, variant: str, seed: int) -> dict[str, dict]:
    """Figure -> clip -> pair of one model, from its folder if they are there."""
    folder, words = args.runs / f"{variant}-{seed}", settings(args, variant, seed)
    done, out = folder / "trained.json", folder / f"figures-{args.split}-{args.clips}-{args.sampler}.json"
    if not done.exists() or json.loads(done.read_text()) != words:
        init = [f"init={start(folder / 'start', words, seed, args.encoders)}"] if args.encoders else []
        train(folder, words, init)
        done.write_text(json.dumps(words))
        out.unlink(missing_ok=True)
    if not out.exists():
        begin, figures = time.time(), in_own_process(measure_release, args, folder / "release")
        with atomic_output(out) as partial:
            partial.write_text(json.dumps(figures))
        print(f"{folder.name} measured in {time.time() - begin:.0f} s", flush=True)
    return json.loads(out.read_text())


def settings(args: argparse.Namespace, variant: str, seed: int) -> list[str]:
    """Settings of train.py for one model."""
    return [
        "experiment=hicodit_synthetic_2", f"data.corpus={args.corpus}", f"data.root={args.shards}", "data.held_out=[]",
        f"task.codec={args.codec}", f"trainer.seed={seed}", f"trainer.steps={args.steps}",
        f"trainer.warmup={args.steps // 10}", "trainer.lr=6e-4", "trainer.ema_decay=0.99",
        *args.overrides, *VARIANTS[variant],
    ]  # fmt: skip


def start(folder: Path, words: list[str], seed: int, encoders: str) -> Path:
    """A release with random weights but for the `SHARED` parts, which are those of the release `encoders`."""
    with ONE_AT_A_TIME:
        task = OmegaConf.to_container(compose("train", words).task, resolve=True)
        torch.manual_seed(seed)
        system = HiCoDiTSystem(ModelConfig(**task["model"]), encoder_config(task["encoders"]))
    trained = HiCoDiTSystem.from_pretrained(encoders).state_dict()
    system.load_state_dict({key: value for key, value in trained.items() if key.startswith(SHARED)}, strict=False)
    return system.save(folder, f"Start of an ablation: random, but for {', '.join(SHARED)} of {encoders}.\n")


def train(folder: Path, words: list[str], init: list[str]) -> None:
    never = ["trainer.checkpoint_every=1000000", "trainer.validate_every=1000000"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "training.log").open("a") as log:
        command = [sys.executable, "train.py", f"run={folder}", *never, *words, *init]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise UserError(f"the training of {folder.name} failed (exit {code}), see {folder / 'training.log'}")


def measure_release(args: argparse.Namespace, release: Path) -> dict[str, dict]:
    """`measure`, with the figures of the true clips from RUNS, where the first model leaves them."""
    clips = HeldOut.load(args.corpus, args.shards / args.split, Path(args.codec), args.clips)
    stored = args.runs / f"truth-{args.split}-{args.clips}.json"
    if not stored.exists():
        truth = clips.truth()
        with atomic_output(stored) as partial:
            partial.write_text(json.dumps(truth))
    sampler = read_config(f"sampler/{args.sampler}")
    return measure(release, Path(args.codec), clips, json.loads(stored.read_text()), sampler)


def pairs(measured: dict, variant: str, seeds: list[int], name: str) -> np.ndarray:
    """(S, N, 2) pairs of a variant, NaN for clips that do not count."""
    found = (measured[variant, seed][name].values() for seed in seeds)
    return np.array([[pair or (np.nan, np.nan) for pair in clips] for clips in found], float)


def chart(rows: list[dict], baseline: str, path: Path) -> None:
    """Differences to the full model with their intervals, one panel a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    others = [row for row in rows if row["variant"] != baseline]
    grid, axes = plt.subplots(3, 4, figsize=(14, 8), sharey=True, layout="constrained")
    for axis, (name, (_, better)) in zip(axes.flat, FIGURES.items()):
        means, halves = zip(*(row[f"{name}_minus_{baseline}"] for row in others))
        axis.errorbar(means, range(len(others)), xerr=halves, fmt="o", capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        own = rows[0][name]
        axis.set_title(
            f"{name.replace('_', ' ')} ({better} is better)\n{baseline}: {own[0]:.3g} ± {own[1]:.2g}", size=9
        )
        axis.grid(alpha=0.3, axis="x")
    axes[0, 0].set_yticks(range(len(others)), [row["variant"].replace("_", " ") for row in others])
    axes[0, 0].invert_yaxis()
    grid.suptitle(f"Difference to the {baseline} model, mean over seeds with 95 % interval")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path) as partial:
        grid.savefig(partial, format="png", dpi=90)
    plt.close(grid)

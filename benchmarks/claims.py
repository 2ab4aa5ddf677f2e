"""Tests of the papers' claims: variants of a model or of its settings on the same clips.

benchmarks/claims.yaml lists the claims. Models are trained with several seeds in RUNS/CLAIM/VARIANT-SEED; finished work
is skipped. `engine.evaluation.run` generates and measures. The result: means over seeds, paired differences to the
first variant with 95 % intervals (with one model over clips alone; see `benchmarks.comparison.estimate`), and a
chart of them, or of the figures over the costs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks import hicodit_models
from benchmarks.common import in_own_process
from benchmarks.comparison import Pairs, chart_curves, chart_differences, compare, line
from engine.arguments import within
from engine.config import load
from engine.errors import UserError
from engine.evaluation.clips import TRUTH
from engine.evaluation.run import evaluate
from engine.files import CHECKOUT, write_json, write_text
from engine.processes import script_environment
from engine.record import dated

CLAIMS: dict[str, dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("claims.yaml")))
NEVER = ["trainer.checkpoint_every=1000000", "trainer.validate_every=1000000"]
MADE_OF = {"derive", "weights"}  # keys of a variant that needs the release of another one
FEW = 10  # speakers: with fewer, intervals are over clips in place of speakers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("claim", choices=CLAIMS, help="entry of benchmarks/claims.yaml")
    parser.add_argument("--variants", nargs="+", help="variants to measure; the first one is the reference")
    parser.add_argument("--seeds", type=within(0), nargs="+", default=[0, 1, 2], help="seeds of training")
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic_2"), help="folder of the corpus")
    parser.add_argument(
        "--manifest",
        type=Path,
        default=Path("outputs/grid/test.jsonl"),
        help="test clips of claims on GRID; `scripts/recipes/grid.sh evaluate` writes it",
    )
    parser.add_argument(
        "--shards",
        type=Path,
        help="prepared clips to train on (default: CORPUS/shards/RECIPE; on GRID data/shards/hicodit_grid_cpu)",
    )
    parser.add_argument(
        "--evaluate",
        nargs="*",
        action="extend",
        default=[],
        metavar="SETTING",
        help="settings of evaluate.py for all variants",
    )
    parser.add_argument(
        "--train",
        nargs="*",
        action="extend",
        default=[],
        metavar="SETTING",
        help="settings of train.py for all variants",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the runs")


def record_name(args: argparse.Namespace) -> str:
    return f"claims-{args.claim}"


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    claim = CLAIMS[args.claim]
    groups = {}
    chosen = args.variants or [*claim["variants"]]
    if unknown := [name for name in chosen if name not in claim["variants"]]:
        raise UserError(f"--variants {unknown[0]} is unknown; choose {', '.join(claim['variants'])}")
    if "table=grid" in claim["evaluate"] and not args.manifest.is_file():
        raise UserError(f"--manifest {args.manifest} is not a file: scripts/recipes/grid.sh evaluate writes it")
    if "table=grid" not in claim["evaluate"] and "train" not in claim and not args.corpus.is_dir():
        raise UserError(f"--corpus {args.corpus} is not a folder: scripts/make_synthetic_corpus.py writes it")
    measured: dict[str, list[Pairs]] = {}
    trained_first = sorted(chosen, key=lambda name: not MADE_OF.isdisjoint(claim["variants"][name]))
    for name in trained_first:
        trained = "train" in claim or "derive" in claim["variants"][name]
        for seed in args.seeds if trained else [0]:
            pairs, true, speakers = measure(args, claim, name, seed)
            measured.setdefault(name, []).append(pairs)
            measured[TRUTH] = [true]
            groups |= speakers
    figures = [*claim.get("losses", ()), *claim["figures"]]
    x = claim.get("x")
    rows = compare({name: measured[name] for name in [*chosen, TRUTH]}, [*figures, x] if x else figures, groups)
    yield from ((row, line(row)) for row in rows)
    path = dated(args.out, f"claims-{args.claim}.png")
    if x:
        chart_curves(rows, claim["figures"], x, path)
    elif len(chosen) > 1:
        chart_differences([row for row in rows if row["variant"] != TRUTH], figures, path)
    yield {"chart": path.name, "figures_are": "[mean over seeds, half of the 95 % interval]"}, str(path)


def measure(
    args: argparse.Namespace, claim: dict[str, Any], name: str, seed: int
) -> tuple[Pairs, Pairs, dict[str, str]]:
    """Train and measure a variant, unless its results exist.

    Returns:
        The measured pairs of the variant and of the ground truth, and the speaker of each clip.
    """
    variant = claim["variants"][name]
    folder = args.runs / args.claim / f"{name}-{seed}"
    on_grid = "table=grid" in claim["evaluate"]
    shards = args.shards or prepared_clips(args.corpus, claim)
    settings = dict(variant.get("generate") or {})
    if "weights" in variant:
        settings["weights"] = str(folder.with_name(f"{variant['weights']}-{seed}") / "release")
    elif "train" in claim or "derive" in variant:
        settings["weights"] = str(train(args, claim, variant, seed, folder, shards))
    if "model" in variant:
        settings["model"] = variant["model"]
    clips = f"manifest={args.manifest}" if on_grid else f"corpus={args.corpus}"
    words = [*claim["evaluate"], clips, "media=false", f"output={folder}", *args.evaluate]
    config = load("evaluate", [*words, f"device={args.device}"])
    OmegaConf.set_struct(config, False)
    config.systems = {name: settings}
    config.compare = False
    split = config.split[0] if config.split else None
    summary = evaluate(config, split, folder / "evaluation")
    cells = summary["systems"]
    pairs = {figure: cell["pairs"] for figure, cell in cells.get(name, {}).items() if "pairs" in cell}
    true = {figure: cell["pairs"] for figure, cell in cells.get(TRUTH, {}).items() if "pairs" in cell}
    if "losses" in claim and "weights" not in variant:
        path = folder / "losses.json"
        if not path.is_file():
            source = shards / (split or "test")
            losses = in_own_process(hicodit_models.losses, settings["weights"], source, config.clips)
            write_json(path, losses)
        losses = json.loads(path.read_text())
        pairs |= {figure: losses[figure] for figure in claim["losses"]}
    speakers = summary["speakers"]
    return pairs, true, speakers if len(set(speakers.values())) >= FEW else {}


def prepared_clips(corpus: Path, claim: Mapping[str, Any]) -> Path:
    """Return the default folder of the shards of a claim."""
    if "table=grid" in claim["evaluate"]:
        return Path("data/shards/hicodit_grid_cpu")
    return corpus / "shards" / ("talker" if "table=synthetic_talker" in claim["evaluate"] else "hicodit_tiny")


def train(
    args: argparse.Namespace,
    claim: Mapping[str, Any],
    variant: Mapping[str, Any],
    seed: int,
    folder: Path,
    shards: Path,
) -> Path:
    """Train a variant, or derive it from another one, if it does not exist. Return its release."""
    source = variant.get("derive")
    settings = [*claim.get("train", ()), f"data.corpus={args.corpus}"]
    settings += [f"data.root={shards}", f"trainer.seed={seed}", *args.train, *variant.get("train", ())]
    done = folder / "trained.json"
    wanted = json.dumps([source, settings])
    if done.is_file() and done.read_text() == wanted:
        return folder / "release"
    shutil.rmtree(folder, ignore_errors=True)  # also what was measured of an older model
    name = folder.name.removesuffix(f"-{seed}")
    for other, entry in claim["variants"].items():
        if name in (entry.get("weights"), entry.get("derive")):
            shutil.rmtree(folder.with_name(f"{other}-{seed}"), ignore_errors=True)
    folder.mkdir(parents=True)
    if source is not None:
        trained = folder.with_name(f"{source}-{seed}") / "release" if source in claim["variants"] else Path(source)
        hicodit_models.derive(trained, folder / "release", seed)
    else:
        if "start" in claim:
            start = hicodit_models.start(folder / "start", settings, seed, claim["start"])
            settings = [*settings, f"init={start}"]
        environment = script_environment(OMP_NUM_THREADS=str(args.threads))
        command = [sys.executable, str(CHECKOUT / "train.py"), f"run={folder}", *NEVER, *settings]
        code = subprocess.run(command, env=environment).returncode  # in the user's folder, as paths are relative to it
        if code:
            raise UserError(f"train.py exited with code {code}, see its output; run the command again to continue")
    write_text(done, wanted)
    return folder / "release"

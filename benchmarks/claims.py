"""The papers' claims put to the test: variants of a model, or of its settings, on the same clips.

benchmarks/claims.yaml lists the claims. What has to be trained is trained with several seeds in
RUNS/CLAIM/VARIANT-SEED; what is finished is not done again. `scripts/evaluate.py` generates and measures. The result:
means over seeds, paired differences to the first variant with 95 % intervals (with one model over clips alone; see
`engine.evaluation.statistics.estimate`), and a chart of them, or of the figures over the costs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks import hicodit_models
from benchmarks.common import in_own_process
from engine.config import load
from engine.errors import UserError
from engine.evaluation.charts import chart_curves, chart_differences
from engine.evaluation.clips import TRUTH
from engine.evaluation.statistics import estimate, ratio
from engine.metrics.registry import metric_of
from engine.record import dated
from scripts.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[1]
CLAIMS: dict[str, dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("claims.yaml")))
LEAST = {"seeds": 0}
NEVER = ["trainer.checkpoint_every=1000000", "trainer.validate_every=1000000"]
Pairs = dict[str, dict[str, Sequence[float]]]  # figure -> clip -> (a, b)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("claim", choices=CLAIMS, help="entry of benchmarks/claims.yaml")
    parser.add_argument("--variants", nargs="+", help="those that are measured; the first is compared with the others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of what is trained")
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic_2"), help="folder of the corpus")
    parser.add_argument("--shards", type=Path, help="its prepared shards; default: CORPUS/shards/RECIPE")
    parser.add_argument(
        "--evaluate", nargs="*", action="extend", default=[], metavar="SETTING", help="settings of evaluate.py for all"
    )
    parser.add_argument(
        "--train", nargs="*", action="extend", default=[], metavar="SETTING", help="settings of train.py for all"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the runs")


def record_name(args: argparse.Namespace) -> str:
    return f"claims-{args.claim}"


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    claim, groups = CLAIMS[args.claim], {}
    chosen = args.variants or [*claim["variants"]]
    if unknown := [name for name in chosen if name not in claim["variants"]]:
        raise UserError(f"--variants {unknown[0]} is unknown; choose {', '.join(claim['variants'])}")
    measured: dict[str, list[Pairs]] = {}
    for name in sorted(chosen, key=lambda name: "derive" in claim["variants"][name]):  # from those that are there then
        trained = "train" in claim or "derive" in claim["variants"][name]
        for seed in args.seeds if trained else [0]:
            pairs, true, speakers = measure(args, claim, name, seed)
            measured.setdefault(name, []).append(pairs)
            measured[TRUTH], groups = [true], {**groups, **speakers}
    rows = compare({name: measured[name] for name in [*chosen, TRUTH]}, figures_of(claim), groups)
    yield from ((row, line(row)) for row in rows)
    path = dated(args.out, f"claims-{args.claim}.png")
    if x := claim.get("x"):
        chart_curves(rows, claim["figures"], x, path)
    elif len(chosen) > 1:
        chart_differences([row for row in rows if row["variant"] != TRUTH], figures_of(claim), path)
    yield {"chart": path.name, "figures_are": "[mean over seeds, half of the 95 % interval]"}, str(path)


def figures_of(claim: Mapping[str, Any]) -> list[str]:
    losses = [*hicodit_models.LOSSES] if claim.get("losses") else []
    return [*losses, *claim["figures"], *([claim["x"]] if "x" in claim else [])]


def measure(
    args: argparse.Namespace, claim: Mapping[str, Any], name: str, seed: int
) -> tuple[Pairs, Pairs, dict[str, str]]:
    """Train and measure a variant, where that is missing; return its pairs, those of true clips, and the speakers."""
    variant, folder = claim["variants"][name], args.runs / args.claim / f"{name}-{seed}"
    settings = dict(variant.get("generate") or {})
    if release := release_of(args, claim, name, seed, folder):
        settings["weights"] = str(release)
    if "model" in variant:
        settings["model"] = variant["model"]
    words = [*claim["evaluate"], f"corpus={args.corpus}", "media=false", f"output={folder}", *args.evaluate]
    config = load("evaluate", [*words, f"device={args.device}"], "")
    OmegaConf.set_struct(config, False)
    config.systems, config.compare = {name: settings}, False
    summary = evaluate(config, config.split[0], folder / "evaluation")
    cells = summary["systems"]
    pairs, true = ({f: c["pairs"] for f, c in cells.get(which, {}).items() if "pairs" in c} for which in (name, TRUTH))
    if claim.get("losses"):
        shards = shards_of(args, claim) / config.split[0]
        path = folder / "losses.json"
        if not path.is_file():
            losses = in_own_process(hicodit_models.losses, settings["weights"], shards, config.clips)
            path.write_text(json.dumps(losses))
        pairs |= json.loads(path.read_text())
    return pairs, true, summary["speakers"]


def release_of(args: argparse.Namespace, claim: Mapping[str, Any], name: str, seed: int, folder: Path) -> Path | None:
    """Return the release of a variant, trained or derived where it is missing; None: it needs none of its own."""
    variant = claim["variants"][name]
    source = variant.get("derive")
    if "train" not in claim and source is None:
        return None
    settings = [
        *claim.get("train", ()), f"data.corpus={args.corpus}", f"data.root={shards_of(args, claim)}",
        f"trainer.seed={seed}", *args.train, *variant.get("train", ()),
    ]  # fmt: skip
    done, wanted = folder / "trained.json", json.dumps([source, settings])
    if done.is_file() and done.read_text() == wanted:
        return folder / "release"
    shutil.rmtree(folder, ignore_errors=True)  # also what was measured of an older model
    if source is not None:
        trained = (
            args.runs / args.claim / f"{source}-{seed}" / "release" if source in claim["variants"] else Path(source)
        )
        hicodit_models.derive(trained, folder / "release", seed)
    else:
        if "start" in claim:
            start = hicodit_models.start(folder / "start", settings, seed, claim["start"])
            settings = [*settings, f"init={start}"]
        train(folder, settings)
    done.write_text(wanted)
    return folder / "release"


def shards_of(args: argparse.Namespace, claim: Mapping[str, Any]) -> Path:
    talker = "table=synthetic_talker" in claim["evaluate"]
    return args.shards or args.corpus / "shards" / ("talker" if talker else "hicodit_tiny")


def train(folder: Path, settings: list[str]) -> None:
    """Run train.py to its last step, in the user's working folder: what the settings name lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "training.log").open("a") as log:
        command = [sys.executable, str(ROOT / "train.py"), f"run={folder}", *NEVER, *settings]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise UserError(f"the training of {folder.name} failed (exit {code}), see {folder / 'training.log'}")


def compare(
    measured: Mapping[str, Sequence[Pairs]], figures: Sequence[str], groups: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return a row for each system: the `estimate` of each figure, and of its difference to the first system."""
    rows, (first, *_) = [], measured
    clips = sorted({clip for models in measured.values() for pairs in models for of in pairs.values() for clip in of})
    speakers = [groups.get(clip, clip) for clip in clips]

    def table(system: str, figure: str) -> np.ndarray:
        none = (np.nan, np.nan)
        return np.array([[pairs[figure].get(clip, none) for clip in clips] for pairs in measured[system]], float)

    for system, models in measured.items():
        row: dict[str, Any] = {"variant": system, "seeds": len(models)}
        for figure in figures:
            if not all(figure in pairs for pairs in models):
                continue
            about = None if figure in hicodit_models.LOSSES else metric_of(figure).figures[figure]
            statistic, scale = (about.statistic, about.scale) if about else (ratio, 1.0)
            own = table(system, figure)
            row[figure] = [round(scale * value, 4) for value in estimate(statistic, own, speakers)]
            if system not in (first, TRUTH) and figure in measured[first][0]:
                difference = estimate(statistic, own, speakers, minus=table(first, figure))
                row[f"{figure}_minus_{first}"] = [round(scale * value, 4) for value in difference]
        rows.append(row)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Return a row's own figures in words."""
    own = {name: value for name, value in row.items() if isinstance(value, list) and "_minus_" not in name}
    return f"{row['variant']}: " + ", ".join(f"{name} {mean:.4g} +- {half:.2g}" for name, (mean, half) in own.items())

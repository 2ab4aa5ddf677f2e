"""Words, own voice and prosody against network evaluations, for the samplers of HiCoDiT, with 95 % intervals.

Clips of a synthetic corpus are spoken with each of `--methods` in each of `--steps`, all with the guidance of
`sampler=fast` (one scale for all conditions: two branches, so twice as many evaluations as steps), and with each of
`--points`: files of configs/sampler with changes, as in `fast,sampler.steps=12,guidance.all=2`. The first row is the
true speech, the second what the tokenizer makes of it. Choose settings on a split that is not reported (`dev`).

Evaluations are counted: rows that the network was given, a guidance branch counting as one, divided by the windows of
all clips. Own voice: the clip's GE2E vector is nearest to the mean of its own voice (without the clip itself) among the
voices with several clips in the split; other clips do not count. Prosody: correlation of pitch range and energy with
the true clips, and how often they move the right way where the expression changes. Intervals of correlations are
Fisher's, all others a bootstrap over clips.

Axes: C clips.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.charts import chart_file
from engine.config import CONFIGS
from engine.errors import UserError
from engine.evaluation.statistics import bootstrap_interval, correlation, ratio
from engine.record import dated
from engine.settings import PRECISIONS, override
from engine.shards.recordings import read_manifest
from hicodit.generation import windows
from hicodit.held_out import Figures, HeldOut, synthesise
from hicodit.pipeline import BUNDLED, HiCoDiTPipeline
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig, with_preset
from hicodit.system import CODECS  # noqa: F401 -- registers the tokenizers

LEAST: dict[str, float] = {"clips": 4, "steps": 1}
GREEDY = {"temperature": 0.0, "choice_noise": 1.0}
DRAWN = {"temperature": 0.7}
OWN: dict[str, dict[str, Any]] = {"ordered": GREEDY, "entropy": GREEDY}  # as docs/LOG.md found; the others: DRAWN
Point = tuple[str, SamplerConfig, GuidanceScales]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, default=BUNDLED, help="release folder")
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic_2"), help="folder of the corpus")
    parser.add_argument("--split", default="dev", help="split of the corpus")
    parser.add_argument("--clips", type=int, default=60, help="number of clips")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, help="sampling methods")
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 8, 16, 32, 64], help="numbers of steps")
    parser.add_argument("--points", nargs="*", default=["fast", "paper"], help="files of configs/sampler, with changes")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of the model")
    parser.add_argument("--batch", type=int, default=16, help="batch size")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    pipeline = HiCoDiTPipeline.from_pretrained(args.weights, args.device, precision=args.precision)
    points = [read_point(pipeline, text) for text in args.points]
    for steps in args.steps:
        for method in args.methods:
            changes = {"method": method, "steps": steps, **OWN.get(method, DRAWN)}
            _, sampler, guidance = read_point(pipeline, "fast")
            points.append((method, override(sampler, changes), guidance))
    clips = HeldOut.recorded(pipeline, args.corpus, args.split, args.clips)
    everyone, rows = read_manifest(args.corpus, args.split), []
    clips_of = Counter(row["voice"] for row in everyone)
    several = [row for row in everyone if clips_of[row["voice"]] > 1]
    clips.known = HeldOut(args.corpus, args.split, several, [], 16_000).true_voices()

    def result(name: str, waves: list[np.ndarray], **about: Any) -> tuple[dict[str, Any], str]:
        row = {"name": name, **about, **summarise(clips.figures(waves), len(clips.known))}
        rows.append(row)
        return row, ", ".join(f"{key} {value}" for key, value in row.items())

    yield result("true speech", clips.true)
    yield result("tokenizer alone", clips.resynthesis(pipeline))
    for name, sampler, guidance in points:
        pipeline.sampler, pipeline.guidance = sampler, guidance
        start = time.process_time()
        with Evaluations(pipeline) as counter:
            waves = [speech.wave for speech in synthesise(pipeline, clips.crops, 0, args.batch)]
        evaluations = round(counter.rows / sum(len(windows(len(c), sampler)) for c in clips.crops), 2)
        seconds = round((time.process_time() - start) * clips.rate / sum(map(len, clips.true)), 3)
        yield result(name, waves, steps=sampler.steps, evaluations=evaluations, processor_seconds_a_second=seconds)
    path = dated(args.out, f"samplers-{args.device.type}.png")
    chart(rows, path)
    yield {"chart": path.name}, str(path)


def read_point(pipeline: HiCoDiTPipeline, text: str) -> Point:
    """`FILE,sampler.steps=12,...` -> its name and settings, over those of the release.

    Raises:
        UserError: there is no such file in configs/sampler, or a setting is unknown or out of range.
    """
    preset, *changes = text.split(",")
    path = CONFIGS / "sampler" / f"{preset}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(f"--points {preset} is no file of configs/sampler: choose {names}")
    given = OmegaConf.to_container(OmegaConf.from_dotlist(changes))
    if unknown := set(given) - {"sampler", "guidance"}:
        raise UserError(f"--points {text}: {min(unknown)} is neither sampler.FIELD=VALUE nor guidance.FIELD=VALUE")
    sampler, guidance = with_preset(preset, pipeline.sampler, pipeline.guidance)
    return text, override(sampler, given.get("sampler", {})), override(guidance, given.get("guidance", {}))


class Evaluations:
    """Counts the rows that a pipeline's network is given: clips times guidance branches."""

    def __init__(self, pipeline: HiCoDiTPipeline) -> None:
        self.model, self.rows = pipeline.system.model, 0

    def __enter__(self) -> Evaluations:
        self.hook = self.model.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _count(self, module: torch.nn.Module, given: tuple, log_p: torch.Tensor) -> None:
        self.rows += log_p.shape[0] * log_p.shape[1]  # (branches, clips, ...)


def summarise(figures: Figures, voices: int) -> dict[str, Any]:
    """Each figure with its interval, except the cosine of voices; what no clip has is left out."""
    found: dict[str, Any] = {}
    for name, pairs in figures.items():
        if counted := [pair for pair in pairs if pair is not None]:
            a, b = np.array(counted).T
            if name == "voice_similarity":
                found |= {"voices": voices, name: round(ratio(a, b), 4)}
            elif name.endswith("correlation"):
                found |= correlated(name, a, b)
            else:
                found |= share(name.replace("right_way", "moves_rightly"), a, b)
    return found


def share(name: str, part: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """{NAME: sum(part) / sum(whole), NAME_95: its interval} of clips (C,)."""
    interval = bootstrap_interval(part, whole)
    return {name: round(float(part.sum() / whole.sum()), 4), f"{name}_95": interval and _rounded(interval)}


def correlated(name: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """{NAME: Pearson's r of (C,), NAME_95: Fisher's interval}."""
    r = correlation(a, b)
    z, half = np.arctanh(np.clip(r, -0.9999, 0.9999)), 1.96 / np.sqrt(max(len(a) - 3, 1))
    return {name: round(r, 4), f"{name}_95": _rounded((np.tanh(z - half), np.tanh(z + half)))}


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each figure against network evaluations, a line for each method; single points for whole settings."""
    panels = {
        "wer": "word errors, closed sentences",
        "wer_free": "word errors, free sentences",
        "own_voice_first": "own voice is the nearest",
        "voice_similarity": "cosine with the own voice",
        "pitch_range_correlation": "pitch range: correlation",
        "energy_correlation": "energy: correlation",
    }
    panels = {name: title for name, title in panels.items() if any(name in row for row in rows)}
    spoken, high = [row for row in rows if "evaluations" in row], -(-len(panels) // 2)
    with chart_file(path, high, 2, figsize=(10, 3.2 * high)) as (_, axes):
        for panel, (name, title) in zip(axes.flat, panels.items()):
            for method in dict.fromkeys(row["name"] for row in spoken):
                own = [row for row in spoken if row["name"] == method and name in row]
                own.sort(key=lambda row: row["evaluations"])
                if own:
                    x, y = ([row[key] for row in own] for key in ("evaluations", name))
                    ends = [row.get(f"{name}_95") or (row[name], row[name]) for row in own]
                    bars = [[max(sign * (v - end[i]), 0) for v, end in zip(y, ends)] for i, sign in enumerate((1, -1))]
                    style = "o-" if method in METHODS else "*"
                    panel.errorbar(x, y, bars, fmt=style, label=method, capsize=2, elinewidth=0.6, markersize=5)
            for row, style in zip(rows[:2], (":", "--")):
                if name in row:
                    panel.axhline(row[name], linestyle=style, color="k", linewidth=0.8, label=row["name"])
            panel.set(title=title, xscale="log", xlabel="network evaluations a window")
            panel.grid(alpha=0.3)
        axes.flat[0].legend(fontsize=7)

"""Systems compared by models of several seeds: means with intervals, differences to the first system, and charts.

A row of one system is {"variant": name, FIGURE: [value, half-width of its interval], FIGURE_minus_FIRST: ...}.

Axes: N clips, W rows of weights, S seeds (models of one system).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hicodit_models import LOSSES
from engine.charts import chart_file
from engine.evaluation.clips import TRUTH
from engine.evaluation.statistics import RESAMPLES, Statistic, ratio, resampled
from engine.metrics.registry import metric_of

NORMAL = 1.96
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % quantile of the t distribution, by number of values
Pairs = dict[str, dict[str, Sequence[float]]]  # figure -> clip -> (a, b)


def compare(
    measured: Mapping[str, Sequence[Pairs]], figures: Sequence[str], groups: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return a row for each system: the `estimate` of each figure, and of its difference to the first system."""
    rows = []
    first = next(iter(measured))
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
            about = None if figure in LOSSES else metric_of(figure).figures[figure]
            statistic = about.statistic if about else ratio
            scale = about.scale if about else 1.0
            own = table(system, figure)
            row[figure] = [round(scale * value, 4) for value in estimate(statistic, own, speakers)]
            if system not in (first, TRUTH) and figure in measured[first][0]:
                difference = estimate(statistic, own, speakers, minus=table(first, figure))
                row[f"{figure}_minus_{first}"] = [round(scale * value, 4) for value in difference]
        rows.append(row)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Return the results of a row as text."""
    own = {name: value for name, value in row.items() if isinstance(value, list) and "_minus_" not in name}
    return f"{row['variant']}: " + ", ".join(f"{name} {mean:.4g} +- {half:.2g}" for name, (mean, half) in own.items())


def estimate(
    statistic: Statistic, models: np.ndarray, groups: Sequence[str], minus: np.ndarray | None = None
) -> tuple[float, float]:
    """Estimate the mean of a figure over seeds, or of its difference to another system, with a 95 % interval.

    The variances of two components are added: a Student t interval over the seeds, and a normal interval over clips
    from resampled groups, which are the same for all seeds and both systems.

    Args:
        models: pairs (S, N, 2), NaN for excluded clips.
        groups: the clips' speakers.
        minus: pairs of the other system.

    Returns:
        (mean, half-width), NaN with fewer than two groups.
    """
    counts = ~np.isnan(models).any((0, 2)) & (True if minus is None else ~np.isnan(minus).any((0, 2)))
    weights = [np.ones((1, counts.sum())), *resampled(counts.sum(), np.asarray(groups)[counts], RESAMPLES)]
    if len(weights) == 1:
        return float("nan"), float("nan")
    values = np.stack([statistic(pairs[counts], np.vstack(weights)) for pairs in models])  # (S, 1 + W)
    if minus is not None:
        values = values - np.stack([statistic(pairs[counts], np.vstack(weights)) for pairs in minus])
    seeds = len(values)
    spread = STUDENT.get(seeds, STUDENT[5]) * values[:, 0].std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    return float(values[:, 0].mean()), float(np.hypot(spread, NORMAL * values[:, 1:].mean(0).std()))


def chart_differences(rows: Sequence[Mapping[str, Any]], figures: Sequence[str], path: Path) -> None:
    """Plot the differences from the first system with their intervals, one panel per figure."""
    first, *others = rows
    name = first["variant"]
    shown = [figure for figure in figures if any(f"{figure}_minus_{name}" in row for row in others)]
    wide = min(4, len(shown))
    size = 3.5 * max(wide, 2), 1 + -(-len(shown) // wide) * (1 + 0.25 * len(others))
    title = f"Difference from {name.replace('_', ' ')}, with 95 % interval"
    with chart_file(path, len(shown), wide, title, figsize=size, sharey=True) as axes:
        for axis, figure in zip(axes, shown):
            own = [row for row in others if f"{figure}_minus_{name}" in row]
            means, halves = zip(*(row[f"{figure}_minus_{name}"] for row in own))
            axis.errorbar(means, [others.index(row) for row in own], xerr=halves, fmt="o", capsize=3)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_title("{}\n{}: {:.3g} ± {:.2g}".format(figure.replace("_", " "), name, *first[figure]), size=9)
        axes[0].set_yticks(range(len(others)), [row["variant"].replace("_", " ") for row in others])
        axes[0].invert_yaxis()


def chart_curves(rows: Sequence[Mapping[str, Any]], figures: Sequence[str], x: str, path: Path) -> None:
    """Plot each figure against another one, with one line for each system name without its trailing number.

    Rows without `x`, such as the ground truth, are drawn as horizontal lines.
    """
    shown = [name for name in figures if any(name in row for row in rows)]
    kinds = {}
    for row in rows:
        kinds.setdefault(re.sub(r"_\d+$", "", row["variant"]), []).append(row)
    with chart_file(path, len(shown), 2, figsize=(10, 3.2 * -(-len(shown) // 2))) as axes:
        for axis, figure in zip(axes, shown):
            for kind, own in kinds.items():
                points = sorted((row[x][0], *row[figure]) for row in own if figure in row and x in row)
                if points:
                    at, values, halves = zip(*points)
                    axis.errorbar(at, values, halves, fmt="o-", label=kind, capsize=2, elinewidth=0.6, markersize=5)
                for row in own if not points else ():
                    if figure in row:
                        axis.axhline(row[figure][0], linestyle=":", color="k", linewidth=0.8, label=kind)
            if np.isfinite(axis.dataLim.minposx):  # a logarithmic axis needs a point to the right of 0
                axis.set_xscale("log")
            axis.set(title=figure.replace("_", " "), xlabel=x.replace("_", " "))
        axes[0].legend(fontsize=7)

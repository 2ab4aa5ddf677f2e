"""Figures of several systems on the same clips, over seeds and clips: means, paired differences, 95 % intervals.

What is measured of a clip for a figure is a pair of numbers (a, b): the figure is sum(a) / sum(b) over clips, or the
correlation of a with b.

Axes: S seeds (trained models of one system), N clips, W rows of weights of the clips, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.charts import chart_file

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18}  # 97.5 % point of the t distribution for the mean of so many values
NORMAL = 1.96
RESAMPLES = 2000

Pairs = dict[str, tuple[float, float] | None]  # by clip; None: the figure does not count it
Figure = Callable[[np.ndarray, np.ndarray], np.ndarray]


def tabulate(models: Sequence[Mapping[str, Pairs]], name: str) -> np.ndarray:
    """(S, N, 2) pairs of a figure of several models, NaN for clips that do not count."""
    return np.array([[pair or (np.nan, np.nan) for pair in model[name].values()] for model in models], float)


def ratio(pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum(a) / sum(b): (N, 2), (W, N) -> (W,)."""
    return (weights @ pairs[:, 0]) / (weights @ pairs[:, 1])


def correlation(pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's r: (N, 2), (W, N) -> (W,); 0 where one of them does not vary."""
    share = weights / weights.sum(1, keepdims=True)
    centred = pairs - (share @ pairs)[:, None]  # (W, N, 2)
    (xx, yy), xy = np.einsum("wn,wnc->cw", share, centred**2), (share * centred.prod(-1)).sum(1)
    return xy / np.sqrt(np.maximum(xx * yy, 1e-24))


def estimate(
    figure: Figure, tables: np.ndarray, groups: Sequence[str], minus: np.ndarray | None = None
) -> tuple[float, float]:
    """(mean over seeds of a figure, or of its difference to another variant's; half of its 95 % interval).

    Two parts are added as squares: Student's for the mean over seeds of models on the same clips, and the normal one
    for clips, from resampled voices (whole voices are drawn, the same ones for all seeds and both variants).

    Args:
        tables: (S, N, 2) pairs; NaN where a clip does not count. groups: the clips' voices.
        minus: the same of the other variant.

    Returns:
        NaN with fewer than two voices.
    """
    counts = ~np.isnan(tables).any((0, 2)) & (True if minus is None else ~np.isnan(minus).any((0, 2)))
    names, at = np.unique(np.asarray(groups)[counts], return_inverse=True)
    voices = len(names)
    if voices < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).multinomial(voices, np.full(voices, 1 / voices), RESAMPLES)
    weights = np.vstack([np.ones(len(at)), drawn[:, at]])
    values = np.stack([figure(table[counts], weights) for table in tables])  # (S, 1 + R)
    if minus is not None:
        values = values - np.stack([figure(table[counts], weights) for table in minus])
    seeds = len(values)
    spread = STUDENT.get(seeds, 2.78) * values[:, 0].std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    clips = NORMAL * values[:, 1:].mean(0).std()
    return float(values[:, 0].mean()), float(np.hypot(spread, clips))


def compare(
    measured: Mapping[str, Sequence[Mapping[str, Pairs]]],
    figures: Mapping[str, tuple[Figure, str]],
    groups: Mapping[str, str],
) -> list[dict]:
    """A row for each system: each figure's `estimate`, and that of its difference to the first system.

    Args:
        measured: system -> what was measured of its models, the same seeds in the same order.
        figures: name -> (`ratio` or `correlation`, which way is better). groups: clip -> voice.
    """
    rows, (first, *_) = [], measured
    for system, models in measured.items():
        row: dict = {"variant": system, "seeds": len(models)}
        for name, (figure, _) in figures.items():
            if name not in models[0]:
                continue
            own, voices = tabulate(models, name), [groups[clip] for clip in models[0][name]]
            row[name] = [round(value, 4) for value in estimate(figure, own, voices)]
            if system != first:
                difference = estimate(figure, own, voices, minus=tabulate(measured[first], name))
                row[f"{name}_minus_{first}"] = [round(value, 4) for value in difference]
        rows.append(row)
    return rows


def line(row: Mapping) -> str:
    """A row's own figures in words."""
    own = {name: value for name, value in row.items() if isinstance(value, list) and "_minus_" not in name}
    return f"{row['variant']}: " + ", ".join(f"{name} {mean:.4g} +- {half:.2g}" for name, (mean, half) in own.items())


def chart(rows: Sequence[Mapping], figures: Mapping[str, tuple[Figure, str]], path: Path) -> None:
    """Differences to the first system with their intervals, one panel a figure."""
    (first, *others), shown = rows, [name for name in figures if name in rows[0]]
    wide = min(4, len(shown))
    deep = -(-len(shown) // wide)
    size = 3.5 * max(wide, 2), 1 + deep * (1 + 0.25 * len(others))
    with chart_file(path, deep, wide, dpi=90, figsize=size, sharey=True, squeeze=False) as (figure, axes):
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        for axis, name in zip(axes.flat, shown):
            means, halves = zip(*(row[f"{name}_minus_{first['variant']}"] for row in others))
            axis.errorbar(means, range(len(others)), xerr=halves, fmt="o", capsize=3)
            axis.axvline(0, color="black", linewidth=0.8)
            title, (mean, half) = f"{name.replace('_', ' ')} ({figures[name][1]} is better)", first[name]
            axis.set_title(f"{title}\n{first['variant']}: {mean:.3g} ± {half:.2g}", size=9)
            axis.grid(alpha=0.3, axis="x")
        axes[0, 0].set_yticks(range(len(others)), [row["variant"].replace("_", " ") for row in others])
        axes[0, 0].invert_yaxis()
        figure.suptitle(f"Difference to {first['variant'].replace('_', ' ')}, with 95 % interval")

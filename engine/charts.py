"""Charts of evaluation results, drawn without a display.

A row of one system is {"variant": name, FIGURE: [value, half-width of its interval], FIGURE_minus_FIRST: ...}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import atomic_output


@contextmanager
def chart_file(
    path: Path, panels: int, columns: int, title: str = "", grid: bool = True, dpi: int = 110, **how: Any
) -> Iterator[np.ndarray]:
    """Yield the axes (`panels`,) of a new figure, which is written to `path` when the block succeeds."""
    import matplotlib  # importing matplotlib takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(-(-panels // columns), columns, layout="constrained", squeeze=False, **how)
    try:
        for axis in axes.flat[panels:]:
            axis.set_visible(False)
        for axis in axes.flat if grid else ():
            axis.grid(alpha=0.3)
        if title:
            figure.suptitle(title)
        yield axes.flat[:panels]
        with atomic_output(path) as partial:
            figure.savefig(partial, dpi=dpi)
    finally:
        plt.close(figure)


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

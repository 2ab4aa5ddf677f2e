"""Plot the curves of one or more training runs from their logs:

    python scripts/plot_run.py runs/NAME [runs/OTHER ...] [--out curves.png]

Draws a panel for each loss, gradient norms, learning rate, tokens per second and each validation figure. A figure that
was measured on seen and unseen clips has one panel (seen: line, unseen: dashes). Logged losses are drawn pale below the
smoothed ones. Each run's curves are wider than those of the runs after it, which are drawn over them, so that equal
ones can be seen. It also works during training.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from engine.arguments import Parser, within
from engine.charts import chart_file
from engine.errors import UserError, run_cli
from engine.training.export import read_log

LEFT_OUT = re.compile(r"step|samples_per_s|data_wait|step_s|mfu|memory_gib")
COLUMNS = 4  # of the grid
WIDTH = 4.2  # of a panel, in inches
HEIGHT = 2.7
FEW = 4  # points of a curve that are marked
# points by which a run is wider than the next one, and at most
WIDER = 1.8
MOST_WIDER = 10.0
WIDE = 30  # a positive curve whose largest value is this many times its smallest is drawn on a logarithmic scale

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their log.jsonl files")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="figure to write: .png, .svg or .pdf")
    parser.add_argument("--only", default="", help="draw panels whose name has a match of this regular expression")
    parser.add_argument(
        "--smooth", type=within(1), help="logged points per smoothed value; 1: none (default: 1/25 of all points)"
    )
    args = parser.parse_args()
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {args.out}: its name must end in .png, .svg or .pdf")
    try:
        only = re.compile(args.only)
    except re.error as error:
        raise UserError(f"--only {args.only} is not a regular expression: {error}") from error
    curves = {label: read_curves(run) for label, run in zip(labels(args.runs), args.runs)}
    names = [name for name in panels(curves.values()) if only.search(name)]
    if not names:
        raise UserError(
            f"nothing to plot: no logged value matches --only {args.only}" if args.only else "the logs are empty"
        )
    draw(curves, names, args.smooth, args.out)
    print(f"{args.out}: {len(names)} panels, {len(curves)} {'run' if len(curves) == 1 else 'runs'}")


def labels(runs: Sequence[Path]) -> list[str]:
    """Return a unique name for each run: its folder, preceded by as many parent folders as necessary."""
    folders = [(run.parent if run.suffix == ".jsonl" else run).resolve() for run in runs]
    for run, folder in zip(runs, folders):
        if folders.count(folder) > 1:
            raise UserError(f"{run} is listed twice")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def read_curves(run: Path) -> dict[str, Curve]:
    """Read the curve of each name in a run's log, in order of first appearance; incomplete lines are skipped."""
    path = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no log in {run}: expected the folder of a run, which has log.jsonl")
    curves: dict[str, dict[float, float]] = {}
    for _, record in read_log(path):
        for name, value in record.items():
            drawable = isinstance(value, int | float) and math.isfinite(value)
            if drawable and not LEFT_OUT.fullmatch(name):
                curves.setdefault(name, {})[record["step"]] = value
    return {
        name: (np.array(list(points)), np.array(list(points.values())))
        for name, points in curves.items()
        if any(points.values())  # parts that never ran are all zero
    }


def panels(runs) -> list[str]:
    """Return panels in reading order: losses, gradient norms, learning rate, speed, validation."""
    names = list(dict.fromkeys(panel(name)[0] for run in runs for name in run))

    def rank(name: str) -> int:
        if name.startswith("validation/"):
            return 5
        return {"loss": 0, "grad_norm": 2, "lr": 3, "tokens_per_s": 4}.get(name.split("/")[-1], 1)

    return sorted(names, key=rank)


def panel(name: str) -> tuple[str, str]:
    """Return (panel, line style) of a logged name: seen and unseen clips share a panel."""
    if not name.startswith("validation/"):
        return name, "-"
    shared = re.sub(r"(?<![a-z])(un)?seen(?![a-z])[/_]?|_(un)?seen$", "", name)
    return shared, "--" if "unseen" in name else "-"


def smoothed(values: np.ndarray, points: int) -> np.ndarray:
    """Return the centred moving average over `points` values, or fewer at the ends."""
    if points < 2 or len(values) < 3:
        return values
    index = np.arange(len(values))
    half = np.minimum(points // 2, np.minimum(index, index[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def draw(runs: dict[str, dict[str, Curve]], names: list[str], smooth: int | None, path: Path) -> None:
    """Write the figure: a panel per name, a colour per run."""
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    colours = dict(zip(runs, plt.rcParams["axes.prop_cycle"].by_key()["color"] * len(runs)))
    last = max(steps.max() for curves in runs.values() for steps, _ in curves.values())
    with chart_file(path, len(names), columns, figsize=(WIDTH * columns, HEIGHT * rows + 0.4)) as axes:
        for i, (axis, name) in enumerate(zip(axes, names)):
            fill(axis, name, runs, colours, smooth)
            axis.set_xlim(0, 1.02 * max(last, 1))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if i + columns >= len(names):
                axis.set_xlabel("step")
        handles = [Line2D([], [], color=colours[label], lw=1.4, label=label) for label in runs]
        if any(panel(name)[1] == "--" for run in runs.values() for name in run):
            for what, style, inside in (("seen", "-", "0.4"), ("unseen", "--", "white")):
                handles.append(Line2D([], [], color="0.4", ls=style, marker="o", ms=4, mfc=inside, label=what))
        ncols = min(6, len(handles))
        axes[0].figure.legend(handles=handles, loc="outside upper center", ncols=ncols, frameon=False)


def fill(axis: Axes, name: str, runs: dict[str, dict[str, Curve]], colours: dict[str, str], smooth: int | None) -> None:
    """Draw one panel."""
    lines = [
        (label, panel(logged)[1], min(WIDER * (len(runs) - 1 - number), MOST_WIDER), *curve)
        for number, (label, curves) in enumerate(runs.items())
        for logged, curve in curves.items()
        if panel(logged)[0] == name
    ]
    lowest = min(v.min() for *_, v in lines)
    highest = max(v.max() for *_, v in lines)
    logarithmic = lowest > 0 and highest > WIDE * lowest and name != "lr"
    if logarithmic:
        axis.set_yscale("log")
    for label, style, wider, steps, values in lines:
        line = {"color": colours[label], "lw": 1.4 + wider, "ls": style}
        if name.startswith("validation/") or len(steps) < FEW:  # a line through one point cannot be seen
            line |= {"marker": "o", "ms": 4 + wider, "mfc": "white" if style == "--" else None}
        elif name != "lr":
            axis.plot(steps, values, color=colours[label], lw=0.6, alpha=0.35)
            points = smooth or max(1, len(values) // 25)
            values = np.exp(smoothed(np.log(values), points)) if logarithmic else smoothed(values, points)
        axis.plot(steps, values, **line)
    if lowest >= 0 and name.startswith("validation/") and not logarithmic:
        axis.set_ylim(0, 1.08 * highest or 1)
    title = name.replace("tokens_per_s", "tokens/s").replace("grad_norm", "gradient norm").replace("_", " ")
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)


if __name__ == "__main__":
    run_cli(main)

"""Charts of benchmarks, drawn without a screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.files import atomic_output


@contextmanager
def chart_file(path: Path, rows: int = 1, columns: int = 1, dpi: int = 110, **how: Any) -> Iterator[tuple[Any, Any]]:
    """Figure and axes of a new chart; it is written to the PNG file `path` when the block succeeds.

    Args:
        rows, columns: of panels. how: other arguments of `matplotlib.pyplot.subplots`.
    """
    import matplotlib  # takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, layout="constrained", **how)
    try:
        yield figure, axes
        with atomic_output(path) as partial:
            figure.savefig(partial, dpi=dpi)
    finally:
        plt.close(figure)

"""Charts in files, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterator
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

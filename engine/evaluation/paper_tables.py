"""Tables of published papers, shown separately from the tables of an evaluation.

The numbers of a paper refer to other test sets, often to other measurement programs, and have no intervals. Its rows
are therefore printed unchanged, under the titles and columns of the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import UserError
from engine.evaluation.summary import aligned
from engine.metrics.metric import ARROWS
from engine.metrics.registry import FIGURES, metric_of


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        title: number and subject of the table.
        columns: figures of `engine.metrics.registry`, in the units of the evaluation. A column whose definition differs
            from the figure of that name has a separate title, such as "DD".
        rows: values by system, in the order of the columns. None where the paper states no value.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]

    @property
    def stated(self) -> set[str]:
        """Figures for which the table states a value."""
        values = [dict(zip(self.columns, row)) for row in self.rows.values()]
        return {name for row in values for name, value in row.items() if value is not None and name in FIGURES}

    def heads(self) -> list[str]:
        """Return the column titles."""
        return [title_of(name) for name in self.columns]

    def cells(self, system: str) -> list[str]:
        """Return the values of a row, with the digits of the paper. Missing values are dashes."""
        columns = zip(*self.rows.values())
        digits = [max(map(_decimals, column)) for column in columns]
        return [_text(value, count) for value, count in zip(self.rows[system], digits)]


def read_paper_tables(config: Mapping[str, Mapping[str, Any]]) -> list[PaperTable]:
    """Read the setting `paper_tables`, {title: {columns: [...], rows: {system: [...]}}}, ordered by title.

    Raises:
        UserError: If the number of values in a row differs from the number of columns.
    """
    tables = [PaperTable(title, table["columns"], table["rows"]) for title, table in sorted(config.items())]
    for table in tables:
        for system, values in table.rows.items():
            if len(values) != len(table.columns):
                raise UserError(
                    f"paper_tables: {table.title}: {system} has {len(values)} values for {len(table.columns)} columns"
                )
    return tables


def paper_lines(tables: Iterable[PaperTable], figures: Iterable[str]) -> list[str]:
    """Return the tables that report at least one of the measured figures, as lines for a terminal."""
    lines: list[str] = []
    for table in tables:
        if not table.stated & {*figures}:
            continue
        rows = [[table.title, *table.heads()], *([system, *table.cells(system)] for system in table.rows)]
        lines += ["", *aligned(rows)]
    return lines


def title_of(column: str) -> str:
    """Return the title of a column, with an arrow that points to better values."""
    if column not in FIGURES:
        return column
    figure = metric_of(column).figures[column]
    return figure.title + ARROWS[figure.better]


def _decimals(value: float | None) -> int:
    return len(f"{value}".partition(".")[2]) if isinstance(value, float) else 0


def _text(value: float | None, decimals: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

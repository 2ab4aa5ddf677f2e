"""Tables of papers, shown next to an evaluation's own and never mixed with them.

A paper reports numbers of other test sets, often measured by other programs, and without intervals. So its rows are
printed as they are, in tables that carry the paper's own titles and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import UserError
from engine.metrics.registry import METRICS


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper.

    Attributes:
        title: its number and subject.
        columns: figures of `engine.metrics.registry`, in the unit in which the evaluation prints them. A column that is
            computed in another way than the figure of that name has a title of its own, such as "DD".
        rows: values by system, in the order of the columns; None where the paper has none.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]

    @property
    def stated(self) -> set[str]:
        """Figures of the evaluation for which the table has a value."""
        values = [dict(zip(self.columns, row)) for row in self.rows.values()]
        return {name for row in values for name, value in row.items() if value is not None and name in METRICS}

    def heads(self) -> list[str]:
        """Return the titles of the columns."""
        return [title_of(name) for name in self.columns]

    def cells(self, system: str) -> list[str]:
        """Return the values of a row with the digits of the paper; a dash where the paper has none."""
        columns = zip(*self.rows.values())
        digits = [max(map(_decimals, column)) for column in columns]
        return [_text(value, count) for value, count in zip(self.rows[system], digits)]


def read_paper_tables(config: Mapping[str, Mapping[str, Any]]) -> list[PaperTable]:
    """Read the setting `paper_tables`, {title: {columns: [...], rows: {system: [...]}}}, ordered by title.

    Raises:
        UserError: a row has another number of values than the table has columns.
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
    """Return, for a terminal, the tables that report at least one of the measured figures."""
    lines: list[str] = []
    for table in tables:
        if not table.stated & {*figures}:
            continue
        rows = [[table.title, *table.heads()], *([system, *table.cells(system)] for system in table.rows)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines.append("")
        for name, *cells in rows:
            lines.append(name.ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths[1:])))
    return lines


def title_of(column: str) -> str:
    """Return the title of a column, with an arrow in the direction of better values."""
    if column not in METRICS:
        return column
    figure = METRICS[column].figures[column]
    return figure.title + {1: " ↑", -1: " ↓", 0: ""}[figure.better]


def _decimals(value: float | None) -> int:
    return len(f"{value}".partition(".")[2]) if isinstance(value, float) else 0


def _text(value: float | None, decimals: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

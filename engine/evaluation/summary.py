"""Aggregation of measurements to the figures of a table: values, intervals, tests, and omitted items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluation.clips import EXCHANGED, TRUTH, Clip
from engine.evaluation.measure import Results
from engine.evaluation.statistics import bootstrap_interval, holm, permutation_test, ratio
from engine.metrics.frechet import frechet_distance
from engine.metrics.metric import ARROWS, Figure, Metric

Found = Mapping[str, Mapping[str, Any]]  # measurements of a figure, by system and clip
SIGNIFICANT = 0.05
HEADLINE = ("value", "interval", "interval_speakers", "clips")  # keys of a figure in a record
TOLERANCE = 0.2  # tolerated difference in length between output and ground truth, in seconds


def summarise(
    clips: Sequence[Clip], results: Results, metrics: Mapping[str, Metric], resamples: int, compare: bool = True
) -> dict[str, Any]:
    """Return the figures of every system and, if requested, tests of every pair of systems, as plain values for a JSON
    file.

    `systems[name][figure]` has `value`, `interval` and `interval_speakers` (95 %, or None), `clips` (number of measured
    clips), `values`, those of single clips by id, and `pairs`. Values are in the unit of the printed table. `metrics`
    maps each requested figure to its metric.
    """
    missing = {figure: results.missing[m.name] for figure, m in metrics.items() if m.name in results.missing}
    speakers = {clip.id: clip.speaker for clip in clips}
    found: dict[str, Found] = {}
    systems: dict[str, dict[str, Any]] = {}
    for figure, metric in metrics.items():
        rows = results.rows.get(metric.name, {})
        found[figure] = {
            system: {clip: row[figure] for clip, row in own.items() if figure in row} for system, own in rows.items()
        }
        for system, measured in found[figure].items():
            try:
                if measured:
                    cell = _cell(measured, found[figure].get(TRUTH, {}), speakers, metric.figures[figure], resamples)
                    systems.setdefault(system, {})[figure] = cell
            except UserError as error:
                missing[figure] = str(error)
        if rows and figure not in missing and not any(figure in cells for cells in systems.values()):
            missing[figure] = "no clip has a value"
    shown = {name: metric for name, metric in metrics.items() if any(name in cells for cells in systems.values())}
    return {
        "figures": {
            name: {
                **{key: getattr(metric.figures[name], key) for key in ("title", "better", "digits", "meaning")},
                "protocol": metric.kind,
            }
            for name, metric in shown.items()
        },
        "systems": {name: systems[name] for name in sorted(systems, key=lambda n: n == TRUTH)},
        "heard": {
            system: {clip: row["heard"] for clip, row in rows.items() if "heard" in row}
            for system, rows in results.rows.get("WordErrors", {}).items()
        },
        "tests": _tests(shown, systems, speakers, resamples) if compare else [],
        "notes": _length_notes(shown, results.lengths) + _clip_notes(shown, found),
        "left_out": {"figures": missing, "files": results.failed},
        "seconds": {name: round(value, 2) for name, value in results.seconds.items()},
        "found_in_cache": results.cached,
    }


def headline(summary: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the part of a summary that a record stores, by system and figure: everything except the values of single
    clips.
    """
    systems = summary["systems"].items()
    return {name: {f: {key: cell[key] for key in HEADLINE} for f, cell in cells.items()} for name, cells in systems}


def _cell(
    measured: Mapping[str, Any],
    true: Mapping[str, Any],
    speakers: Mapping[str, str | None],
    about: Figure,
    resamples: int,
) -> dict[str, Any]:
    """Return the figure of one system from its measurements by clip: pairs, or features (F, D)."""
    if isinstance(next(iter(measured.values())), np.ndarray):
        if not true:
            raise UserError("the ground-truth clips have no video, which this metric requires: give clips with video")
        value = frechet_distance(*(np.concatenate([*rows.values()]) for rows in (measured, true)))
        return {"value": value, "interval": None, "interval_speakers": None, "clips": len(measured), "values": {}}
    pairs = np.array([*measured.values()], float)
    single = measured.items() if about.statistic is ratio else ()
    return {
        "value": about.scale * float(about.statistic(pairs)),
        **_intervals(pairs, [speakers[clip] for clip in measured], about, resamples),
        "clips": len(measured),
        "values": {clip: about.scale * x / y for clip, (x, y) in single if y},
        "pairs": {clip: [float(x) for x in pair] for clip, pair in measured.items()},
    }


def _intervals(
    pairs: np.ndarray, speakers: Sequence[str | None], about: Figure, resamples: int, minus: np.ndarray | None = None
) -> dict[str, list[float] | None]:
    """Return the intervals of a figure over clips, and over speakers if all are known. None with fewer than two."""
    how = resamples, about.statistic, minus
    intervals = {
        "interval": bootstrap_interval(pairs, None, *how),
        "interval_speakers": None if None in speakers else bootstrap_interval(pairs, speakers, *how),
    }
    return {name: [about.scale * end for end in ends] if ends else None for name, ends in intervals.items()}


def _tests(
    metrics: Mapping[str, Metric],
    systems: Mapping[str, Mapping[str, Any]],
    speakers: Mapping[str, str | None],
    resamples: int,
) -> list[dict[str, Any]]:
    """Run permutation tests between every two systems on the clips that both have. p-values are Holm-corrected over all
    tests.

    `better` names a system if the corrected p is below 0.05, else it is None. `smallest_p` is the smallest p-value that
    any two systems could reach with this number of clips.
    """
    tests = []
    compared = [name for name in systems if name != TRUTH and not name.endswith(EXCHANGED)]
    for figure, metric in metrics.items():
        about = metric.figures[figure]
        for one, two in combinations(compared, 2):
            first = systems[one].get(figure, {}).get("pairs", {})
            second = systems[two].get(figure, {}).get("pairs", {})
            both = [clip for clip in first if clip in second]
            if len(both) < 2 or not about.better:
                continue
            one_pairs = np.array([first[clip] for clip in both])
            two_pairs = np.array([second[clip] for clip in both])
            difference, p = permutation_test(one_pairs, two_pairs, resamples, statistic=about.statistic)
            tests.append(
                {
                    "figure": figure,
                    "systems": [one, two],
                    "difference": about.scale * difference,
                    **_intervals(one_pairs, [speakers[clip] for clip in both], about, resamples, two_pairs),
                    "p": p,
                    "smallest_p": max(2.0 ** (1 - len(both)), 1 / (1 + resamples)),
                    "clips": len(both),
                }
            )
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        figure = test["figure"]
        ahead = test["difference"] * metrics[figure].figures[figure].better > 0
        test["p_holm"] = p
        test["smallest_p"] = min(1.0, len(tests) * test["smallest_p"])
        test["better"] = test["systems"][0 if ahead else 1] if p < SIGNIFICANT else None
    return tests


def _length_notes(metrics: Mapping[str, Metric], lengths: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Report systems with outputs of another length: metrics only compare the part that output and ground truth have in
    common.
    """
    cut = ", ".join(metric.figures[figure].title for figure, metric in metrics.items() if metric.trims)
    true = lengths.get(TRUTH, {})
    notes = []
    for system, own in lengths.items() if cut else ():
        other = [clip for clip in own if clip in true and abs(own[clip] - true[clip]) > TOLERANCE]
        if other:
            some = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
            what = f"{len(other)} of {len(own)} outputs of {system} are over {TOLERANCE} s longer or shorter"
            notes.append(f"{what} than the ground-truth speech ({some}); for {cut} only the part that both have counts")
    return notes


def _clip_notes(metrics: Mapping[str, Metric], found: Mapping[str, Found]) -> list[str]:
    """Report figures whose rows cover different clips."""
    other = []
    systems = 0
    for figure, metric in metrics.items():
        first, *more = (own.keys() for own in found[figure].values())
        if any(own != first for own in more):
            other.append(metric.figures[figure].title)
            systems = max(systems, len(found[figure].keys() - {TRUTH}))
    if not other:
        return []
    are = f"{', '.join(other)} {'is' if len(other) == 1 else 'are'}"
    note = f"{are} computed over different clips in each row, as some were skipped"
    return [note + ("; the comparison of two systems counts the clips that both have" if systems > 1 else "")]


def comparison_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the paired tests of all pairs of systems as lines of text."""
    tests = summary["tests"]
    if not tests:
        return []
    lines = [f"Paired permutation tests over clips; p is corrected for {len(tests)} tests (Holm):"]
    for test in tests:
        about = summary["figures"][test["figure"]]
        one, two = test["systems"]
        value, interval = _texts({**test, "value": test["difference"]}, about)
        result = f"{test['better']} is better" if test["better"] else "no significant difference"
        head = f"  {about['title']}, {one} - {two}: {value} {interval}"
        lines.append(f"{head}, p {test['p_holm']:.4f}, {test['clips']} clips: {result}")
    if min(test["smallest_p"] for test in tests) >= SIGNIFICANT:
        lines.append("  Too few clips or resamples for any significant difference.")
    return lines


def table_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the table as lines for a terminal: a row per system with intervals, then the target values."""
    figures = summary["figures"]
    rows = [
        ["", *(about["title"] + ARROWS[about["better"]] for about in figures.values())],
        ["", *(about["protocol"] for about in figures.values())],
    ]
    for system, cells in summary["systems"].items():
        values, intervals = zip(*(_texts(cells.get(name), about) for name, about in figures.items()))
        counts = [cells[name]["clips"] if name in cells else summary["count"] for name in figures]
        counts = ("" if n == summary["count"] else f"{n} clip{'s'[: n != 1]}" for n in counts)
        rows += [[system, *values], ["", *intervals], ["", *counts]]
    if summary["aim"]:
        cells = {figure: {"value": value, "interval": None} for figure, value in summary["aim"].items()}
        rows.append(["aim", *(_texts(cells.get(figure), about)[0] for figure, about in figures.items())])
    return [line for line in aligned(rows) if line]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines with aligned columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [row[0].ljust(widths[0]) + "".join(f"  {t:>{w}}" for t, w in zip(row[1:], widths[1:])) for row in rows]
    return [line.rstrip() for line in lines]


def _texts(cell: Mapping[str, Any] | None, about: Mapping[str, Any]) -> tuple[str, str]:
    """Return the formatted value and interval of a figure."""
    if cell is None:
        return "-", ""
    digits = about["digits"]
    ends = [f"{number:.{digits}f}" for number in cell["interval"] or ()]
    return f"{cell['value']:.{digits}f}", f"[{', '.join(ends)}]" if ends else ""

"""From measurements to the figures of a table: values, intervals, tests, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluation.clips import TRUTH, Clip
from engine.evaluation.measure import Results, Row
from engine.evaluation.statistics import STATISTICS, bootstrap_interval, holm, permutation_test
from engine.metrics.metric import Figure
from engine.metrics.registry import description, metric_of, metrics_of

SIGNIFICANT = 0.05
HEADLINE = ("value", "interval", "interval_speakers", "clips")  # of a figure, in a record
TOLERANCE = 0.2  # seconds between an output and the true speech that need no remark


def summarise(
    clips: Sequence[Clip],
    results: Results,
    figures: Sequence[str],
    protocols: Mapping[str, str],
    resamples: int,
    compare: bool = True,
) -> dict[str, Any]:
    """Return the figures of every system, and if asked for tests of every two, as plain values for a JSON file.

    `systems[name][figure]` has `value`, `interval` and `interval_speakers` (95 %, or None), `clips` (how many counted)
    and `values`, those of single clips by id. Values are in the unit of the printed table.
    """
    missing = dict(results.missing)
    speakers = {clip.id: clip.speaker for clip in clips}
    systems: dict[str, dict[str, Any]] = {}
    ratios: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    truths, measured = {clip.id: clip.truth for clip in clips}, {}  # rows by metric, system and clip
    for metric in metrics_of(figures):
        name = metric.__name__
        rows = results.rows.get(name, {})
        true = rows.get(TRUTH, {})
        measured[name] = {system: metric.finish(own, true, truths, protocols[name]) for system, own in rows.items()}
    for figure in figures:
        metric, about = metric_of(figure), description(figure)
        rows = measured.get(metric.__name__, {})
        for system, by_clip in rows.items():
            found = {clip: row[figure] for clip, row in by_clip.items() if figure in row}
            if not found:
                continue
            try:
                if isinstance(next(iter(found.values())), np.ndarray):
                    cell = _set_figure(metric, figure, found, rows.get(TRUTH, {}))
                else:
                    ratios[figure, system], cell = found, _pair_figure(found, speakers, about, resamples)
            except UserError as error:
                missing[figure] = str(error)
            else:
                systems.setdefault(system, {})[figure] = cell
        if rows and figure not in missing and not any(figure in cells for cells in systems.values()):
            missing[figure] = "no clip has it"
    shown = [figure for figure in figures if any(figure in cells for cells in systems.values())]
    return {
        "figures": {
            figure: {
                **{key: getattr(description(figure), key) for key in ("title", "better", "digits", "meaning")},
                "protocol": protocols[metric_of(figure).__name__].partition(":")[0],
            }
            for figure in shown
        },
        "systems": {name: systems[name] for name in sorted(systems, key=lambda n: n == TRUTH)},
        "heard": {
            system: {clip: row["heard"] for clip, row in rows.items() if "heard" in row}
            for system, rows in results.rows.get("WordErrors", {}).items()
        },
        "tests": _tests(shown, ratios, speakers, resamples) if compare else [],
        "notes": _length_notes(shown, results.lengths) + _clip_notes(shown, measured),
        "left_out": {
            "figures": missing,
            "files": [dict(zip(("clip", "system", "where", "why"), row)) for row in results.failed],
        },
        "seconds": {name: round(value, 2) for name, value in results.seconds.items()},
        "found_in_cache": results.cached,
    }


def headline(summary: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by system and figure what a record keeps of a summary: all but what was measured of single clips."""
    systems = summary["systems"].items()
    return {name: {f: {key: cell[key] for key in HEADLINE} for f, cell in cells.items()} for name, cells in systems}


def _pair_figure(
    found: Mapping[str, tuple[float, float]], speakers: Mapping[str, str | None], about: Figure, resamples: int
) -> dict[str, Any]:
    pairs, single = np.array([*found.values()], float), about.statistic == "ratio"
    return {
        "value": about.scale * float(STATISTICS[about.statistic](pairs, 1.0)),
        **_intervals(pairs, [speakers[clip] for clip in found], about, resamples),
        "clips": len(found),
        "values": {clip: about.scale * x / y for clip, (x, y) in found.items() if y} if single else {},
        "pairs": {clip: [float(x) for x in pair] for clip, pair in found.items()},
    }


def _intervals(
    pairs: np.ndarray, speakers: Sequence[str | None], about: Figure, resamples: int, minus: np.ndarray | None = None
) -> dict[str, list[float] | None]:
    """Return the interval of a figure over clips, and over their speakers if all are known and some differ."""
    statistic, several = STATISTICS[about.statistic], None not in speakers and len(set(speakers)) > 1
    intervals = {
        "interval": bootstrap_interval(pairs, None, resamples, statistic, minus),
        "interval_speakers": bootstrap_interval(pairs, speakers, resamples, statistic, minus) if several else None,
    }
    return {name: ends and [about.scale * end for end in ends] for name, ends in intervals.items()}


def _set_figure(metric: Any, figure: str, found: Mapping[str, np.ndarray], true: Mapping[str, Row]) -> dict[str, Any]:
    truth = [row[figure] for row in true.values() if figure in row]
    if not truth:
        raise UserError("the true clips have no pictures to compare with")
    value = metric.distance(np.concatenate(list(found.values())), np.concatenate(truth))
    return {"value": value, "interval": None, "interval_speakers": None, "clips": len(found), "values": {}}


def _tests(
    figures: Sequence[str],
    ratios: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]],
    speakers: Mapping[str, str | None],
    resamples: int,
) -> list[dict[str, Any]]:
    """Test every two systems by permutation on the clips that both have; p values are corrected over all tests (Holm).

    `better` names a system if the corrected p is below 0.05, else it is None. `smallest_p` is what the most different
    systems could reach: each clip is exchanged or not, so few clips can show nothing.
    """
    tests = []
    names = list(dict.fromkeys(system for _, system in ratios if system != TRUTH))
    for figure in figures:
        for one, two in combinations(names, 2):
            first, second = ratios.get((figure, one), {}), ratios.get((figure, two), {})
            both = [clip for clip in first if clip in second]
            if len(both) < 2 or metric_of(figure).outputs_only or not description(figure).better:
                continue
            one_pairs, two_pairs = (np.array([x[c] for c in both], float) for x in (first, second))
            about = description(figure)
            difference, p = permutation_test(one_pairs, two_pairs, resamples, statistic=STATISTICS[about.statistic])
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
        ahead = test["difference"] * description(test["figure"]).better > 0
        test["p_holm"] = p
        test["smallest_p"] = min(1.0, len(tests) * test["smallest_p"])
        test["better"] = test["systems"][0 if ahead else 1] if p < SIGNIFICANT else None
    return tests


def _length_notes(figures: Sequence[str], lengths: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Name systems that end early or late: figures see only what they have in common with the true speech."""
    cut, true = [description(f).title for f in figures if metric_of(f).cuts], lengths.get(TRUTH, {})
    notes = []
    if not cut:
        return []
    for system, own in lengths.items():
        other = [clip for clip in own if clip in true and abs(own[clip] - true[clip]) > TOLERANCE]
        if other:
            some = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
            what = f"{len(other)} of {len(own)} outputs of {system} are over {TOLERANCE} s longer or shorter"
            notes.append(
                f"{what} than the true speech ({some}); for {', '.join(cut)} only the part that both have counts"
            )
    return notes


def _clip_notes(figures: Sequence[str], measured: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> list[str]:
    """Name figures whose rows are of different clips, as of a system that has not all of them."""
    other, systems = [], 0
    for figure in figures:
        rows = measured[metric_of(figure).__name__]
        sets = [{clip for clip, row in by_clip.items() if figure in row} for by_clip in rows.values()]
        if any(own != sets[0] for own in sets):
            other.append(description(figure).title)
            systems = max(systems, len([name for name in rows if name != TRUTH]))
    if not other:
        return []
    note = (
        f"the rows' {', '.join(other)} {'is' if len(other) == 1 else 'are'} of different clips, as some were left out"
    )
    return [note + ("; the comparison of two systems counts the clips that both have" if systems > 1 else "")]


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """Write a sentence for every two systems: which is better by which figures, and what shows no difference."""
    lines, figures, pairs = [], summary["figures"], {}
    for test in summary["tests"]:
        pairs.setdefault(tuple(test["systems"]), []).append(test)
    for (one, two), tests in pairs.items():
        won: dict[str | None, list[str]] = {one: [], two: [], None: []}
        for test in tests:
            won[test["better"]].append(figures[test["figure"]]["title"])
        parts = [f"{name} is better by {', '.join(won[name])}" for name in (one, two) if won[name]]
        if won[None]:
            parts.append(f"no difference is shown by {', '.join(won[None])}")
        tested = {test["figure"] for test in tests}
        shared = [f for f in figures if all(f in summary["systems"].get(name, {}) for name in (one, two))]
        rest = [figures[f]["title"] for f in shared if f not in tested]
        if rest:
            parts.append(f"not tested: {', '.join(rest)}")
        line = f"{one} against {two}: {'; '.join(parts)}."
        if min(test["smallest_p"] for test in tests) >= SIGNIFICANT:
            line += " So few clips, or resamples, can show no difference at all."
        lines.append(line)
    return lines


def comparison_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the comparison of systems for a terminal: a sentence for every two, then a line for each test."""
    lines = verdicts(summary)
    for test in summary["tests"]:
        about = summary["figures"][test["figure"]]
        value, interval = _cell({"value": test["difference"]}, about["digits"]), _interval(test, about["digits"])
        one, two = test["systems"]
        shown = f"{test['better']} better" if test["better"] else "no difference shown"
        head = f"  {about['title']}, {one} less {two}: {value} {interval}"
        lines.append(f"{head}, p {test['p_holm']:.4f}, {test['clips']} clips: {shown}")
    if lines:
        how = f"permutation tests over clips; p is corrected for {len(summary['tests'])} tests"
        lines.append(f"  ({how}; a difference is shown where it is below {SIGNIFICANT})")
    return lines


def table_lines(summary: Mapping[str, Any], paper: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return the table for a terminal: a row a system with intervals, then the rows of aims and of the paper."""
    figures = summary["figures"]
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    head = ["", *(f["title"] + arrows[f["better"]] for f in figures.values())]
    rows = [head, ["", *(f["protocol"] for f in figures.values())]]
    for system, cells in summary["systems"].items():
        rows.append([system, *(_cell(cells.get(name), f["digits"]) for name, f in figures.items())])
        rows.append(["", *(_interval(cells.get(name), f["digits"]) for name, f in figures.items())])
        counts = [cells[name]["clips"] if name in cells else summary["count"] for name in figures]
        rows.append(["", *("" if n == summary["count"] else f"{n} clip{'s'[: n != 1]}" for n in counts)])
    for name, values in paper.items():
        texts = (None if values.get(figure) is None else {"value": values[figure]} for figure in figures)
        rows.append([name, *(_cell(c, f["digits"]) for c, f in zip(texts, figures.values()))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [row[0].ljust(widths[0]) + "".join(f"  {t:>{w}}" for t, w in zip(row[1:], widths[1:])) for row in rows]
    return [line.rstrip() for line in lines if line.strip()]


def _cell(cell: Mapping[str, Any] | None, digits: int) -> str:
    return "-" if cell is None else f"{cell['value']:.{digits}f}"


def _interval(cell: Mapping[str, Any] | None, digits: int) -> str:
    interval = cell and cell["interval"]
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""

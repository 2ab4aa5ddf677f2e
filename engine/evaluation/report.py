"""The report of an evaluation as one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from engine.errors import UserError
from engine.evaluation.clips import TRUTH, Clip
from engine.evaluation.pictures import COLOURS, TRUE_COLOUR, distribution, player, spectrogram
from engine.evaluation.summary import verdicts
from engine.files import atomic_output
from engine.metrics.metric import Take

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN = 10  # best clips, and worst


def write_report(path: Path, summary: Mapping[str, Any], clips: Sequence[Clip], media: bool = True) -> None:
    """Write the tables, distributions, tests, and the ten best and worst clips of the first system.

    Args:
        media: with players and spectrograms.
    """
    systems = [name for name in summary["systems"] if name != TRUTH]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(systems)} | {TRUTH: TRUE_COLOUR}
    plots = []
    for figure, about in summary["figures"].items():
        values = {
            name: list(cells[figure]["values"].values())
            for name, cells in summary["systems"].items()
            if figure in cells and len(cells[figure]["values"]) > 1
        }
        values = {n: own for n, own in values.items() if n != TRUTH or np.ptp(own) > 1e-6}  # not 0 or 1 by definition
        if any(np.ptp(own) > 1e-6 for own in values.values()):
            plots.append({**about, "svg": distribution(values, colours, about["digits"])})
    ranking, best, worst = rank(summary, systems)
    by_id = {clip.id: clip for clip in clips}
    cards = {
        title: [_card(by_id[name], summary, systems, media) for name in names]
        for title, names in (("best", best), ("worst", worst))
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = lambda value, digits: f"{value:.{digits}f}".replace("-", "−")
    page = environment.from_string(TEMPLATE.read_text()).render(
        s=summary,
        systems=systems,
        verdicts=verdicts(summary),
        truth=TRUTH,
        best=_best(summary, systems),
        colours=colours,
        plots=plots,
        cards=cards,
        ranking=ranking,
    )
    with atomic_output(path) as partial:
        partial.write_text(page, encoding="utf-8")


def rank(summary: Mapping[str, Any], systems: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(title of the figure, best clips, worst clips) of the first system, by the first figure that single clips have.

    Of equal values, the further figures decide.
    """
    if not systems:
        return "", [], []
    cells = summary["systems"][systems[0]]
    keys = [f for f, about in summary["figures"].items() if f in cells and cells[f]["values"] and about["better"]]
    if not keys:
        return "", [], []
    better = {key: summary["figures"][key]["better"] for key in keys}

    def goodness(clip: str) -> tuple[float, ...]:
        return tuple(better[k] * cells[k]["values"].get(clip, 0.0) for k in keys)

    order = sorted(cells[keys[0]]["values"], key=goodness, reverse=True)
    count = min(SHOWN, (len(order) + 1) // 2)
    return summary["figures"][keys[0]]["title"], order[:count], order[count:][::-1][:SHOWN]


def _best(summary: Mapping[str, Any], systems: Sequence[str]) -> dict[str, str]:
    """The system with the best value of each figure, where there are several, measured on the same clips."""
    found = {}
    for figure, about in summary["figures"].items():
        cells = {n: summary["systems"][n][figure] for n in systems if figure in summary["systems"][n]}
        values = {name: cell["value"] for name, cell in cells.items()}
        if len({(cell["clips"], *sorted(cell["values"])) for cell in cells.values()}) > 1:
            continue
        shown = {name: round(about["better"] * value, about["digits"]) for name, value in values.items()}
        top = [name for name, value in shown.items() if value == max(shown.values())]
        if len(top) == 1 < len(values):
            found[figure] = top[0]
    return found


def _card(clip: Clip, summary: Mapping[str, Any], systems: Sequence[str], media: bool) -> dict[str, Any]:
    takes = []
    for name in [*systems, TRUTH]:
        take = clip.truth if name == TRUTH else clip.takes.get(name)
        cells = summary["systems"].get(name, {})
        values = [
            (about["title"], f"{cells[figure]['values'][clip.id]:.{about['digits']}f}")
            for figure, about in summary["figures"].items()
            if clip.id in cells.get(figure, {}).get("values", {})
        ]
        heard = summary["heard"].get(name, {}).get(clip.id)
        takes.append({"name": name, "values": values, "heard": heard, "media": _media(take) if media and take else ""})
    return {"id": clip.id, "text": clip.truth.text, "speaker": clip.speaker, "takes": takes}


def _media(take: Take) -> str:
    """A player and a spectrogram; "" where the file cannot be shown."""
    if take.audio is None:
        return ""
    try:
        return player(take.audio, take.video) + spectrogram(take.audio)
    except UserError:
        return ""

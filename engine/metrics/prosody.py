"""Pitch range and energy: how they follow the true clips, and whether they move as those do where expressions change.

Pitch by pYIN (Mauch and Dixon 2014; package librosa, ISC), see `engine.metrics.speech`. The manifest's row of a clip
that changes its expression has `change` (seconds), `phonemes` (name, start, end) and `expressions` (names by half
second). The right way is that of the means over all true clips' parts of the two expressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from engine.metrics.metric import Figure, Metric, Rows, Take, wave_of
from engine.metrics.speech import PITCH_HOP, energy, pitch, pitch_range

RATE = 24_000
FRAMES = 1 / PITCH_HOP  # a second
NAMES = ("pitch_range", "energy")
WAY = "moves the right way where the expression changes"


class Prosody(Metric):
    figures: ClassVar = {
        "pitch_range_correlation": Figure(
            "pitch r", 1, 2, 1, "pitch range: correlation with true clips", "correlation"
        ),
        "energy_correlation": Figure("energy r", 1, 2, 1, "energy: correlation with true clips", "correlation"),
        "pitch_range_right_way": Figure("pitch right way %", 1, 1, 100, f"pitch range {WAY}"),
        "energy_right_way": Figure("energy right way %", 1, 1, 100, f"energy {WAY}"),
    }
    needs = ("librosa",)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        wave = wave_of(take.audio, RATE)
        f0, row, parts = pitch(wave, RATE), truth.about, []
        for start, end in spans_around_change(row) if row.get("change") is not None else ():
            part = wave[int(start * RATE) : int(end * RATE)]
            parts.append((pitch_range(f0[int(start * FRAMES) : int(end * FRAMES)]), energy(part)))
        return {"whole": (pitch_range(f0), energy(wave)), "around_change": parts}

    @classmethod
    def finish(cls, rows: Rows, true: Rows, truths: Mapping[str, Take], protocol: str) -> Rows:
        finished = {clip: dict(row) for clip, row in rows.items()}
        means: dict[str, list[Any]] = {}
        for clip, row in true.items():
            for name, part in zip(ends_of(truths[clip]), row["around_change"]):
                means.setdefault(name, []).append(part)
        levels = {name: np.mean(parts, 0) for name, parts in means.items()}
        for clip, row in finished.items():
            pairs = zip(NAMES, true[clip]["whole"], row["whole"]) if clip in true else ()
            row |= {f"{name}_correlation": (own, made) for name, own, made in pairs}
            if row["around_change"] and true:
                first, second = ends_of(truths[clip])
                moved = np.sign(np.diff(row["around_change"], axis=0)[0])
                right = moved == np.sign(levels[second] - levels[first])
                row |= {f"{name}_right_way": (float(value), 1) for name, value in zip(NAMES, right)}
        return finished


def ends_of(truth: Take) -> tuple[str, str]:
    """Return the expressions at the beginning and at the end of a clip that changes."""
    expressions = truth.about.get("expressions") or [""]
    return expressions[0], expressions[-1]


def spans_around_change(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the seconds in which a clip speaks before and after its change of expression."""
    times = [times for _, *times in row["phonemes"]]
    parts = [[t for t in times if (t[0] >= row["change"] - 1e-6) == after] for after in (False, True)]
    return [(part[0][0], part[-1][1]) for part in parts]

"""A trainer's validation: `engine.evaluation.measure` for waves in memory, divided over processes.

Each process measures its part of the clips, and the figures come of all of them. What processes measure is kept by
clip, in the order of the clips, so that the figures do not depend on their number.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.evaluation.clips import Clip
from engine.evaluation.measure import measure
from engine.evaluation.statistics import ratio
from engine.metrics.metric import Sound, Take
from engine.metrics.registry import metrics_of, protocol_of


@dataclass(frozen=True)
class Share:
    """What process `rank` of `count` measures: neighbouring items, the smaller shares first.

    The first process also measures what cannot be divided. It has an item if there is any: random draws then come after
    the same work as in a single process.
    """

    rank: int = 0
    count: int = 1
    most: int | None = None  # items that are measured by all processes together; None: all

    def range(self, items: int) -> range:
        """Return the numbers of this process's items among `items`."""
        items = items if self.most is None else min(items, self.most)
        parts = min(self.count, items)
        if self.rank >= parts:
            return range(0)
        return range(self.rank * items // parts, (self.rank + 1) * items // parts)

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Share()
OUTPUT = "output"  # the one system of a validation


def spread(total: int, count: int) -> list[int]:
    """Return the numbers of `count` of `total` clips, evenly spread; all of them if there are fewer."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class ByClip:
    """A figure that all clips have together."""

    values: Mapping[int, Any]  # what was measured of a clip, by its number
    figure: Callable[[list[Any]], Any] = mean_of  # of the values of all clips in order; pickle knows it by name


def figures_of(shares: Sequence[Mapping[str, float | ByClip]]) -> dict[str, float]:
    """Return the figures of all shares. A figure of several values is their mean; one that no clip has is left out."""
    found: dict[str, float | ByClip] = {}
    for share in shares:
        for name, value in share.items():
            if isinstance(value, ByClip) and name in found:
                value = ByClip({**found[name].values, **value.values}, value.figure)
            found[name] = value
    figures = {}
    for name, value in found.items():
        if isinstance(value, ByClip):
            if not value.values:
                continue
            value = value.figure([value.values[clip] for clip in sorted(value.values)])
        figures[name] = float(np.mean(value))
    return figures


def words_by(recogniser: str | Path | None) -> dict[str, str]:
    """Return the protocol of word errors: a JSGF grammar (a file), the Whisper of a folder; None: Whisper medium."""
    if recogniser is None:
        return {}
    return {"wer": f"{'whisper-medium' if Path(recogniser).is_dir() else 'grammar'}:{recogniser}"}


def ratio_of(pairs: Sequence[tuple[float, float]]) -> float:
    """Return sum(a) / sum(b) of pairs (a, b)."""
    return float(ratio(np.array(pairs, float)))


def measure_outputs(
    figures: Sequence[str],
    texts: Sequence[str],
    waves: Sequence[np.ndarray],
    truths: Sequence[np.ndarray] | None,
    rate: int,
    recogniser: str | Path | None = None,
    device: str = "cpu",
    numbers: Sequence[int] | None = None,
) -> dict[str, ByClip]:
    """Measure figures of generated speech as ratios: a word error rate of 0.1 is 10 %.

    `figures_of` makes one number per figure of what all processes measured. A figure whose package or network is
    missing is left out, and the first process prints one line about it. A clip that cannot be measured is left out.

    Args:
        figures: names of `engine.metrics.registry`.
        texts: the words of each clip.
        waves: the generated speech of each clip, (N,).
        truths: the ground-truth speech of each clip, (N,); None leaves out figures that compare with it.
        rate: sampling rate of both, in Hz.
        recogniser: what transcribes the speech; see `words_by`.
        device: device of the metrics' networks.
        numbers: index of each clip among all clips of the validation, of which other processes measure the rest.
    """
    numbers = range(len(waves)) if numbers is None else numbers
    by_metric = {
        metric(protocol_of(metric, words_by(recogniser)), device=device): names
        for metric, names in metrics_of(figures).items()
    }
    clips = []
    for i, number in enumerate(numbers):
        truth = Take(None if truths is None else Sound(truths[i], rate), text=texts[i])
        clips.append(Clip(str(number), None, truth, {OUTPUT: Take(Sound(waves[i], rate), text=texts[i])}))
    comparable = [metric for metric in by_metric if truths is not None or not metric.pair]
    measured = measure(clips, comparable, true_row=False)
    results = {}
    for metric, names in by_metric.items():
        rows = measured.rows.get(metric.name, {}).get(OUTPUT, {})
        for name in names:
            pairs = {int(clip): row[name] for clip, row in rows.items() if name in row}
            if pairs:
                results[name] = ByClip(pairs, ratio_of)
        reason = "there is no ground-truth speech to compare with" if metric not in comparable else None
        reason = reason or measured.missing.get(metric.name)
        if reason and 0 in numbers:
            print(f"no {', '.join(names)}: {reason}", flush=True)
    return results

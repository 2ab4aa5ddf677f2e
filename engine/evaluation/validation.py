"""A trainer's validation: the metrics of an evaluation for waves in memory, spread over processes.

Each process measures its share of the clips, and the figures come of all of them. What processes measure is kept by
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

from engine.errors import UserError
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


def measure_clips(
    figures: Sequence[str],
    texts: Sequence[str],
    waves: Sequence[np.ndarray],
    truths: Sequence[np.ndarray] | None,
    rate: int,
    recogniser: str | Path | None = None,
    device: str = "cpu",
    numbers: Sequence[int] | None = None,
) -> dict[str, ByClip]:
    """Measure figures of clips, as ratios: a word error rate of 0.1 is 10 %. `figures_of` makes one of all clips.

    A figure whose package or network is missing is left out, with one line. A clip that cannot be measured is, too.

    Args:
        figures: names of `engine.metrics.registry`.
        texts, waves, truths: of each clip its words, the wave (N,) to be measured, and the true one. No truths: what
            compares with them is left out.
        recogniser: what hears the words; see `words_by`.
        numbers: of the clips among all clips of a validation, where others are measured elsewhere.
    """
    results = {}
    true = [Take(text=text) for text in texts]
    if truths is not None:
        true = [Take(Sound(wave, rate), text=text) for wave, text in zip(truths, texts, strict=True)]
    made = [Take(Sound(wave, rate), text=text) for wave, text in zip(waves, texts, strict=True)]
    for metric, names in metrics_of(figures).items():
        measuring, rows = metric(protocol_of(metric, words_by(recogniser)), device=device), {}
        try:
            measuring.check()
            if metric.pair and truths is None:
                raise UserError("there is no true speech to compare with")
            measuring.load()
        except (UserError, OSError) as error:  # files of a network that cannot be loaded: training goes on
            if not numbers or numbers[0] == 0:  # one of many processes says so
                print(f"no {', '.join(names)}: {error}", flush=True)
            continue
        for number, take, truth in zip(numbers or range(len(made)), made, true):
            try:
                rows[number] = measuring.measure(take, truth)
            except UserError:  # such as no speech found in the clip
                continue
        for name in names:
            pairs = {number: row[name] for number, row in rows.items() if name in row}
            if pairs:
                results[name] = ByClip(pairs, ratio_of)
    return results

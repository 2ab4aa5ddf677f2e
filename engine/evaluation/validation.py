"""Validation during training: `engine.evaluation.measure` for waveforms in memory, divided over processes.

Each process measures its share of the clips, and the results of all processes are combined in the order of the clips,
so that figures do not depend on the number of processes.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.clips import Clip
from engine.evaluation.measure import measure
from engine.evaluation.statistics import ratio
from engine.metrics.metric import Take, Waveform
from engine.metrics.registry import metrics_of, protocol_of


@dataclass(frozen=True)
class Share:
    """The part of the items that process `rank` of `count` measures. Parts are contiguous, and smaller ones come first.

    By default, a single process measures all items. The first process also computes the metrics that cannot be divided.
    It has at least one item if there are any, so that its random generators are in the same state as in a single
    process.
    """

    rank: int = 0
    count: int = 1
    most: int | None = None  # number of items to measure over all processes; None: all

    def range(self, items: int) -> range:
        """Return the indices of this process's items among `items`."""
        items = items if self.most is None else min(items, self.most)
        parts = min(self.count, items)
        if self.rank >= parts:
            return range(0)
        return range(self.rank * items // parts, (self.rank + 1) * items // parts)

    @property
    def first(self) -> bool:
        return self.rank == 0


OUTPUT = "output"  # name of the only system of a validation


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class ByClip:
    """A figure that is computed from the values of all clips."""

    values: Mapping[int, Any]  # measurement by clip index
    figure: Callable[[list[Any]], Any] = mean_of  # function of the values of all clips in order; must be picklable


def figures_of(shares: Sequence[Mapping[str, float | ByClip]]) -> dict[str, float]:
    """Combine the figures of all shares. Figures with several values are averaged; figures without values are
    omitted.
    """
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
    """Return the WER protocol: a JSGF grammar (a file), the folder of a recogniser of GRID or of a Whisper model, or
    Whisper medium (None).
    """
    if recogniser is None:
        return {}
    kind = "grammar"
    if Path(recogniser).is_dir():
        kind = "grid" if (Path(recogniser) / "config.yaml").is_file() else "whisper-medium"
    return {"wer": f"{kind}:{recogniser}"}


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
    """Measure figures of generated speech as ratios: a WER of 0.1 is 10 %.

    `figures_of` combines the results of all processes. Figures whose package or network is missing are skipped, which
    the first process reports. Clips that cannot be measured are skipped.

    Args:
        figures: names of `engine.metrics.registry`.
        texts: text of each clip.
        waves: generated speech of each clip, (N,).
        truths: ground-truth speech of each clip, (N,). None skips figures that need it.
        rate: sampling rate of both, in Hz.
        recogniser: speech recogniser, see `words_by`.
        device: device of the metrics' networks.
        numbers: index of each clip among all clips of the validation.
    """
    numbers = range(len(waves)) if numbers is None else numbers
    by_metric = {
        metric(protocol_of(metric, words_by(recogniser)), device=device): names
        for metric, names in metrics_of(figures).items()
    }
    clips = []
    for i, number in enumerate(numbers):
        truth = Take(None if truths is None else Waveform(truths[i], rate), text=texts[i])
        clips.append(Clip(str(number), None, truth, {OUTPUT: Take(Waveform(waves[i], rate), text=texts[i])}))
    comparable = [metric for metric in by_metric if truths is not None or not metric.needs_truth]
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

"""The metrics of an evaluation, by name, for waves in memory: what a trainer validates with.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.evaluation.shares import ByClip
from engine.evaluation.statistics import ratio
from engine.metrics.metric import Sound, Take, Unavailable
from engine.metrics.registry import metrics_of, protocol_of

WEIGHTS = Path("checkpoints")  # as in configs/evaluate.yaml


def words_by(recogniser: str | Path | None) -> dict[str, str]:
    """The protocol of word errors: by a JSGF grammar (a file), by the Whisper of a folder; None: by Whisper medium."""
    if recogniser is None:
        return {}
    return {"wer": f"{'whisper-medium' if Path(recogniser).is_dir() else 'grammar'}:{recogniser}"}


def ratio_of(pairs: Sequence[tuple[float, float]]) -> float:
    """sum(a) / sum(b) of pairs (a, b)."""
    return float(ratio(np.array(pairs, float)))


def measure_clips(
    figures: Sequence[str],
    texts: Sequence[str],
    waves: Sequence[np.ndarray],
    truths: Sequence[np.ndarray] | None,
    rate: int,
    protocols: Mapping[str, str] | None = None,
    weights: Path = WEIGHTS,
    device: str = "cpu",
    numbers: Sequence[int] | None = None,
) -> dict[str, ByClip]:
    """Figures of clips, as ratios: a word error rate of 0.1 is 10 %. `figures_of` makes one of all clips.

    A figure whose package or network is missing is left out, with one line. A clip that cannot be measured is, too.

    Args:
        figures: names of `engine.metrics.registry`.
        texts, waves, truths: of each clip its words, the wave (N,) to be measured, and the true one. No truths: what
            compares with them is left out.
        protocols: by figure, with an argument after a colon: {"wer": "grammar:FILE"}.
        numbers: of the clips among all clips of a validation, where others are measured elsewhere.
    """
    results = {}
    true = [Take(text=text) for text in texts]
    if truths is not None:
        true = [Take(Sound(wave, rate), text=text) for wave, text in zip(truths, texts, strict=True)]
    made = [Take(Sound(wave, rate), text=text) for wave, text in zip(waves, texts, strict=True)]
    for metric, names in metrics_of(figures).items():
        protocol = protocol_of(metric, protocols or {})
        try:
            metric.check(protocol, weights)
            if metric.pair and truths is None:
                raise Unavailable("there is no true speech to compare with")
            measuring, rows = metric(protocol, weights, device), {}
        except (UserError, OSError) as error:  # files of a network that cannot be loaded: training goes on
            kind = "" if isinstance(error, Unavailable) else "cannot be measured: "
            if not numbers or numbers[0] == 0:  # one of many processes says so
                print(f"no {', '.join(names)}: {kind}{error}", flush=True)
            continue
        for number, take, truth in zip(numbers or range(len(made)), made, true):
            try:
                rows[number] = measuring.measure(take, truth)
            except UserError:  # such as no speech found in the clip
                continue
        for name in names:
            pairs = {number: row[name] for number, row in rows.items() if name in row}
            if pairs and not any(isinstance(pair, np.ndarray) for pair in pairs.values()):
                results[name] = ByClip(pairs, ratio_of)
    return results

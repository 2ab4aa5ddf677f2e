"""Means over clips with confidence intervals, and paired tests between systems.

The measurement of a clip is a pair (a, b). A figure is sum(a) / sum(b) over clips, or the correlation of a and b.
Resampling weights clips, or groups of clips such as speakers.

Axes: N clips, W rows of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

LEVEL = 95.0  # confidence level of an interval in per cent
BLOCK = 2**22  # random numbers drawn at once
RESAMPLES = 2000

Statistic = Callable[[np.ndarray, np.ndarray | float], np.ndarray]


def ratio(pairs: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Return sum(a) / sum(b) of pairs (..., N, 2) with weights (..., N); NaN where sum(b) is 0."""
    a = weights * pairs[..., 0]
    b = weights * pairs[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return a.sum(-1) / b.sum(-1)


def correlation(pairs: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Return Pearson's r of pairs (..., N, 2) with weights (..., N); 0 where a or b does not vary.

    The pitch range of whispered clips, for example, does not vary.
    """
    weights = np.broadcast_to(weights, np.broadcast_shapes(np.shape(weights), pairs.shape[:-1]))
    share = (weights / weights.sum(-1, keepdims=True))[..., None]
    centred = pairs - (share * pairs).sum(-2, keepdims=True)
    xx, yy = np.moveaxis((share * centred**2).sum(-2), -1, 0)
    xy = (share[..., 0] * centred.prod(-1)).sum(-1)
    scale = np.sqrt(xx * yy)
    return np.where(scale > 1e-12, xy / np.maximum(scale, 1e-12), 0.0)


def bootstrap_interval(
    pairs: np.ndarray,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    statistic: Statistic = ratio,
    minus: np.ndarray | None = None,
) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of a statistic of N clips, or of its difference between systems.

    Args:
        pairs: (N, 2), the measurements (a, b) of each clip.
        groups: group of each clip, such as its speaker. Whole groups are resampled, identically for both systems.
        resamples: number of bootstrap samples.
        statistic: `ratio` or `correlation`.
        minus: (N, 2), the measurements of a second system, whose statistic is subtracted.

    Returns:
        The bounds (low, high), or None with fewer than two clips or groups.
    """
    values = [
        statistic(pairs, weights) - (0 if minus is None else statistic(minus, weights))
        for weights in resampled(len(pairs), groups, resamples)
    ]
    if not values:
        return None
    low, high = np.nanpercentile(np.concatenate(values), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def resampled(count: int, groups: Sequence[str] | None, resamples: int) -> Iterator[np.ndarray]:
    """Yield weights (W, N) of `count` clips, `resamples` rows in total. Yield nothing with fewer than two clips or
    groups.
    """
    at = np.arange(count) if groups is None else np.unique(np.asarray(groups, str), return_inverse=True)[1]
    units = len(np.unique(at))
    rng = np.random.default_rng(0)
    if units > 1:
        for size in _blocks(resamples, count):
            yield rng.multinomial(units, np.full(units, 1 / units), size)[:, at]


def permutation_test(
    one: np.ndarray, two: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, statistic: Statistic = ratio
) -> tuple[float, float]:
    """Return (difference of the figures of two systems, two-sided p-value). Both are pairs (N, 2) of the same clips.

    Under the null hypothesis the outputs of both systems are exchangeable, so each clip is swapped with probability
    1/2.
    """
    seen = float(statistic(one, 1.0) - statistic(two, 1.0))
    rng = np.random.default_rng(seed)
    larger = 0
    for size in _blocks(resamples, 4 * len(one)):
        swap = rng.integers(0, 2, (size, len(one), 1)).astype(bool)
        apart = statistic(np.where(swap, two, one), 1.0) - statistic(np.where(swap, one, two), 1.0)
        larger += int((np.abs(apart) >= abs(seen) - 1e-12).sum())
    return seen, (1 + larger) / (1 + resamples)


def holm(values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values, which control the family-wise error rate (Holm 1979)."""
    order = np.argsort(values)
    out = [0.0] * len(values)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, values[i] * (len(values) - rank)))
        out[i] = worst
    return out


def derangement(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a random permutation (size,) without fixed points."""
    order = rng.permutation(size)
    out = np.empty(size, int)
    out[order] = np.roll(order, 1)
    return out


def _blocks(resamples: int, n: int) -> list[int]:
    size = max(1, min(resamples, BLOCK // max(n, 1)))
    return [min(size, resamples - start) for start in range(0, resamples, size)]

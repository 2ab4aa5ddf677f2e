"""Figures of many clips with intervals, and tests of two systems on the same clips.

What is measured of a clip for a figure is a pair (a, b). A figure is sum(a) / sum(b) over clips, or the correlation of
a with b. Clips, or whole groups of them such as speakers, are resampled by weights.

Axes: N clips, W rows of weights, S seeds (models of one system).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

LEVEL = 95.0  # per cent of an interval
BLOCK = 2**22  # numbers drawn at once
RESAMPLES = 2000
NORMAL = 1.96
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % point of the t distribution for the mean of so many values

Statistic = Callable[[np.ndarray, np.ndarray | float], np.ndarray]


def ratio(pairs: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Return sum(a) / sum(b) of pairs (..., N, 2) with weights (..., N); NaN where sum(b) is 0."""
    a, b = (weights * pairs[..., column] for column in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return a.sum(-1) / b.sum(-1)


def correlation(pairs: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Return Pearson's r of pairs (..., N, 2) with weights (..., N); 0 where a or b does not vary.

    The pitch range of a whisper, for example, does not.
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
    """Return the 95 % percentile interval of a figure of pairs (N, 2), or of its difference to that of `minus` (N, 2).

    Args:
        groups: of the clips, such as speakers: whole groups are drawn with replacement, the same for both.

    Returns:
        None with fewer than two clips or groups.
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
    """Yield weights (W, N) of `count` clips, `resamples` rows in all; none with fewer than two clips or groups."""
    at = np.arange(count) if groups is None else np.unique(np.asarray(groups, str), return_inverse=True)[1]
    units = len(np.unique(at))
    rng = np.random.default_rng(0)
    if units > 1:
        for size in _blocks(resamples, count):
            yield rng.multinomial(units, np.full(units, 1 / units), size)[:, at]


def permutation_test(
    one: np.ndarray, two: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, statistic: Statistic = ratio
) -> tuple[float, float]:
    """Return (difference of two systems' figures, two-sided p), both pairs (N, 2) of the same clips.

    Under the null hypothesis the two takes of a clip can be exchanged: they are, with a fair coin for each clip.
    """
    seen = float(statistic(one, 1.0) - statistic(two, 1.0))
    rng = np.random.default_rng(seed)
    larger = 0
    for size in _blocks(resamples, 4 * len(one)):
        swap = rng.integers(0, 2, (size, len(one), 1)).astype(bool)
        apart = statistic(np.where(swap, two, one), 1.0) - statistic(np.where(swap, one, two), 1.0)
        larger += int((np.abs(apart) >= abs(seen) - 1e-12).sum())
    return seen, (1 + larger) / (1 + resamples)


def estimate(
    statistic: Statistic, models: np.ndarray, groups: Sequence[str], minus: np.ndarray | None = None
) -> tuple[float, float]:
    """Return (mean over seeds of a figure, or of its difference to another system's; half of its 95 % interval).

    Two parts are added as squares: Student's for the mean over seeds of models on the same clips, and the normal one
    for clips, from resampled groups (whole groups, the same ones for all seeds and both systems).

    Args:
        models: pairs (S, N, 2), NaN where a clip does not count. groups: the clips' speakers.
        minus: the same of the other system.

    Returns:
        NaN with fewer than two groups.
    """
    counts = ~np.isnan(models).any((0, 2)) & (True if minus is None else ~np.isnan(minus).any((0, 2)))
    weights = [np.ones((1, counts.sum())), *resampled(counts.sum(), np.asarray(groups)[counts], RESAMPLES)]
    if len(weights) == 1:
        return float("nan"), float("nan")
    values = np.stack([statistic(pairs[counts], np.vstack(weights)) for pairs in models])  # (S, 1 + W)
    if minus is not None:
        values = values - np.stack([statistic(pairs[counts], np.vstack(weights)) for pairs in minus])
    seeds = len(values)
    spread = STUDENT.get(seeds, STUDENT[5]) * values[:, 0].std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    return float(values[:, 0].mean()), float(np.hypot(spread, NORMAL * values[:, 1:].mean(0).std()))


def holm(values: Sequence[float]) -> list[float]:
    """Raise p values so that one wrong rejection among all of them is as rare as in a single test (Holm 1979)."""
    order = np.argsort(values)
    out = [0.0] * len(values)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, values[i] * (len(values) - rank)))
        out[i] = worst
    return out


def derangement(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a permutation (size,) that leaves nothing in place: whose words, or face, stands in for each clip's."""
    order = rng.permutation(size)
    out = np.empty(size, int)
    out[order] = np.roll(order, 1)
    return out


def _blocks(resamples: int, n: int) -> list[int]:
    size = max(1, min(resamples, BLOCK // max(n, 1)))
    return [min(size, resamples - start) for start in range(0, resamples, size)]

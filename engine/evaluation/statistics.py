"""Figures of many clips with intervals, and tests of two systems on the same clips.

A figure is sum(a) / sum(b) over clips, so resampling is a product with counts.

Axes: N clips, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 95.0  # per cent of an interval
BLOCK = 2**22  # numbers drawn at once


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """sum(a) / sum(b) of two (N,)."""
    return float(a.sum() / b.sum()) if b.sum() else float("nan")


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's of two (N,); 0 where one of them does not vary, as the pitch range of a whisper does not."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def bootstrap_interval(
    a: np.ndarray, b: np.ndarray, groups: Sequence[str] | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of sum(a) / sum(b) over clips, drawn with replacement.

    Args:
        groups: of the clips, such as speakers: whole groups are drawn.

    Returns:
        None with fewer than two clips or groups.
    """
    if groups is not None:
        _, at = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        a, b = np.bincount(at, a), np.bincount(at, b)
    n = len(a)
    if n < 2:
        return None
    rng, values = np.random.default_rng(seed), []
    for size in _blocks(resamples, n):
        counts = rng.multinomial(n, np.full(n, 1 / n), size)
        values.append((counts @ a) / np.maximum(counts @ b, 1e-12))
    low, high = np.percentile(np.concatenate(values), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def permutation_test(
    one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """(difference of two systems' figures, two-sided p), both (a, b) over the same clips.

    Under the null hypothesis the two takes of a clip can be exchanged: they are, with a fair coin for each clip.
    """
    (a1, b1), (a2, b2) = one, two
    n, seen = len(a1), ratio(a1, b1) - ratio(a2, b2)
    rng, larger = np.random.default_rng(seed), 0
    for size in _blocks(resamples, n):
        swap = rng.integers(0, 2, (size, n)).astype(np.float64)
        first = (a1.sum() + swap @ (a2 - a1)) / np.maximum(b1.sum() + swap @ (b2 - b1), 1e-12)
        second = (a2.sum() + swap @ (a1 - a2)) / np.maximum(b2.sum() + swap @ (b1 - b2), 1e-12)
        larger += int((np.abs(first - second) >= abs(seen) - 1e-12).sum())
    return seen, (1 + larger) / (1 + resamples)


def difference_interval(
    one: tuple[np.ndarray, np.ndarray],
    two: tuple[np.ndarray, np.ndarray],
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % percentile interval of the difference of two systems' figures, both (a, b) over the same clips.

    Clips, or whole `groups` of them, are drawn with replacement, the same for both systems.

    Returns:
        None with fewer than two clips or groups.
    """
    columns = [*one, *two]
    if groups is not None:
        _, at = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        columns = [np.bincount(at, column) for column in columns]
    n = len(columns[0])
    if n < 2:
        return None
    rng, values = np.random.default_rng(seed), []
    for size in _blocks(resamples, n):
        a1, b1, a2, b2 = (rng.multinomial(n, np.full(n, 1 / n), size) @ np.stack(columns, 1)).T
        values.append(a1 / np.maximum(b1, 1e-12) - a2 / np.maximum(b2, 1e-12))
    low, high = np.percentile(np.concatenate(values), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def holm(values: Sequence[float]) -> list[float]:
    """p values made larger so that one wrong rejection among all of them is as rare as in a single test (Holm 1979)."""
    order, out, worst = np.argsort(values), [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, values[i] * (len(values) - rank)))
        out[i] = worst
    return out


def _blocks(resamples: int, n: int) -> list[int]:
    size = max(1, min(resamples, BLOCK // max(n, 1)))
    return [min(size, resamples - start) for start in range(0, resamples, size)]

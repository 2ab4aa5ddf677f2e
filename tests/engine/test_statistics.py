"""Statistics of evaluations beside closed forms: intervals, paired tests, correction for many tests."""

import numpy as np
import pytest

from engine.evaluation.statistics import (
    bootstrap_interval,
    correlation,
    derangement,
    holm,
    permutation_test,
    ratio,
)


def pairs(values, weights=1.0):
    return np.stack([values, np.broadcast_to(weights, np.shape(values))], -1)


def test_weights_act_as_repeated_clips():
    assert ratio(pairs([1.0, 0.0], [1.0, 9.0])) == 0.1  # errors are summed first: not the mean of 1 and 0
    clips = np.random.default_rng(0).normal(size=(5, 2)) + 3
    counts = np.array([2, 0, 1, 3, 1])
    repeated = np.repeat(clips, counts, 0)
    assert ratio(clips, counts[None])[0] == pytest.approx(repeated[:, 0].sum() / repeated[:, 1].sum())
    assert correlation(clips, counts[None])[0] == pytest.approx(np.corrcoef(repeated.T)[0, 1])
    assert correlation(np.ones((3, 2))) == 0


def test_speakers_who_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(10), 20)
    values = rng.normal(0, 1, 10)[speakers] + rng.normal(0, 0.1, 200)
    over_clips = np.ptp(bootstrap_interval(pairs(values)))
    assert np.ptp(bootstrap_interval(pairs(values), speakers.astype(str))) > 3 * over_clips


def test_p_values_of_the_permutation_test_are_uniform_under_the_null():
    ones = np.ones(5)
    difference, p = permutation_test(pairs(ones), pairs(0 * ones), resamples=20_000)
    assert difference == 1 and p == pytest.approx(2 / 2**5, rel=0.1)  # all five swapped, or none
    rng = np.random.default_rng(2)
    values = []
    for seed in range(200):
        a, b = rng.normal(0, 1, (2, 30))
        values.append(permutation_test(pairs(a), pairs(b), 200, seed)[1])
    assert 0.01 < np.mean(np.array(values) < 0.05) < 0.1
    true, other = rng.normal(size=(2, 30))
    same = np.stack([true, true], -1)
    different = np.stack([true, other], -1)
    assert permutation_test(same, different, statistic=correlation)[1] < 0.01


def test_the_interval_of_a_difference_is_the_normal_approximation_of_pairs_of_clips():
    rng = np.random.default_rng(1)
    clips = rng.normal(0, 5, 300)  # easy and hard ones, for both systems
    one = clips + rng.normal(1, 1, 300)
    two = clips + rng.normal(0, 1, 300)
    half = 1.96 * (one - two).std(ddof=1) / 300**0.5
    middle = (one - two).mean()
    assert bootstrap_interval(pairs(one), minus=pairs(two)) == pytest.approx((middle - half, middle + half), abs=0.02)
    assert bootstrap_interval(pairs(one[:1])) is None


@pytest.mark.parametrize("size", [2, 3, 20])
def test_a_derangement_leaves_nothing_in_its_place(size):
    for seed in range(20):
        order = derangement(size, np.random.default_rng(seed))
        assert sorted(order) == list(range(size)) and (order != np.arange(size)).all()


def test_holm_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])

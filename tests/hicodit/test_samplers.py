"""Samplers on a posterior known in closed form: tokens independent, each with its own distribution."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from engine.errors import UserError
from hicodit.guidance import GuidanceScales, combine
from hicodit.samplers import METHODS, SamplerConfig, sample

N, K = 5, 3


def closed_form(logits):
    """Posterior of independent tokens with logits (K, N): it never depends on what is revealed."""

    def posterior(x, t, where):
        log_q = logits.log_softmax(-1)[:, None].expand(*x.shape, -1)
        return log_q if where is None else log_q[where]

    return posterior


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_all_valid_tokens_are_revealed_and_padding_is_not(method):
    lengths = torch.tensor([7, 4])
    x = sample(closed_form(torch.zeros(K, N)), lengths, K, N, SamplerConfig(method, steps=5), generators(2))
    assert (x[0] < N).all() and (x[1, :, :4] < N).all() and (x[1, :, 4:] == N).all()


@pytest.mark.parametrize("method", ["euler", "fixed_count", "entropy"])
def test_frequencies_follow_the_posterior(method):
    logits = torch.tensor([[2.0, 1, 0, -1, 0], [0, 0, 3, 0, 0], [0.5, 0, 0, 0, 1]])
    x = sample(closed_form(logits), torch.tensor([4000]), K, N, SamplerConfig(method, steps=8), generators(1))
    seen = torch.stack([torch.bincount(row, minlength=N) / 4000 for row in x[0]])
    assert (seen - logits.softmax(-1)).abs().max() < 0.03


def test_euler_reveals_on_a_straight_line():
    """A masked token is revealed with probability h/t: after step i a share 1 - i/steps is still masked."""
    shares = []

    def posterior(x, t, where):
        shares.append((x == N).float().mean().item())
        return torch.zeros(int(where.sum()), N).log_softmax(-1)

    sample(posterior, torch.tensor([5000]), K, N, SamplerConfig("euler", steps=10), generators(1))
    expected = [1 - i / 10 for i in range(10)]
    assert torch.allclose(torch.tensor(shares[:10]), torch.tensor(expected), atol=0.03)


def test_fixed_count_reveals_the_same_number_each_step():
    counts = []

    def posterior(x, t, where):
        counts.append(int(where.sum()))
        return torch.zeros(counts[-1], N).log_softmax(-1)

    sample(posterior, torch.tensor([40]), K, N, SamplerConfig("fixed_count", steps=6), generators(1))
    assert counts == [20] * 6


def test_unnormalised_posterior_of_too_high_a_rate_reveals_everything_at_once():
    calls = []

    def posterior(x, t, where):
        calls.append(int(where.sum()))
        return torch.full((calls[-1], N), 5.0)

    config = SamplerConfig("euler", steps=4)
    sample(posterior, torch.tensor([30]), K, N, config, generators(1), normalised=False)
    assert calls == [90]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    posterior = closed_form(torch.randn(K, N, generator=torch.Generator().manual_seed(1)))
    config = SamplerConfig(method, steps=5)
    both = sample(posterior, torch.tensor([9, 6]), K, N, config, generators(2))
    alone = sample(posterior, torch.tensor([6]), K, N, config, [torch.Generator().manual_seed(1)])
    assert torch.equal(both[1, :, :6], alone[0])


@pytest.mark.parametrize("method", METHODS)
def test_known_tokens_are_kept(method):
    known = torch.full((1, K, 8), N)
    known[:, :, :3] = 2
    x = sample(
        closed_form(torch.randn(K, N)),
        torch.tensor([8]),
        K,
        N,
        SamplerConfig(method, steps=4),
        generators(1),
        known=known,
    )
    assert (x[:, :, :3] == 2).all() and (x < N).all()


@pytest.mark.parametrize("method", METHODS)
def test_time_starts_at_the_share_that_is_masked(method):
    """A later window of a long clip has known tokens: here a quarter of one clip, none of the other."""
    known, times, uniform = torch.full((2, K, 8), N), [], closed_form(torch.zeros(K, N))
    known[0, :, :2] = 1

    def posterior(x, t, where):
        times.append(t.tolist())
        return uniform(x, t, where)

    config = SamplerConfig(method, steps=4, entropy=0.0)
    sample(posterior, torch.tensor([8, 8]), K, N, config, generators(2), known=known)
    assert times[0] == pytest.approx([0.75, 1.0])
    assert all(a > b for one, other in pairwise(times) for a, b in zip(one, other))


def counting(posterior, counts):
    """A posterior that notes how many tokens of each clip and level are revealed when it is asked."""

    def counted(x, t, where):
        counts.append((x < N).sum(2).tolist())
        return posterior(x, t, where)

    return counted


def test_ordered_reveals_coarse_levels_first_and_few_tokens_early():
    counts, length = [], 20
    config = SamplerConfig("ordered", steps=6, temperature=0.0, level_delay=100.0, choice_noise=1.0, shift=0.1)
    logits = torch.randn(K, N)
    x = sample(counting(closed_form(logits), counts), torch.tensor([length]), K, N, config, generators(1))
    assert torch.equal(x[0], logits.argmax(-1)[:, None].expand(-1, length))
    due = [math.ceil(K * length * (0.1 * i / 6) / (1 - 0.9 * i / 6)) for i in range(6)]
    assert [sum(row) for (row,) in counts] == due and due[3] < K * length / 8
    assert all(fine == 0 or coarse == length for (row,) in counts for coarse, fine in pairwise(row))


def test_entropy_reveals_what_its_bound_allows():
    """Level 0 is certain, level 1 has log 2 nats a token, level 2 log 5."""
    logits = torch.tensor([[0.0, -99, -99, -99, -99], [0, 0, -99, -99, -99], [0, 0, 0, 0, 0]])
    counts, length = [], 10
    config = SamplerConfig("entropy", steps=50, entropy=4.5 * math.log(2) / length)
    sample(counting(closed_form(logits), counts), torch.tensor([length]), K, N, config, generators(1))
    # Beside one that is free: four of level 1, then one of level 2 (log 5 / log 2 = 2.3, and two would be 4.6).
    assert [row for (row,) in counts[:4]] == [[0, 0, 0], [10, 5, 0], [10, 10, 0], [10, 10, 2]]
    assert len(counts) == 7
    counts.clear()
    few = replace(config, steps=3)
    sample(counting(closed_form(logits), counts), torch.tensor([length, 5]), K, N, few, generators(2))
    assert len(counts) == 3 and [sum(row) for row in counts[2]] == [23, 12]  # half of the rest of 15 and 7


def test_temperature_zero_takes_the_mode():
    logits = torch.randn(K, N)
    x = sample(closed_form(logits), torch.tensor([10]), K, N, SamplerConfig("fixed_count", 3, 0.0), generators(1))
    assert torch.equal(x[0], logits.argmax(-1)[:, None].expand(-1, 10))


@pytest.mark.parametrize("bad", [{"method": "magic"}, {"steps": 0}, {"temperature": -1.0}])
def test_bad_settings_name_the_value(bad):
    with pytest.raises(UserError, match=str(next(iter(bad.values())) if "temperature" not in bad else "temperature")):
        SamplerConfig(**bad)


def test_unit_joint_scale_is_the_conditional_model():
    scales = GuidanceScales(all=1.0)
    assert scales.branches == ("all",)
    log_p = torch.randn(1, 4, N).log_softmax(-1)
    assert torch.allclose(combine(log_p, scales), log_p[0], atol=1e-6)


def test_normalised_readings_sum_to_one():
    for reading in "CD":
        scales = GuidanceScales(2.5, 1.25, 1.5, 2.0, reading)
        log_p = torch.randn(5, 4, N, dtype=torch.float64).log_softmax(-1)
        total = combine(log_p, scales).exp().sum(-1)
        assert torch.allclose(total, torch.ones(4, dtype=torch.float64))
    with pytest.raises(UserError, match="'E'"):
        GuidanceScales(reading="E")

"""Samplers on a posterior known in closed form: tokens independent, each with its own distribution."""

import math
from itertools import pairwise

import pytest
import torch

from engine.errors import UserError
from hicodit.guidance import combine
from hicodit.samplers import invert, sample
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig

N, K = 5, 3


class Closed:
    """Posterior of independent tokens with log q of (K, N): it never depends on what is revealed."""

    def __init__(self, log_q):
        self.log_q = log_q

    def at(self, t):
        return self

    def __call__(self, x, t, where):
        return self.log_q[:, None].expand(*(x if where is None else where).shape, -1)


def closed_form(logits):
    return Closed(logits.log_softmax(-1))


class Watched(Closed):
    """Notes at each call how many tokens of each clip and level are revealed, and the time."""

    def __init__(self, log_q):
        super().__init__(log_q)
        self.counts, self.times = [], []

    def __call__(self, x, t, where):
        self.counts.append((x < N).sum(2).tolist())
        self.times.append(t.tolist())
        return super().__call__(x, t, where)


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


def test_temperature_sharpens_the_drawn_frequencies():
    log_q = torch.tensor([2.0, 1, 0, -1, 0]).log_softmax(-1)
    drawn = invert(log_q.expand(4000, N), (torch.arange(4000) + 0.5) / 4000, temperature=0.5)
    assert (torch.bincount(drawn, minlength=N) / 4000 - (2 * log_q).softmax(-1)).abs().max() < 1e-3


def watched(method, lengths, log_q=None, **settings):
    """The posterior after a run, with what it saw."""
    posterior = Watched(torch.zeros(K, N).log_softmax(-1) if log_q is None else log_q)
    normalised = bool((posterior.log_q.exp().sum(-1) - 1).abs().max() < 1e-5)
    config, clips = SamplerConfig(method, **settings), torch.tensor(lengths)
    posterior.tokens = sample(posterior, clips, K, N, config, generators(len(lengths)), normalised)
    return posterior


def test_euler_reveals_on_a_straight_line():
    """A masked token is revealed with probability h/t: after step i a share 1 - i/steps is still masked."""
    counts = watched("euler", [5000], steps=10).counts
    shares = [sum(row) / (5000 * K) for (row,) in counts]
    assert len(counts) in (10, 11)  # the last step is left out if it has nothing to reveal
    assert shares[:10] == pytest.approx([i / 10 for i in range(10)], abs=0.02)


def test_fixed_count_reveals_the_same_number_each_step():
    counts = watched("fixed_count", [40], steps=6).counts
    assert [sum(row) for (row,) in counts] == [0, 20, 40, 60, 80, 100]


def test_a_step_asks_for_no_more_frames_than_the_largest_needs():
    asked = []

    class Asked(Closed):
        def __call__(self, x, t, where):
            asked.append(where)
            return super().__call__(x, t, where)

    posterior = Asked(torch.zeros(K, N).log_softmax(-1))
    sample(posterior, torch.tensor([300]), K, N, SamplerConfig("euler", steps=30), generators(1))
    assert len({where.shape for where in asked}) == 1 and asked[0].shape[2] < 40


def test_unnormalised_posterior_of_too_high_a_rate_reveals_everything_at_once():
    counts = watched("euler", [30], torch.full((K, N), 5.0), steps=4).counts
    assert [sum(row) for (row,) in counts] == [0, 90, 90, 90, 90]


def test_inversion_never_leaves_the_codes():
    """Rounding may make the largest uniform reach the end of the distribution function, 0 lies before it begins."""
    u = torch.tensor([0.0, 1 - 2**-24])
    for seed in range(50):
        log_q = torch.randn(1, 300, generator=torch.Generator().manual_seed(seed))
        log_q[:, [0, -1]] = -200.0  # codes of no probability
        tokens = invert(log_q.expand(2, -1), u, 1.0)
        assert tokens[0] > 0 and tokens[1] < 300
    assert invert(torch.tensor([[0.1, 0.3, 0.2]]), u[:1], 0.0).tolist() == [1]


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
    known, posterior = torch.full((2, K, 8), N), Watched(torch.zeros(K, N).log_softmax(-1))
    known[0, :, :2] = 1
    config = SamplerConfig(method, steps=4, entropy=0.0)
    sample(posterior, torch.tensor([8, 8]), K, N, config, generators(2), known=known)
    assert posterior.times[0] == pytest.approx([0.75, 1.0])
    assert all(a > b for one, other in pairwise(posterior.times) for a, b in zip(one, other))


def test_ordered_reveals_coarse_levels_first_and_few_tokens_early():
    length, logits = 20, torch.randn(K, N)
    settings = {"temperature": 0.0, "level_delay": 100.0, "choice_noise": 1.0, "shift": 0.1}
    seen = watched("ordered", [length], logits.log_softmax(-1), steps=6, **settings)
    assert torch.equal(seen.tokens[0], logits.argmax(-1)[:, None].expand(-1, length))
    due = [math.ceil(K * length * (0.1 * i / 6) / (1 - 0.9 * i / 6)) for i in range(6)]
    assert [sum(row) for (row,) in seen.counts] == due and due[3] < K * length / 8
    assert all(fine == 0 or coarse == length for (row,) in seen.counts for coarse, fine in pairwise(row))


def test_entropy_reveals_what_its_bound_allows():
    """Level 0 is certain, level 1 has log 2 nats a token, level 2 log 5."""
    logits = torch.tensor([[0.0, -99, -99, -99, -99], [0, 0, -99, -99, -99], [0, 0, 0, 0, 0]]).log_softmax(-1)
    length, bound = 10, 4.5 * math.log(2) / 10
    counts = watched("entropy", [length], logits, steps=50, entropy=bound).counts
    # Beside one that is free: four of level 1, then one of level 2 (log 5 / log 2 = 2.3, and two would be 4.6).
    assert [row for (row,) in counts[:4]] == [[0, 0, 0], [10, 5, 0], [10, 10, 0], [10, 10, 2]]
    assert len(counts) == 7
    few = watched("entropy", [length, 5], logits, steps=3, entropy=bound).counts
    assert len(few) == 3 and [sum(row) for row in few[2]] == [23, 12]  # half of the rest of 15 and 7


def test_temperature_zero_takes_the_mode():
    logits = torch.randn(K, N)
    x = sample(closed_form(logits), torch.tensor([10]), K, N, SamplerConfig("fixed_count", 3, 0.0), generators(1))
    assert torch.equal(x[0], logits.argmax(-1)[:, None].expand(-1, 10))


def test_normalised_readings_sum_to_one():
    for reading in "CD":
        scales = GuidanceScales(2.5, 1.25, 1.5, 2.0, reading)
        log_p = torch.randn(5, 4, N, dtype=torch.float64).log_softmax(-1)
        total = combine(log_p, scales).exp().sum(-1)
        assert torch.allclose(total, torch.ones(4, dtype=torch.float64))
    with pytest.raises(UserError, match="reading=E"):
        GuidanceScales(reading="E")

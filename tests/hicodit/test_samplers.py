"""Samplers on a posterior known in closed form: tokens independent, each with its own distribution."""

import math
from itertools import pairwise

import pytest
import torch

from hicodit.samplers import SAMPLERS, SamplerInput, sample_by_inverse_cdf
from hicodit.settings import METHODS, SamplerConfig

N = 5
K = 3


class Closed:
    """Posterior of independent tokens with log q of (K, N): it never depends on what is revealed.

    Attributes:
        counts: at each call, how many tokens of each clip and level are revealed.
        times: of each clip.
        tokens: the sample.
    """

    def __init__(self, log_q):
        self.log_q = log_q
        self.counts = []
        self.times = []

    def __call__(self, x, t, frames):
        self.counts.append((x < N).sum(2).tolist())
        self.times.append(t.tolist())
        return self.log_q[:, None].expand(*(x if frames is None else frames).shape, -1)


def run(method, lengths, log_q=None, known=None, seed=0, **settings):
    """The posterior after a run, with what it saw and the sample; by default all tokens are as likely."""
    posterior = Closed(torch.zeros(K, N).log_softmax(-1) if log_q is None else log_q)
    normalised = bool((posterior.log_q.exp().sum(-1) - 1).abs().max() < 1e-5)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(lengths))]
    config = SamplerConfig(method, **settings)
    tokens = torch.full((len(lengths), K, max(lengths)), N) if known is None else known
    inputs = SamplerInput(posterior, tokens, torch.tensor(lengths), N, config, generators, normalised)
    posterior.tokens = SAMPLERS[method](inputs)
    return posterior


def test_temperature_sharpens_the_drawn_frequencies():
    log_q = torch.tensor([2.0, 1, 0, -1, 0]).log_softmax(-1)
    drawn = sample_by_inverse_cdf(log_q.expand(4000, N), (torch.arange(4000) + 0.5) / 4000, temperature=0.5)
    assert (torch.bincount(drawn, minlength=N) / 4000 - (2 * log_q).softmax(-1)).abs().max() < 1e-3
    assert sample_by_inverse_cdf(log_q, torch.tensor(0.99), temperature=1e-40) == 0  # log_q / 1e-40 overflows


def test_sampled_frequencies_follow_the_posterior():
    log_q = torch.tensor([[2.0, 1, 0, -1, 0], [0, 0, 3, 0, 0], [0.5, 0, 0, 0, 1]]).log_softmax(-1)
    (tokens,) = run("euler", [4000], log_q, steps=8).tokens
    seen = torch.stack([torch.bincount(row, minlength=N) / 4000 for row in tokens])
    assert (seen - log_q.exp()).abs().max() < 0.03


def test_euler_reveals_on_a_straight_line():
    """A masked token is revealed with probability h/t: after step i a share 1 - i/steps is still masked."""
    counts = run("euler", [5000], steps=10).counts
    shares = [sum(row) / (5000 * K) for (row,) in counts]
    assert len(counts) in (10, 11)  # the last step is left out if it has nothing to reveal
    assert shares[:10] == pytest.approx([i / 10 for i in range(10)], abs=0.02)


@pytest.mark.parametrize(("steps", "total"), [(4, 90), (10, 600)])
def test_confidence_follows_the_cosine_schedule(steps, total):
    """MaskGIT's: after i of S steps, floor(total * cos(pi / 2 * i / S)) positions are still masked."""
    counts = run("confidence", [total // K], steps=steps).counts
    masked = [total - sum(row) for (row,) in counts]
    assert masked == [math.floor(total * math.cos(math.pi * step / (2 * steps))) for step in range(steps)]


def test_confidence_reveals_the_most_probable_tokens_first():
    logits = torch.tensor([[9.0, 0, 0, 0, 0], [3, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).log_softmax(-1)
    seen = run("confidence", [20], logits, steps=6, temperature=0.0, choice_noise=0.0)
    assert (seen.tokens == 0).all()
    assert all(less == 0 or more == 20 for (row,) in seen.counts for more, less in pairwise(row))


def test_noise_of_the_ranking_is_annealed_with_time():
    """With much noise the order is random at first; the last positions are still the least probable."""
    logits = torch.tensor([[3.0, 0, 0, 0, 0], [1.5, 0, 0, 0, 0], [0.5, 0, 0, 0, 0]]).log_softmax(-1)
    counts = run("confidence", [2000], logits, steps=10, temperature=0.0, choice_noise=5.0).counts
    (early,) = counts[4]
    (late,) = counts[-1]
    assert early[0] < 1.6 * early[2]  # hardly ranked
    assert 2000 - late[2] > 2.3 * (2000 - late[0])  # 1.7 times without annealing


def test_unnormalised_posterior_of_too_high_a_rate_reveals_everything_at_once():
    counts = run("euler", [30], torch.full((K, N), 5.0), steps=4).counts
    assert [sum(row) for (row,) in counts] == [0, 90, 90, 90, 90]


def test_inverse_transform_sampling_only_returns_valid_codes():
    """Rounding may make the largest uniform reach the end of the distribution function, 0 lies before it begins."""
    u = torch.tensor([0.0, 1 - 2**-24])
    for seed in range(50):
        log_q = torch.randn(1, 300, generator=torch.Generator().manual_seed(seed))
        log_q[:, [0, -1]] = -200.0  # codes of no probability
        tokens = sample_by_inverse_cdf(log_q.expand(2, -1), u, 1.0)
        assert tokens[0] > 0 and tokens[1] < 300
    assert sample_by_inverse_cdf(torch.tensor([[0.1, 0.3, 0.2]]), u[:1], 0.0).tolist() == [1]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    log_q = torch.randn(K, N, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    both = run(method, [9, 6], log_q, steps=5).tokens
    alone = run(method, [6], log_q, seed=1, steps=5).tokens
    assert torch.equal(both[1, :, :6], alone[0])
    assert (both[0] < N).all() and (alone < N).all() and (both[1, :, 6:] == N).all()  # padding stays masked


@pytest.mark.parametrize("method", METHODS)
def test_known_tokens_are_kept_and_time_starts_at_the_masked_fraction(method):
    """As in later windows of long clips: of one clip a quarter of the frames is known, of the second all."""
    known = torch.full((3, K, 8), N)
    known[0, :, :2] = 2
    known[1] = 2
    seen = run(method, [8] * 3, torch.randn(K, N).log_softmax(-1), known, steps=4)
    assert (seen.tokens[0, :, :2] == 2).all() and (seen.tokens[1] == 2).all() and (seen.tokens < N).all()
    assert seen.times[0] == pytest.approx([0.75, seen.times[0][1], 1.0])
    assert all(time > 0 for times in seen.times for time in times)  # also where no token is masked
    assert all(later[i] < earlier[i] for earlier, later in pairwise(seen.times) for i in (0, 2))

"""The product's loss and Euler sampler are SEDD's, with a posterior that sums to one and with one that does not."""

import pytest
import torch

from hicodit.diffusion import LogLinearNoise, log_expm1, weighted_score_entropy
from hicodit.samplers import SamplerInput, euler
from hicodit.settings import SamplerConfig
from tests.reference import sedd

N = 3
PAIRS = 100_000
STEPS = 3
NOISE = LogLinearNoise()


def test_loss_and_its_gradient_are_sedds():
    random = torch.Generator().manual_seed(0)
    log_q = torch.randn(4, 50, N, generator=random, dtype=torch.float64, requires_grad=True)  # sums to anything
    x0 = torch.randint(N, (4, 50), generator=random)
    t = torch.tensor([1e-3, 0.2, 0.7, 1.0], dtype=torch.float64)
    sigma = NOISE.sigma(t)
    x = torch.where(torch.rand(4, 50, generator=random) < 0.6, N, x0)
    masked = x == N
    ours = weighted_score_entropy(log_q[masked], x0[masked], t[:, None].expand(4, 50)[masked], NOISE)
    log_score = log_q - log_expm1(sigma)[:, None, None]
    theirs = (NOISE.rate(t)[:, None] * sedd.score_entropy(log_score, x, x0, sigma, N))[masked]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss.sum(), log_q, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def log_posterior(x: torch.Tensor, t: torch.Tensor, excess: float) -> torch.Tensor:
    """(1, L), (1,) -> log q (1, L, N) that sums to exp(excess) and depends on time and the other token of a pair."""
    table = 2 * torch.randn(N + 1, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = x.view(-1, 2).flip(-1).view(x.shape)
    return (table[other] * (1 + t.double())).log_softmax(-1) + excess


@pytest.mark.parametrize("predictor", ["euler", "analytic"])
@pytest.mark.parametrize("excess", [0.0, -0.4])
def test_euler_sampler_draws_from_the_distribution_of_sedds_race(predictor, excess):
    """All N^2 pairs are as frequent: the standard deviation of a frequency's difference is at most 0.0023."""

    class Pairs:
        def at(self, t):
            return self

        def __call__(self, x, t, where):  # x (B, K, L), here one clip of one level
            log_q = log_posterior(x[:, 0], t, excess)[:, None].float()
            return log_q if where is None else log_q.gather(2, where[..., None].expand(-1, -1, -1, N))

    def score(x, sigma):
        t = -torch.expm1(-sigma) / (1 - NOISE.eps)
        real = log_posterior(x, t, excess) - log_expm1(sigma)
        raw = torch.nn.functional.pad(real, (0, 1))
        return sedd.to_log_score(raw, x, sigma, scale_by_sigma=False).exp()

    def frequencies(x):
        return torch.bincount(x.view(-1, 2) @ torch.tensor([N, 1]), minlength=N**2) / PAIRS

    random = torch.Generator().manual_seed(2)
    config = SamplerConfig("euler", steps=STEPS)
    lengths = torch.tensor([2 * PAIRS])
    start = torch.full((1, 2 * PAIRS), N)
    ours = euler(SamplerInput(Pairs(), start[:, None], lengths, N, config, [random], normalised=excess == 0))
    columns = [N + 1] * STEPS + [N]
    uniforms = (torch.rand(1, 2 * PAIRS, c, generator=random, dtype=torch.float64) for c in columns)
    theirs, _, _ = sedd.race_sampler(score, start, STEPS, NOISE, N, predictor, uniforms)
    torch.testing.assert_close(frequencies(ours), frequencies(theirs), atol=0.008, rtol=0)

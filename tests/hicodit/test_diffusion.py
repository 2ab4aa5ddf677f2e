import torch

from hicodit.diffusion import LogLinearNoise, weighted_score_entropy


def test_score_entropy_of_unnormalised_posteriors_is_equation_5_of_sedd():
    """sigma'(t) sum_y (s_y - r_y log s_y + r_y (log r_y - 1)), true ratios r = 1 / (exp(sigma) - 1) at x0, else 0."""
    noise, t, x0 = LogLinearNoise(), torch.tensor([0.2, 0.9], dtype=torch.float64), torch.tensor([2, 0])
    log_q = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratio = 1 / torch.expm1(noise.sigma(t))
    score = log_q.exp() * ratio[:, None]
    entropy = score.sum(1) - ratio * score.gather(1, x0[:, None])[:, 0].log() + ratio * (ratio.log() - 1)
    torch.testing.assert_close(weighted_score_entropy(log_q, x0, t, noise), noise.rate(t) * entropy)

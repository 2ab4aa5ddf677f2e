"""Absorbing-state discrete diffusion with a log-linear schedule (SEDD, arXiv 2310.16834).

Axes: B batch, M masked positions, N real tokens (ids 0..N-1; id N is the mask).
Any leading shape works where a docstring says `...`; a time or noise level broadcasts against it from the left.

The network output has two interpretations. The *score* of token y at a masked position is `s_y = q_y / (exp(sigma) -
1)`, where `q` is the posterior of the clean token. With a normalised `q` the score-entropy loss is cross entropy
weighted by 1/t, and a step reveals a masked token with probability h/t independently of the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogLinearNoise:
    """Log-linear noise schedule sigma(t) = -log(1 - (1 - eps) t): a token is masked at time t with probability (1 -
    eps) t.
    """

    eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        """Return the total noise at time t in [0, 1]. The time input of the network is sigma, not t."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate(self, t: Tensor) -> Tensor:
        """Return the time derivative of `sigma`."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)


def masked_at(sigma: Tensor, u: Tensor) -> Tensor:
    """Return a mask of the tokens where the uniform u (B, ...) falls below 1 - exp(-sigma). sigma is (B,)."""
    sigma = sigma.reshape(len(sigma), *[1] * (u.ndim - 1))
    return u < -torch.expm1(-sigma)


def log_expm1(sigma: Tensor) -> Tensor:
    """Return log(exp(sigma) - 1), accurate for small sigma. Its negative is the log odds of a token being unmasked."""
    return torch.log(torch.expm1(sigma))


def weighted_score_entropy(log_q: Tensor, x0: Tensor, t: Tensor, noise: LogLinearNoise) -> Tensor:
    """Return sigma'(t) times the score entropy of masked tokens, given log posteriors: (M, N), (M,), (M,) -> (M,).

    This is equation 5 of SEDD for the scores `q / (exp(sigma) - 1)`, written such that a normalised posterior (sum q =
    1) yields exactly the cross entropy divided by t.
    """
    weight = noise.rate(t) / torch.expm1(noise.sigma(t))
    excess = torch.expm1(log_q.logsumexp(-1))  # Z - 1 penalises a wrong total rate
    return weight * (excess - log_q.gather(-1, x0.unsqueeze(-1)).squeeze(-1))


def stratified_times(batch: int, low: float) -> Tensor:
    """Draw `batch` stratified times in [low, 1], one from each of `batch` equal intervals, which reduces the variance
    of the 1/t weight.
    """
    u = (torch.randperm(batch) + torch.rand(batch)) / batch
    return low + (1 - low) * u


def exponential_noise(u: Tensor) -> Tensor:
    """Transform uniforms to exponential noise, with the small constants of the reference program."""
    return 1e-10 - torch.log(u + 1e-10)

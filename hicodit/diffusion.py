"""Absorbing-state discrete diffusion with a log-linear schedule (SEDD, arXiv 2310.16834).

Axes: B batch, M masked positions, N real tokens (ids 0..N-1; id N is the mask).
Any leading shape works where a docstring says `...`; a time or noise level broadcasts against it from the left.

Two readings of one network output are used. The *score* of token y at a masked position is
`s_y = q_y / (exp(sigma) - 1)`, where `q` is the posterior of the clean token. With a normalised `q` the score-entropy
loss is cross entropy weighted by 1/t, and a step reveals a masked token with probability h/t whatever the network says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogLinearNoise:
    """sigma(t) = -log(1 - (1 - eps) t): a token is masked at time t with probability (1 - eps) t."""

    eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        """Return the total noise at time t in [0, 1]; the network's time input is sigma, not t."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate(self, t: Tensor) -> Tensor:
        """Return the time derivative of `sigma`."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Append axes to `value` until it broadcasts against `like` from the left."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def masked_at(sigma: Tensor, u: Tensor) -> Tensor:
    """Return which tokens are masked: where the uniform u (B, ...) falls below 1 - exp(-sigma); sigma is (B,)."""
    return u < -torch.expm1(-expand(sigma, u))


def log_expm1(sigma: Tensor) -> Tensor:
    """Return log(exp(sigma) - 1), exact for small sigma; its negative is the log odds of a token being unmasked."""
    return torch.log(torch.expm1(sigma))


def weighted_score_entropy(log_q: Tensor, x0: Tensor, t: Tensor, noise: LogLinearNoise) -> Tensor:
    """Compute sigma'(t) times the score entropy of masked tokens from their log posterior: (M, N), (M,), (M,) -> (M,).

    SEDD's equation 5 for the scores `q / (exp(sigma) - 1)`, written so that a normalised posterior (sum q = 1) gives
    exactly cross entropy over t.
    """
    weight = noise.rate(t) / torch.expm1(noise.sigma(t))
    excess = torch.expm1(log_q.logsumexp(-1))  # Z - 1: the price of a wrong total rate
    return weight * (excess - log_q.gather(-1, x0.unsqueeze(-1)).squeeze(-1))


def stratified_times(batch: int, low: float) -> Tensor:
    """Draw `batch` times in [low, 1], one in each of `batch` equal slices, at random: the 1/t weight stays tame."""
    u = (torch.randperm(batch) + torch.rand(batch)) / batch
    return low + (1 - low) * u


def exponential_noise(u: Tensor) -> Tensor:
    """Return exponential draws from uniforms, with the small constants of the reference program."""
    return 1e-10 - torch.log(u + 1e-10)

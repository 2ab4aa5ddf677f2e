"""Absorbing-state discrete diffusion with a log-linear schedule (SEDD, arXiv 2310.16834), for several token levels.

Axes: B batch, K token levels, L token frames, N real tokens (ids 0..N-1; id N is the mask), V = N + 1 columns.
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
        """Total noise at time t in [0, 1]; this, not t, is what the network is told."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate(self, t: Tensor) -> Tensor:
        """Time derivative of `sigma`."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Append axes to `value` until it broadcasts against `like` from the left."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def perturb(x0: Tensor, sigma: Tensor, mask_id: int, u: Tensor) -> Tensor:
    """Mask each token of x0 (B, ...) where the uniform u falls below 1 - exp(-sigma); sigma is (B,)."""
    return torch.where(u < -torch.expm1(-expand(sigma, x0)), mask_id, x0)


# ------------------------------------------------------------------------------------------------ the absorbing graph


def one_hot(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(x, size).to(dtype)


def rate(x: Tensor, mask_id: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Forward rate column of each token, (...) -> (..., V): one_hot(mask) - one_hot(x)."""
    return one_hot(torch.full_like(x, mask_id), mask_id + 1, dtype) - one_hot(x, mask_id + 1, dtype)


def transposed_rate(x: Tensor, mask_id: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Transposed rate row, (...) -> (..., V): -one_hot(x), plus 1 everywhere when x is the mask."""
    return (x == mask_id).unsqueeze(-1).to(dtype) - one_hot(x, mask_id + 1, dtype)


def transposed_transition(x: Tensor, sigma: Tensor, mask_id: int) -> Tensor:
    """Transposed transition row over a noise interval sigma, (...) -> (..., V); for the mask every column gains."""
    sigma = expand(sigma, x).unsqueeze(-1)
    row = torch.exp(-sigma) * one_hot(x, mask_id + 1, sigma.dtype)
    return row + torch.where((x == mask_id).unsqueeze(-1), 1 - torch.exp(-sigma), 0)


def reverse_rate(x: Tensor, score: Tensor, mask_id: int) -> Tensor:
    """Reverse rate row from x given scores (..., V); the diagonal makes the row sum to zero."""
    row = transposed_rate(x, mask_id, score.dtype) * score
    row = row.scatter(-1, x.unsqueeze(-1), 0)
    return row.scatter(-1, x.unsqueeze(-1), -row.sum(-1, keepdim=True))


def staggered_score(score: Tensor, dsigma: Tensor) -> Tensor:
    """Score carried back over a noise interval: scaled by exp(dsigma), the mask column absorbs the balance."""
    growth = expand(dsigma, score[..., 0]).exp()
    out = score * growth.unsqueeze(-1)
    out[..., -1] += (1 - growth) * score.sum(-1)
    return out


# ---------------------------------------------------------------------------------------------------- scores and loss


def log_expm1(sigma: Tensor) -> Tensor:
    """log(exp(sigma) - 1), exact for small sigma; its negative is the log odds of a token being still unmasked."""
    return torch.log(torch.expm1(sigma))


def to_log_score(raw: Tensor, x: Tensor, sigma: Tensor, scale_by_sigma: bool = True) -> Tensor:
    """Network output (..., V) to SEDD log scores: the noise level taken out, the current token's column set to 0."""
    if scale_by_sigma:
        raw = raw - expand(log_expm1(sigma), raw) - torch.log(torch.tensor(raw.shape[-1] - 1.0, dtype=raw.dtype))
    return raw.scatter(-1, x.unsqueeze(-1), 0)


def score_entropy(log_score: Tensor, x: Tensor, x0: Tensor, sigma: Tensor, mask_id: int) -> Tensor:
    """Denoising score entropy per token, (..., V) -> (...); 0 where x is not masked (SEDD eq. 5, absorbing graph).

    `log_score` may carry the mask column or not: only the N real columns are read.
    """
    inverse = 1 / torch.expm1(expand(sigma, x).to(log_score.dtype))
    real = log_score[..., :mask_id]
    at_x0 = real.gather(-1, x0.clamp(max=mask_id - 1).unsqueeze(-1)).squeeze(-1)
    entropy = real.exp().sum(-1) - inverse * at_x0 + inverse * (inverse.log() - 1)
    return torch.where(x == mask_id, entropy, 0)


def weighted_score_entropy(log_q: Tensor, x0: Tensor, t: Tensor, noise: LogLinearNoise) -> Tensor:
    """sigma'(t) times the score entropy of masked tokens, from their log posterior: (M, N), (M,), (M,) -> (M,).

    Equal to `noise.rate(t) * score_entropy(...)` with `log_score = log_q - log(exp(sigma) - 1)`; written so that a
    normalised posterior (sum q = 1) gives exactly cross entropy over t.
    """
    weight = noise.rate(t) / torch.expm1(noise.sigma(t))
    excess = torch.expm1(log_q.logsumexp(-1))  # Z - 1: the price of a wrong total rate
    return weight * (excess - log_q.gather(-1, x0.unsqueeze(-1)).squeeze(-1))


def stratified_times(batch: int, low: float, generator: torch.Generator | None = None) -> Tensor:
    """`batch` times in [low, 1], one in each of `batch` equal slices, in random order: the 1/t weight stays tame."""
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    return low + (1 - low) * u


# --------------------------------------------------------------------------------------------- one step of a sampler


def sample_categorical(weights: Tensor, u: Tensor) -> Tensor:
    """Index drawn in proportion to weights (..., V), by an exponential race on uniforms u of the same shape.

    Weights need not sum to one; a negative weight never wins.
    """
    return (weights / exponential_noise(u)).argmax(-1)


def exponential_noise(u: Tensor) -> Tensor:
    """The race's exponential draws from uniforms, with the small constants of the reference program."""
    return 1e-10 - torch.log(u + 1e-10)


def euler_weights(score: Tensor, x: Tensor, t: Tensor, h: Tensor, noise: LogLinearNoise, mask_id: int) -> Tensor:
    """Weights (..., V) of one Euler step from t to t - h (each (B,)), from scores (..., V)."""
    step = expand(h * noise.rate(t), x).unsqueeze(-1)
    return one_hot(x, mask_id + 1, score.dtype) + step * reverse_rate(x, score, mask_id)


def analytic_weights(score: Tensor, x: Tensor, t: Tensor, h: Tensor, noise: LogLinearNoise, mask_id: int) -> Tensor:
    """Weights (..., V) of one analytic (Tweedie) step; the same map as Euler for this schedule, up to rounding."""
    dsigma = noise.sigma(t) - noise.sigma(t - h)
    return staggered_score(score, dsigma) * transposed_transition(x, dsigma, mask_id)


def denoise_weights(score: Tensor, x: Tensor, t: Tensor, noise: LogLinearNoise, mask_id: int) -> Tensor:
    """Weights (..., N) of the last step, which leaves no mask."""
    sigma = noise.sigma(t)
    return (staggered_score(score, sigma) * transposed_transition(x, sigma, mask_id))[..., :mask_id]

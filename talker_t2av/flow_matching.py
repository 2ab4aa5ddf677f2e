"""Optimal-transport flow matching: times, guidance, solver and loss. It does not depend on a network.

t = 1 is noise and t = 0 is data, x_t = (1 - t) x1 + t z, and the velocity is z - x1.

Axes: B batch (N examples in training), C channels, P frames of a patch, n solver steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import UserError

# published probabilities of dropping mu and the context frames in training
DROP_MU = 0.1
DROP_COND = 0.05
ZERO_FRACTION = 0.04  # fraction of the steps whose velocity CFG-Zero* sets to zero
TIME_MEAN = -0.4  # mean of the logits of the training times, whose standard deviation is 1


def solver_times(steps: int, sway: float = 1.0) -> Tensor:
    """Return times (n + 1,) from 1 to 0, float32 on the CPU. sway = 1 makes steps smaller near the noise, sway = 0 is
    uniform.
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    u = torch.linspace(1, 0, steps + 1)
    return u + sway * (torch.cos(math.pi / 2 * u) - 1 + u)


def zero_steps(steps: int) -> int:
    """Return the number of initial steps that CFG-Zero* skips (arXiv 2503.18886): one for up to 48 steps."""
    return max(1, math.floor(ZERO_FRACTION * (steps + 1)))


def guide(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor, zero_star: bool = True) -> Tensor:
    """Return the classifier-free guided velocity a v_u + g (v_c - a v_u) of velocities (B, C, P), with g a number or
    (B, 1, 1).

    With `zero_star`, a is the projection coefficient of v_c on v_u per sample (CFG-Zero*), else 1.
    """
    if zero_star:
        dot = (conditional * unconditional).sum((1, 2), keepdim=True)
        unconditional = dot / (unconditional.square().sum((1, 2), keepdim=True) + 1e-8) * unconditional
    return unconditional + guidance * (conditional - unconditional)


def euler(velocity: Callable[[Tensor, int], Tensor], x: Tensor, lengths: Sequence[float], skip: int = 0) -> Tensor:
    """Integrate from noise to data with the Euler method.

    Args:
        velocity: (x, i) -> dx/dt at the beginning of step i.
        lengths: lengths of the steps.
        skip: number of initial steps to skip.
    """
    for i in range(skip, len(lengths)):
        x = x - lengths[i] * velocity(x, i)
    return x


def logit_normal_times(normal: Tensor) -> Tensor:
    """Map standard normal samples to training times in (0, 1), which have a logit-normal distribution."""
    return torch.sigmoid(normal + TIME_MEAN)


@dataclass(frozen=True)
class FlowDraws:
    """Random numbers of a loss evaluation.

    Attributes:
        u_mu, u_cond: (N,) uniforms. An example keeps mu and its context where they exceed drop_mu and drop_cond.
        t: (N,) times.
        z: (N, C, P) noise.
    """

    u_mu: Tensor
    u_cond: Tensor
    t: Tensor
    z: Tensor

    @classmethod
    def sample(cls, x1: Tensor) -> FlowDraws:
        """Draw the random numbers for targets x1 (N, C, P), from torch's default generator."""
        u_mu, u_cond = torch.rand(2, len(x1), device=x1.device)
        normal = torch.randn(len(x1), device=x1.device)
        return cls(u_mu, u_cond, logit_normal_times(normal), torch.randn_like(x1))


def drop(x: Tensor, u: Tensor, probability: float) -> Tensor:
    """Zero x (N, ...) where u (N,) does not exceed `probability`."""
    return x * (u > probability).view(-1, *[1] * (x.ndim - 1))


def noised(x1: Tensor, draws: FlowDraws) -> Tensor:
    """Return x_t (N, C, P), the interpolation between data x1 (N, C, P) at t = 0 and noise at t = 1."""
    t = draws.t[:, None, None]
    return (1 - t) * x1 + t * draws.z


def flow_loss(predicted: Tensor, x1: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of a predicted velocity (N, C, P) over channels and the frames of `mask` (N, 1, P).

    Without examples it is 0, but still depends on the parameters.
    """
    error = (predicted.float() - (z - x1)).square().mean(1)
    if mask is None:
        return error.sum() / max(1, error.numel())
    return (mask[:, 0] * error).sum() / mask.sum()

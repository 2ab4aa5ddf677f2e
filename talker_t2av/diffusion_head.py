"""Diffusion heads, which generate the next patch of a stream from the hidden state of the language model.

A head has three conditions: mu, the hidden state of the language model before the patch, which classifier-free guidance
drops; the frames before the patch; and a global condition, the speaker embedding or the first frame of the motion.

Axes: N examples (2 B rows when sampling with guidance), C channels, P frames of a patch, K context frames, D width, G
width of the global condition, n solver steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device import to_device
from talker_t2av.flow_matching import (
    DROP_COND,
    DROP_MU,
    FlowDraws,
    drop,
    euler,
    flow_loss,
    guide,
    noised,
    solver_times,
    zero_steps,
)
from talker_t2av.layers import Transformer


def time_features(u: Tensor, width: int) -> Tensor:
    """Return sines, then cosines (N, width) of 1000 u, at width/2 frequencies from 1 to 1/10000 inclusive."""
    half = width // 2
    steps = torch.arange(half, device=u.device, dtype=torch.float32)
    angles = 1000 * u.float()[:, None] * torch.exp(steps * (-math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], -1)


class TimeMLP(nn.Module):
    """Embeds times (N,) in [0, 1] as vectors (N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        features = time_features(t, self.linear_1.in_features)
        return self.linear_2(F.silu(self.linear_1(features)))


class DiffusionHead(nn.Module):
    """Predicts the velocity of a noisy patch. The sequence is [mu + time; global condition; context frames; patch]."""

    def __init__(
        self,
        channels: int,
        global_dim: int,
        width: int,
        layers: int,
        heads: int,
        max_positions: int = 1024,
    ) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, width)
        self.cond_proj = nn.Linear(channels, width)
        self.global_cond_proj = nn.Linear(global_dim, width)
        self.out_proj = nn.Linear(width, channels)
        self.time_mlp = TimeMLP(width)
        self.delta_time_mlp = TimeMLP(width)
        self.decoder = Transformer(width, width, layers, heads, max_positions)

    def time(self, t: Tensor, dt: Tensor | None = None) -> Tensor:
        """Return the time embedding (N, D). Without dt, it is the embedding of dt = 0, which is not zero."""
        return self.time_mlp(t) + self.delta_time_mlp(torch.zeros_like(t[:1]) if dt is None else dt)

    def context(self, cond: Tensor, global_cond: Tensor) -> Tensor:
        """Return the tokens that do not depend on time and mu: cond (N, C, K), global_cond (N, G) -> (N, 1 + K, D)."""
        tokens = [self.global_cond_proj(global_cond)[:, None], self.cond_proj(cond.transpose(1, 2))]
        return self.decoder.input_proj(torch.cat(tokens, 1))

    def denoise(self, x: Tensor, first: Tensor, context: Tensor) -> Tensor:
        """Return the velocity (N, C, P) for x (N, C, P), the projected first token (N, D) and `context`."""
        patch = self.decoder.input_proj(self.in_proj(x.transpose(1, 2)))
        sequence = torch.cat([first[:, None], context, patch], 1)
        length = sequence.shape[1]
        states = self.decoder.run(sequence, slice(length - x.shape[-1], length))
        return self.out_proj(states).transpose(1, 2).to(x.dtype)

    def forward(
        self, x: Tensor, mu: Tensor, t: Tensor, cond: Tensor, global_cond: Tensor, dt: Tensor | None = None
    ) -> Tensor:
        """Map x (N, C, P), mu (N, D), t (N,), cond (N, C, K), global_cond (N, G) to the velocity (N, C, P)."""
        first = self.decoder.input_proj(mu + self.time(t, dt))
        return self.denoise(x, first, self.context(cond, global_cond))


@dataclass(frozen=True)
class Schedule:
    """Precomputed values that depend only on the solver times.

    Attributes:
        times: (n + 1,) solver times on the CPU.
        lengths: lengths of the n steps.
        shifts: (n, D), added to the projected first token in each step.
    """

    times: Tensor
    lengths: list[float]
    shifts: Tensor


class FlowHead(nn.Module):
    """A diffusion head with its sampler and its loss.

    Args:
        drop_mu, drop_cond: probabilities of dropping mu and the context frames in training.
    """

    def __init__(
        self,
        estimator: DiffusionHead,
        drop_mu: float = DROP_MU,
        drop_cond: float = DROP_COND,
    ) -> None:
        super().__init__()
        self.estimator = estimator
        self.drop_mu = drop_mu
        self.drop_cond = drop_cond

    def schedule(self, steps: int = 10, sway: float = 1.0) -> Schedule:
        """Return a schedule of `steps` steps, which all patches of an utterance share. sway: see `solver_times`."""
        net = self.estimator
        times = solver_times(steps, sway)
        vectors = net.time(to_device(times[:-1], net.in_proj.weight.device))
        shifts = F.linear(vectors, net.decoder.input_proj.weight.to_dense().float())
        return Schedule(times, (times[:-1] - times[1:]).tolist(), shifts)

    def branches(
        self, mu: Tensor, cond: Tensor, global_cond: Tensor, schedule: Schedule, unconditional: bool
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return a function (x, i) -> velocities with and without mu at step i, evaluated as one batch.

        Without `unconditional`, or with a third argument False, both are the conditional velocity. The unconditional
        branch keeps context and global condition.
        """
        net = self.estimator
        context = net.context(cond, global_cond).repeat(1 + unconditional, 1, 1)
        state = net.decoder.input_proj(torch.cat([mu, torch.zeros_like(mu)]) if unconditional else mu)  # (N, D)

        def evaluate(x: Tensor, i: int, unconditional: bool = unconditional) -> tuple[Tensor, Tensor]:
            rows = (1 + unconditional) * len(x)
            both = net.denoise(x.repeat(1 + unconditional, 1, 1), state[:rows] + schedule.shifts[i], context[:rows])
            return both[: len(x)], both[-len(x) :]

        return evaluate

    @torch.no_grad()
    def sample(
        self,
        mu: Tensor,
        cond: Tensor,
        global_cond: Tensor,
        noise: Tensor,
        schedule: Schedule,
        temperature: float = 1.0,
        guidance: float = 1.0,
        zero_star: bool = True,
        unguided: int = 0,
    ) -> Tensor:
        """Sample a patch (B, C, P), with the memory layout of `noise`.

        Args:
            mu: (B, D) hidden states.
            cond: (B, C, K) frames before the patch, zero-padded.
            global_cond: (B, G) speaker embedding or first motion frame.
            noise: (B, C, P) standard normal noise, which is scaled by `temperature`.
            schedule: result of `schedule`.
            guidance: guidance scale. With 1, the unconditional branch is not evaluated.
            zero_star: use CFG-Zero*, see `guide`, which also skips the first steps.
            unguided: number of final steps without guidance.
        """
        evaluate = self.branches(mu, cond, global_cond, schedule, guidance != 1)
        guided = 0 if guidance == 1 else len(schedule.lengths) - unguided  # steps

        def velocity(x: Tensor, i: int) -> Tensor:
            conditional, unconditional = evaluate(x, i, i < guided)
            return guide(conditional, unconditional, guidance, zero_star) if i < guided else conditional

        skip = zero_steps(len(schedule.lengths)) if zero_star else 0
        return euler(velocity, temperature * noise, schedule.lengths, skip)

    def loss(
        self,
        x1: Tensor,
        mu: Tensor,
        cond: Tensor,
        global_cond: Tensor,
        draws: FlowDraws | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the flow-matching loss (scalar) of patches x1 (N, C, P), N may be 0. mask (N, 1, P) marks valid
        frames.
        """
        draws = draws or FlowDraws.sample(x1)
        mu = drop(mu, draws.u_mu, self.drop_mu)
        cond = drop(cond, draws.u_cond, self.drop_cond)
        return flow_loss(self.estimator(noised(x1, draws), mu, draws.t, cond, global_cond), x1, draws.z, mask)

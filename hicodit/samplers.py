"""Samplers for masked discrete diffusion. They accept any posterior and do not depend on a network.

Axes: B clips, K token levels, L token frames, N real tokens (mask id N), M requested frames of a level, S steps.

A step is a function of tensors on the model's device. Shapes do not depend on sampled values, and nothing is copied to
the host, so that `planned_step`, `thinned_step` and `ranked_step` can be compiled or captured as CUDA graphs. Times,
the number of tokens that each step reveals and, if independent of the posterior, their positions are computed before
the first step. Tokens are drawn by inverse transform sampling. Each clip has its own generator, so that its sample does
not depend on the rest of the batch.

To add a sampler, write a function with an entry in `SAMPLERS`, and add its name to `hicodit.settings.METHODS`, which is
read before PyTorch is imported. Values that differ between steps are passed to step functions as tensors, as a graph is
captured, or a function compiled, for each value of a Python number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.cuda_graph import GraphedSteps
from engine.device import to_device
from hicodit.diffusion import exponential_noise
from hicodit.settings import METHODS, SamplerConfig

# The distribution of clean tokens that a sampler draws from. `posterior(tokens, t, frames)`, with tokens (B, K, L) at
# the diffusion times t (B,), returns log q (B, K, M, N) at the requested frames (B, K, M) of each level, or
# (B, K, L, N) at all frames if `frames` is None.
Posterior = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class SamplerInput:
    """A batch of partly masked tokens, and all that a sampler needs to replace the masks.

    Args:
        posterior: the distribution to draw from.
        tokens: (B, K, L), on the CPU.
        lengths: (B,) number of frames of each clip, on the CPU. Padding stays masked.
        mask_id: the token that stands for a masked position.
        config: settings of the sampler.
        generators: one per clip, on `device`.
        normalised: whether the posterior sums to one, so that the positions to reveal can be drawn in advance.
        device: the model's device.
        graphs: runs the step functions; by default they are called directly.
        on_step: called after each step.

    Attributes:
        tokens: (B, K, L), on `device`.
        masked: (B, K, L) bool, True at masked positions, on `device`.
        total: (B,) number of masked positions, on the CPU.
    """

    def __init__(
        self,
        posterior: Posterior,
        tokens: Tensor,
        lengths: Tensor,
        mask_id: int,
        config: SamplerConfig,
        generators: list[torch.Generator],
        normalised: bool = True,
        device: torch.device | str = "cpu",
        graphs: GraphedSteps | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        device = torch.device(device)
        masked = (tokens == mask_id) & (torch.arange(tokens.shape[2]) < lengths[:, None])[:, None]
        self.posterior = posterior
        self.tokens = to_device(tokens.contiguous(), device)  # equal strides at every step, for compiled steps
        self.masked = to_device(masked, device)
        self.total = masked.flatten(1).sum(1)
        self.lengths = lengths
        self.config = config
        self.generators = generators
        self.normalised = normalised
        self.graphs = graphs or GraphedSteps()
        self.on_step = on_step

    def time(self, count: Tensor) -> Tensor:
        """Return the diffusion time (..., B) of clips with `count` (..., B) masked positions: the masked fraction."""
        fraction = count / to_device(self.lengths, count.device) / self.tokens.shape[1]
        return fraction.clamp(min=self.config.end)

    def noise(self, columns: int = 1) -> Tensor:
        """Draw uniforms in [0, 1) of shape (columns, B, K, L). Each clip draws as many as its length requires."""
        draws = torch.full((columns, *self.tokens.shape), 0.5, device=self.tokens.device)
        for row, length, generator in zip(draws.unbind(1), self.lengths.tolist(), self.generators):
            row[..., :length] = torch.rand(columns, row.shape[1], length, generator=generator, device=row.device)
        return draws


def sample_by_inverse_cdf(log_q: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Sample tokens by inverse transform sampling.

    Args:
        log_q: (..., N) log probabilities, which need not be normalised.
        u: (...) uniforms in [0, 1).
        temperature: divides log_q. Below 1e-6: the most likely token, regardless of u.

    Returns:
        Token ids (...) int64.
    """
    if temperature < 1e-6:
        return log_q.argmax(-1)
    cdf = (log_q / temperature).softmax(-1).cumsum(-1)
    index = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)
    return index[..., 0].clamp(max=log_q.shape[-1] - 1)


def planned_step(
    posterior: Posterior, tokens: Tensor, t: Tensor, frames: Tensor, u: Tensor, temperature: float
) -> Tensor:
    """Reveal the given frames of each level. Return the new tokens (B, K, L).

    Args:
        posterior: the distribution to draw from.
        tokens: (B, K, L).
        t: (B,) diffusion times.
        frames: (B, K, M) frames to reveal. An index of L reveals nothing.
        u: (B, K, L) uniforms, one per position.
        temperature: see `sample_by_inverse_cdf`.
    """
    length = tokens.shape[-1]
    requested = frames.clamp(max=length - 1)
    drawn = sample_by_inverse_cdf(posterior(tokens, t, requested), u.gather(2, requested), temperature)
    padded = torch.cat([tokens, tokens[..., :1]], -1)  # column L receives positions that reveal nothing
    return padded.scatter(2, frames, drawn)[..., :length].contiguous()  # equal strides at every step


def thinned_step(
    posterior: Posterior, tokens: Tensor, masked: Tensor, t: Tensor, rate: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Reveal each masked position with probability rate * sum(q). Return tokens and masked, both (B, K, L).

    Args:
        rate: (B,) probability of a position to be revealed if q sums to one.
        u: (2, B, K, L) uniforms, for the decision to reveal and for the token.
    """
    log_q = posterior(tokens, t, None)
    reveal = masked & (u[0] < rate[:, None, None] * log_q.exp().sum(-1))
    return torch.where(reveal, sample_by_inverse_cdf(log_q, u[1], temperature), tokens), masked & ~reveal


def ranked_step(
    posterior: Posterior,
    tokens: Tensor,
    masked: Tensor,
    t: Tensor,
    count: Tensor,
    u: Tensor,
    choice_noise: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sample all masked positions and reveal those with the highest noisy log probability. Return tokens and masked,
    both (B, K, L).

    Args:
        count: (B,) number of positions to reveal.
        u: (2, B, K, L) uniforms, for the tokens and for the Gumbel noise.
        choice_noise: (B,) scale of the Gumbel noise.
    """
    log_q = posterior(tokens, t, None)
    drawn = sample_by_inverse_cdf(log_q, u[0], temperature)
    score = log_q.gather(-1, drawn[..., None])[..., 0]
    score = score - choice_noise[:, None, None] * torch.log(exponential_noise(u[1]))
    order = score.masked_fill(~masked, -math.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1).view(masked.shape)
    reveal = masked & (rank < count[:, None, None])
    return torch.where(reveal, drawn, tokens), masked & ~reveal


def euler(inputs: SamplerInput) -> Tensor:
    """Reveal each masked token between t and t - h with probability h / t, and all remaining ones in the last step (as
    in the paper). Return tokens (B, K, L).

    Time starts at the masked fraction: at 1, or lower if some tokens are known. If the posterior sums to one, the time
    at which a position is revealed is uniform and independent of the tokens, so that it is drawn in advance.
    """
    config = inputs.config
    tokens = inputs.tokens
    masked = inputs.masked
    start = inputs.time(inputs.total).double()
    spaced = [torch.linspace(t, config.end, config.steps + 1, dtype=torch.float64) for t in start.tolist()]
    times = torch.stack(spaced, 1)  # (S + 1, B)
    if inputs.normalised:
        when, u = inputs.noise(2)
        scale = (config.steps * start / (start - config.end).clamp(min=1e-12)).to(when.dtype)
        step = ((1 - when) * to_device(scale, when.device)[:, None, None]).long().clamp(max=config.steps)
        frames = revealed_frames(step, masked, len(times))
        run = inputs.graphs(planned_step)
        for t, revealed in zip(to_device(times.float(), frames.device), frames):
            tokens = run(inputs.posterior, tokens, t, revealed, u, config.temperature)
            inputs.on_step()
        return tokens
    run = inputs.graphs(thinned_step)
    last = torch.full_like(times[:1], math.inf)  # the last step reveals all that remains
    rates = torch.cat([(times[:-1] - times[1:]) / times[:-1], last])
    for t, rate in zip(*to_device(torch.stack([times, rates]).float(), tokens.device)):
        tokens, masked = run(inputs.posterior, tokens, masked, t, rate, inputs.noise(2), config.temperature)
        inputs.on_step()
    return tokens


def confidence(inputs: SamplerInput) -> Tensor:
    """Reveal the most probable candidates first, with a cosine unmasking schedule (MaskGIT, arXiv 2202.04200). Return
    tokens (B, K, L).

    After a fraction s of the steps, a fraction cos(pi / 2 * s) of the tokens is still masked. The Gumbel noise of the
    ranking is annealed to 0 in proportion to t.
    """
    config = inputs.config
    tokens = inputs.tokens
    masked = inputs.masked
    device = tokens.device
    fractions = [math.cos(math.pi / 2 * (step / config.steps)) for step in range(1, config.steps)]
    remaining = [inputs.total, *(torch.floor(inputs.total * fraction) for fraction in fractions)]
    remaining = torch.stack([*remaining, torch.zeros_like(inputs.total)])  # (S + 1, B)
    times = inputs.time(remaining[:-1])  # (S, B)
    counts = to_device(remaining[:-1] - remaining[1:], device)
    scales = to_device((config.choice_noise * times).float(), device)
    run = inputs.graphs(ranked_step)
    for t, count, scale in zip(to_device(times.float(), device), counts, scales):
        noise = inputs.noise(2)
        tokens, masked = run(inputs.posterior, tokens, masked, t, count, noise, scale, config.temperature)
        inputs.on_step()
    return tokens


SAMPLERS: dict[str, Callable[[SamplerInput], Tensor]] = {"euler": euler, "confidence": confidence}
assert tuple(SAMPLERS) == tuple(METHODS)


def revealed_frames(step: Tensor, masked: Tensor, steps: int) -> Tensor:
    """Return the frames (S, B, K, M) that each step reveals, where `step` (B, K, L) is the step of each masked
    position.

    A frame index of L reveals nothing. M is the largest number of frames of a level that a step reveals, rounded up to
    a multiple of 4. A last step that reveals nothing is omitted. Counting the frames requires a device sync.

    For example, a level of L = 6 masked frames with steps 1 0 1 0 0 1 is revealed by two steps: frames 1 3 4 and then
    frames 0 2 5, each followed by one index of 6, as M = 4.
    """
    length = step.shape[2]
    step = torch.where(masked, step, steps)
    counts = torch.zeros(*step.shape[:2], steps + 1, dtype=torch.long, device=step.device)
    counts = counts.scatter_add(2, step, torch.ones_like(step))[..., :steps]  # (B, K, S)
    largest = counts.amax((0, 1)).cpu().tolist()
    used = steps if largest[-1] else steps - 1
    most = max(*largest, 1)
    slots = torch.arange(math.ceil(most / 4) * 4, device=step.device)  # few shapes, so that fewer graphs are compiled
    index = ((counts.cumsum(2) - counts)[..., None] + slots).clamp(max=length - 1)  # (B, K, S, M)
    order = step.argsort(dim=2, stable=True)[:, :, None].expand(-1, -1, steps, -1)
    frames = torch.where(slots < counts[..., None], order.gather(3, index), length)
    return frames.permute(2, 0, 1, 3)[:used].contiguous()

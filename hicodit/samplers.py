"""Samplers for masked discrete diffusion. They take any posterior and know no network.

Axes: B clips, K token levels, L token frames, N real tokens (mask id N), M requested frames of a level, S steps.

A step is a function of tensors on the model's device, of shapes that do not depend on what is drawn, and reads nothing
back to the host: `planned_step`, `ranked_step` and their relatives can be compiled. All that is known before the first
step is computed there: times, how many tokens a step reveals and, by methods that do not look at the posterior for
that, which. A token is drawn by inverting its distribution function, with one uniform number. Every clip draws from its
own generator, so its result does not depend on what shares its batch.

A new method is a function here with an entry in `FUNCTIONS`, and its name one in `hicodit.settings.METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_graph import GraphedSteps
from engine.device import send
from hicodit.diffusion import exponential_noise
from hicodit.settings import METHODS, SamplerConfig

# The distribution of clean tokens that a sampler draws from. `posterior(tokens, t, where)`, with tokens (B, K, L) and
# their times (B,), is log q (B, K, M, N) at the frames `where` (B, K, M) of each level, (B, K, L, N) if that is None.
Posterior = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class SamplerState:
    """The state of a run: tokens of a batch on their way from masked to clean.

    Attributes:
        tokens, masked: (B, K, L), on the model's device. total: (B,) masked tokens at the beginning, on the CPU.
        lengths: (B,) frames of each clip, on the CPU.
        generators: one a clip, on the model's device.
        graphs: runs the functions of steps, on CUDA as graphs.
    """

    posterior: Posterior
    tokens: Tensor
    masked: Tensor
    total: Tensor
    lengths: Tensor
    config: SamplerConfig
    generators: list[torch.Generator]
    normalised: bool
    graphs: GraphedSteps

    def share(self, masked: Tensor) -> Tensor:
        """Return the masked fraction (..., B) of each clip, given the number masked: the time t of the step."""
        share = masked / send(self.lengths, masked.device) / self.tokens.shape[1]
        return share.clamp(min=self.config.end)

    def noise(self, columns: int = 1) -> Tensor:
        """Draw uniforms in [0, 1) of shape (columns, B, K, L), of each clip as many as it is long."""
        draws = torch.full((columns, *self.tokens.shape), 0.5, device=self.tokens.device)
        for row, n, generator in zip(draws.unbind(1), self.lengths.tolist(), self.generators):
            row[..., :n] = torch.rand(columns, row.shape[1], n, generator=generator, device=row.device)
        return draws


def invert(log_q: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Draw tokens (...) from log q (..., N), which need not be normalised, at the uniforms u (...)."""
    if temperature == 0:
        return log_q.argmax(-1)
    cdf = (log_q / temperature).softmax(-1).cumsum(-1)
    place = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)
    return place[..., 0].clamp(max=log_q.shape[-1] - 1)


def planned_step(
    posterior: Posterior, tokens: Tensor, t: Tensor, frames: Tensor, u: Tensor, temperature: float
) -> Tensor:
    """Reveal the frames (B, K, M) of each level of tokens (B, K, L). A frame of L reveals nothing."""
    length = tokens.shape[-1]
    asked = frames.clamp(max=length - 1)
    drawn = invert(posterior(tokens, t, asked), u.gather(2, asked), temperature)
    room = torch.cat([tokens, tokens[..., :1]], -1)  # where the frames that reveal nothing write
    return room.scatter(2, frames, drawn)[..., :length].contiguous()  # strides, too, stay from step to step


def thinned_step(
    posterior: Posterior, tokens: Tensor, masked: Tensor, t: Tensor, rate: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Reveal a position with probability rate (B,) times sum q; return the tokens and what is still masked.

    u: (2, B, K, L) uniforms, for whether to reveal and for the token.
    """
    log_q = posterior(tokens, t, None)
    reveal = masked & (u[0] < rate[:, None, None] * log_q.exp().sum(-1))
    return torch.where(reveal, invert(log_q, u[1], temperature), tokens), masked & ~reveal


def ranked_step(
    posterior: Posterior,
    tokens: Tensor,
    masked: Tensor,
    t: Tensor,
    count: Tensor,
    u: Tensor,
    choice_noise: Tensor,
    config: SamplerConfig,
    level_delay: float,
) -> tuple[Tensor, Tensor]:
    """Reveal the `count` (B,) drawn tokens of highest noisy log probability.

    u: (2, B, K, L) uniforms, for the tokens and for the noise, which `choice_noise` (B,) scales.
    """
    log_q = posterior(tokens, t, None)
    drawn = invert(log_q, u[0], config.temperature)
    score = log_q.gather(-1, drawn[..., None])[..., 0] - level_delay * _levels(drawn)
    score = score - choice_noise[:, None, None] * torch.log(exponential_noise(u[1]))
    place = _ranked(score.masked_fill(~masked, -math.inf))[-1].view(masked.shape)
    reveal = masked & (place < count[:, None, None])
    return torch.where(reveal, drawn, tokens), masked & ~reveal


def entropy_step(
    posterior: Posterior, tokens: Tensor, masked: Tensor, t: Tensor, due: Tensor, bound: Tensor, u: Tensor,
    config: SamplerConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reveal the surest tokens up to a bound (B,) on their entropy, but at least `due` (B,) of them."""
    log_q = posterior(tokens, t, None)
    nats = torch.special.entr(log_q.exp()).sum(-1)
    order, place = _ranked((-nats - config.level_delay * _levels(nats)).masked_fill(~masked, -math.inf))
    taken = nats.flatten(1).gather(1, order)
    allowed = (taken.cumsum(1) - taken.cummax(1).values <= bound[:, None]).gather(1, place).view(masked.shape)
    reveal = masked & (allowed | (place < due[:, None]).view(masked.shape))
    return torch.where(reveal, invert(log_q, u, config.temperature), tokens), masked & ~reveal


def euler(state: SamplerState) -> Iterator[None]:
    """Reveal every masked token from t to t - h with probability h / t, at the end the rest (the paper's sampler).

    Time starts at the masked share: at 1, or lower where some tokens are known. If the posterior sums to one, the time
    at which a position is revealed depends on nothing else, and is uniform: it is drawn beforehand.
    """
    c, start = state.config, state.share(state.total).double()
    times = torch.stack([torch.linspace(t, c.end, c.steps + 1, dtype=torch.float64) for t in start.tolist()], 1)
    if state.normalised:
        when, u = state.noise(2)
        scale = send((c.steps * start / (start - c.end).clamp(min=1e-12)).to(when.dtype), when.device)[:, None, None]
        step = ((1 - when) * scale).long().clamp(max=c.steps)
        yield from _planned(state, step, u, times)
        return
    step, tokens, masked = state.graphs(thinned_step), state.tokens, state.masked
    rates = torch.cat([(times[:-1] - times[1:]) / times[:-1], torch.full_like(times[:1], math.inf)])  # at last all
    for t, rate in zip(*send(torch.stack([times, rates]).float(), tokens.device)):
        tokens, masked = step(state.posterior, tokens, masked, t, rate, state.noise(2), c.temperature)
        state.tokens, state.masked = tokens, masked
        yield


def fixed_count(state: SamplerState) -> Iterator[None]:
    """Reveal the number of tokens that Euler does on average in a step, in random order."""
    steps, total = state.config.steps, state.total
    done = torch.stack([total - torch.floor(total * (1 - step / steps)) for step in range(steps + 1)])  # (S + 1, B)
    order, u = state.noise(2)
    place = _ranked((-order).masked_fill(~state.masked, -math.inf))[-1]
    ends = send(done[1:].T.contiguous().to(place.dtype), place.device)
    step = torch.searchsorted(ends, place, right=True).view(order.shape)
    yield from _planned(state, step, u, state.share(total - done[:-1]))


def confidence(state: SamplerState) -> Iterator[None]:
    """Reveal the most probable of drawn candidates first, on a cosine schedule (MaskGIT); noise falls to 0 with t."""
    return _surest_first(state, lambda done: math.cos(math.pi / 2 * done), 0.0, annealed=True)


def ordered(state: SamplerState) -> Iterator[None]:
    """Reveal the most probable tokens of coarse levels first, few in early steps and many in late ones (OmniVoice)."""
    shift = state.config.shift
    return _surest_first(state, lambda done: (1 - done) / (1 - (1 - shift) * done), state.config.level_delay)


def entropy(state: SamplerState) -> Iterator[None]:
    """Reveal as many of the surest tokens, coarse levels first, as a bound on entropy allows (arXiv 2505.24857).

    Tokens that are drawn at once are drawn independently; the sum of their entropies without the largest bounds what
    that loses. A step reveals at least the share that is due for `steps` to suffice. Whether all is revealed is known
    to the device alone: the host asks for it after each step on a CPU, after every fourth elsewhere.
    """
    c, device = state.config, state.tokens.device
    run, bound = state.graphs(entropy_step), c.entropy * send(state.lengths, device)
    for step in range(c.steps):
        left = state.masked.flatten(1).sum(1)
        t, due, u = state.share(left), (left / (c.steps - step)).ceil(), state.noise()[0]
        state.tokens, state.masked = run(state.posterior, state.tokens, state.masked, t, due, bound, u, c)
        yield
        if (device.type == "cpu" or step % 4 == 3) and not state.masked.any():
            return


FUNCTIONS: dict[str, Callable[[SamplerState], Iterator[None]]] = {  # each yields after a step
    function.__name__: function for function in (euler, fixed_count, confidence, ordered, entropy)
}
assert tuple(FUNCTIONS) == METHODS


def sample(
    posterior: Posterior,
    tokens: Tensor,
    lengths: Tensor,
    mask_id: int,
    config: SamplerConfig,
    generators: list[torch.Generator],
    normalised: bool = True,
    on_step: Callable[[], object] = lambda: None,
    device: torch.device | str = "cpu",
    graphs: GraphedSteps | None = None,
) -> Tensor:
    """Replace `mask_id` in tokens (B, K, L) of `lengths` (B,) frames; return them on `device`. Padding stays `mask_id`.

    Args:
        tokens, lengths: on the CPU.
        generators: one a clip, on `device`.
        normalised: the posterior sums to one, so that which tokens to reveal can be drawn without it.
        on_step: called after each step.
        graphs: runs the functions of steps; by default as they are.
    """
    device = torch.device(device)
    masked = (tokens == mask_id) & (torch.arange(tokens.shape[2]) < lengths[:, None])[:, None]
    state = SamplerState(
        posterior, send(tokens, device), send(masked, device), masked.flatten(1).sum(1), lengths, config, generators,
        normalised, graphs or GraphedSteps(),
    )  # fmt: skip
    for _ in FUNCTIONS[config.method](state):
        on_step()
    return state.tokens


def revealed_frames(step: Tensor, masked: Tensor, steps: int) -> Tensor:
    """Return the frames (S, B, K, M) that each step reveals, where `step` (B, K, L) is that of each masked position.

    A frame of L reveals nothing: M is the most frames of a level that a step reveals, or a few more. A last step that
    reveals nothing is left out. The host reads how many frames the steps need.
    """
    length, step = step.shape[2], torch.where(masked, step, steps)
    counts = torch.zeros(*step.shape[:2], steps + 1, dtype=torch.long, device=step.device)
    counts = counts.scatter_add(2, step, torch.ones_like(step))[..., :steps]  # (B, K, S)
    most = counts.amax((0, 1)).cpu().tolist()
    used = steps if most[-1] else steps - 1
    slots = torch.arange(-(-max(*most, 1) // 4) * 4, device=step.device)  # few shapes: fewer graphs to compile
    place = ((counts.cumsum(2) - counts)[..., None] + slots).clamp(max=length - 1)  # (B, K, S, M)
    order = step.argsort(dim=2, stable=True)[:, :, None].expand(-1, -1, steps, -1)
    frames = torch.where(slots < counts[..., None], order.gather(3, place), length)
    return frames.permute(2, 0, 1, 3)[:used].contiguous()


def _planned(state: SamplerState, step: Tensor, u: Tensor, times: Tensor) -> Iterator[None]:
    """Reveal each masked position in its step (B, K, L), of time times[i] (B,). u: uniforms (B, K, L) of tokens."""
    run, frames = state.graphs(planned_step), revealed_frames(step, state.masked, len(times))
    for t, revealed in zip(send(times.float(), frames.device), frames):
        state.tokens = run(state.posterior, state.tokens, t, revealed, u, state.config.temperature)
        yield


def _surest_first(
    state: SamplerState, left: Callable[[float], float], level_delay: float, annealed: bool = False
) -> Iterator[None]:
    """Reveal the candidates of highest noisy log probability; `left` is the masked share after a share of all steps."""
    c, device, total = state.config, state.tokens.device, state.total
    shares = [left(step / c.steps) if step < c.steps else 0.0 for step in range(c.steps + 1)]
    remaining = torch.stack([total if i == 0 else torch.floor(total * share) for i, share in enumerate(shares)])
    times = state.share(remaining[:-1])  # (S, B)
    counts = send(remaining[:-1] - remaining[1:], device)
    scales = send((c.choice_noise * (times if annealed else torch.ones_like(times))).float(), device)
    run = state.graphs(ranked_step)
    for t, count, scale in zip(send(times.float(), device), counts, scales):
        state.tokens, state.masked = run(
            state.posterior, state.tokens, state.masked, t, count, state.noise(2), scale, c, level_delay
        )
        yield


def _levels(like: Tensor) -> Tensor:
    """Return the level (K, 1) of each position of (B, K, L)."""
    return torch.arange(like.shape[1], device=like.device)[:, None]


def _ranked(score: Tensor) -> tuple[Tensor, Tensor]:
    """Sort scores (B, K, L) from high to low: return the positions in that order, and each one's place, (B, K * L)."""
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order, order.argsort(1)

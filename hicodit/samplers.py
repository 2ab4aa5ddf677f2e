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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.nn.transfer import send
from hicodit.diffusion import exponential_noise
from hicodit.settings import METHODS, SamplerConfig


class Posterior(Protocol):
    """The distribution of clean tokens that a sampler asks for."""

    def moments(self, times: Tensor) -> Iterable[Any]:
        """For each of the times (S, B), known beforehand, what `__call__` takes as `moment`."""

    def __call__(self, tokens: Tensor, moment: Any, where: Tensor | None) -> Tensor:
        """log q (B, K, M, N) at the frames `where` (B, K, M) of each level, (B, K, L, N) without it.

        Args:
            tokens: (B, K, L). moment: one of `moments`, or a time (B,) on the device of the tokens.
        """


@dataclass
class Draft:
    """Tokens of a batch on their way from masked to clean.

    Attributes:
        tokens, masked: (B, K, L), on the model's device. total: (B,) masked tokens at the beginning, on the CPU.
        lengths: (B,) frames of each clip, on the CPU.
        generators: one a clip, on the model's device.
        compiled: wraps the function of a step.
    """

    posterior: Posterior
    tokens: Tensor
    masked: Tensor
    total: Tensor
    lengths: Tensor
    config: SamplerConfig
    generators: list[torch.Generator]
    normalised: bool
    compiled: Callable[[Callable], Callable]

    def share(self, masked: Tensor) -> Tensor:
        """The share of each clip's positions that `masked` (..., B) of them are: the time t at which a step begins."""
        share = masked / send(self.lengths, masked.device) / self.tokens.shape[1]
        return share.clamp(min=self.config.end)

    def noise(self, columns: int = 1) -> Tensor:
        """Uniforms in [0, 1) of shape (columns, B, K, L), of each clip as many as it is long."""
        draws = torch.full((columns, *self.tokens.shape), 0.5, device=self.tokens.device)
        for row, n, generator in zip(draws.unbind(1), self.lengths.tolist(), self.generators):
            row[..., :n] = torch.rand(columns, row.shape[1], n, generator=generator, device=row.device)
        return draws


def invert(log_q: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Tokens (...) from log q (..., N), which need not be normalised, at the uniforms u (...)."""
    if temperature == 0:
        return log_q.argmax(-1)
    cdf = (log_q / temperature).softmax(-1).cumsum(-1)
    place = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)
    return place[..., 0].clamp(max=log_q.shape[-1] - 1)


def planned_step(
    posterior: Posterior, tokens: Tensor, moment: Any, frames: Tensor, u: Tensor, temperature: float
) -> Tensor:
    """Tokens (B, K, L) with some revealed: the frames (B, K, M) of each level. A frame of L reveals nothing."""
    length = tokens.shape[-1]
    asked = frames.clamp(max=length - 1)
    drawn = invert(posterior(tokens, moment, asked), u.gather(2, asked), temperature)
    room = torch.cat([tokens, tokens[..., :1]], -1)  # where the frames that reveal nothing write
    return room.scatter(2, frames, drawn)[..., :length].contiguous()  # strides, too, stay from step to step


def thinned_step(
    posterior: Posterior, tokens: Tensor, masked: Tensor, moment: Any, rate: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens and what is still masked, after a step that reveals a position with probability rate (B,) times sum q.

    u: (2, B, K, L) uniforms, for whether to reveal and for the token.
    """
    log_q = posterior(tokens, moment, None)
    reveal = masked & (u[0] < rate[:, None, None] * log_q.exp().sum(-1))
    return torch.where(reveal, invert(log_q, u[1], temperature), tokens), masked & ~reveal


def ranked_step(
    posterior: Posterior,
    tokens: Tensor,
    masked: Tensor,
    moment: Any,
    count: Tensor,
    u: Tensor,
    choice_noise: Tensor,
    config: SamplerConfig,
    level_delay: float,
) -> tuple[Tensor, Tensor]:
    """Reveal the `count` (B,) drawn tokens of highest noisy log probability.

    u: (2, B, K, L) uniforms, for the tokens and for the noise, which `choice_noise` (B,) scales.
    """
    log_q = posterior(tokens, moment, None)
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
    _, order, place = _ranked((-nats - config.level_delay * _levels(nats)).masked_fill(~masked, -math.inf))
    taken = nats.flatten(1).gather(1, order)
    allowed = (taken.cumsum(1) - taken.cummax(1).values <= bound[:, None]).gather(1, place).view(masked.shape)
    reveal = masked & (allowed | (place < due[:, None]).view(masked.shape))
    return torch.where(reveal, invert(log_q, u, config.temperature), tokens), masked & ~reveal


def euler(draft: Draft) -> Iterator[None]:
    """The paper's: from t to t - h every masked token is revealed with probability h / t; at the end the rest.

    Time starts at the masked share: at 1, or lower where some tokens are known. If the posterior sums to one, the time
    at which a position is revealed depends on nothing else, and is uniform: it is drawn beforehand.
    """
    c, start = draft.config, draft.share(draft.total).double()
    times = torch.stack([torch.linspace(t, c.end, c.steps + 1, dtype=torch.float64) for t in start.tolist()], 1)
    if draft.normalised:
        when, u = draft.noise(2)
        scale = send((c.steps * start / (start - c.end).clamp(min=1e-12)).to(when.dtype), when.device)[:, None, None]
        step = ((1 - when) * scale).long().clamp(max=c.steps)
        yield from _planned(draft, Plan.of(step, draft.masked, len(times)), u, times)
        return
    step, tokens, masked = draft.compiled(thinned_step), draft.tokens, draft.masked
    rates = torch.cat([(times[:-1] - times[1:]) / times[:-1], torch.full_like(times[:1], math.inf)])  # at last all
    for moment, rate in zip(draft.posterior.moments(times), send(rates.float(), tokens.device)):
        tokens, masked = step(draft.posterior, tokens, masked, moment, rate, draft.noise(2), c.temperature)
        draft.tokens, draft.masked = tokens, masked
        yield


def fixed_count(draft: Draft) -> Iterator[None]:
    """The number of tokens that Euler reveals on average in a step, in random order."""
    steps, total = draft.config.steps, draft.total
    done = torch.stack([total - torch.floor(total * (1 - step / steps)) for step in range(steps + 1)])  # (S + 1, B)
    order, u = draft.noise(2)
    place = _ranked((-order).masked_fill(~draft.masked, -math.inf))[-1]
    ends = send(done[1:].T.contiguous().to(place.dtype), place.device)
    step = torch.searchsorted(ends, place, right=True).view(order.shape)
    yield from _planned(draft, Plan.of(step, draft.masked, steps), u, draft.share(total - done[:-1]))


def confidence(draft: Draft) -> Iterator[None]:
    """The most probable of drawn candidates first, on a cosine schedule (MaskGIT), with noise annealed to 0 with t."""
    return _surest_first(draft, lambda done: math.cos(math.pi / 2 * done), 0.0, annealed=True)


def ordered(draft: Draft) -> Iterator[None]:
    """The most probable tokens of coarse levels first, few in early steps and many in late ones (OmniVoice)."""
    shift = draft.config.shift
    return _surest_first(draft, lambda done: (1 - done) / (1 - (1 - shift) * done), draft.config.level_delay)


def entropy(draft: Draft) -> Iterator[None]:
    """As many of the surest tokens, coarse levels first, as a bound on their entropy allows (arXiv 2505.24857).

    Tokens that are drawn at once are drawn independently; the sum of their entropies without the largest bounds what
    that loses. A step reveals at least the share that is due for `steps` to suffice. Whether all is revealed is known
    to the device alone: the host asks for it after each step on a CPU, after every fourth elsewhere.
    """
    c, device = draft.config, draft.tokens.device
    run, bound = draft.compiled(entropy_step), c.entropy * send(draft.lengths, device)
    for step in range(c.steps):
        left = draft.masked.flatten(1).sum(1)
        t, due, u = draft.share(left), (left / (c.steps - step)).ceil(), draft.noise()[0]
        draft.tokens, draft.masked = run(draft.posterior, draft.tokens, draft.masked, t, due, bound, u, c)
        yield
        if (device.type == "cpu" or step % 4 == 3) and not draft.masked.any():
            return


FUNCTIONS: dict[str, Callable[[Draft], Iterator[None]]] = {  # each yields after a step
    function.__name__: function for function in (euler, fixed_count, confidence, ordered, entropy)
}
assert tuple(FUNCTIONS) == METHODS


def sample(
    posterior: Posterior,
    lengths: Tensor,
    levels: int,
    mask_id: int,
    config: SamplerConfig,
    generators: list[torch.Generator],
    normalised: bool = True,
    known: Tensor | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    device: torch.device | str = "cpu",
    compiled: Callable[[Callable], Callable] = lambda step: step,
) -> Tensor:
    """Tokens (B, K, max L) on `device`, for frame counts `lengths` (B,). Positions past a clip's end stay `mask_id`.

    Args:
        normalised: the posterior sums to one, so that which tokens to reveal can be drawn without it.
        generators: one a clip, on `device`.
        known: (B, K, max L) tokens that are kept, `mask_id` where one is wanted. It and `lengths` lie on the CPU.
        on_step: called with the number of steps that are done.
        compiled: wraps the function of a step, such as `torch.compile`.
    """
    valid = (torch.arange(int(lengths.max())) < lengths[:, None])[:, None].expand(-1, levels, -1)
    x = torch.full(valid.shape, mask_id) if known is None else known.clone()
    masked = (x == mask_id) & valid
    place = torch.device(device)
    total = masked.flatten(1).sum(1)
    draft = Draft(
        posterior, send(x, place), send(masked, place), total, lengths, config, generators, normalised, compiled
    )
    for step, _ in enumerate(FUNCTIONS[config.method](draft), 1):
        on_step(step)
    return draft.tokens


@dataclass(frozen=True)
class Plan:
    """Which frames each step reveals, known before the first.

    Attributes:
        order: (B, K, L) frames of each level, by their step. begins, counts: (B, K, S) where those of a step stand.
        slots: (M,) numbers from 0 to the most frames of a level that a step reveals, or a few more.
        steps: S, without a last step that reveals nothing.
    """

    order: Tensor
    begins: Tensor
    counts: Tensor
    slots: Tensor
    steps: int

    @classmethod
    def of(cls, step: Tensor, masked: Tensor, steps: int) -> Plan:
        """The masked positions (B, K, L) are revealed in their `step`. The host reads how many frames a step needs."""
        step = torch.where(masked, step, steps)
        counts = torch.zeros(*step.shape[:2], steps + 1, dtype=torch.long, device=step.device)
        counts = counts.scatter_add(2, step, torch.ones_like(step))[..., :steps]
        most = counts.amax((0, 1)).tolist()
        slots = torch.arange(-(-max(*most, 1) // 4) * 4, device=step.device)  # few shapes: fewer graphs to compile
        used = steps if most[-1] else steps - 1
        return cls(step.argsort(dim=2, stable=True), counts.cumsum(2) - counts, counts, slots, used)

    def frames(self, i: int) -> Tensor:
        """(B, K, M) frames that step i reveals; L where a level has fewer than the most."""
        length = self.order.shape[2]
        place = (self.begins[..., i, None] + self.slots).clamp(max=length - 1)
        return torch.where(self.slots < self.counts[..., i, None], self.order.gather(2, place), length)


def _planned(draft: Draft, plan: Plan, u: Tensor, times: Tensor) -> Iterator[None]:
    """Follow a plan; step i is at the time times[i] (B,). u: uniforms (B, K, L) for the tokens."""
    run = draft.compiled(planned_step)
    for i, moment in enumerate(draft.posterior.moments(times[: plan.steps])):
        draft.tokens = run(draft.posterior, draft.tokens, moment, plan.frames(i), u, draft.config.temperature)
        yield


def _surest_first(
    draft: Draft, left: Callable[[float], float], level_delay: float, annealed: bool = False
) -> Iterator[None]:
    """Reveal the candidates of highest noisy log probability; `left` is the masked share after a share of all steps."""
    c, device, total = draft.config, draft.tokens.device, draft.total
    shares = [left(step / c.steps) if step < c.steps else 0.0 for step in range(c.steps + 1)]
    remaining = torch.stack([total if i == 0 else torch.floor(total * share) for i, share in enumerate(shares)])
    times = draft.share(remaining[:-1])  # (S, B)
    counts = send(remaining[:-1] - remaining[1:], device)
    scales = send((c.choice_noise * (times if annealed else torch.ones_like(times))).float(), device)
    run, moments = draft.compiled(ranked_step), draft.posterior.moments(times)
    for moment, count, scale in zip(moments, counts, scales):
        draft.tokens, draft.masked = run(
            draft.posterior, draft.tokens, draft.masked, moment, count, draft.noise(2), scale, c, level_delay
        )
        yield


def _levels(like: Tensor) -> Tensor:
    """The level (K, 1) of each position of (B, K, L)."""
    return torch.arange(like.shape[1], device=like.device)[:, None]


def _ranked(score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, K, L) from high to low (B, K * L), which position each is from, and each position's place."""
    ranked, order = score.flatten(1).sort(dim=1, descending=True, stable=True)
    return ranked, order, order.argsort(1)

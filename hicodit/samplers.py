"""Samplers for masked discrete diffusion. They take any posterior function and know no network.

Axes: B clips, K token levels, L token frames, N real tokens (mask id N), M requested positions.

A `Posterior` is `(tokens (B, K, L), t (B,), where) -> log q`, with `where` (B, K, L) bool rows (M, N) in the order of
`where.nonzero()`, without it (B, K, L, N). Times and masks lie on the CPU, tokens and posteriors on the model's device.
A method that knows beforehand which positions it reveals requests those alone; the others work on all positions in
fixed shapes. Every clip draws from its own generator, so its result does not depend on what shares its batch.

A new method is a function here with an entry in `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.bounds import bounded, check_bounds
from engine.errors import UserError
from hicodit.diffusion import exponential_noise, sample_categorical

Posterior = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    method: a name of `METHODS`.
    steps: network calls (the paper uses 64); `euler` adds a last one that leaves no mask, `entropy` may need fewer.
    temperature: of the token draw; 0 takes the most likely token.
    choice_noise: Gumbel noise on the log probabilities by which `confidence`, where it is annealed to 0 with t, and
        `ordered` choose.
    level_delay: by how much each level's log probability counts less than that of the level before it, so that coarse
        levels are revealed before fine ones (`ordered`, `entropy`).
    shift: 1 reveals as many tokens in each step of `ordered`, less few at first and many at last.
    entropy: nats a frame of tokens that `entropy` may reveal in a step, as long as `steps` suffice.
    window: seconds of a clip that are drawn at once, as long as what the model was trained on; longer clips are done in
        windows that overlap by a second (see `hicodit.generation`).
    """

    method: str = "euler"
    steps: int = bounded(1, 1000, default=64)
    temperature: float = bounded(0.0, 100.0, default=1.0)
    choice_noise: float = bounded(0.0, 1000.0, default=4.5)
    level_delay: float = bounded(0.0, 1000.0, default=5.0)
    shift: float = bounded(0.01, 1.0, default=0.1)
    entropy: float = bounded(0.0, 1000.0, default=4.0)
    window: int = bounded(2, 60, default=3)
    end: float = bounded(1e-9, 0.5, default=1e-5)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"sampler.method={self.method!r} is not one of {', '.join(METHODS)}")
        check_bounds(self, "sampler.")


class Draft:
    """Tokens of a batch on their way from masked to clean."""

    def __init__(
        self, posterior: Posterior, tokens: Tensor, masked: Tensor, lengths: Tensor, config: SamplerConfig,
        generators: list[torch.Generator], normalised: bool,
    ) -> None:  # fmt: skip
        self.posterior, self.tokens, self.masked, self.config = posterior, tokens, masked, config
        self.lengths, self.generators, self.normalised = lengths, generators, normalised

    def share(self) -> Tensor:
        """The share of each clip's positions that is still masked (B,): the time t at which a step begins."""
        share = self.masked.flatten(1).sum(1) / self.lengths / self.tokens.shape[1]
        return share.clamp(min=self.config.end)

    def uniform(self, where: Tensor, columns: int = 1) -> Tensor:
        """Uniforms (M, columns) in float64 (float32 truncates the race's noise, arXiv 2409.02908)."""
        counts = where.flatten(1).sum(1).tolist()
        draws = [torch.rand(n, columns, generator=g, dtype=torch.float64) for n, g in zip(counts, self.generators)]
        return torch.cat(draws)

    def draw(self, log_q: Tensor, where: Tensor) -> Tensor:
        """Tokens (M,) from log q (M, N) of the positions `where`."""
        if self.config.temperature == 0:
            return log_q.argmax(-1)
        log_q = log_q.double() / self.config.temperature
        weights = (log_q - log_q.amax(-1, keepdim=True)).exp()
        return sample_categorical(weights, self.uniform(where, weights.shape[-1]).to(weights.device))

    def noise(self) -> Tensor:
        """Uniforms (B, K, L) in float64, of each clip as many as it is long."""
        draws = torch.full(self.tokens.shape, 0.5, dtype=torch.float64)
        for row, n, generator in zip(draws, self.lengths.tolist(), self.generators):
            row[:, :n] = torch.rand(len(row), n, generator=generator, dtype=torch.float64)
        return draws.to(self.tokens.device)

    def candidates(self, log_q: Tensor) -> Tensor:
        """Tokens (B, K, L) from log q (B, K, L, N) of all positions, by inversion: one uniform a token."""
        if self.config.temperature == 0:
            return log_q.argmax(-1)
        cdf = (log_q / self.config.temperature).softmax(-1).cumsum(-1)
        return (cdf < self.noise()[..., None] * cdf[..., -1:]).sum(-1)

    def put(self, where: Tensor, tokens: Tensor) -> None:
        """Reveal the positions `where` as tokens (M,)."""
        self.tokens[where] = tokens
        self.masked = self.masked & ~where

    def reveal(self, t: Tensor, where: Tensor) -> None:
        """Draw the positions `where` from the posterior at time t."""
        if where.any():
            self.put(where, self.draw(self.posterior(self.tokens, t, where), where))


def euler(draft: Draft) -> Iterator[None]:
    """The paper's: from t to t - h every masked token is revealed with probability h / t; at the end the rest.

    Time starts at the masked share: at 1, or lower where some tokens are known.
    """
    c, start = draft.config, draft.share().tolist()
    times = torch.stack([torch.linspace(t, c.end, c.steps + 1, dtype=torch.float64) for t in start], 1)
    for t, later in pairwise(times):  # each (B,)
        masked, u = draft.masked, draft.uniform(draft.masked)[:, 0]
        rate = ((t - later) / t)[masked.nonzero(as_tuple=True)[0]]
        if draft.normalised:
            draft.reveal(t, _subset(masked, u < rate))
        elif masked.any():
            log_q = draft.posterior(draft.tokens, t, masked)
            chosen = u < rate * log_q.double().exp().sum(-1).cpu()
            where = _subset(masked, chosen)
            draft.put(where, draft.draw(log_q[chosen], where))
        yield
    draft.reveal(times[-1], draft.masked)


def fixed_count(draft: Draft) -> Iterator[None]:
    """The number of tokens that Euler reveals on average in a step, in random order."""
    total, steps = draft.masked.flatten(1).sum(1), draft.config.steps
    rank = torch.full(draft.masked.shape, math.inf)  # place of a position in the order of revealing
    orders = [torch.randperm(n, generator=g) for n, g in zip(total.tolist(), draft.generators)]
    rank[draft.masked] = torch.cat(orders).to(rank.dtype)
    for step in range(1, steps + 1):
        done = total - torch.floor(total * (1 - step / steps))
        draft.reveal(draft.share(), draft.masked & (rank < done[:, None, None]))
        yield


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
    that loses. A step reveals at least the share that is due for `steps` to suffice.
    """
    c, masked = draft.config, draft.masked.to(draft.tokens.device)
    bound = c.entropy * draft.lengths.to(masked.device)[:, None]
    for step in range(c.steps):
        log_q = draft.posterior(draft.tokens, draft.share(), None)
        nats = torch.special.entr(log_q.exp()).sum(-1)
        _, order, place = _ranked((-nats - c.level_delay * _levels(nats)).masked_fill(~masked, -math.inf))
        taken = nats.flatten(1).gather(1, order)
        allowed = (taken.cumsum(1) - taken.cummax(1).values <= bound).gather(1, place).view(masked.shape)
        due = (masked.flatten(1).sum(1) / (c.steps - step)).ceil()[:, None]
        reveal = masked & (allowed | (place < due).view(masked.shape))
        draft.tokens = torch.where(reveal, draft.candidates(log_q), draft.tokens)
        masked = masked & ~reveal
        draft.masked = masked.cpu()  # the number of steps depends on it
        yield
        if not draft.masked.any():
            return


METHODS: dict[str, Callable[[Draft], Iterator[None]]] = {  # each yields after a step
    "euler": euler,
    "fixed_count": fixed_count,
    "confidence": confidence,
    "ordered": ordered,
    "entropy": entropy,
}


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
) -> Tensor:
    """Tokens (B, K, max L) on `device`, for frame counts `lengths` (B,). Positions past a clip's end stay `mask_id`.

    Args:
        normalised: the posterior sums to one, so that which tokens to reveal can be drawn without it.
        generators: one a clip, on the CPU.
        known: (B, K, max L) tokens that are kept, `mask_id` where one is wanted.
        on_step: called with the number of steps that are done.
    """
    valid = (torch.arange(int(lengths.max())) < lengths[:, None])[:, None].expand(-1, levels, -1)
    x = torch.full(valid.shape, mask_id) if known is None else known.clone()
    draft = Draft(posterior, x.to(device), (x == mask_id) & valid, lengths, config, generators, normalised)
    for step, _ in enumerate(METHODS[config.method](draft), 1):
        on_step(step)
    return draft.tokens


def _surest_first(
    draft: Draft, left: Callable[[float], float], level_delay: float, annealed: bool = False
) -> Iterator[None]:
    """Reveal the candidates of highest noisy log probability; `left` is the masked share after a share of all steps."""
    c, device = draft.config, draft.tokens.device
    masked, total = draft.masked.to(device), draft.masked.flatten(1).sum(1)  # (B,)
    remaining = total
    for step in range(1, c.steps + 1):
        t = (remaining / draft.lengths / masked.shape[1]).clamp(min=c.end)
        log_q = draft.posterior(draft.tokens, t, None)
        candidates = draft.candidates(log_q)
        score = log_q.gather(-1, candidates[..., None])[..., 0].double() - level_delay * _levels(log_q[..., 0])
        gumbel = -torch.log(exponential_noise(draft.noise()))
        score = score + c.choice_noise * (t.double().to(device)[:, None, None] if annealed else 1) * gumbel
        after = torch.floor(total * (left(step / c.steps) if step < c.steps else 0.0))
        place = _ranked(score.masked_fill(~masked, -math.inf))[-1].view(masked.shape)
        reveal = masked & (place < (remaining - after).to(device)[:, None, None])
        draft.tokens = torch.where(reveal, candidates, draft.tokens)
        masked, remaining = masked & ~reveal, after
        yield


def _levels(like: Tensor) -> Tensor:
    """The level (K, 1) of each position of (B, K, L)."""
    return torch.arange(like.shape[1], device=like.device)[:, None]


def _ranked(score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, K, L) from high to low (B, K * L), which position each is from, and each position's place."""
    ranked, order = score.flatten(1).sort(dim=1, descending=True, stable=True)
    return ranked, order, order.argsort(1)


def _subset(where: Tensor, chosen: Tensor) -> Tensor:
    """The positions of `where` (B, K, L) whose rows (M,) are chosen."""
    out = where.clone()
    out[where] = chosen
    return out

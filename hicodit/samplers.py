"""Samplers for masked discrete diffusion. They take any posterior function and know no network.

Axes: B clips, K token levels, L token frames, N real tokens (mask id N), M requested positions.

A `Posterior` is `(tokens (B, K, L), t (B,), where (B, K, L) bool) -> log q (M, N)`, rows in the order of
`where.nonzero()`. Times and masks lie on the CPU, tokens and posteriors on the model's device. A method that knows
beforehand which positions it reveals requests those alone. Every clip draws from its own generator, so its result does
not depend on which other clips share its batch.

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

Posterior = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    method: a name of `METHODS`.
    steps: network calls (the paper uses 64); `euler` adds a last one that leaves no mask.
    temperature: of the token draw; 0 takes the most likely token.
    choice_noise: Gumbel noise on the confidences, annealed to 0 with t (`confidence` only).
    window: seconds of a clip that are drawn at once, as long as what the model was trained on; longer clips are done in
        windows that overlap by a second (see `hicodit.generation`).
    """

    method: str = "euler"
    steps: int = bounded(1, 1000, default=64)
    temperature: float = bounded(0.0, 100.0, default=1.0)
    choice_noise: float = bounded(0.0, 1000.0, default=4.5)
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
    total, c = draft.masked.flatten(1).sum(1), draft.config
    for step in range(1, c.steps + 1):
        masked, t = draft.masked, draft.share()
        left = torch.floor(total * (math.cos(math.pi / 2 * step / c.steps) if step < c.steps else 0.0))
        log_q = draft.posterior(draft.tokens, t, masked)
        candidate = draft.draw(log_q, masked)
        log_p = log_q.gather(-1, candidate[:, None])[:, 0].double().cpu()
        gumbel = -torch.log(exponential_noise(draft.uniform(masked)[:, 0]))
        at = t.double()[masked.nonzero(as_tuple=True)[0]]
        score = torch.full(masked.shape, -math.inf, dtype=torch.float64)
        score[masked] = log_p + c.choice_noise * at * gumbel
        place = score.flatten(1).argsort(1, descending=True).argsort(1).view(masked.shape)
        reveal = masked & (place < (masked.flatten(1).sum(1) - left)[:, None, None])
        draft.put(reveal, candidate[reveal[masked].to(candidate.device)])
        yield


METHODS: dict[str, Callable[[Draft], Iterator[None]]] = {  # each yields after a step
    "euler": euler,
    "fixed_count": fixed_count,
    "confidence": confidence,
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


def _subset(where: Tensor, chosen: Tensor) -> Tensor:
    """The positions of `where` (B, K, L) whose rows (M,) are chosen."""
    out = where.clone()
    out[where] = chosen
    return out

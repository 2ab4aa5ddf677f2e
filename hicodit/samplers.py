"""Samplers for masked discrete diffusion. They take any posterior function and know no network.

Axes: B batch, K token levels, L token frames, N real tokens (mask id N), M positions asked for.

A `Posterior` is `(tokens (B, K, L), t (B,), where (B, K, L) bool) -> log q (M, N)`, rows in the order of
`where.nonzero()`; it need only be computed at `where`, which is why a sampler that knows beforehand which positions it
will reveal asks for those alone. Every sample draws from its own generator, so a clip's result does not depend on
which other clips share its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.bounds import bounded, check_bounds
from engine.errors import UserError
from hicodit import diffusion as dd

Posterior = Callable[[Tensor, Tensor, Tensor], Tensor]
METHODS = ("euler", "fixed_count", "confidence")


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    method: `euler` (the paper: every masked token is revealed with probability h/t), `fixed_count` (the expected number
        of tokens a step, in random order), `confidence` (the surest candidates first, on a cosine schedule).
    steps: network calls (the paper uses 64); `euler` adds a last one that leaves no mask.
    temperature: of the token draw; 0 takes the most likely token.
    choice_noise: Gumbel noise on the confidences, annealed to 0 with t (`confidence` only).
    window: seconds of a clip that are drawn at once, as long as what the model was trained on; longer clips are done in
        windows that overlap by a second (see `hicodit.pipeline.generate`).
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
) -> Tensor:
    """Sample tokens (B, K, max L) for frame counts `lengths` (B,); positions past a sample's length stay `mask_id`.

    `normalised` says that the posterior sums to one, so that which tokens to reveal can be drawn without it.
    `generators`: one a sample, on the CPU. `known` (B, K, max L): tokens that are kept, `mask_id` where one is wanted.
    `on_step` is told how many steps are done.
    """
    device, batch = lengths.device, len(lengths)
    valid = (torch.arange(int(lengths.max()), device=device) < lengths[:, None])[:, None].expand(-1, levels, -1)
    x = torch.full(valid.shape, mask_id, device=device) if known is None else known.clone()

    def uniform(where: Tensor, columns: int = 1) -> Tensor:
        """Uniforms (M, columns) in float64 (float32 truncates the race's noise, arXiv 2409.02908)."""
        counts = where.flatten(1).sum(1).tolist()
        draws = [torch.rand(n, columns, generator=g, dtype=torch.float64) for n, g in zip(counts, generators)]
        return torch.cat(draws).to(device)

    def draw(log_q: Tensor, where: Tensor) -> Tensor:
        if config.temperature == 0:
            return log_q.argmax(-1)
        log_q = log_q.double() / config.temperature
        weights = (log_q - log_q.amax(-1, keepdim=True)).exp()
        return dd.sample_categorical(weights, uniform(where, weights.shape[-1]))

    if config.method == "euler":
        times = torch.linspace(1, config.end, config.steps + 1, dtype=torch.float64)
        for step in range(config.steps):
            t, h = float(times[step]), float(times[step] - times[step + 1])
            masked = (x == mask_id) & valid
            u = uniform(masked)[:, 0]
            if normalised:
                reveal = masked.clone()
                reveal[masked] = u < h / t
                if reveal.any():
                    x[reveal] = draw(posterior(x, torch.full((batch,), t, device=device), reveal), reveal)
            elif masked.any():
                log_q = posterior(x, torch.full((batch,), t, device=device), masked)
                chosen = u < h / t * log_q.double().exp().sum(-1)
                reveal = masked.clone()
                reveal[masked] = chosen
                x[reveal] = draw(log_q[chosen], reveal)
            on_step(step + 1)
        masked = (x == mask_id) & valid
        if masked.any():
            t = torch.full((batch,), config.end, device=device)
            x[masked] = draw(posterior(x, t, masked), masked)
        return x

    wanted = (x == mask_id) & valid
    total = wanted.flatten(1).sum(1)  # (B,) tokens to reveal
    rank = torch.full(valid.shape, math.inf, device=device)  # (B, K, L) place of a position in the order of revealing
    orders = [torch.randperm(n, generator=g) for n, g in zip(total.tolist(), generators)]
    rank[wanted] = torch.cat(orders).to(device, rank.dtype)
    for step in range(config.steps):
        fraction = (step + 1) / config.steps
        left = 1 - fraction if config.method == "fixed_count" else math.cos(math.pi / 2 * fraction)
        keep_masked = torch.floor(total * (left if step + 1 < config.steps else 0.0))  # (B,)
        masked = (x == mask_id) & valid
        t = (masked.flatten(1).sum(1) / lengths / levels).clamp(min=config.end)
        if config.method == "fixed_count":
            reveal = masked & (rank < (total - keep_masked)[:, None, None])
            if reveal.any():
                x[reveal] = draw(posterior(x, t, reveal), reveal)
        else:
            log_q = posterior(x, t, masked)
            candidate = draw(log_q, masked)
            confidence = log_q.gather(-1, candidate[:, None])[:, 0].double()
            noise = -torch.log(dd.exponential_noise(uniform(masked)[:, 0]))  # Gumbel
            at = t.double()[:, None, None].expand(masked.shape)[masked]
            score = torch.full(masked.shape, -math.inf, dtype=torch.float64, device=device)
            score[masked] = confidence + config.choice_noise * at * noise
            place = score.flatten(1).argsort(1, descending=True).argsort(1).view(masked.shape)
            reveal = masked & (place < (masked.flatten(1).sum(1) - keep_masked)[:, None, None])
            x[reveal] = candidate[reveal[masked]]
        on_step(step + 1)
    return x

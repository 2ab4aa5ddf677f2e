"""Tokens of clips of any length: model, guidance and sampler, window by window.

Axes: B clips, T video frames (25 a second), L = 2 T token frames, K token levels, M requested positions, N codes.

A clip longer than the sampler's window is done in several. A window starts from the last tokens of the one before it,
which the sampler keeps, so there is no seam to hide. The very last tokens of a window were drawn without a view of what
follows and are drawn again. Starts are whole seconds, so that expression windows stay aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.errors import UserError
from hicodit.conditions.types import FPS, Conditions, windows_of
from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.guidance import GuidanceScales, combine
from hicodit.model import TOKENS_PER_FRAME, HiCoDiT
from hicodit.samplers import Posterior, SamplerConfig, sample

OVERLAP, REDO = 25, 5  # video frames that two windows share, and those of them that are drawn again


def guided_posterior(model: HiCoDiT, conditions: Conditions, scales: GuidanceScales) -> Posterior:
    """The posterior that a sampler asks for: all guidance branches in one forward, or one branch while it is early."""
    noise, unguided = LogLinearNoise(), GuidanceScales()
    prepared = model.prepare(conditions, scales.branches)
    early = model.prepare(conditions, unguided.branches) if scales.late < 1 else None

    def posterior(tokens: Tensor, t: Tensor, where: Tensor | None) -> Tensor:
        sigma, late = noise.sigma(t.float()).to(tokens.device), t <= scales.late
        if not late.any():
            return combine(model(tokens, sigma, early, where), unguided)

        def by_row(values: Tensor) -> Tensor:  # (B,) for each row, or to broadcast against (B, K, L, N)
            return values[where.nonzero(as_tuple=True)[0], None] if where is not None else values[:, None, None, None]

        log_p = model(tokens, sigma, prepared, where)
        guided = combine(log_p, scales, by_row(-log_expm1(sigma)))
        if late.all():
            return guided
        alone = combine(log_p[scales.branches.index("all")][None], unguided)
        return torch.where(by_row(late).to(guided.device), guided, alone)

    return posterior


@torch.inference_mode()
def generate(
    model: HiCoDiT,
    conditions: Conditions,
    sampler: SamplerConfig,
    scales: GuidanceScales,
    seeds: Sequence[int],
    posterior_of: Callable[[HiCoDiT, Conditions, GuidanceScales], Posterior] = guided_posterior,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """Tokens (K, L) of each clip, on the CPU. A clip's draws depend on its seed alone.

    What shares a clip's batch changes only rounding.

    Raises:
        UserError: guidance reading A or B with a sampler that plans its own reveal schedule.
    """
    if scales.reading in "AB" and sampler.method != "euler":
        raise UserError(
            f"guidance.reading={scales.reading} changes the reveal schedule: use sampler.method=euler, or C, D"
        )
    levels, mask_id = model.config.levels, model.mask_id
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    frames = conditions.frames.tolist()
    done = [torch.full((levels, TOKENS_PER_FRAME * n), mask_id) for n in frames]
    windows_by_clip = [windows(n, sampler) for n in frames]
    for turn in range(max(map(len, windows_by_clip))):
        clips = [b for b, own in enumerate(windows_by_clip) if turn < len(own)]
        spans = [windows_by_clip[b][turn] for b in clips]
        part = window(conditions, clips, spans)
        known = pad_sequence(
            [done[b][:, TOKENS_PER_FRAME * s : TOKENS_PER_FRAME * e].T for b, (s, e) in zip(clips, spans)],
            batch_first=True,
            padding_value=mask_id,
        ).transpose(1, 2)
        tokens = sample(
            posterior_of(model, part, scales),
            TOKENS_PER_FRAME * torch.tensor([end - start for start, end in spans]),
            levels,
            mask_id,
            sampler,
            [generators[b] for b in clips],
            normalised=scales.reading in "CD",
            known=known,
            on_step=on_step,
            device=part.lip.device,
        ).cpu()
        for row, b, (start, end) in zip(tokens, clips, spans):
            done[b][:, TOKENS_PER_FRAME * start : TOKENS_PER_FRAME * end] = row[:, : TOKENS_PER_FRAME * (end - start)]
            if end < frames[b]:
                done[b][:, TOKENS_PER_FRAME * (end - REDO) :] = mask_id
    return done


def windows(frames: int, sampler: SamplerConfig) -> list[tuple[int, int]]:
    """The overlapping windows [start, end), in video frames, that a clip of so many frames is done in."""
    most = int(FPS) * sampler.window
    starts = range(0, max(1, frames - OVERLAP), most - OVERLAP)
    return [(start, min(start + most, frames)) for start in starts]


def window(conditions: Conditions, clips: list[int], spans: list[tuple[int, int]]) -> Conditions:
    """The conditions of video frames [start, end) of some clips; `start` is a whole second."""
    lip = pad_sequence([conditions.lip[b, s:e] for b, (s, e) in zip(clips, spans)], batch_first=True)
    expression = [conditions.expression[b, windows_of(s) : windows_of(e)] for b, (s, e) in zip(clips, spans)]
    frames = torch.tensor([e - s for s, e in spans], device=lip.device)
    return Conditions(lip, conditions.identity[clips], pad_sequence(expression, batch_first=True), frames)

"""Tokens of clips of any length: model, guidance and sampler, window by window.

Axes: B clips, T video frames (25 a second), L = 2 T token frames, K token levels, M requested frames of a level, N
codes, R rows of the network (guidance branches times B), S steps.

A clip longer than the sampler's window is done in several. A window starts from the last tokens of the one before it,
which the sampler keeps, so there is no seam to hide. The very last tokens of a window were drawn without a view of what
follows and are drawn again. Starts are whole seconds, so that expression windows stay aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.errors import UserError
from engine.precision import half_precision
from hicodit.conditions.types import FPS, Conditions, windows_of
from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.guidance import combine
from hicodit.model import TOKENS_PER_FRAME, HiCoDiT, Modulation
from hicodit.samplers import Posterior, sample
from hicodit.settings import UNGUIDED, GuidanceScales, SamplerConfig

OVERLAP, REDO = 25, 5  # video frames that two windows share, and those of them that are drawn again
MODULATION_VALUES = 2**24  # at most so many are computed beforehand: 64 MiB in float32


@dataclass(frozen=True)
class Moment:
    """A time of a sampler, as the posterior needs it.

    modulation: of the rows that the network computes. log_odds: (B, 1, 1, 1) of a token being unmasked.
    guided: where guidance acts: (B, 1, 1, 1), or the same for all clips.
    """

    modulation: list[Modulation]
    log_odds: Tensor
    guided: Tensor | bool


class GuidedPosterior:
    """The posterior that a sampler asks for: all guidance branches in one forward, or one branch while it is early.

    A model that takes guidance as its input has one branch at all times.

    Raises:
        UserError: such a model did not learn these scales.
    """

    def __init__(self, model: HiCoDiT, conditions: Conditions, scales: GuidanceScales) -> None:
        given = None
        if model.config.guidance_limit is not None:
            scales.check_input(model.config.guidance_limit)
            given, scales = conditions.identity.new_tensor([scales.values]), UNGUIDED
        self.model, self.scales, self.noise = model, scales, LogLinearNoise()
        with half_precision(conditions.lip.device, model.dtype):
            self.prepared = model.prepare(conditions, scales.branches, scales=given)
            self.early = model.prepare(conditions, UNGUIDED.branches) if scales.late < 1 else None

    @torch.inference_mode()
    def moments(self, times: Tensor) -> Iterator[Moment]:
        """For each of the times (S, B) on the CPU: all that depends on the time alone, for many steps at once."""
        device = self.prepared.lip.device
        late = times <= self.scales.late  # decided by the host, before the first step
        sigma = self.noise.sigma(times.float()).to(device)
        log_odds = -log_expm1(sigma)[..., None, None, None]
        at_once = max(1, MODULATION_VALUES // self._values())
        for first in range(0, len(times), at_once):
            part = slice(first, first + at_once)
            modulation = {False: None, True: None}
            for any_late in set(late[part].any(1).tolist()):
                modulation[any_late] = self._modulate(sigma[part], any_late)
            for i in range(first, min(first + at_once, len(times))):
                acts = bool(late[i].any())
                guided = acts if acts == bool(late[i].all()) else late[i, :, None, None, None].to(device)
                yield Moment([m.at(i - first) for m in modulation[acts]], log_odds[i], guided)

    def __call__(self, tokens: Tensor, moment: Moment | Tensor, where: Tensor | None) -> Tensor:
        """log q (B, K, M, N), see `samplers.Posterior`; a moment that is a time (B,) may lie on any device."""
        if isinstance(moment, Tensor):
            moment = self._moment(moment)
        alone = moment.guided is False
        with half_precision(tokens.device, self.model.dtype):
            log_p = self.model(tokens, moment.modulation, self.early if alone else self.prepared, where)
        if alone:
            return combine(log_p, UNGUIDED)
        guided = combine(log_p, self.scales, moment.log_odds)
        if moment.guided is True:
            return guided
        unguided = combine(log_p[self.scales.branches.index("all")][None], UNGUIDED)
        return torch.where(moment.guided, guided, unguided)

    def _moment(self, t: Tensor) -> Moment:
        """That of a time that is known to the device alone."""
        sigma = self.noise.sigma(t.float())
        guided = True if self.scales.late >= 1 else (t <= self.scales.late)[:, None, None, None]
        modulation = [m.at(0) for m in self._modulate(sigma[None], True)]
        return Moment(modulation, -log_expm1(sigma)[:, None, None, None], guided)

    def _modulate(self, sigma: Tensor, guided: bool) -> list[Modulation]:
        return self.model.modulate(sigma, self.prepared if guided else self.early)

    def _values(self) -> int:
        """Numbers in the modulation of one time."""
        blocks = [6 * len(stage.blocks) + 2 for stage in self.model.stages]
        return self.model.config.width * sum(n * len(c) for n, c in zip(blocks, self.prepared.conds))


@torch.inference_mode()
def generate(
    model: HiCoDiT,
    conditions: Conditions,
    sampler: SamplerConfig,
    scales: GuidanceScales,
    seeds: Sequence[int],
    posterior_of: Callable[[HiCoDiT, Conditions, GuidanceScales], Posterior] = GuidedPosterior,
    on_step: Callable[[int], None] = lambda step: None,
    compiled: Callable[[Callable], Callable] = lambda step: step,
) -> list[Tensor]:
    """Tokens (K, L) of each clip, on the CPU. A clip's draws depend on its seed alone.

    What shares a clip's batch changes only rounding. The draws of a CPU are others than those of an accelerator.

    Raises:
        UserError: guidance reading A or B with a sampler that plans its own reveal schedule.
    """
    if scales.reading in "AB" and sampler.method != "euler":
        raise UserError(
            f"guidance.reading={scales.reading} changes the reveal schedule: use sampler.method=euler, or C, D"
        )
    levels, mask_id, device = model.config.levels, model.mask_id, conditions.lip.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
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
            device=device,
            compiled=compiled,
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

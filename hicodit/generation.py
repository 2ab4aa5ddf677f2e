"""Tokens of clips of any length: model, guidance and sampler, window by window.

Axes: B clips, T video frames (25 a second), L = 2 T token frames, K token levels, M requested frames of a level, N
codes.

A clip longer than the sampler's window is done in several. A window starts from the last tokens of the one before it,
which the sampler keeps, so there is no seam to hide. The very last tokens of a window were drawn without a view of what
follows and are drawn again. Starts are whole seconds, so that expression windows stay aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.cuda_graph import GraphedSteps
from engine.device import to_device
from engine.errors import UserError
from engine.precision import half_precision
from hicodit.conditions.types import FPS, Conditions, windows_of
from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.guidance import combine
from hicodit.model import TOKENS_PER_FRAME, Conditioning, HiCoDiT
from hicodit.samplers import Posterior, sample
from hicodit.settings import GuidanceScales, SamplerConfig

OVERLAP, REDO = 25, 5  # video frames that two windows share, and those of them that are drawn again


@dataclass(frozen=True)
class GuidedPosterior:
    """The posterior that a sampler asks for: all guidance branches in one forward.

    Attributes:
        conditioning: tensors of the clips; a graph of a step copies them, so that it serves other clips, too.
    """

    model: HiCoDiT
    conditioning: Conditioning
    scales: GuidanceScales

    def __call__(self, tokens: Tensor, t: Tensor, where: Tensor | None) -> Tensor:
        """Compute log q (B, K, M, N) or (B, K, L, N), see `samplers.Posterior`."""
        sigma = LogLinearNoise().sigma(t.float())
        positions = None
        if where is not None:
            clip = torch.arange(len(tokens), device=tokens.device)[:, None]
            positions = [(clip, frame) for frame in where.unbind(1)]
        with half_precision(tokens.device, self.model.dtype):
            log_p = self.model(tokens, sigma, self.conditioning, positions)  # of each branch
        if where is not None:
            batch, levels, frames = where.shape
            log_p = log_p.unflatten(1, (levels, batch, frames)).transpose(1, 2)
        return combine(log_p, self.scales, -log_expm1(sigma)[:, None, None, None])


def guided_posterior(model: HiCoDiT, conditions: Conditions, scales: GuidanceScales) -> GuidedPosterior:
    """Prepare the guided posterior of a batch of clips: all that does not depend on diffusion time."""
    with half_precision(conditions.lip.device, model.dtype):
        conditioning = model.prepare(conditions, scales.branches)
    return GuidedPosterior(model, conditioning, scales)


@torch.inference_mode()
def generate(
    model: HiCoDiT,
    conditions: Conditions,
    sampler: SamplerConfig,
    scales: GuidanceScales,
    seeds: Sequence[int],
    posterior_of: Callable[[HiCoDiT, Conditions, GuidanceScales], Posterior] = guided_posterior,
    on_step: Callable[[], object] = lambda: None,
    graphs: GraphedSteps | None = None,
    evaluations: list[int] | None = None,
) -> list[Tensor]:
    """Sample the tokens (K, L) of each clip; return them on the CPU. A clip's draws depend on its seed alone.

    The other clips of the batch change only rounding. The draws of a CPU differ from those of an accelerator.

    Args:
        model: the score network.
        conditions: of B clips.
        sampler: settings of the sampler.
        scales: guidance scales; their branches are evaluated together.
        seeds: one per clip.
        posterior_of: prepares the posterior of the clips of a window.
        on_step: called after each step of the sampler.
        graphs: runs the steps; by default they are called directly.
        evaluations: (B,) counters, to which the evaluations of the network are added for each clip: one per guidance
            branch and step, in each window. They are counted per step, as a replayed CUDA graph runs no Python.
    """
    if scales.guidance_form == "literal" and sampler.method != "euler":
        raise UserError(
            "guidance.guidance_form=literal changes the unmasking schedule: use sampler.method=euler, or "
            "guidance.guidance_form=normalised"
        )
    levels = model.config.levels
    mask_id = model.mask_id
    device = conditions.lip.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    frames = conditions.frames.tolist()
    tokens = [torch.full((levels, TOKENS_PER_FRAME * n), mask_id) for n in frames]
    windows_by_clip = [windows(n, sampler) for n in frames]
    for turn in range(max(map(len, windows_by_clip))):
        clips = [b for b, spans in enumerate(windows_by_clip) if turn < len(spans)]
        spans = [windows_by_clip[b][turn] for b in clips]
        lips = []
        classes = []
        prompts = []
        for b, (start, end) in zip(clips, spans):  # a start is a whole second, so that its window is exact
            lips.append(conditions.lip[b, start:end])
            classes.append(conditions.expression[b, windows_of(start) : windows_of(end)])
            prompts.append(tokens[b][:, TOKENS_PER_FRAME * start : TOKENS_PER_FRAME * end].T)

        def count(clips: Sequence[int] = clips) -> None:
            on_step()
            for b in clips if evaluations is not None else ():
                evaluations[b] += len(scales.branches)

        part = Conditions(
            pad_sequence(lips, batch_first=True),
            conditions.identity[to_device(torch.tensor(clips), device)],
            pad_sequence(classes, batch_first=True),
            torch.tensor([end - start for start, end in spans]),
        )
        samples = sample(
            posterior_of(model, part, scales),
            pad_sequence(prompts, batch_first=True, padding_value=mask_id).transpose(1, 2),
            TOKENS_PER_FRAME * part.frames,
            mask_id,
            sampler,
            [generators[b] for b in clips],
            normalised=scales.guidance_form == "normalised",
            on_step=count,
            device=device,
            graphs=graphs,
        ).cpu()
        for row, b, (start, end) in zip(samples, clips, spans):
            tokens[b][:, TOKENS_PER_FRAME * start : TOKENS_PER_FRAME * end] = row[:, : TOKENS_PER_FRAME * (end - start)]
            if end < frames[b]:
                tokens[b][:, TOKENS_PER_FRAME * (end - REDO) :] = mask_id
    return tokens


def windows(frames: int, sampler: SamplerConfig) -> list[tuple[int, int]]:
    """Return the overlapping windows [start, end), in video frames, of a clip of so many frames."""
    most = int(FPS) * sampler.window
    starts = range(0, max(1, frames - OVERLAP), most - OVERLAP)
    return [(start, min(start + most, frames)) for start in starts]

"""Token sampling for clips of any length: model, guidance and sampler, window by window.

A clip longer than the sampler's window is sampled in several windows. Each starts from the last tokens of the previous
one, which the sampler keeps, so that no seam is audible. The last tokens of a window were sampled without the frames
that follow, and are resampled. Windows start at whole seconds, so that expression windows stay aligned.

Axes: B clips, T video frames (25 per second), L = 2 T token frames, K token levels, M requested frames of a level,
N codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.cuda_graph import GraphedSteps
from engine.device import to_device
from hicodit.conditions.types import FPS, Conditions, num_expression_windows
from hicodit.guidance import guided_posterior
from hicodit.model import TOKENS_PER_FRAME, HiCoDiT
from hicodit.samplers import SAMPLERS, SamplerInput
from hicodit.settings import GuidanceScales, SamplerConfig, require_compatible

OVERLAP_FRAMES = 25  # video frames that two consecutive windows share
RESAMPLED_FRAMES = 5  # last frames of a window, whose tokens the next window samples again


@torch.inference_mode()
def generate(
    model: HiCoDiT,
    conditions: Conditions,
    sampler: SamplerConfig,
    scales: GuidanceScales,
    seeds: Sequence[int],
    on_step: Callable[[Sequence[int]], object] = lambda clips: None,
    graphs: GraphedSteps | None = None,
) -> list[Tensor]:
    """Sample the tokens of clips, window by window.

    The random numbers of a clip depend only on its seed, so that the rest of the batch only affects rounding. They
    differ between CPU and accelerators.

    Args:
        model: the score network.
        conditions: conditions of B clips.
        sampler: settings of the sampler.
        scales: guidance scales, whose branches are evaluated as one batch.
        seeds: one per clip.
        on_step: called after each step of the sampler with the indices of the clips that took part in it. Each of them
            cost one network evaluation per guidance branch.
        graphs: runs the steps; by default they are called directly. If it captures CUDA graphs, batches are padded by
            `pad_for_graphs`, which only affects rounding.

    Returns:
        The tokens (K, L) of each clip, on the CPU.

    Raises:
        UserError: See `require_compatible`.
    """
    require_compatible(sampler, scales)
    mask_id = model.mask_id
    device = conditions.lip.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    frames = conditions.frames.tolist()
    tokens = [torch.full((model.config.levels, TOKENS_PER_FRAME * n), mask_id) for n in frames]
    windows_by_clip = [sampling_windows(n, sampler) for n in frames]
    for number in range(max(map(len, windows_by_clip))):
        clips = [b for b, spans in enumerate(windows_by_clip) if number < len(spans)]
        spans = [windows_by_clip[b][number] for b in clips]
        token_spans = [slice(TOKENS_PER_FRAME * start, TOKENS_PER_FRAME * end) for start, end in spans]
        window = window_conditions(conditions, clips, spans)
        prompts = [tokens[b][:, span].T for b, span in zip(clips, token_spans)]
        prompts = pad_sequence(prompts, batch_first=True, padding_value=mask_id).transpose(1, 2)
        window_generators = [generators[b] for b in clips]
        on_window_step = partial(on_step, clips)
        inputs = sampler_input(model, window, prompts, sampler, scales, window_generators, on_window_step, graphs)
        samples = SAMPLERS[sampler.method](inputs).cpu()
        for row, b, (_, end), span in zip(samples, clips, spans, token_spans):
            tokens[b][:, span] = row[:, : span.stop - span.start]
            if end < frames[b]:
                tokens[b][:, TOKENS_PER_FRAME * (end - RESAMPLED_FRAMES) :] = mask_id
    return tokens


def sampler_input(
    model: HiCoDiT,
    conditions: Conditions,
    prompts: Tensor,
    sampler: SamplerConfig,
    scales: GuidanceScales,
    generators: Sequence[torch.Generator],
    on_step: Callable[[], object] = lambda: None,
    graphs: GraphedSteps | None = None,
) -> SamplerInput:
    """Return the input of a sampler for one window of B clips, padded by `pad_for_graphs` for CUDA graphs.

    Args:
        conditions: conditions of the window.
        prompts: (B, K, L) tokens on the CPU, with masks where they are to be sampled.
        generators: one per clip, on the model's device.
        on_step: called after each step.
    """
    device = conditions.lip.device
    generators = list(generators)
    if graphs is not None and graphs.backend is not None:
        conditions = pad_for_graphs(conditions)
        prompts = pad_prompts(prompts, conditions, model.mask_id)
        added = len(prompts) - len(generators)
        generators += [torch.Generator(device).manual_seed(0) for _ in range(added)]
    return SamplerInput(
        guided_posterior(model, conditions, scales),
        prompts,
        TOKENS_PER_FRAME * conditions.frames,
        model.mask_id,
        sampler,
        generators,
        normalised=scales.guidance_form == "normalised",
        device=device,
        graphs=graphs,
        on_step=on_step,
    )


def window_conditions(conditions: Conditions, clips: Sequence[int], spans: Sequence[tuple[int, int]]) -> Conditions:
    """Return the conditions of one window of each of the selected clips, padded to the longest one.

    Args:
        conditions: conditions of B clips.
        clips: indices of the clips with this window.
        spans: [start, end) of their windows in video frames. Starts are whole seconds, to align with expression
            windows.
    """
    lips = [conditions.lip[b, start:end] for b, (start, end) in zip(clips, spans)]
    classes = [
        conditions.expression[b, num_expression_windows(start) : num_expression_windows(end)]
        for b, (start, end) in zip(clips, spans)
    ]
    chosen = to_device(torch.tensor(clips), conditions.lip.device)
    return Conditions(
        pad_sequence(lips, batch_first=True),
        conditions.identity[chosen],
        pad_sequence(classes, batch_first=True),
        torch.tensor([end - start for start, end in spans]),
    )


def pad_for_graphs(conditions: Conditions) -> Conditions:
    """Pad a batch to whole seconds and to a power of two of clips, so that few CUDA graphs cover all batches.

    Added clips repeat the last one. `frames` of the other clips is unchanged.
    """
    batch, length = conditions.lip.shape[:2]
    longer = -length % int(FPS)
    clips = [min(i, batch - 1) for i in range(1 << (batch - 1).bit_length())]
    chosen = to_device(torch.tensor(clips), conditions.lip.device)
    more_windows = num_expression_windows(length + longer) - conditions.expression.shape[1]
    return Conditions(
        F.pad(conditions.lip, (0, 0, 0, longer))[chosen],
        conditions.identity[chosen],
        F.pad(conditions.expression, (0, more_windows))[chosen],
        conditions.frames[clips],
    )


def pad_prompts(prompts: Tensor, padded: Conditions, mask_id: int) -> Tensor:
    """Pad tokens (B, K, L), on the CPU, to the number of clips and length of `pad_for_graphs`."""
    longer = TOKENS_PER_FRAME * padded.lip.shape[1] - prompts.shape[2]
    more_clips = len(padded.frames) - len(prompts)
    prompts = torch.cat([prompts, prompts[-1:].expand(more_clips, -1, -1)])
    return F.pad(prompts, (0, longer), value=mask_id)


@torch.inference_mode()
def capture_graphs(
    model: HiCoDiT, sampler: SamplerConfig, scales: GuidanceScales, graphs: GraphedSteps, batch_size: int
) -> None:
    """Capture the sampler's CUDA graphs for all batches up to `batch_size`, so that no later clip waits for a capture.

    There is a graph for each number of whole seconds, up to the sampler's window, each power of two of clips, and with
    and without padding. Euler's planned steps also differ in the number of revealed tokens; further graphs are captured
    when needed.
    """
    if graphs.backend is None:
        return
    device = next(model.parameters()).device
    max_batch = 1 << (batch_size - 1).bit_length()
    for batch in reversed([1 << power for power in range(max_batch.bit_length())]):  # single clips are kept longest
        for seconds in range(1, sampler.window + 1):
            length = int(FPS) * seconds
            for frames in (length, length - 1):
                conditions = Conditions(
                    torch.zeros(batch, frames, model.config.lip_dim, device=device),
                    torch.zeros(batch, model.config.identity_dim, device=device),
                    torch.zeros(batch, num_expression_windows(frames), dtype=torch.long, device=device),
                    torch.full((batch,), frames),
                )
                generate(model, conditions, sampler, scales, range(batch), graphs=graphs)


def sampling_windows(frames: int, sampler: SamplerConfig) -> list[tuple[int, int]]:
    """Return the overlapping sampling windows [start, end) of a clip with `frames` video frames, in video frames."""
    length = int(FPS) * sampler.window
    starts = range(0, max(1, frames - OVERLAP_FRAMES), length - OVERLAP_FRAMES)
    return [(start, min(start + length, frames)) for start in starts]

"""Inputs of a request that are known before generation: prompt, given streams, limits and noise.

Axes: T prompt tokens, S steps, n tokens of a patch, N patches, P frames of a patch, F frames, C channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import to_device
from engine.errors import UserError
from engine.seeding import generator_for
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import ORDERS, Mode, Request, Stream, tokens_per_patch


def known_tokens(model: TalkerT2AV, request: Request, mode: Mode, steps: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that are known before generation: text, prefix, given streams, and placeholders of absent
    motion.

    Returns:
        The tokens (T, D) of task, text and prefix; and the known part (S, n, D) of the tokens after it.
    """
    c = model.config
    in_turn = tokens_per_patch(c.order, mode.motion != "absent") > 1
    if in_turn and not (request.task_first and request.prefix_has_motion):
        raise UserError(f"this model has order={c.order}, which the official routines do not support")
    slots = torch.arange(request.prefix + steps, device=model.device)
    prefix = slots < request.prefix
    speech = patch_tokens(model.speech_tokens, request.speech, slots, c.patch_size)
    speech = speech * (prefix | (mode.speech == "given"))[:, None]
    if mode.motion == "absent":
        motion = model.motion_pad_emb[0]
    else:
        waiting = slots < request.prefix + c.delay  # for the first generated motion patch
        filled = torch.full_like(prefix, mode.motion == "given") | (waiting & (not request.rules.motion_waits))
        filled = torch.where(prefix, request.prefix_has_motion, filled)
        motion = patch_tokens(model.motion_tokens, request.motion, slots - c.delay, c.patch_size) * filled[:, None]
    streams = {"speech": speech, "motion": motion}
    tokens = torch.stack([streams[s] for s in ORDERS[c.order]] if in_turn else [speech + motion], 1)  # (slots, n, D)
    text = model.embed_text(to_device(torch.tensor([request.prompt], dtype=torch.long), model.device))[0]
    start, later = tokens.split([request.prefix, steps])
    start = start.flatten(0, 1)
    embedding = model.task_embedding.weight[mode.task : mode.task + 1]
    if request.task_first:
        text = torch.cat([embedding, text])
    elif len(start):
        start = torch.cat([start[:1] + embedding, start[1:]])
    return torch.cat([text, start]), later


def step_limit(model: TalkerT2AV, request: Request, mode: Mode) -> int:
    """Return the maximum number of decoding steps of a request after its prefix, including the `delay` patches by which
    motion lags behind speech.
    """
    size = model.config.patch_size
    delay = model.config.delay
    if mode.speech == "given":
        return -(-len(request.speech) // size) + delay - request.prefix
    if mode.motion == "given":
        return -(-len(request.motion) // size) - request.prefix
    return request.max_patches + (delay if mode.motion == "generated" else 0)


def seeded_noise(request: Request, stream: Stream, shape: tuple[int, int], patches: int) -> Tensor:
    """Return the noise of N = `patches` patches of a stream, (N, *shape). The noise of a patch depends on the seed of
    the row, the stream and the patch index.
    """
    return torch.stack([torch.randn(shape, generator=generator_for(request.seed, stream, n)) for n in range(patches)])


def patch_tokens(encode: Callable[[Tensor, Tensor], Tensor], frames: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Return the tokens (N, D) of patches (N,) of given frames (F, C). Patches without frames have the token of zero
    frames.

    The token of zero frames is not zero; it also occurs in training, before and after a stream.
    """
    count = -(-len(frames) // size)
    padded = F.pad(frames, (0, 0, 0, (count + 1) * size - len(frames)))  # the last patch is empty
    valid = torch.arange(len(padded), device=frames.device) < len(frames)
    tokens = encode(padded.unflatten(0, (-1, size)), valid.unflatten(0, (-1, size)))
    return tokens[torch.where((numbers < 0) | (numbers >= count), count, numbers)]

"""The two orders of tokens in which the streams take turns: the ablation of Table 4 (arXiv 2604.23586).

With `order=add`, the paper's own, a patch of 160 ms is one token, the sum of both streams'. With `av` each patch is two
tokens, speech then motion; with `va` motion then speech. Each patch is predicted from the token before it, so that the
second stream is drawn with the first one's patch of the same time known. A row of speech alone has one token a patch.

Axes: B batch, T tokens, M patches, S steps of generation, P frames of a patch, N patches of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from engine.errors import UserError
from engine.nn.transfer import send
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import ORDERS, T2AV, Mode, Request
from talker_t2av.stop_predictor import IGNORED, stop_labels
from talker_t2av.streams import EncodedStream, PatchStream


def place_of(order: str, stream: Literal["speech", "motion"]) -> int:
    """Which token of its patch a stream is."""
    return ORDERS[order].index(stream)


def known_pairs(
    model: TalkerT2AV, encoded: Mapping[str, EncodedStream], requests: Sequence[Request], mode: Mode, steps: int
) -> tuple[list[Tensor], Tensor]:
    """What is known before a generation loop: text, prefix and given streams.

    Returns:
        For each row, the tokens (T, D) of task, text and prefix; and the known tokens (S, B, 2, D) after it, zero where
        a stream is drawn.

    Raises:
        UserError: a request is that of an official routine, which knows no such order.
    """
    before, after = [], []
    for row, request in enumerate(requests):
        if not (request.task_first and request.prefix_has_motion):
            raise UserError(f"this model has order={model.config.order}, which the official routines do not know")
        slots, parts = torch.arange(request.prefix + steps, device=model.device), []
        for stream in ORDERS[model.config.order]:
            given = (slots < request.prefix) | (getattr(mode, stream) == "given")
            parts.append(encoded[stream].patches(row, slots) * given[:, None])
        start, later = torch.stack(parts, 1).split([request.prefix, steps])
        text = model.embed_text(torch.tensor([request.prompt], dtype=torch.long, device=model.device))[0]
        before.append(torch.cat([model.task_embedding.weight[T2AV][None], text, start.flatten(0, 1)]))
        after.append(later)
    return before, torch.stack(after, 1)


def fill_slots(
    model: TalkerT2AV,
    embeds: Tensor,
    start: Tensor,
    filled: Tensor,
    speech: PatchStream,
    motion: PatchStream,
    with_motion: Tensor,
) -> Tensor:
    """Put the tokens of the first `filled` (B,) patches into each row's slots of embeds (B, T, D)."""
    order, step = model.config.order, 1 + with_motion.long()
    place = torch.arange(int(filled.max()), device=start.device)
    row, patch = (place < filled[:, None]).nonzero(as_tuple=True)
    moving = with_motion[row]
    padding = send(~moving[:, None], embeds.device)
    tokens = model.speech_tokens(*speech.gather(row, patch)) + model.motion_pad_emb[0] * padding
    at = send(torch.stack([row, start[row] + step[row] * patch + moving * place_of(order, "speech")]), embeds.device)
    embeds = embeds.index_put((at[0], at[1]), tokens.to(embeds.dtype))
    row, patch = row[moving], patch[moving]
    moves = model.motion_tokens(*motion.gather(row, patch))
    at = send(torch.stack([row, start[row] + 2 * patch + place_of(order, "motion")]), embeds.device)
    return embeds.index_put((at[0], at[1]), moves.to(embeds.dtype))


def interleaved_labels(
    start: Tensor, length: Tensor, step: Tensor, tokens: int, patch_size: int, fps: float
) -> tuple[Tensor, Tensor]:
    """As `stop_predictor.stop_labels`, for spans (B,) whose patches have `step` (B,) tokens each.

    The end of an utterance is asked for after the last token of a patch: the tokens before it have no label.
    """
    patches = length.clamp(min=0) // step
    most = int(patches.max())
    by_patch, weight = stop_labels(torch.zeros_like(start), patches, most, patch_size, fps)
    labels = torch.full((len(start), tokens), IGNORED, device=start.device)
    at = start[:, None] + step[:, None] * (torch.arange(most, device=start.device) + 1) - 1
    inside = (torch.arange(most, device=start.device) < patches[:, None]) & (at >= 0) & (at < tokens)
    row, patch = inside.nonzero(as_tuple=True)
    labels[row, at[row, patch]] = by_patch[row, patch]
    return labels, weight

"""The two orders of tokens in which the streams take turns: the ablation of Table 4 (arXiv 2604.23586).

With `order=add`, the paper's own, a patch of 160 ms is one token, the sum of both streams'. With `av` each patch is two
tokens, speech then motion; with `va` motion then speech. Each patch is predicted from the token before it, so that the
second stream is drawn with the first one's patch of the same time known. A row of speech alone has one token a patch.

Axes: B batch, T tokens, P frames of a patch, N patches of all rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.device import send
from talker_t2av.model import TalkerT2AV
from talker_t2av.patches import PatchStream
from talker_t2av.request import ORDERS, Stream
from talker_t2av.stop_predictor import IGNORED, stop_labels


def place_of(order: str, stream: Stream) -> int:
    """Which token of its patch a stream is."""
    return ORDERS[order].index(stream)


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

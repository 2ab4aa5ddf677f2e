"""The forward pass in training: tokens, hidden states, flow-matching examples and losses of a batch, without loops over
rows.

Axes: B batch, T0 text and placeholder tokens (T = T0 + 1 with the task token), F frames (Fm of motion), M patches,
P frames of a patch, p context patches, N examples, C channels (Ds of speech, Dm of motion), G speaker embedding,
D width.

An example is a pair (row, patch). Pairs are ordered by row, so that random numbers are drawn in the order of the
official program. Without examples, the loss is 0 but still depends on every parameter, as required by distributed
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import to_device
from talker_t2av.flow_matching import FlowDraws
from talker_t2av.model import FPS, STOP_WEIGHT, TalkerConfig, TalkerT2AV
from talker_t2av.request import ORDERS, T2AV, TTS

IGNORED = -100
LONGEST_SPAN = 187  # patches; longer clips were truncated at 30 s, so that their end is unknown


@dataclass(frozen=True)
class PatchStream:
    """One stream in patches: latents (B, M, P, C), zero from `frames` (B,) on; patches (B,) is the number of non-empty
    patches.

    Frames and patches may be on the host if the indices of `gather` are.
    """

    latents: Tensor
    frames: Tensor
    patches: Tensor

    @classmethod
    def of(cls, latents: Tensor, frames: Tensor, size: int) -> PatchStream:
        """Divide latents (B, F, C) with `frames` (B,) valid frames into patches of `size` frames, zero-padded."""
        length = latents.shape[1]
        frames = frames.clamp(max=length)
        real = to_device(torch.arange(length, device=frames.device) < frames[:, None], latents.device)
        latents = F.pad(latents * real[..., None], (0, 0, 0, -length % size))
        return cls(latents.unflatten(1, (-1, size)), frames, (frames + size - 1) // size)

    def gather(self, row: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
        """Return patches (N, P, C) and the mask of their valid frames (N, P). Patches outside of the stream
        have none.
        """
        count, size = self.latents.shape[1:3]
        if count == 0:
            empty = self.latents.new_zeros(len(row), size, self.latents.shape[-1])
            return empty, torch.zeros_like(empty[..., 0], dtype=torch.bool)
        frame = patch[:, None] * size + torch.arange(size, device=patch.device)
        real = (frame >= 0) & (frame < self.frames[row][:, None])
        place = to_device(torch.stack([row, patch.clamp(0, count - 1)]), self.latents.device)
        return self.latents[place[0], place[1]], to_device(real, self.latents.device)


@dataclass(frozen=True)
class SpanLayout:
    """Positions of the patches of each row among its tokens. All tensors (B,) are on the host, like the lengths of the
    batch.

    Attributes:
        with_motion: whether the row has motion.
        start, length: span of placeholders in tokens, including the task token.
        slots: number of tokens for patches, at least 0.
        step: tokens per patch.
        turns: position of each stream's token within a patch.
        begin: position of each stream's first token.
        tokens: T.
    """

    with_motion: Tensor
    start: Tensor
    length: Tensor
    slots: Tensor
    step: Tensor
    turns: dict[str, Tensor]
    begin: dict[str, Tensor]
    tokens: int

    @classmethod
    def of(cls, c: TalkerConfig, batch: Mapping[str, Tensor]) -> SpanLayout:
        """Compute the layout of a batch of `talker_t2av.data.collate`."""
        with_motion = batch["motion_frames"] > 0
        span = batch["speech_span"] + (batch["speech_span"][:, :1] >= 0)
        start = span[:, 0]
        length = span[:, 1] - start
        step = 1 + with_motion * (c.order in ORDERS)
        turns = {s: with_motion * (c.order in ORDERS and s == ORDERS[c.order][1]) for s in ("speech", "motion")}
        begin = {"speech": start + turns["speech"], "motion": start + c.delay + turns["motion"]}
        tokens = batch["attention_mask"].shape[1] + 1
        return cls(with_motion, start, length, length.clamp(min=0), step, turns, begin, tokens)

    def examples(self, stream: str, patches: Tensor, count: int) -> Tensor:
        """Return a mask (B, count) of the patches on which a diffusion head is trained.

        Rows with a single patch or without slots yield no examples. Rows with a truncated span yield examples up to the
        last position. Both match the official program.

        Args:
            patches: (B,) number of patches of the stream in each row.
            count: number of columns of the mask.
        """
        place = torch.arange(count, device=self.start.device)
        position = self.begin[stream][:, None] + self.step[:, None] * place - 1
        rows = (self.slots > 0) & (patches > 1)
        return rows[:, None] & (place < patches[:, None]) & ((place == 0) | (position < self.tokens))

    def stop_labels(self, c: TalkerConfig) -> tuple[Tensor, Tensor]:
        """Return labels (B, T) and the positive weight; see `stop_labels`."""
        return stop_labels(self.start, self.length, self.tokens, c.patch_size, FPS, step=self.step)


def count_elements(c: TalkerConfig, batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of elements over which each loss is averaged: examples, labelled positions, frames, patches.

    If the heads are trained on a fraction of the patches, all patches are counted, as the fraction is the same for all
    batches.
    """
    layout = SpanLayout.of(c, batch)
    counts = {"stop": int((layout.stop_labels(c)[0] != IGNORED).sum())}
    for stream in ("speech", "motion"):
        patches = -(-batch[f"{stream}_frames"].clamp(max=batch[stream].shape[1]) // c.patch_size)
        count = -(-batch[stream].shape[1] // c.patch_size)
        counts[stream] = int(layout.examples(stream, patches, count).sum())
    if "phoneme" in batch:
        counts["phoneme"] = int(batch["speech_frames"].clamp(max=batch["phoneme"].shape[1]).sum())
    if "pointer" in batch:
        frames = batch["speech_frames"].clamp(max=batch["pointer"].shape[1])
        counts["alignment"] = int((-(-frames // c.patch_size)).sum())
    return counts


@dataclass(frozen=True)
class Examples:
    """Training examples of a diffusion head: x1 (N, C, P), mu (N, D), cond (N, C, p P), global_cond (N, G)."""

    x1: Tensor
    mu: Tensor
    cond: Tensor
    global_cond: Tensor


@dataclass(frozen=True)
class TrainingForward:
    """Results of the forward pass before the losses.

    Attributes:
        embeds, hidden: (B, T, D).
        mask: (B, T).
        labels: (B, T) labels of the stop head.
        pos_weight: weight of positive labels.
    """

    embeds: Tensor
    mask: Tensor
    hidden: Tensor
    speech: Examples
    motion: Examples
    labels: Tensor
    pos_weight: Tensor


def embed_tokens(
    model: TalkerT2AV, batch: Mapping[str, Tensor], layout: SpanLayout, speech: PatchStream, motion: PatchStream
) -> Tensor:
    """Embed the sequences of a batch, (B, T, D): task token, text, and the patches in place of their placeholders.

    Position j of the patches of a row starts at start + step * j, and the token of a stream is at offset `turns`.
    Tokens of both streams at the same position are added.

    Args:
        model: the model.
        batch: see `training_forward`.
        layout: positions of the patches.
        speech, motion: the streams of the batch in patches.
    """
    device = batch["speech"].device
    task = torch.where(layout.with_motion, T2AV, TTS)
    embeds = torch.cat(
        [model.task_embedding(to_device(task, device))[:, None], model.embed_text(batch["input_ids"])], 1
    )
    delay = model.config.delay
    start = layout.start
    step = layout.step
    filled = torch.where(layout.with_motion, torch.maximum(speech.patches, motion.patches + delay), speech.patches)
    filled = torch.minimum(filled, layout.slots // step)  # (B,) patches that replace placeholders

    place = torch.arange(embeds.shape[1], device=start.device)
    row, slot = (place < filled[:, None]).nonzero(as_tuple=True)
    moving = layout.with_motion[row]
    speech_tokens = model.speech_tokens(*speech.gather(row, slot))
    speech_tokens = speech_tokens + model.motion_pad_emb[0] * to_device(~moving[:, None], device)
    motion_tokens = model.motion_tokens(*motion.gather(row[moving], slot[moving] - delay))
    replaced = (place >= start[:, None]) & (place < (start + step * filled)[:, None])
    embeds = embeds.masked_fill(to_device(replaced, device)[..., None], 0)
    for stream, tokens, rows in (("speech", speech_tokens, slice(None)), ("motion", motion_tokens, moving)):
        at = torch.stack([row, start[row] + step[row] * slot + layout.turns[stream][row]])[:, rows]
        embeds = embeds.index_put(tuple(to_device(at, device)), tokens.to(embeds.dtype), accumulate=True)
    return embeds


def training_forward(model: TalkerT2AV, batch: Mapping[str, Tensor], head_fraction: float = 1.0) -> TrainingForward:
    """Run the backbone and collect the examples of both heads, each repeated `repeats` times.

    Args:
        batch: of `talker_t2av.data.collate`. All except ids, phonemes, latents and embeddings should be on the host,
            where shapes and places are computed.
        head_fraction: fraction of the patches on which the heads are trained, drawn at random.
    """
    c = model.config
    layout = SpanLayout.of(c, batch)
    speech = PatchStream.of(batch["speech"], batch["speech_frames"], c.patch_size)
    motion = PatchStream.of(batch["motion"], batch["motion_frames"], c.patch_size)
    embeds = embed_tokens(model, batch, layout, speech, motion)
    mask = F.pad(batch["attention_mask"], (1, 0), value=1)

    attended = None  # transformers would synchronise to check for padding; this check is on the host
    if not bool(mask.all()):
        causal = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool, device=embeds.device).tril()
        attended = causal & to_device(mask.bool(), embeds.device)[:, None, None]
    hidden = model.backbone(embeds, {"full_attention": attended})
    frames = batch["motion"]
    first_motion = frames[:, 0] if frames.shape[1] else frames.new_zeros(len(frames), c.motion_dim)
    return TrainingForward(
        embeds,
        mask,
        hidden,
        _examples(c, hidden, layout, "speech", speech, batch["speaker"], head_fraction),
        _examples(c, hidden, layout, "motion", motion, first_motion, head_fraction),
        *(to_device(x, embeds.device) for x in layout.stop_labels(c)),
    )


def training_losses(
    model: TalkerT2AV, forward: TrainingForward, speech: FlowDraws | None = None, motion: FlowDraws | None = None
) -> dict[str, Tensor]:
    """Return `speech`, `motion` (weighted), `stop`, and their sum `loss`.

    Args:
        speech, motion: random numbers of the two heads. By default they are drawn, speech first.
    """
    s = forward.speech
    m = forward.motion
    losses = {
        "speech": model.speech_cfm.loss(s.x1, s.mu, s.cond, s.global_cond, speech),
        "motion": model.config.motion_weight * model.motion_cfm.loss(m.x1, m.mu, m.cond, m.global_cond, motion),
        "stop": stop_loss(
            model.head_stop(forward.hidden), forward.labels, forward.pos_weight, model.config.stop_weight
        ),
    }
    losses["loss"] = sum(losses.values())
    return losses


def stop_labels(
    start: Tensor,
    length: Tensor,
    tokens: int,
    patch_size: int = 4,
    fps: float = 25,
    ignore_seconds: float = 0.3,
    step: Tensor | int = 1,
) -> tuple[Tensor, Tensor]:
    """Return labels (B, T) of spans: 1 at the last patch, 0 before, -100 outside and shortly before the end.

    A span that exceeds the row, or is longer than `LONGEST_SPAN`, has no end: all its labels are 0.

    Args:
        start, length: (B,) span of each row in tokens.
        tokens: T.
        step: (B,) tokens per patch. Only the last token is labelled.
    Returns:
        Labels, and the mean number of zeros in rows with a 1 (1.0 without such rows).
    """
    ignored = max(1, round(ignore_seconds * fps / patch_size))
    end = start + length
    step = step + torch.zeros_like(start)
    first = start.clamp(min=0)
    stop = end.clamp(max=tokens)
    valid = (length > 0) & (first < stop)
    ends = valid & (end <= tokens) & (length // step <= LONGEST_SPAN)
    count = (stop - first) // step  # of patches
    last = (count - 1 - ignored).clamp(min=0)
    offset = torch.arange(tokens, device=start.device) - first[:, None]
    step = step[:, None]
    patch = torch.where((offset >= 0) & (offset % step == step - 1) & valid[:, None], offset // step, -1)
    zero = (patch >= 0) & (patch < torch.where(ends, last, count)[:, None])
    one = (patch >= 0) & ends[:, None] & (patch == count[:, None] - 1)
    labels = torch.full_like(patch, IGNORED).masked_fill(zero, 0).masked_fill(one, 1)
    rows = ends.sum()
    return labels, torch.where(rows > 0, (last * ends).sum() / rows.clamp(min=1), 1.0)


def stop_loss(logits: Tensor, labels: Tensor, pos_weight: Tensor, factor: float = STOP_WEIGHT) -> Tensor:
    """Return the binary cross-entropy of logits (B, T) over the labelled positions; 0 without labels.

    Args:
        pos_weight: result of `stop_labels`. Positive labels have the weight `factor` * pos_weight.
        factor: see `TalkerConfig.stop_weight`.
    """
    counted = labels != IGNORED
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), labels.clamp(min=0).float(), reduction="none", pos_weight=factor * pos_weight
    )
    return (loss * counted).sum() / counted.sum().clamp(min=1)


def phoneme_loss(model: TalkerT2AV, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the cross-entropy of the phonemes of each patch's frames, predicted from the state before the patch.

    Args:
        hidden: (B, T, D) from `training_forward`.
    """
    size = model.config.patch_size
    count = model.config.phonemes
    labels = batch["phoneme"].long()
    frame = torch.arange(labels.shape[1], device=batch["speech_frames"].device)
    labels = labels.masked_fill(to_device(frame >= batch["speech_frames"][:, None], labels.device), -100)
    labels = F.pad(labels, (0, -labels.shape[1] % size), value=-100).unflatten(1, (-1, size))  # (B, M, P)
    patch = torch.arange(labels.shape[1], device=hidden.device)
    layout = SpanLayout.of(model.config, batch)
    before, step = to_device(torch.stack([layout.begin["speech"] - 1, layout.step]), hidden.device)
    position = before[:, None] + step[:, None] * patch
    position = position.clamp(0, hidden.shape[1] - 1)
    states = hidden.gather(1, position[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = model.head_phoneme(states).unflatten(-1, (size, count)).float()
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=-100)


def _examples(
    c: TalkerConfig,
    hidden: Tensor,
    layout: SpanLayout,
    name: str,
    stream: PatchStream,
    given: Tensor,
    head_fraction: float,
) -> Examples:
    """Collect the examples of stream `name`: each patch is predicted from the previous position and the frames before
    it.

    Padded frames of the last patch are also targets, as in the official program.
    """
    count = stream.latents.shape[1]
    tokens = hidden.shape[1]
    chosen = layout.examples(name, stream.patches, count)
    position = layout.begin[name][:, None] + layout.step[:, None] * torch.arange(count) - 1
    if head_fraction < 1:
        chosen &= torch.rand(chosen.shape, device=chosen.device) < head_fraction
    row, patch = chosen.nonzero(as_tuple=True)
    row = row.repeat_interleave(c.repeats)
    patch = patch.repeat_interleave(c.repeats)

    padded = F.pad(stream.latents, (0, 0, 0, 0, c.context, 0))  # patches before the first one are zeros
    places = torch.stack([row, patch, position[row, patch].clamp(max=tokens - 1)])
    row, patch, before = to_device(places, hidden.device)
    window = patch[:, None] + torch.arange(c.context, device=patch.device)
    return Examples(
        x1=stream.latents[row, patch].transpose(1, 2),
        mu=hidden[row, before],
        cond=padded[row[:, None], window].flatten(1, 2).transpose(1, 2),  # (N, p, P, C) before
        global_cond=given[row],
    )

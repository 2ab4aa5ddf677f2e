"""Reference of Talker-T2AV's training losses: a loop over rows and patches, as in the paper's description.

Axes: B batch, T tokens, F frames, P frames of a patch, C channels, D width, N examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from talker_t2av.flow_matching import DROP_COND, DROP_MU, FlowDraws, drop, noised
from talker_t2av.losses import TalkerBatch, stop_labels, stop_loss
from talker_t2av.model import TalkerT2AV


def plain_losses(
    model: TalkerT2AV, batch: TalkerBatch, speech: FlowDraws | None = None, motion: FlowDraws | None = None
) -> dict[str, Tensor]:
    """The losses of `talker_t2av.losses.training_losses`, row by row."""
    c = model.config
    task = (batch.motion_frames > 0).long()
    embeds = torch.cat([model.task_embedding(task)[:, None], model.embed_text(batch.input_ids)], 1)
    mask = torch.cat([torch.ones_like(task)[:, None], batch.attention_mask], 1)
    rows = []
    for row in range(len(task)):
        x, (start, end) = embeds[row].clone(), (int(i) for i in batch.speech_span[row])
        if start >= 0:
            tokens = _row_tokens(model, batch, row, end - start)
            x[start + 1 : start + 1 + len(tokens)] = tokens
        rows.append(x)
    hidden = model.llm(inputs_embeds=torch.stack(rows), attention_mask=mask, output_hidden_states=True)
    hidden = hidden.hidden_states[-1]

    losses = {}
    for name, latents, counts, delay, head, draws in (
        ("speech", batch.speech, batch.speech_frames, 0, model.speech_cfm, speech),
        ("motion", batch.motion, batch.motion_frames, c.delay, model.motion_cfm, motion),
    ):
        examples = []
        for row in range(len(task)):
            start, end = (int(i) for i in batch.speech_span[row])
            if start < 0 or end <= start:
                continue
            frames = latents[row, : int(counts[row])]
            given = batch.speaker[row] if name == "speech" else latents[row, :1].sum(0)
            examples += _row_examples(hidden[row], frames, start + 1 + delay, given, model)
        losses[name] = _flow_loss(head, examples, draws) if examples else hidden.new_zeros(())
    losses["motion"] = c.motion_weight * losses["motion"]
    start, end = (batch.speech_span + (batch.speech_span[:, :1] >= 0)).unbind(1)
    labels, weight = stop_labels(start, end - start, hidden.shape[1], c.patch_size)
    losses["stop"] = stop_loss(model.head_stop(hidden), labels, weight)
    losses["loss"] = sum(losses.values())
    return losses


def _row_tokens(model: TalkerT2AV, batch: TalkerBatch, row: int, slots: int) -> Tensor:
    """(n, D): what stands in a row's slots."""
    size, delay = model.config.patch_size, model.config.delay
    speech = batch.speech[row, : int(batch.speech_frames[row])]
    motion = batch.motion[row, : int(batch.motion_frames[row])]
    patches = -(-len(speech) // size)
    if len(motion):
        patches = max(patches, -(-len(motion) // size) + delay)
    patches = min(patches, slots)

    def buffer(frames: Tensor, first: int) -> Tensor:
        out = frames.new_zeros(max(patches * size, first + len(frames)), model.width)
        out[first : first + len(frames)] = frames
        return out[: patches * size].unflatten(0, (patches, size))

    tokens = model.speech_patch_encoder(buffer(model.projector_speech(speech), 0))
    if len(motion):
        return tokens + model.motion_patch_encoder(buffer(model.projector_motion(motion), delay * size))
    return tokens + model.motion_pad_emb[0]


def _row_examples(hidden: Tensor, frames: Tensor, start: int, given: Tensor, model: TalkerT2AV) -> list[tuple]:
    """(x1 (C, P), mu (D,), cond (C, p P), global_cond) of every patch of a row, repeated."""
    size, context = model.config.patch_size, model.config.context
    patches = -(-len(frames) // size)
    if patches <= 1:
        return []
    padded = frames.new_zeros(patches * size, frames.shape[1])
    padded[: len(frames)] = frames
    out = []
    for j in range(patches):
        position = start + j - 1
        if j and position >= len(hidden):
            break
        before = padded[max(0, j - context) * size : j * size]
        cond = frames.new_zeros(context * size, frames.shape[1])
        cond[len(cond) - len(before) :] = before
        example = (padded[j * size : (j + 1) * size].T, hidden[position], cond.T, given)
        out += [example] * model.config.repeats
    return out


def _flow_loss(head: torch.nn.Module, examples: list[tuple], draws: FlowDraws | None) -> Tensor:
    """Loss of all examples together; every position passes every layer."""
    x1, mu, cond, given = (torch.stack(part) for part in zip(*examples))
    draws = draws or FlowDraws.sample(x1)
    net = head.estimator
    mu, cond = drop(mu, draws.u_mu, DROP_MU), drop(cond, draws.u_cond, DROP_COND)
    time = net.time_mlp(draws.t) + net.delta_time_mlp(torch.zeros_like(draws.t))
    frames = [net.cond_proj(cond.transpose(1, 2)), net.in_proj(noised(x1, draws).transpose(1, 2))]
    x = torch.cat([(mu + time)[:, None], net.global_cond_proj(given)[:, None], *frames], 1)
    x = net.decoder.input_proj(x)
    for block in net.decoder.blocks:
        x = block(x, net.decoder.rope.factors(x.shape[1]))
    predicted = net.out_proj(net.decoder.norm(x)[:, -x1.shape[-1] :]).transpose(1, 2)
    return (predicted - (draws.z - x1)).square().mean()

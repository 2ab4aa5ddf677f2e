"""The plain reading of Talker-T2AV's generation: one row, a cache that grows, every step of the solver evaluated, both
branches of the guidance one after the other, and a look at the stop head on the host for every patch.

It is what the loop of talker_t2av/generation.py has to equal, and to beat (benchmarks/talker.py).

Axes: T tokens, P frames of a patch, C channels, D width, n solver steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from talker_t2av.diffusion_head import FlowHead
from talker_t2av.flow_matching import guide, solver_times, zero_steps
from talker_t2av.generation import seeded_noise
from talker_t2av.model import T2AV, TalkerT2AV
from talker_t2av.request import Request, Sampling


@torch.no_grad()
def plain_t2av(model: TalkerT2AV, request: Request, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Speech (F, Ds) and motion (F, Dm) of a T2AV request without prefix, for a model without delay."""
    assert model.config.delay == 0 and request.prefix == 0
    size, context = model.config.patch_size, model.config.context
    ids = torch.tensor([request.prompt])
    task = model.task_embedding(torch.tensor([[T2AV]]))
    embeds = torch.cat([task, model.embed_text(ids)], 1)
    cache, noise = DynamicCache(), seeded_noise(model, [request])
    streams = {
        "speech": (model.speech_cfm, request.speaker[None], torch.zeros(1, 0, model.config.speech_dim)),
        "motion": (model.motion_cfm, request.first_motion[None], torch.zeros(1, 0, model.config.motion_dim)),
    }
    frames = {name: empty for name, (_, _, empty) in streams.items()}
    for index in range(request.max_patches):
        hidden = model.llm.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        if index >= request.min_patches and torch.sigmoid(model.head_stop(hidden)).item() >= 0.5:
            break
        for name, (head, global_cond, empty) in streams.items():
            history = frames[name][:, -context * size :]
            missing = empty.new_zeros(1, context * size - history.shape[1], empty.shape[2])
            cond = torch.cat([missing, history], 1).transpose(1, 2)
            z = noise(name, 0, index)[None]
            patch = plain_sample(head, hidden, cond, global_cond, z, sampling).transpose(1, 2)
            frames[name] = torch.cat([frames[name], patch], 1)
        embeds = model.speech_tokens(frames["speech"][:, -size:]) + model.motion_tokens(frames["motion"][:, -size:])
        embeds = embeds[:, None]
    return frames["speech"][0], frames["motion"][0]


def plain_sample(
    head: FlowHead, mu: Tensor, cond: Tensor, global_cond: Tensor, noise: Tensor, sampling: Sampling
) -> Tensor:
    """A patch (1, C, P): two forwards of the whole head at each of the n times."""
    times = solver_times(sampling.steps)
    x = sampling.temperature * noise
    for i in range(sampling.steps):
        t = times[i : i + 1]
        with_mu = head.estimator(x, mu, t, cond, global_cond)
        without = head.estimator(x, torch.zeros_like(mu), t, cond, global_cond)
        velocity = guide(with_mu, without, sampling.guidance)
        if i < zero_steps(sampling.steps):
            velocity = 0 * velocity
        x = x - (times[i] - times[i + 1]) * velocity
    return x

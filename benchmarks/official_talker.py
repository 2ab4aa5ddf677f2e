"""Baseline of Talker-T2AV's generation: a loop structured as in the official program.

It generates one row with a growing cache, evaluates both guidance branches in one call of the head, skips the zeroed
first solver step, passes all positions through all layers, precomputes nothing, and reads the stop head on the host
after every patch. benchmarks/inference.py compares the loop of talker_t2av/generation.py with it, which must give the
same result in less time.

Axes: T tokens, P frames of a patch, F frames, C channels (Ds of speech, Dm of motion), D width, N both branches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from talker_t2av.diffusion_head import DiffusionHead
from talker_t2av.flow_matching import guide, solver_times, zero_steps
from talker_t2av.layers import Transformer
from talker_t2av.model import TalkerT2AV
from talker_t2av.prompt import seeded_noise
from talker_t2av.request import T2AV, Request, Sampling


@torch.no_grad()
def official_t2av(model: TalkerT2AV, request: Request, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the speech (F, Ds) and motion (F, Dm) of a T2AV request without prefix, for a model without delay."""
    assert model.config.delay == 0 and request.prefix == 0
    size = model.config.patch_size
    context = model.config.context
    device = model.task_embedding.weight.device
    ids = torch.tensor([request.prompt], device=device)
    task = model.task_embedding(torch.tensor([[T2AV]], device=device))
    embeds = torch.cat([task, model.embed_text(ids)], 1)
    cache = DynamicCache()
    no_speech = torch.zeros(1, 0, model.config.speech_dim, device=device)
    no_motion = torch.zeros(1, 0, model.config.motion_dim, device=device)
    streams = {
        "speech": (model.speech_cfm, request.speaker[None].to(device), no_speech),
        "motion": (model.motion_cfm, request.first_motion[None].to(device), no_motion),
    }
    frames = {name: empty for name, (_, _, empty) in streams.items()}
    noise = {
        name: seeded_noise(request, name, (empty.shape[2], size), request.max_patches)[:, None].to(device)
        for name, (_, _, empty) in streams.items()
    }
    for index in range(request.max_patches):
        hidden = model.llm.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        if index >= request.min_patches and torch.sigmoid(model.head_stop(hidden)).item() >= 0.5:
            break
        for name, (head, global_cond, empty) in streams.items():
            history = frames[name][:, -context * size :]
            missing = empty.new_zeros(1, context * size - history.shape[1], empty.shape[2])
            cond = torch.cat([missing, history], 1)
            patch = _sample(head.estimator, hidden, cond, global_cond, noise[name][index], sampling)
            frames[name] = torch.cat([frames[name], patch.transpose(1, 2)], 1)
        token = _encode(model.speech_patch_encoder, model.projector_speech(frames["speech"][:, -size:]))
        token = token + _encode(model.motion_patch_encoder, model.projector_motion(frames["motion"][:, -size:]))
        embeds = token[:, None]
    return frames["speech"][0], frames["motion"][0]


def _sample(
    net: DiffusionHead, mu: Tensor, cond: Tensor, global_cond: Tensor, noise: Tensor, sampling: Sampling
) -> Tensor:
    """Sample a patch (1, C, P), with one call of the whole head per solver step for both branches."""
    times = solver_times(sampling.steps).to(mu.device)
    x = sampling.temperature * noise
    mu = torch.cat([mu, torch.zeros_like(mu)])
    cond = cond.repeat(2, 1, 1)
    global_cond = global_cond.repeat(2, 1)
    for i in range(zero_steps(sampling.steps), sampling.steps):
        t = times[i : i + 1].expand(2)
        first = mu + net.time_mlp(t) + net.delta_time_mlp(torch.zeros_like(t))
        patch = net.in_proj(x.repeat(2, 1, 1).transpose(1, 2))
        tokens = [first[:, None], net.global_cond_proj(global_cond)[:, None], net.cond_proj(cond), patch]
        hidden = _run(net.decoder, net.decoder.input_proj(torch.cat(tokens, 1)))
        with_mu, without = net.out_proj(hidden[:, -x.shape[-1] :]).transpose(1, 2).chunk(2)
        x = x - (times[i] - times[i + 1]) * guide(with_mu, without, sampling.guidance)
    return x


def _encode(encoder: Transformer, frames: Tensor) -> Tensor:
    """Encode projected frames (1, P, D) to a token (1, D)."""
    return _run(encoder, torch.cat([encoder.cls_token[0], encoder.input_proj(frames)], 1))[:, 0]


def _run(transformer: Transformer, x: Tensor) -> Tensor:
    """Run every block on all positions."""
    for block in transformer.blocks:
        x = block(x, transformer.rope.factors(x.shape[1]))
    return transformer.norm(x)

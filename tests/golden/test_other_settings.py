"""Cases with other settings than the public ones: made here from public cases, with outputs from plain formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from talker_t2av.diffusion_head import FlowHead
from tests.golden.check import check
from tests.golden.runners import Case, load_case
from tests.golden.runners.talker import draws_of, drop_rates, head_of, loaded
from tests.golden.runners.whisperx_vae import build

FOLDER = Path(__file__).parent


def public(name: str) -> Case:
    return load_case(FOLDER / f"{name}.safetensors")


def failures(case: Case) -> list[str]:
    """Names of the outputs that are off."""
    return [result.output for result in check(case) if not result.passed]


def plain_block(case: Case, x: Tensor) -> dict[str, Tensor]:
    """The official block without rotary positions, from its formulas: every output of the case."""
    w, heads = case.weights(), case.config["n_head"]

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain

    def attention(x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (x @ w["attn.qkv.weight"].T).chunk(3, -1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2) @ w["attn.proj.weight"].T

    def mlp(x: Tensor) -> Tensor:
        return (F.silu(x @ w["mlp.fc1.weight"].T) * (x @ w["mlp.fc2.weight"].T)) @ w["mlp.proj.weight"].T

    attended = attention(norm(x, w["norm1.scale"]))
    after = x + attended
    return {
        "norm1": norm(x, w["norm1.scale"]),
        "attn": attended,
        "mlp": mlp(norm(x, w["norm2.scale"])),
        "y": after + mlp(norm(after, w["norm2.scale"])),
    }


def test_a_block_without_rotary_positions():
    case = public("talker/block")
    outputs = plain_block(case, case.inputs["x"])
    assert failures(replace(case, outputs=outputs)) == ["attn", "y"]  # the public case has rotary positions
    meta = case.meta | {"config": case.config | {"rope": False}}
    assert not failures(replace(case, meta=meta, outputs=outputs))


@pytest.mark.parametrize("mu_rate, cond_rate", [(0.5, 0.3), (0.0, 1.0), (0.2, 0.05)])
def test_a_flow_loss_with_other_dropout_rates(mu_rate, cond_rate):
    case = public("talker/cfm_loss_motion_mask")
    settings = {"cfm_params": {"training_cfg_rate": mu_rate, "training_cond_rate": cond_rate}}
    varied = replace(case, meta=case.meta | {"config": case.config | settings})
    i, draws = case.inputs, draws_of(case)
    net = loaded(case, FlowHead(head_of(case))).estimator
    mu, cond, voice = (i[name].clone().requires_grad_() for name in ("mu", "cond", "global_cond"))
    mu_used = mu * (i["u_cfg"] > mu_rate).float()[:, None]
    cond_used = cond * (i["u_cond"] > cond_rate).float()[:, None, None]
    t = draws.t[:, None, None]
    noisy = (1 - t) * i["x1"] + t * i["z"]
    velocity = net(noisy, mu_used, draws.t, cond_used, voice)
    error = (velocity - (i["z"] - i["x1"])).square().mean(1, keepdim=True)
    loss = (error * i["tgt_mask"]).sum() / i["tgt_mask"].sum()
    loss.backward()
    outputs = {
        "mu_used": mu_used,
        "cond_used": cond_used,
        "v_pred": velocity,
        "loss": loss,
        "grad_mu": mu.grad,
        "grad_cond": cond.grad,
        "grad_global_cond": voice.grad,
    }
    outputs = {name: value.detach() for name, value in outputs.items()}
    assert {"loss", "mu_used"} <= set(
        failures(replace(case, outputs=outputs))
    )  # the published rates give other numbers
    assert not failures(replace(varied, outputs=outputs))
    assert drop_rates(varied) == {"drop_mu": mu_rate, "drop_cond": cond_rate}


def test_a_program_that_never_drops_need_not_draw_for_it():
    case = public("talker/cfm_loss_motion_mask")
    inputs = {name: value for name, value in case.inputs.items() if name != "u_cfg"}
    kept = {"mu_used": case.inputs["mu"]}
    meta = case.meta | {"config": case.config | {"cfm_params": {"training_cfg_rate": 0.0}}}
    assert not failures(replace(case, meta=meta, inputs=inputs, outputs=kept))


@torch.no_grad()
@pytest.mark.parametrize("frames, step", [(3, 7), (11, 17), (60, 1)])
def test_whisper_states_with_any_number_of_first_frames_and_any_stride(tmp_path, frames, step):
    case = public("codecs/wxvae_oddstride")
    states = build(case).semantic(case.inputs["mel"].flatten(0, 1))
    outputs = {"semantic_50hz_head": states[:, :frames], "semantic_50hz_strided": states[:, ::step]}
    inputs = {"wav": case.inputs["wav_195"], "mel": case.inputs["mel"]}
    tensors = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v.clone() for k, v in outputs.items()}
    meta = case.meta | {"notes": f"full-size encode. semantic_50hz_strided = frames 0,{step},{2 * step},..."}
    path = tmp_path / "wxvae_full_encode_in99.safetensors"
    save_file(tensors, path, {"meta": json.dumps(meta)})
    path.with_suffix(".keys.json").write_text(json.dumps({k: list(v) for k, v in case.keys.items()}))
    varied = load_case(path)
    assert not failures(varied)
    varied.outputs["semantic_50hz_head"][0, frames - 1] += 0.1
    assert failures(varied) == ["semantic_50hz_head"]

"""The model's files: released checkpoints with and without their optional keys, shards, warm starts."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from talker_fixtures import tiny_model
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from engine.errors import UserError
from talker_t2av.fused import FusedAttention, FusedMLP, fuse_layers
from talker_t2av.layers import MLP
from talker_t2av.model import KeyValues, TalkerT2AV
from talker_t2av.upstream import LM_HEAD, read_safetensors, warm_start, without_tied_weights

DROPPED = ("llm.lm_head.weight", "rope.w")


def answer(model: TalkerT2AV) -> torch.Tensor:
    """A number of every part."""
    g = torch.Generator().manual_seed(3)
    c = model.config
    with torch.no_grad():
        hidden = model.backbone(model.embed_text(torch.arange(6)[None]))[:, -1]
        hidden = hidden + model.speech_tokens(torch.randn(1, 4, c.speech_dim, generator=g))
        hidden = hidden + model.motion_tokens(torch.randn(1, 4, c.motion_dim, generator=g))
        out = [model.head_stop(hidden)]
        for head, channels, given in (
            (model.speech_cfm, c.speech_dim, c.speaker_dim),
            (model.motion_cfm, c.motion_dim, c.motion_dim),
        ):
            noise, cond = torch.randn(2, 1, channels, 4, generator=g)
            condition = torch.randn(1, given, generator=g)
            out.append(head.sample(hidden, cond, condition, noise, head.schedule(3), 1.0, 2.0).flatten())
    return torch.cat(out)


def released_state(model: TalkerT2AV) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_a_released_state_loads_with_and_without_its_optional_keys():
    model = tiny_model()
    full = released_state(model)
    assert LM_HEAD in full
    full["spk.some.weight"] = full["pretrained_speech_encoder.x"] = torch.zeros(2)
    lean = {key: value for key, value in full.items() if not key.endswith(DROPPED)}
    for state in (full, lean):
        loaded = TalkerT2AV.from_upstream(state, model.config)
        torch.testing.assert_close(answer(loaded), answer(model))
        assert loaded.llm.lm_head.weight is loaded.llm.model.embed_tokens.weight
        assert not loaded.training
    lean.pop("head_stop.proj.bias")
    with pytest.raises(UserError, match=r"head_stop\.proj\.bias"):
        TalkerT2AV.from_upstream(lean, model.config)


def test_a_stored_rotary_table_is_used_as_it_is():
    model = tiny_model()
    state = released_state(model)
    exact = answer(model)
    for key in state:
        if key.endswith("rope.w"):
            state[key] = state[key].bfloat16()
    rounded = TalkerT2AV.from_upstream(state, model.config)
    assert rounded.speech_patch_encoder.rope.w.dtype == torch.float32
    assert not torch.allclose(answer(rounded), exact, atol=1e-6)
    assert any(key.endswith("rope.w") for key in without_tied_weights(rounded))  # and kept in a release of ours
    assert not any(key.endswith("rope.w") for key in without_tied_weights(model))


def test_shards_are_merged_and_a_missing_one_is_named(tmp_path):
    model = tiny_model()
    state = without_tied_weights(model)
    keys = sorted(state)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    for i, part in enumerate(halves, 1):
        save_file({k: state[k].contiguous() for k in part}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    torch.testing.assert_close(answer(TalkerT2AV.from_upstream(tmp_path, model.config)), answer(model))
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00001-of-00002"):
        read_safetensors(tmp_path)


def test_a_speech_only_checkpoint_warms_the_speech_head(tmp_path):
    source = tiny_model(seed=1)
    model = tiny_model(seed=2)
    before = released_state(model)
    old = {}
    for key, value in source.state_dict().items():
        if key.startswith("motion_") or key == LM_HEAD:
            continue
        key = key.replace("speech_cfm.", "motion_cfm.").replace(".global_cond_proj.", ".spk_proj.")
        key = key.replace("speech_patch_encoder.input_proj.", "patch_encoder.in_proj.")
        old[key.replace("speech_patch_encoder.", "patch_encoder.")] = value.clone()
    old["head_stop.proj.weight"] = torch.zeros(3)  # of another shape: left as it is
    save_file(old, tmp_path / "model.safetensors")
    names = warm_start(model, tmp_path, "tts")
    state = model.state_dict()
    for key, value in source.state_dict().items():
        kept = key.startswith("motion_") or key == "head_stop.proj.weight"
        assert torch.equal(state[key], before[key] if kept else value), key
        assert (key in names) == (not kept and key != LM_HEAD)


def test_a_projector_checkpoint_renames(tmp_path):
    model = tiny_model()
    bias = torch.full_like(model.motion_cfm.estimator.global_cond_proj.bias, 7.0)
    state = {"motion_cfm.estimator.first_motion_proj.bias": bias, "patch_encoder.norm.scale": bias.clone()}
    save_file(state, tmp_path / "model.safetensors")
    assert warm_start(model, tmp_path, "projector") == [
        "motion_cfm.estimator.global_cond_proj.bias",
        "speech_patch_encoder.norm.scale",
    ]
    assert torch.equal(model.speech_patch_encoder.norm.scale, bias)
    save_file({"x": bias}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensor"):
        warm_start(model, tmp_path, "projector")


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_fused_layers_give_the_same_outputs(bias):
    """A prompt without a cache and a row of two; then tokens that see a cache, one and three at a time."""
    torch.manual_seed(0)
    config = tiny_model().config
    model = TalkerT2AV(replace(config, llm=config.llm | {"attention_bias": bias, "head_dim": 8})).eval()
    for parameter in model.llm.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    llm = model.llm.config
    x = torch.randn(2, 5, 32)
    assert llm.num_attention_heads == 2 * llm.num_key_value_heads
    cache = torch.randn(2, llm.num_hidden_layers, 2, llm.num_key_value_heads, 9, llm.head_dim)
    positions = torch.tensor([[3, 4, 5], [5, 6, 7]])
    visible = torch.arange(9) <= positions[..., None]

    def answers():
        caches = [KeyValues(cache.clone(), positions[:, :n]) for n in (1, 3)]
        states = [model.continue_cache(c, x[:, :n], visible[:, :n], positions[:, :n]) for c, n in zip(caches, (1, 3))]
        return model.backbone(x), model.speech_tokens(x[..., :4]), *states, *(c.cache for c in caches)

    before = answers()
    fuse_layers(model)
    kinds = {type(module) for module in model.modules()}
    assert {FusedMLP, FusedAttention} <= kinds and not kinds & {MLP, Qwen3MLP, Qwen3Attention}
    for a, b in zip(before, answers()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

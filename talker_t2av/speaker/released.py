"""The released speaker encoder: original WavLM names to those of transformers, and its sizes.

Axes: none; this file handles names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from itertools import count
from typing import Any

from torch import Tensor
from transformers import WavLMConfig

from engine.errors import UserError

FILE = "wavlm_large_finetune.pth"
WAVLM = "feature_extract.model."
TRAINING_ONLY = "loss_calculator."

# WavLM-Large, by the original's own field names; the released file holds no configuration, but its tensors tell sizes.
LARGE: dict[str, Any] = {
    "extractor_mode": "layer_norm",
    "encoder_layers": 24,
    "encoder_embed_dim": 1024,
    "encoder_ffn_embed_dim": 4096,
    "encoder_attention_heads": 16,
    "layer_norm_first": True,
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "num_buckets": 320,
    "max_distance": 800,
    "normalize": True,
}

# Original -> transformers, for whole names or the part after `encoder.layers.N.`
_TOP = {
    "mask_emb": "masked_spec_embed",
    "layer_norm": "feature_projection.layer_norm",
    "post_extract_proj": "feature_projection.projection",
    "encoder.pos_conv.0.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv.0.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    "encoder.pos_conv.0.bias": "encoder.pos_conv_embed.conv.bias",
}
_LAYER = {
    "self_attn.grep_linear": "attention.gru_rel_pos_linear",
    "self_attn.grep_a": "attention.gru_rel_pos_const",
    "self_attn.relative_attention_bias": "attention.rel_attn_embed",
    "self_attn_layer_norm": "layer_norm",
    "self_attn": "attention",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
}


def _replace_start(name: str, table: Mapping[str, str]) -> str:
    """Replace the beginning of a dotted name by the first match in a table."""
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def hf_name(name: str) -> str:
    """Translate the original WavLM's name of a tensor to that of `transformers.WavLMModel`."""
    convolution = re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)\.(0|2|2\.1)\.(weight|bias)", name)
    if convolution:
        index, layer, kind = convolution.groups()
        return f"feature_extractor.conv_layers.{index}.{'conv' if layer == '0' else 'layer_norm'}.{kind}"
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if layer:
        return f"encoder.layers.{layer[1]}.{_replace_start(layer[2], _LAYER)}"
    return _replace_start(name, _TOP)


def our_name(name: str) -> str:
    """Translate the released name of a tensor to ours."""
    if name.startswith(WAVLM):
        return "wavlm." + hf_name(name.removeprefix(WAVLM))
    return name if name == "feature_weight" else "head." + name


def wavlm_config(original: Mapping[str, Any]) -> WavLMConfig:
    """Make transformers' configuration from the original's fields (those of `LARGE`); dropouts are off."""
    for name, needed in {"activation_fn": "gelu", "relative_position_embedding": True, "gru_rel_pos": True}.items():
        if original.get(name, needed) != needed:
            raise UserError(f"WavLM with {name}={original[name]} is not supported: it must be {needed}")
    convolutions = conv_layers(original["conv_feature_layers"])
    first = original["layer_norm_first"]
    return WavLMConfig(
        hidden_size=original["encoder_embed_dim"],
        num_hidden_layers=original["encoder_layers"],
        num_attention_heads=original["encoder_attention_heads"],
        intermediate_size=original["encoder_ffn_embed_dim"],
        conv_dim=[c[0] for c in convolutions],
        conv_kernel=[c[1] for c in convolutions],
        conv_stride=[c[2] for c in convolutions],
        conv_bias=original["conv_bias"],
        feat_extract_norm="layer" if original["extractor_mode"] == "layer_norm" else "group",
        do_stable_layer_norm=first,
        num_conv_pos_embeddings=original["conv_pos"],
        num_conv_pos_embedding_groups=original["conv_pos_groups"],
        num_buckets=original["num_buckets"],
        max_bucket_distance=original["max_distance"],
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
    )


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Read [(channels, kernel, stride), ...] from the original's formula, e.g. "[(512,10,5)] + [(512,3,2)] * 4"."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return value(node.left) * value(node.right)
        return ast.literal_eval(node)

    try:
        return [(int(c), int(k), int(s)) for c, k, s in value(ast.parse(text, mode="eval").body)]
    except (SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"conv_feature_layers={text!r} is not a sum of lists of (channels, kernel, stride)") from error


def wavlm_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `LARGE` that follow from the shapes of a released state; others are those of every WavLM."""
    layer = WAVLM + "encoder.layers.0."
    try:
        width, group, kernel = state[WAVLM + "encoder.pos_conv.0.weight_v"].shape
        buckets, heads = state[layer + "self_attn.relative_attention_bias.weight"].shape
        strides = [stride for *_, stride in conv_layers(LARGE["conv_feature_layers"])]
        kernels = [state[f"{WAVLM}feature_extractor.conv_layers.{i}.0.weight"].shape for i in range(len(strides))]
        return {
            "encoder_layers": next(i for i in count() if f"{WAVLM}encoder.layers.{i}.fc1.weight" not in state),
            "encoder_embed_dim": width,
            "encoder_ffn_embed_dim": len(state[layer + "fc1.weight"]),
            "encoder_attention_heads": heads,
            "conv_feature_layers": str([(c, k, stride) for (c, _, k), stride in zip(kernels, strides)]),
            "conv_pos": kernel,
            "conv_pos_groups": width // max(1, group),
            "num_buckets": buckets,
        }
    except KeyError as error:
        raise UserError(f"not a WavLM-ECAPA speaker encoder: it has no tensor {error}") from error
    except ValueError as error:
        raise UserError(f"not a WavLM-ECAPA speaker encoder: a tensor has another rank ({error})") from error


def head_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return arguments of `EcapaTDNN` besides `inputs`, from the shapes of a released state."""
    try:
        return {
            "channels": state["layer1.conv.weight"].shape[0],
            "pooled": state["conv.weight"].shape[0],
            "bottleneck": state["pooling.linear1.weight"].shape[0],
            "embedding": state["linear.weight"].shape[0],
        }
    except KeyError as error:
        raise UserError(f"not a WavLM-ECAPA speaker encoder: it has no tensor {error}") from error

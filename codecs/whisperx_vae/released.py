"""The released WhisperX-VAE checkpoint: its key names, ours, and its sizes."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import sinusoids

from engine.errors import UserError
from engine.release import load_strict
from engine.safe_pickle import plain, read_checkpoint
from whisperx_vae.codec import WhisperXVAE, WhisperXVAEConfig

POSITIONS = "whisper.embed_positions.weight"
HEAD_SIZE = 64  # of every published Whisper
_PREFIXES = {
    "CodecEnc.": "encoder.",
    "CodecDec.": "decoder.",
    "vae.in_proj.": "in_proj.",
    "vae.out_proj.": "out_proj.",
    "semantic_model.encoder.": "whisper.",
}
_WHISPER_PARTS = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


def our_name(key: str) -> str | None:
    """Our name of a released tensor, or None for one that inference does not need."""
    for theirs, ours in _PREFIXES.items():
        if key.startswith(theirs):
            rest = key.removeprefix(theirs)
            return ours + (_whisper_name(rest) if ours == "whisper." else rest)
    return None


def _whisper_name(key: str) -> str:
    """openai-whisper's encoder names -> transformers'."""
    if key == "positional_embedding":
        return "embed_positions.weight"
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if block:
        index, part, kind = block.groups()
        return f"layers.{index}.{_WHISPER_PARTS.get(part, part)}.{kind}"
    return key.replace("ln_post.", "layer_norm.")


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inference subset of `state` under our names; training-only tensors and Whisper's text half are left out."""
    renamed = {our_name(key): value for key, value in state.items()}
    renamed.pop(None, None)
    return renamed


def released_config(state: dict[str, Tensor]) -> WhisperXVAEConfig:
    """All sizes from the shapes of `state` (released names); Whisper's head size and, if absent, context as published.

    Raises:
        UserError: a tensor that tells a size is missing.
    """
    try:
        return WhisperXVAEConfig(
            encoder_width=state["CodecEnc.block.0.weight_v"].shape[0],
            encoder_ratios=_strides(state, "CodecEnc.block.{}.block.4.weight_v"),
            hidden=state["vae.in_proj.weight_v"].shape[1],
            latent_dim=state["vae.out_proj.weight_v"].shape[1],
            decoder_width=state["CodecDec.model.0.weight_v"].shape[0],
            decoder_ratios=_strides(state, "CodecDec.model.{}.block.1.weight_v"),
            mel_bands=state["semantic_model.encoder.conv1.weight"].shape[1],
            whisper_context=len(state.get("semantic_model.encoder.positional_embedding", range(1500))),
            whisper_heads=max(1, state["semantic_model.encoder.conv1.weight"].shape[0] // HEAD_SIZE),
            whisper_layers=next(i for i in count() if f"semantic_model.encoder.blocks.{i}.mlp.0.weight" not in state),
        )
    except KeyError as error:
        raise UserError(f"not a WhisperX-VAE checkpoint: it has no tensor {error}") from error


def _strides(state: dict[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Strides of the blocks 1, 2, ...: half the kernel of their re-sampling convolution."""
    strides = []
    while pattern.format(len(strides) + 1) in state:
        strides.append(state[pattern.format(len(strides) + 1)].shape[-1] // 2)
    return tuple(strides)


def load_released(state: dict[str, Tensor], source: str | Path, config: WhisperXVAEConfig | None = None) -> WhisperXVAE:
    """A `WhisperXVAE` with the tensors of `state` (released names). Strict on the inference subset.

    Whisper's position table is computed where the state does not have it.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    config = config or released_config(state)
    with torch.device("meta"):
        model = WhisperXVAE(config)
    state = {POSITIONS: sinusoids(config.whisper_context, config.hidden), **from_released(state)}
    load_strict(model, {key: value.float() for key, value in state.items()}, source, assign=True)
    return model.eval()


def find_checkpoint(path: Path) -> Path | None:
    """The Lightning checkpoint that `path` is, or the only one in the folder `path`."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.ckpt")) if path.is_dir() else []
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} checkpoints ({', '.join(p.name for p in found)}): name one")
    return found[0] if found else None


def load_checkpoint(path: Path) -> WhisperXVAE:
    """The official Lightning checkpoint. Sizes come from the weights; the configuration in the file must agree.

    Raises:
        UserError: the file is damaged, lacks tensors, or its configuration contradicts its weights.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise UserError(f"{path} has no state_dict: it is not a WhisperX-VAE checkpoint")
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    config = released_config(state)
    _check_configuration(content.get("hyper_parameters"), config, path)
    return load_released(state, path, config)


def _check_configuration(parameters: Any, config: WhisperXVAEConfig, path: Path) -> None:
    """Compare what the pickled configuration says, where it says it, with the sizes of the weights."""
    node = plain(parameters) if parameters is not None else {}
    model = _dig(node, "cfg", "model")
    for part, ours in {
        "codec_encoder": {
            "in_dim": config.encoder_width,
            "ratios": list(config.encoder_ratios),
            "hidden_dim": config.hidden,
        },
        "codec_decoder": {
            "hidden_dim": config.decoder_width,
            "ratios": list(config.decoder_ratios),
            "z_dim": config.latent_dim,
        },
    }.items():
        for name, value in ours.items():
            said = _dig(model, part, name)
            if said is not None and said != value:
                raise UserError(f"{path}: its configuration says {part}.{name}={said}, its weights have {value}")


def _dig(node: Any, *names: str) -> Any:
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node

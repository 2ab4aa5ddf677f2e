"""The official WhisperX-VAE checkpoint, a Lightning file: its key names, its sizes, its configuration."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.errors import UserError
from engine.safe_pickle import plain, read_checkpoint

WHISPER = "semantic_model.encoder."
HEAD_SIZE = 64  # of every published Whisper
_PREFIXES = {
    "CodecEnc.": "encoder.",
    "CodecDec.": "decoder.",
    "vae.in_proj.": "in_proj.",
    "vae.out_proj.": "out_proj.",
    WHISPER: "whisper.",
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
    """Our name of an official tensor, or None for one that inference does not need."""
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


def our_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What inference needs of an official `state`, under our names: no training-only tensor, no Whisper decoder."""
    renamed = {our_name(key): value for key, value in state.items()}
    renamed.pop(None, None)
    return renamed


def sizes_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of `WhisperXVAEConfig` by the shapes of an official `state`.

    Whisper's head size is the published one, and so is its context if the state has no position table.
    """
    try:
        return {
            "encoder_width": state["CodecEnc.block.0.weight_v"].shape[0],
            "encoder_ratios": _strides(state, "CodecEnc.block.{}.block.4.weight_v"),
            "hidden": state["vae.in_proj.weight_v"].shape[1],
            "latent_dim": state["vae.out_proj.weight_v"].shape[1],
            "decoder_width": state["CodecDec.model.0.weight_v"].shape[0],
            "decoder_ratios": _strides(state, "CodecDec.model.{}.block.1.weight_v"),
            "mel_bands": state[WHISPER + "conv1.weight"].shape[1],
            "whisper_context": len(state.get(WHISPER + "positional_embedding", range(1500))),
            "whisper_heads": max(1, state[WHISPER + "conv1.weight"].shape[0] // HEAD_SIZE),
            "whisper_layers": next(i for i in count() if f"{WHISPER}blocks.{i}.mlp.0.weight" not in state),
        }
    except KeyError as error:
        raise UserError(f"not a WhisperX-VAE checkpoint: it has no tensor {error}") from error


def _strides(state: dict[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Strides of the blocks 1, 2, ...: half the kernel of their re-sampling convolution."""
    strides = []
    while pattern.format(len(strides) + 1) in state:
        strides.append(state[pattern.format(len(strides) + 1)].shape[-1] // 2)
    return tuple(strides)


def find_official(path: Path) -> Path | None:
    """The Lightning checkpoint that `path` is, or the only one in the folder `path`; None: there is none."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.ckpt")) if path.is_dir() else []
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} checkpoints ({', '.join(p.name for p in found)}): name one")
    return found[0] if found else None


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields of `WhisperXVAEConfig`, state dict under our names) of an official checkpoint.

    Sizes come from the weights; the configuration in the file must agree.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise UserError(f"{path} has no state_dict: it is not a WhisperX-VAE checkpoint")
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    sizes = sizes_of(state)
    _check_configuration(content.get("hyper_parameters"), sizes, path)
    return sizes, our_state(state)


_CONFIGURATION = {  # where the pickled configuration has our fields
    "encoder_width": ("codec_encoder", "in_dim"),
    "encoder_ratios": ("codec_encoder", "ratios"),
    "hidden": ("codec_encoder", "hidden_dim"),
    "decoder_width": ("codec_decoder", "hidden_dim"),
    "decoder_ratios": ("codec_decoder", "ratios"),
    "latent_dim": ("codec_decoder", "z_dim"),
}


def _check_configuration(parameters: Any, sizes: dict[str, Any], path: Path) -> None:
    """Compare the pickled configuration, as far as there is one, with the sizes of the weights."""
    node = plain(parameters) if parameters is not None else {}
    for field, (part, name) in _CONFIGURATION.items():
        stated = _dig(node, "cfg", "model", part, name)
        found = list(sizes[field]) if isinstance(sizes[field], tuple) else sizes[field]
        if stated is not None and stated != found:
            raise UserError(f"{path}: its configuration says {part}.{name}={stated}, its weights have {found}")


def _dig(node: Any, *names: str) -> Any:
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node

"""The official WhisperX-VAE checkpoint, a Lightning file: its key names and its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from engine.errors import UserError
from engine.official import numbered, rename_all, sizes_of, strides
from engine.torch_files import read_state

HEAD_SIZE = 64  # of every published Whisper
RULES = (
    # Tensors that are only used in training.
    (r"^(?!CodecEnc\.|CodecDec\.|vae\.(?:in|out)_proj\.|semantic_model\.encoder\.)", None),
    (r"^CodecEnc\.", "encoder."),
    (r"^CodecDec\.", "decoder."),
    (r"^vae\.", ""),
    # openai-whisper's names -> transformers'
    (r"^semantic_model\.encoder\.", "whisper."),
    (r"^whisper\.positional_embedding$", "whisper.embed_positions.weight"),
    (r"^whisper\.ln_post\.", "whisper.layer_norm."),
    (r"^whisper\.blocks\.", "whisper.layers."),
    (r"\.attn\.query\.", ".self_attn.q_proj."),
    (r"\.attn\.key\.", ".self_attn.k_proj."),
    (r"\.attn\.value\.", ".self_attn.v_proj."),
    (r"\.attn\.out\.", ".self_attn.out_proj."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
)


def config_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `WhisperXVAEConfig` that match the shapes of an upstream state dict with renamed keys.

    The head size is that of Whisper. If the state dict has no position table, so is the context length.
    """
    with sizes_of("a WhisperX-VAE checkpoint"):
        width, bands, _ = state["whisper.conv1.weight"].shape
        return {
            "encoder_width": len(state["encoder.block.0.weight_v"]),
            "encoder_ratios": strides(state, "encoder.block.{}.block.4.weight_v"),
            "hidden": state["in_proj.weight_v"].shape[1],
            "latent_dim": state["out_proj.weight_v"].shape[1],
            "decoder_width": len(state["decoder.model.0.weight_v"]),
            "decoder_ratios": strides(state, "decoder.model.{}.block.1.weight_v"),
            "mel_bands": bands,
            "whisper_context": len(state.get("whisper.embed_positions.weight", range(1500))),
            "whisper_heads": max(1, width // HEAD_SIZE),
            "whisper_layers": len(numbered(state, "whisper.layers.{}.fc1.weight")),
        }


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the fields of `WhisperXVAEConfig` and the state dict with renamed keys of an upstream checkpoint.

    Args:
        path: a checkpoint, or a folder with exactly one. Returns None for a folder without checkpoints.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.ckpt"))
    if not files:
        return None
    if len(files) > 1:
        raise UserError(
            f"{path} contains {len(files)} checkpoints ({', '.join(p.name for p in files)}): give the path of one"
        )
    state = rename_all(read_state(files[0], "state_dict"), RULES)
    return config_of(state), state

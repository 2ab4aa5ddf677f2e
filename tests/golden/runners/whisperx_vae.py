"""Runners for WhisperX-VAE (`wxvae_*`), Whisper's log-mel (`whisper_logmel*`) and the resampler (`resample*`).

Axes: B batch, N samples, T latent frames, C channels, M mel bands, F mel frames.
"""

import ast
import re
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from engine.media.audio import resample
from engine.nn.mel import HOP, RATE, log_mel, mel_filters, mel_levels, pad_or_trim
from engine.official import rename_all
from engine.release import load_strict
from tests.golden.runners import Case, runner
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig
from whisperx_vae.upstream import RULES

WINDOW = 30 * RATE


def generated_input(case: Case, name: str) -> Tensor:
    """An input that the case gives as numpy formula: an expression, or assignments that end in a variable `x`."""
    text = case.meta["inputs_generated"][name]
    tree = ast.parse(text)
    if any(isinstance(node, ast.Attribute) and node.attr.startswith("_") for node in ast.walk(tree)):
        raise ValueError(f"{case.name}: not a formula: {text}")
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.fix_missing_locations(
            ast.copy_location(ast.Assign([ast.Name("x", ast.Store())], tree.body[-1].value), tree.body[-1])
        )
    names = {"__builtins__": {}, "np": np}
    exec(compile(tree, case.name, "exec"), names)
    return torch.from_numpy(names["x"])


def config_of(case: Case) -> WhisperXVAEConfig:
    sizes = case.config
    meta = case.meta
    arguments = {
        "encoder_width": sizes["in_dim"],
        "hidden": sizes["hidden"],
        "latent_dim": sizes["z"],
        "decoder_width": sizes["dec_hidden"],
        "decoder_ratios": meta.get("decoder_ratios", WhisperXVAEConfig.decoder_ratios),
    }
    arguments["encoder_ratios"] = meta.get("encoder_ratios", arguments["decoder_ratios"][::-1])
    whisper = meta.get("whisper_dims")
    if whisper:
        arguments |= {
            "mel_bands": whisper["n_mels"],
            "whisper_context": whisper["n_audio_ctx"],
            "whisper_heads": whisper["n_audio_head"],
            "whisper_layers": whisper["n_audio_layer"],
        }
    return WhisperXVAEConfig(**arguments)


def inference_weights(case: Case) -> dict[str, Tensor]:
    """Without Whisper's text half: filling its 900 M numbers would take longer than the case."""
    return case.weights(lambda key: not key.startswith("semantic_model.decoder."))


def build(case: Case) -> WhisperXVAE:
    """The case's network; where it has the decoder's half alone, the rest stays on the meta device."""
    state = inference_weights(case)
    config = config_of(case)
    if any(key.startswith("CodecEnc.") for key in state):
        return WhisperXVAE.from_tensors(asdict(config), rename_all(state, RULES), case.name)
    with torch.device("meta"):
        model = WhisperXVAE(config).eval()
    half = nn.ModuleDict({"out_proj": model.out_proj, "decoder": model.decoder})
    load_strict(half, rename_all(state, RULES), case.name, assign=True)
    return model


def decode(model: WhisperXVAE, latent: Tensor) -> dict[str, Tensor]:
    hidden = model.out_proj(latent.transpose(1, 2))
    layers = model.decoder.model
    assert isinstance(layers[-1], nn.Tanh)
    return {"out_proj": hidden, "pre_tanh": layers[:-1](hidden), "decode": model.decode(latent)}


@runner("wxvae_")
@torch.no_grad()
def run_vae(case: Case) -> dict[str, Tensor]:
    model = build(case)
    mel = generated_input(case, "mel") if "mel" in case.meta.get("inputs_generated", {}) else case.inputs.get("mel")
    if mel is not None:
        mel = mel.flatten(0, 1)  # the official program carries a channel axis
    out: dict[str, Tensor] = {}
    for name, value in case.inputs.items():
        kind, _, length = name.partition("_")
        if kind == "wav" and length:
            out[f"encode_{length}"] = model.encode_window(value, mel)
        elif kind == "latent" and length.isdigit():
            out[f"decode_{length}"] = model.decode(value)
        elif kind == "latent":
            out |= decode(model, value)
    if "wav" not in case.inputs:
        return out

    wave = case.inputs["wav"]
    maps = [wave]
    for layer in model.encoder.block:
        maps.append(layer(maps[-1]))
    states = model.semantic(mel)
    mean, scale = model.posterior(wave, mel)
    out |= {
        "enc": maps[-1],
        "semantic_50hz": states,
        "posterior_mean_scale_bct": torch.cat([mean, scale], 1),
        "encode_btc": model.encode_window(wave, mel),
    }
    for name, expected in case.outputs.items():
        block = re.fullmatch(r"enc_block(\d+)(_tail)?", name)
        if block:
            value = maps[int(block[1]) + 1]  # after the wave and the first convolution
            out[name] = value[..., -expected.shape[-1] :] if block[2] else value
        elif name == "semantic_50hz_head":
            out[name] = case.first(name, states, 1)
        elif name == "semantic_50hz_strided":
            out[name] = case.every(name, states, 1)
    return out


@runner("whisper_logmel")
def run_log_mel(case: Case) -> dict[str, Tensor]:
    wave = case.inputs["wav"]
    expected = case.outputs
    bands = expected["filters"].shape[0]

    padded = log_mel(pad_or_trim(wave, WINDOW), bands)
    trimmed = log_mel(pad_or_trim(generated_input(case, "wav_long"), WINDOW), bands)
    n = expected["mel_batch2"].shape[-1] * HOP
    levels = mel_levels(torch.stack([wave[:n], 0.01 * wave[n : 2 * n]]), bands)
    return {
        "filters": mel_filters(RATE, 400, bands).T,
        "mel_padded_head": case.first("mel_padded_head", padded, 1),
        "mel_padded_strided": case.every("mel_padded_strided", padded, 1),
        "mel_trimmed_strided": case.every("mel_trimmed_strided", trimmed, 1),
        "mel_unpadded": log_mel(case.inputs["wav_b"], bands),
        "mel_zeros": log_mel(torch.zeros(expected["mel_zeros"].shape[-1] * HOP), bands),
        "mel_batch2": (levels.clamp_min(levels.amax() - 8) + 4) / 4,  # openai-whisper takes one peak over the batch
    }


@runner("resample")
def run_resample(case: Case) -> dict[str, Tensor]:
    out = {}
    for name in case.outputs:
        source, target = map(int, name.removeprefix("r").split("_"))
        out[name] = resample(case.inputs["wav"], source, target)
    return out

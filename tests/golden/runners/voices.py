"""Runners for the encoders of voices and of expressions: `wavlm*`, `ecapa*`, `ge2e_*`, `poster_*`, `syncnet_*`.

Axes: B batch, N samples, T frames, K hidden states, C channels.
"""

import ast
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from engine.metrics.lip_sync import SyncNet, mfcc, sync_score
from engine.nn.ge2e import GE2EEncoder
from engine.official import rename_all
from engine.release import build_with
from hicodit.conditions.poster2 import POSTER2
from talker_t2av.speaker.encoder import LARGE, RULES, EcapaTDNN, WavLMEncoder, head_sizes, mix_states, standardise
from tests.golden.runners import Case, runner

# --- WavLM and ECAPA-TDNN ---

WAVLM = "feature_extract.model."
FIELDS = {  # of the original's configuration, as transformers names them
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "layer_norm_first": "do_stable_layer_norm",
    "conv_bias": "conv_bias",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_bucket_distance",
}


def wavlm_settings(original: dict[str, Any]) -> dict[str, Any]:
    settings = LARGE | {FIELDS[name]: value for name, value in original.items() if name in FIELDS}
    if "extractor_mode" in original:
        settings["feat_extract_norm"] = "layer" if original["extractor_mode"] == "layer_norm" else "group"
    if "conv_feature_layers" in original:  # a formula such as "[(8,10,5)] + [(8,3,2)] * 4"
        parts = [part.partition("*") for part in original["conv_feature_layers"].split("+")]
        layers = [layer for text, _, times in parts for layer in ast.literal_eval(text.strip()) * int(times or 1)]
        settings |= zip(("conv_dim", "conv_kernel", "conv_stride"), map(list, zip(*layers)))
    return settings


def head_outputs(head: EcapaTDNN, mixed: Tensor) -> dict[str, Tensor]:
    """All that a case may ask of the head, by the names of the cases; `mixed` (B, C, T) is the states' mix."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, inputs, output: seen.update({name: output})

    normalised = standardise(mixed)
    modules = {f"layer{i}": getattr(head, f"layer{i}") for i in range(1, 5)} | {"pooled": head.pooling}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    embedding = head(normalised)
    for handle in handles:
        handle.remove()
    means = {f"{name}_mean": value.mean(-1) for name, value in seen.items() if name != "pooled"}
    return {"summed": mixed, "instance_norm": normalised, "embedding": embedding, **seen, **means}


@runner("ecapa")
@torch.no_grad()
def run_ecapa(case: Case) -> dict[str, Tensor]:
    weights = case.weights()
    given = case.inputs
    states = given["hidden_states"] if "hidden_states" in given else given["base"] @ given["mix"]
    named = rename_all(weights, RULES)
    head = EcapaTDNN(states.shape[-1], **head_sizes(named)).eval()
    head.load_state_dict({k.removeprefix("head."): v for k, v in named.items() if k != "feature_weight"})
    return head_outputs(head, mix_states(states, weights["feature_weight"]))


def complete(case: Case) -> dict[str, Tensor]:
    """The case's weights by full released names; where it has WavLM alone, a head of ones stands in."""
    weights = case.weights()
    if "feature_weight" in weights:
        return weights
    if not any(name.startswith(WAVLM) for name in weights):
        weights = {WAVLM + name: value for name, value in weights.items()}
    head = EcapaTDNN(case.config["encoder_embed_dim"], 8, 8, 8, 8).state_dict()
    return weights | head | {"feature_weight": torch.zeros(case.config["encoder_layers"] + 1)}


@runner("wavlm")
@torch.no_grad()
def run_wavlm(case: Case) -> dict[str, Tensor]:
    encoder = WavLMEncoder.from_upstream(
        complete(case), wavlm_settings(case.config), case.config.get("normalize", True), case.name
    )
    if "wav" in case.inputs:
        waves = list(case.inputs["wav"])
    else:
        names = sorted((n for n in case.inputs if n.startswith("wav")), key=lambda n: int(n.removeprefix("wav")))
        waves = [case.inputs[name] for name in names]
    states = encoder.hidden_states(waves)
    out = {
        "hidden_states": states,
        "hidden_mean": states.mean(-2),
        "hidden_last_frame0": states[-1][:, 0],
        "wav_normalised": nn.utils.rnn.pad_sequence([encoder.normalise(wave) for wave in waves], batch_first=True),
    }
    mixed = mix_states(states, encoder.feature_weight)
    return out | head_outputs(encoder.head, mixed)


# --- GE2E ---


@runner("ge2e_net", "ge2e_pretrained")
@torch.no_grad()
def run_ge2e_network(case: Case) -> dict[str, Tensor]:
    """With the case's weights, or with those of the package where it has none."""
    network = GE2EEncoder().network
    if case.keys:
        weights = case.weights()
        missing, unexpected = network.load_state_dict(weights, strict=False)
        # The package's own checkpoint has two more entries, of the training loss.
        if missing or set(unexpected) - {"similarity_weight", "similarity_bias"}:
            raise ValueError(f"{case.name}: missing {missing}, unexpected {unexpected}")
    return {"embedding": network(case.inputs["mels"])}


@runner("ge2e_slices")
def run_ge2e_slices(case: Case) -> dict[str, Tensor]:
    """Rows (n_samples, 10 rate, 100 coverage, wave start and stop, mel start and stop) for the settings of the case."""
    network = GE2EEncoder().network
    settings = list(dict.fromkeys((int(row[1]), int(row[2])) for row in case.outputs["rows"]))
    rows = []
    for samples in case.inputs["n_samples"].tolist():
        for rate, coverage in settings:
            slices = network.compute_partial_slices(samples, rate / 10, coverage / 100)
            rows += [[samples, rate, coverage, w.start, w.stop, m.start, m.stop] for w, m in zip(*slices)]
    return {"rows": torch.tensor(rows)}


class _GivenFlags:
    """In place of webrtcvad's detector: says what the case says, window by window."""

    def __init__(self, flags: Tensor):
        self.flags = iter(flags.bool().tolist())

    def is_speech(self, *_: object, **__: object) -> bool:
        return next(self.flags)


@runner("ge2e_audio")
def run_ge2e_audio(case: Case) -> dict[str, Tensor]:
    audio = GE2EEncoder().audio
    wave = case.inputs["wav"].numpy()
    loud = 30 * wave
    target = audio.audio_norm_target_dBFS
    normalised = audio.normalize_volume(wave, target, increase_only=True)

    def trim(flags: Tensor) -> np.ndarray:
        with mock.patch.object(audio.webrtcvad, "Vad", lambda mode: _GivenFlags(flags)):
            return audio.trim_long_silences(normalised)

    trimmed, other = trim(case.inputs["vad_flags"]), trim(case.inputs["other_flags"])
    peaks = [np.abs(audio.normalize_volume(loud, target, increase_only=True)).max(), np.abs(loud).max()]
    out = {
        "normalised": normalised,
        "mel": audio.wav_to_mel_spectrogram(normalised),
        "trimmed": trimmed,
        "trimmed_len": [len(trimmed), len(other)],
        "trimmed_other_sum": [np.sum(other, dtype=np.float64)],
        "loud_unchanged_peak": peaks,
    }
    return {name: torch.as_tensor(np.asarray(value)) for name, value in out.items()}


# --- POSTER V2 ---


@runner("poster")
@torch.no_grad()
def run_poster(case: Case) -> dict[str, Tensor]:
    weights = case.weights()
    names = tuple(map(str, range(len(weights["VIT.head.linear.weight"]))))  # in the network's own order
    model = POSTER2.from_upstream(weights, names, case.name)
    picture = case.inputs["image_rgb"]
    pictures = picture if picture.ndim == 4 else picture[None]
    x = model.normalise(pictures.permute(0, 3, 1, 2).float() / 255)
    small = model.shrink(x)
    # Rounding of the maps is amplified a hundred times on the way to the tokens, and oneDNN's convolutions round more.
    with torch.backends.mkldnn.flags(enabled=False):
        maps = model.fuse(x)
        out = {"tokens": model.tokens(maps), "logits": model.logits(x)}
        named = {"ffn": maps, "ir": model.ir_back(small), "landmark": model.face_landback(small)}
    for name, levels in named.items():
        out |= {f"{name}{i}_mean": level.mean((-1, -2)) for i, level in enumerate(levels, 1)}
    return out


# --- SyncNet ---


@runner("syncnet_net")
@torch.no_grad()
def run_syncnet(case: Case) -> dict[str, Tensor]:
    model = build_with(SyncNet, case.weights(), case.name)
    frames = case.inputs["frames_bgr"]
    frames = (frames if frames.ndim == 5 else frames[None]).permute(0, 4, 1, 2, 3).float()
    return {
        "audio": model.audio(case.inputs["mfcc"]),
        "lip": model.lip(frames),
        "lip_feature": model.lip_features(frames),
    }


@runner("syncnet_mfcc")
def run_mfcc(case: Case) -> dict[str, Tensor]:
    coefficients = len(case.outputs["mfcc"])
    return {"mfcc": torch.from_numpy(mfcc(case.inputs["wav_int16"].numpy(), coefficients))}


@runner("syncnet_offset")
def run_offset(case: Case) -> dict[str, Tensor]:
    shift = case.outputs["dists"].shape[1] // 2
    score = sync_score(case.inputs["lip"], case.inputs["audio"], shift)
    mean = score.distances.mean(0)
    by_window = mean.median() - score.distances[:, mean.argmin()]
    return {
        "dists": score.distances,
        "mean_dist": mean,
        # A median over nine windows, with zeros beyond the ends.
        "framewise_confidence": nn.functional.pad(by_window, (4, 4)).unfold(0, 9, 1).median(-1).values,
        "lse_c": torch.tensor(score.confidence),
        "lse_d": torch.tensor(score.distance),
        "offset": torch.tensor(score.offset),
    }

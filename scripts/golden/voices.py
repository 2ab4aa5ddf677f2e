"""Runners for the encoders of voices and of expressions: `wavlm*`, `ecapa*`, `ge2e_*`, `poster_*`, `syncnet_*`.

Axes: B batch, N samples, T frames, K hidden states, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scripts.golden import Case, runner
from talker_t2av.speaker import EcapaTDNN, SpeakerEncoder, mix_states, standardise
from talker_t2av.speaker_names import LARGE, WAVLM, head_sizes, our_name

# --- WavLM and ECAPA-TDNN ---


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
    head = EcapaTDNN(states.shape[-1], **head_sizes(weights)).eval()
    head.load_state_dict({our_name(k).removeprefix("head."): v for k, v in weights.items() if k != "feature_weight"})
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
    encoder = SpeakerEncoder.from_released(complete(case), {**LARGE, **case.config}, case.name)
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

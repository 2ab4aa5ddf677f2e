"""HiCoDiT models of a claim: initial weights, derived releases, and losses by clip.

Axes: K levels, L token frames.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import compose, plain
from engine.evaluation.statistics import derangement
from engine.release import find_codec
from engine.seeding import generator_for
from engine.shards.recordings import spread
from hicodit.conditions import encoder_config
from hicodit.conditions.types import Conditions
from hicodit.data import HiCoDiTDataset
from hicodit.diffusion import LogLinearNoise, masked_at, weighted_score_entropy
from hicodit.model import HiCoDiT, ModelConfig, positions_of, rows_of
from hicodit.pipeline import BUNDLED, HiCoDiTPipeline
from hicodit.system import CODECS, HiCoDiTSystem
from hicodit.validation import stored_conditions

TIMES = (0.25, 0.75)  # of the loss: the middle of each half
LOW = 2  # levels in `score_entropy_low` of every variant, as in the paper
LOSSES = ("score_entropy_low", "score_entropy_high", "expression_gain_high", "identity_gain_low")
# The identity loss reaches these parts alone, and with the true voice as its input the score network does not see them:
# without that loss it is trained exactly as in the full model.
IDENTITY = ("model.identity_adapter.", "encoders.identity.")
SHARED = ("encoders.lip.", "encoders.expression.")  # parts that may start trained: no claim is about them


def start(folder: Path, settings: list[str], seed: int, encoders: str | Path) -> Path:
    """Write a release with random weights, except for the `SHARED` parts, which are those of the release `encoders`."""
    task = plain(compose("train", settings).task)
    torch.manual_seed(seed)
    system = HiCoDiTSystem(ModelConfig(**task["model"]), encoder_config(task["encoders"]))
    take(system, HiCoDiTSystem.from_pretrained(encoders), SHARED)
    return system.save_pretrained(folder, "Where the training of an ablation starts.\n")


def derive(trained: Path, folder: Path, seed: int) -> Path:
    """Write a copy of the release `trained` whose `IDENTITY` parts have random weights."""
    system = HiCoDiTSystem.from_pretrained(trained)
    torch.manual_seed(seed)
    take(system, HiCoDiTSystem(system.model.config, system.encoders.config), IDENTITY)
    text = f"{trained}, with an untrained adapter from face to voice.\n"
    extra = {**system.release, "codec": str(find_codec(trained, system.release["codec"], CODECS, BUNDLED.parent))}
    return system.save_pretrained(folder, text, extra)


def take(system: HiCoDiTSystem, other: HiCoDiTSystem, parts: tuple[str, ...]) -> None:
    """Load the tensors of `other` whose names begin with one of `parts`."""
    state = {key: value for key, value in other.state_dict().items() if key.startswith(parts)}
    system.load_state_dict(state, strict=False)


@torch.inference_mode()
def losses(release: str, shards: str | Path, clips: int | None) -> dict[str, dict[str, tuple[float, float]]]:
    """Measure `LOSSES` on `clips` clips of prepared shards (None: all). Return (a, b) by figure and clip.

    These are the score entropies in nats per token of levels 1-2 and of the other levels, at `TIMES`, with conditions
    from video alone, and their increase with the expressions, or the face, of another clip. All models have the same
    masks.
    """
    pipeline = HiCoDiTPipeline.from_pretrained(release, precision="fp32")
    codec = find_codec(Path(release), pipeline.system.release.get("codec", "rvq_speech"), CODECS, BUNDLED.parent)
    data = HiCoDiTDataset(shards, codec, augment=False)
    samples = [data.read(index) for index in spread(len(data), clips or len(data))]
    conditions = [stored_conditions(pipeline, [clip]) for _, clip in samples]
    others = derangement(len(samples), np.random.default_rng(0))
    pairs: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in LOSSES}
    for (info, clip), own, other in zip(samples, conditions, others):
        expression = torch.from_numpy(np.resize(conditions[other].expression.numpy(), own.expression.shape))
        versions = own, replace(own, expression=expression), replace(own, identity=conditions[other].identity)
        tokens = clip["tokens"].T[None]
        values = [entropy(pipeline.system.model, each, tokens, info["key"]).double().tolist() for each in versions]
        low, high = values[0]
        other_expression = values[1][1]
        other_face = values[2][0]
        for name, value in zip(LOSSES, (low, high, other_expression - high, other_face - low)):
            pairs[name][info["key"]] = value, 1.0
    return pairs


def entropy(model: HiCoDiT, conditions: Conditions, tokens: Tensor, key: str) -> Tensor:
    """Return the loss (2,) of levels 1-2 and of the other levels, divided by the number of tokens of all levels.

    Args:
        tokens: (1, K, L).
        key: key of the clip, which determines its masks.
    """
    noise = LogLinearNoise()
    conditioning = model.prepare(conditions)
    out = torch.zeros(2)
    for number, moment in enumerate(TIMES):
        t = torch.full((1,), moment)
        uniforms = torch.rand(tokens.shape[1:], generator=generator_for(0, "claims", key, number))
        masked = masked_at(noise.sigma(t), uniforms[None])
        where = positions_of(masked, tokens.device)
        log_q = model(torch.where(masked, model.mask_id, tokens), noise.sigma(t), conditioning, where)[0]
        clip, level, frame = rows_of(where)
        score = weighted_score_entropy(log_q, tokens[clip, level, frame], t[clip], noise)
        out.index_put_(((level >= LOW).long(),), score, accumulate=True)
    return out / tokens.numel() / len(TIMES)

"""HiCoDiT models of a claim: with which weights they start, what is derived from them, and their losses by clip.

Axes: B batch, N clips, K levels, L token frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.config import compose, plain
from engine.evaluation.statistics import derangement
from engine.release import find_codec
from engine.seeding import generator_for
from hicodit.conditions import encoder_config
from hicodit.conditions.types import Conditions, windows_of
from hicodit.data import HiCoDiTDataset
from hicodit.diffusion import LogLinearNoise, masked_at, weighted_score_entropy
from hicodit.evaluate import stored_conditions, stored_samples
from hicodit.model import HiCoDiT, ModelConfig, positions_of, rows_of
from hicodit.pipeline import BUNDLED, HiCoDiTPipeline
from hicodit.system import CODECS, HiCoDiTSystem

TIMES = (0.25, 0.75)  # of the loss: the middle of each half
LOW = 2  # levels in `score_entropy_low` of every variant, as in the paper
BATCH = 8
LOSSES = ("score_entropy_low", "score_entropy_high", "expression_gain_high", "identity_gain_low")
# The identity loss reaches these parts alone, and with the true voice as its input the score network does not see them:
# without that loss it is trained exactly as in the full model.
IDENTITY = ("model.identity_adapter.", "encoders.identity.")
SHARED = ("encoders.lip.", "encoders.expression.")  # parts that may start trained: no claim is about them


def start(folder: Path, settings: list[str], seed: int, encoders: str | Path) -> Path:
    """Write a release with random weights, but for the `SHARED` parts, which are those of the release `encoders`."""
    task = plain(compose("train", settings).task)
    torch.manual_seed(seed)
    system = HiCoDiTSystem(ModelConfig(**task["model"]), encoder_config(task["encoders"]))
    take(system, HiCoDiTSystem.from_pretrained(encoders), SHARED)
    return system.save(folder, "Where the training of an ablation starts.\n")


def derive(trained: Path, folder: Path, seed: int) -> Path:
    """Write the release `trained` with untrained `IDENTITY` parts."""
    system = HiCoDiTSystem.from_pretrained(trained)
    torch.manual_seed(seed)
    take(system, HiCoDiTSystem(system.model.config, system.encoders.config), IDENTITY)
    text = f"{trained}, with an untrained adapter from face to voice.\n"
    extra = {**system.release, "codec": str(find_codec(trained, system.release["codec"], CODECS, BUNDLED.parent))}
    return system.save(folder, text, extra)


def take(system: HiCoDiTSystem, other: HiCoDiTSystem, parts: tuple[str, ...]) -> None:
    """Load the tensors of `other` whose names begin with one of `parts`."""
    state = {key: value for key, value in other.state_dict().items() if key.startswith(parts)}
    system.load_state_dict(state, strict=False)


@torch.inference_mode()
def losses(release: str, shards: str | Path, clips: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Measure `LOSSES` of `clips` clips of prepared shards: figure -> clip -> (a, b).

    Score entropy in nats per token of levels 1-2 and of the others, at `TIMES`, with conditions from pictures alone;
    and by how much it grows with another clip's expressions, and with its face. Every model meets the same masks.
    """
    pipeline = HiCoDiTPipeline.from_pretrained(release, precision="fp32")
    codec = find_codec(Path(release), pipeline.system.release.get("codec", "rvq_tiny"), CODECS, BUNDLED.parent)
    samples = stored_samples(HiCoDiTDataset(shards, codec, augment=False), clips)
    table = losses_of(pipeline, samples).double()  # (N, 3 versions, 2 groups of levels)
    own, expression, identity = table.unbind(1)
    columns = own[:, 0], own[:, 1], (expression - own)[:, 1], (identity - own)[:, 0]
    keys = [info["key"] for info, _ in samples]
    return {n: {key: (value, 1.0) for key, value in zip(keys, c.tolist())} for n, c in zip(LOSSES, columns)}


def losses_of(pipeline: HiCoDiTPipeline, samples: Sequence[tuple[dict[str, Any], dict[str, Tensor]]]) -> Tensor:
    """Return losses (N, 3, 2): with own conditions, with other expressions, with another face; of both level groups.

    samples: JSON and tensors, see `HiCoDiTDataset.read`.
    """
    model, (infos, clips) = pipeline.system.model, zip(*samples)
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]["phoneme"]))
    groups = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    other, conditions = derangement(len(clips), np.random.default_rng(0)), {}
    for group in groups:
        own = stored_conditions(pipeline, [clips[i] for i in group])
        for row, i in enumerate(group):
            length = len(clips[i]["phoneme"])
            conditions[i] = own.lip[row, :length], own.identity[row], own.expression[row, : windows_of(length)]
    found = {}
    for group in groups:
        frames = torch.tensor([len(clips[i]["phoneme"]) for i in group])
        lip, identity, expression = zip(*(conditions[i] for i in group))
        far = [conditions[other[i]] for i in group]
        resized = [torch.from_numpy(np.resize(o[2].numpy(), len(e))) for o, e in zip(far, expression)]
        lip, expression, resized = (pad_sequence(parts, batch_first=True) for parts in (lip, expression, resized))
        own = Conditions(lip, torch.stack(identity), expression, frames)
        versions = own, replace(own, expression=resized), replace(own, identity=torch.stack([o[1] for o in far]))
        tokens = pad_sequence([clips[i]["tokens"] for i in group], batch_first=True).transpose(1, 2)
        keys = [infos[i]["key"] for i in group]
        found |= zip(group, torch.stack([_entropy(model, version, tokens, keys) for version in versions], 1))
    return torch.stack([found[i] for i in range(len(clips))])


def _entropy(model: HiCoDiT, conditions: Conditions, tokens: Tensor, keys: Sequence[str]) -> Tensor:
    """Tokens (B, K, L) of clips `keys` -> loss (B, 2) of levels 1-2 and of the others, for one token of all levels."""
    noise, conditioning, out = LogLinearNoise(), model.prepare(conditions), 0
    valid = torch.arange(tokens.shape[2]) < 2 * conditions.frames[:, None]
    for number, moment in enumerate(TIMES):
        t = torch.full((len(tokens),), moment)
        drawn = [torch.rand(len(tokens[0]), int(2 * n), generator=generator_for(0, "claims", key, number))
                 for n, key in zip(conditions.frames, keys)]  # fmt: skip
        uniforms = pad_sequence([u.T for u in drawn], batch_first=True, padding_value=1.0).transpose(1, 2)
        masked = masked_at(noise.sigma(t), uniforms) & valid[:, None]
        where = positions_of(masked, tokens.device)
        log_q = model(torch.where(masked, model.mask_id, tokens), noise.sigma(t), conditioning, where)[0]
        clip, level, frame = rows_of(where)
        entropy = weighted_score_entropy(log_q, tokens[clip, level, frame], t[clip], noise)
        sums = torch.zeros(len(tokens), 2).index_put((clip, (level >= LOW).long()), entropy, accumulate=True)
        out = out + sums / (valid.sum(1, keepdim=True) * len(tokens[0])) / len(TIMES)
    return out

"""What a trained HiCoDiT does on held-out clips, clip by clip.

Every model is measured on the same clips: the loss with the same masked tokens at the same times, speech with the same
draws. So models can be compared by paired differences (`benchmarks.paired`).

Axes: B batch, N clips, K levels, L token frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.paired import Pairs
from benchmarks.trained import measure_once
from engine.progress import track
from engine.seeding import generator_for
from engine.shards.recordings import read_manifest
from hicodit.conditions.types import Conditions, windows_of
from hicodit.data import HiCoDiTDataset, HiCoDiTSample
from hicodit.diffusion import LogLinearNoise, masked_at, weighted_score_entropy
from hicodit.evaluation import derangement
from hicodit.held_out import HeldOut, stored_crops, stored_samples, stored_voices, synthesise
from hicodit.model import HiCoDiT, positions_of, rows_of
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import with_preset

TIMES = (0.25, 0.75)  # of the loss: the middle of each half
LOW = 2  # levels in `dse_low` of every variant, as in the paper
BATCH = 8


def measure(
    release: Path, codec: Path, corpus: Path, shards: Path, count: int, sampler: str, truth: Path
) -> dict[str, Pairs]:
    """All figures of a release: name -> clip -> the pair, None where the figure does not count the clip.

    Measured are `count` clips, evenly spread over the split SHARDS, which were made of the recordings CORPUS. Their
    voices are looked for among those that have several clips in the split.

    Args:
        sampler: a file of configs/sampler.
        truth: JSON file of the true clips' prosody, written where it is missing.
    """
    samples = stored_samples(HiCoDiTDataset(shards, codec, augment=False), count)
    exact = HiCoDiTPipeline.from_pretrained(release, "cpu", str(codec), precision="fp32")
    figures = losses(exact, samples)
    pipeline = HiCoDiTPipeline.from_pretrained(release, "cpu", str(codec), precision="bf16")
    pipeline.sampler, pipeline.guidance = with_preset(sampler, pipeline.sampler, pipeline.guidance)
    crops = [stored_crops(sample, pipeline.system.encoders.config.picture_every) for sample in samples]
    rows = {row["id"]: row for row in read_manifest(corpus, shards.name)}
    rows = [rows[sample.info["key"]] for sample in samples]
    known = {voice: clips for voice, clips in stored_voices(shards).items() if len(clips) > 1}
    clips = HeldOut(corpus, shards.name, rows, crops, pipeline.codec.sample_rate, known)
    clips.truth = measure_once(truth, lambda: clips.truth)
    figures |= clips.figures([speech.wave for speech in synthesise(pipeline, crops, batch=BATCH)])
    return {name: dict(zip([row["id"] for row in rows], pairs)) for name, pairs in figures.items()}


@torch.inference_mode()
def losses(pipeline: HiCoDiTPipeline, samples: Sequence[HiCoDiTSample]) -> dict[str, list]:
    """Score entropy per token of levels 1-2 and of the others, at `TIMES`, with conditions from pictures alone; and by
    how much it grows with the expressions, and with the face, of another clip. Every model meets the same masks.
    """
    every, model = pipeline.system.encoders.config.picture_every, pipeline.system.model
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].phoneme))
    other = derangement(len(samples), np.random.default_rng(0))
    found: dict[int, Tensor] = {}
    conditions = {}
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        own = pipeline.conditions([stored_crops(samples[i], every) for i in group])
        for row, i in enumerate(group):
            length = len(samples[i].phoneme)
            conditions[i] = own.lip[row, :length], own.identity[row], own.expression[row, : windows_of(length)]
    for start in track(range(0, len(order), BATCH), -(-len(order) // BATCH), "losses"):
        group = order[start : start + BATCH]
        frames = torch.tensor([len(samples[i].phoneme) for i in group])
        lip, identity, expression = zip(*(conditions[i] for i in group))
        far = [conditions[other[i]] for i in group]
        resized = [torch.from_numpy(np.resize(o[2].numpy(), len(e))) for o, e in zip(far, expression)]
        lip, expression, resized = (pad_sequence(parts, batch_first=True) for parts in (lip, expression, resized))
        given = Conditions(lip, torch.stack(identity), expression, frames)
        versions = given, replace(given, expression=resized)
        versions += (replace(given, identity=torch.stack([o[1] for o in far])),)
        tokens = pad_sequence([samples[i].tokens for i in group], batch_first=True).transpose(1, 2)
        keys = [samples[i].info["key"] for i in group]
        values = torch.stack([_entropy(model, version, tokens, keys) for version in versions], 1)
        found |= zip(group, values)
    table = torch.stack([found[i] for i in range(len(samples))])  # (N, 3 versions, 2 groups of levels)
    figures = {}
    for column, name in enumerate(("low", "high")):
        own, expression, identity = table[..., column].T.double()
        for kind, values in (("dse", own), ("expression_gain", expression - own), ("identity_gain", identity - own)):
            figures[f"{kind}_{name}"] = [(value, 1.0) for value in values.tolist()]
    return figures


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

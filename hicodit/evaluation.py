"""Synthesise held-out clips and measure what comes out. Axes: T video frames, N samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.codec import load_codec
from engine.errors import UserError
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.progress import track
from hicodit.data import ShardedClips, open_clips
from hicodit.features import FeatureSplit
from hicodit.guidance import GuidanceScales
from hicodit.pipeline import FPS, Crops, HiCoDiTPipeline, Speech
from hicodit.samplers import SamplerConfig
from hicodit.system import CODECS, HiCoDiTSystem

WAVES, VIDEOS = 4, 2  # that a validation keeps of each split


def feature_crops(split: FeatureSplit | ShardedClips, index: int, every: int = 1) -> Crops:
    """Crops of a prepared clip; each frame in `every` takes the nearest of the stored face pictures."""
    clip = split[index]
    frames = len(clip.mouth)
    nearest = (np.arange(0, frames, every) * len(clip.faces)) // frames
    return Crops(clip.mouth.numpy(), clip.faces.numpy()[nearest])


def synthesise(
    pipeline: HiCoDiTPipeline,
    crops: Sequence[Crops],
    seed: int = 0,
    batch: int = 16,
    expressions: Sequence[np.ndarray] | None = None,
) -> list[Speech]:
    """Speech of many clips, batched with clips of like length; clip i is drawn with seed + i.

    `expressions` (each (J,) classes of half seconds) replaces what the faces show.
    """
    order = sorted(range(len(crops)), key=lambda i: len(crops[i].mouth))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    out: dict[int, Speech] = {}
    for group in track(groups, len(groups), "batches"):
        shown = [expressions[i] for i in group] if expressions is not None else None
        out |= zip(group, pipeline.run([crops[i] for i in group], [seed + i for i in group], expressions=shown))
    return [out[i] for i in range(len(crops))]


def evaluate_features(
    system: HiCoDiTSystem,
    codec: Path,
    features: str | Path,
    grammar: Path | None,
    clips: int,
    sampler: SamplerConfig,
    guidance: GuidanceScales,
    folder: Path | None,
) -> dict[str, float]:
    """Word error rate of `clips` prepared clips, from their pictures alone.

    Four waves go to `folder`, and two videos of the mouths that they were read from. Without a grammar for the
    recogniser nothing is measured.
    """
    loaded = load_codec(codec, CODECS)
    split = open_clips(features, loaded.digest())
    device = next(system.parameters()).device
    pipeline = HiCoDiTPipeline(system, loaded, sampler, guidance, device)
    chosen = torch.linspace(0, len(split) - 1, min(clips, len(split))).round().long().tolist()
    speech = synthesise(pipeline, [feature_crops(split, i, system.encoders.config.picture_every) for i in chosen])
    if folder is not None:
        for n, (i, said) in enumerate(list(zip(chosen, speech))[:WAVES]):
            write_wav(folder / f"{split[i].info['id']}.wav", said.wave, said.rate)
            if n < VIDEOS:
                mouth = said.crops.mouth.repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3)
                write_video(folder / f"{split[i].info['id']}.mp4", mouth, FPS, said.wave, said.rate)
    if grammar is None:
        return {}
    try:
        recogniser = Recogniser(grammar)
    except UserError as error:  # the recogniser is an extra; training goes on without it
        print(f"no word error rate: {error}", flush=True)
        return {}
    heard = [recogniser.transcribe(s.wave, s.rate) for s in speech]
    return {"wer": word_error_rate([split[i].info["text"] for i in chosen], heard)}

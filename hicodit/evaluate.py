"""Speech generation for the clips of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.evaluation.clips import Clip
from engine.evaluation.generate import ALL_BATCHES, generate_missing, write_facts, write_take
from engine.evaluation.statistics import derangement
from engine.faces.source import FaceSource
from engine.media.ffmpeg import probe
from engine.metrics.metric import wave_of
from engine.nn.ge2e import GE2EEncoder
from engine.settings import override, require_choice
from hicodit.conditions.types import Crops
from hicodit.generation import sampling_windows
from hicodit.pipeline import BUNDLED, HiCoDiTPipeline
from hicodit.settings import with_preset

EXPRESSIONS = ("own", "shuffled", "exchanged")


def write_outputs(
    clips: Sequence[Clip],
    folder: Path,
    device: str,
    weights: str | None = None,
    codec: str | None = None,
    precision: str = "fp32",
    detector: str | None = None,
    face_landmarks: str | None = None,
    sampler: str = "release",
    sampling: Mapping[str, float | str] | None = None,
    guidance: Mapping[str, float] | None = None,
    voice: bool = False,
    expressions: str = "own",
    seed: int = 0,
    batch_size: int = 8,
    chosen: slice = ALL_BATCHES,
    **other: object,
) -> None:
    """Generate the missing speech FOLDER/ID.wav for the videos of clips. Clip i uses the seed seed + i.

    Args:
        detector, face_landmarks: see `FaceSource.from_settings`. If both are None, those of training are used.
        sampler: name of a file in configs/sampler.
        sampling, guidance: settings that override it.
        voice: use the voice of each clip's prompt instead of the one predicted from the face.
        chosen: slice of the batches to write.
        other: ignored settings of other models.
        expressions: own, shuffled (those of another clip), or exchanged (first and last expression of the clip
            swapped).
    """
    require_choice("generate.expressions", expressions, EXPRESSIONS)
    face_source = FaceSource.from_settings(detector, face_landmarks) if detector or face_landmarks else None
    pipeline = HiCoDiTPipeline.from_pretrained(weights or BUNDLED, device, codec, None, face_source, precision)
    settings, scales = with_preset(sampler, pipeline.sampler, pipeline.guidance)
    pipeline.sampler = override(settings, sampling or {})
    pipeline.guidance = override(scales, guidance or {})
    tokens = pipeline.codec
    ge2e = GE2EEncoder(device) if voice else None
    facts = {"sampler": asdict(pipeline.sampler), "guidance": asdict(pipeline.guidance), "precision": precision}
    facts |= {"voice": voice, "expressions": expressions, "seed": seed, "faces": pipeline.face_source.name}
    bits = tokens.levels * np.log2(tokens.codes) * tokens.frame_rate
    write_facts(folder, "hicodit", weights, bits_per_second=float(bits), **facts)
    others = derangement(len(clips), np.random.default_rng(0))

    def crops_of(number: int, clip: Clip) -> Crops:
        """Return the crops of a clip, with the expressions to generate."""
        crops = pipeline.crops(clip.truth.source)
        if expressions == "own":
            return crops
        other = pipeline.crops(clips[others[number]].truth.source) if expressions == "shuffled" else crops
        classes = other.expression.cpu().numpy()
        classes = exchange(classes) if expressions == "exchanged" else np.resize(classes, len(crops.expression))
        return replace(crops, expression=torch.from_numpy(classes))

    def write(batch: Sequence[tuple[int, Clip]]) -> None:
        if any(clip.truth.source is None for _, clip in batch):
            raise UserError("no input video: expected ID.mp4 in references=, or video in the manifest")
        crops = [crops_of(i, clip) for i, clip in batch]
        identity = None
        if ge2e is not None:  # one voice per call
            if batch[0][1].prompt.audio is None:
                raise UserError("there is no other clip of the same speaker: set reference_audio in the manifest")
            identity = ge2e.embed(wave_of(batch[0][1].prompt.audio, 16_000).copy(), 16_000)
        speeches = pipeline.run(crops, [seed + i for i, _ in batch], identity)
        for (_, clip), speech in zip(batch, speeches):
            spans = len(sampling_windows(len(speech.crops), pipeline.sampler))
            write_take(folder, clip.id, speech.wave, speech.rate, evaluations=(speech.evaluations, spans))

    def inputs(clip: Clip) -> list[Path | None]:
        return [clip.truth.source, clip.prompt.audio if voice else None]

    def length(clip: Clip) -> float:
        return probe(clip.truth.source).seconds if clip.truth.source else 0.0

    generate_missing(clips, folder, 1 if voice else batch_size, inputs, write, length, chosen)


def exchange(classes: np.ndarray) -> np.ndarray:
    """Swap the first and the last of the classes (J,), wherever they occur."""
    first = classes[0]
    last = classes[-1]
    return np.where(classes == first, last, np.where(classes == last, first, classes))

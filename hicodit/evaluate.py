"""Speech generation for the clips of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.evaluation.clips import Clip
from engine.evaluation.generate import ALL_BATCHES, write_facts, write_missing, write_take
from engine.evaluation.statistics import derangement
from engine.faces.source import FaceSource
from engine.media.ffmpeg import probe
from engine.metrics.metric import wave_of
from engine.nn.ge2e import GE2EEncoder
from engine.settings import override, require_choice
from hicodit.conditions.types import Crops
from hicodit.generation import sampling_windows
from hicodit.pipeline import BUNDLED, HiCoDiTPipeline
from hicodit.settings import require_compatible, with_preset

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
) -> None:
    """Generate the missing speech FOLDER/ID.wav for the videos of clips. Clip i uses the seed seed + i.

    Args:
        clips: clips of the evaluation.
        folder: folder of the files.
        device: device of the networks.
        weights, codec: release folders of the model and of its tokenizer. None: the bundled model; its tokenizer.
        precision: see `HiCoDiTPipeline.from_pretrained`.
        detector, face_landmarks: see `FaceSource.from_settings`. If both are None, those of training are used.
        sampler: name of a file in configs/sampler.
        sampling, guidance: settings that override it.
        voice: use the voice of each clip's prompt instead of the one predicted from the face.
        expressions: own, shuffled (those of another clip), or exchanged (first and last expression of the clip
            swapped).
        seed: seed of the first clip.
        batch_size: number of clips per batch.
        chosen: slice of the batches to write.

    Raises:
        UserError: If a setting is invalid, or an existing output was generated from other inputs.
    """
    require_choice("generate.expressions", expressions, EXPRESSIONS)
    face_source = FaceSource.from_settings(detector, face_landmarks) if detector or face_landmarks else None
    pipeline = HiCoDiTPipeline.from_pretrained(weights or BUNDLED, device, codec, None, face_source, precision)
    settings, scales = with_preset(sampler, pipeline.sampler, pipeline.guidance)
    pipeline.sampler = override(settings, sampling or {})
    pipeline.guidance = override(scales, guidance or {})
    require_compatible(pipeline.sampler, pipeline.guidance)
    facts = {"sampler": asdict(pipeline.sampler), "guidance": asdict(pipeline.guidance), "precision": precision}
    facts |= {"voice": voice, "expressions": expressions, "seed": seed, "faces": pipeline.face_source.name}
    tokenizer = pipeline.codec
    bits = tokenizer.levels * np.log2(tokenizer.codes) * tokenizer.frame_rate
    write_facts(folder, "hicodit", weights or BUNDLED, {"codec": codec}, bits_per_second=float(bits), **facts)
    writer = SpeechWriter(pipeline, clips, folder, GE2EEncoder(device) if voice else None, expressions, seed)
    rows = 1 if voice else batch_size  # a batch has one voice
    write_missing(clips, folder, rows, writer.inputs, writer.write, seconds_of_video, chosen)


class SpeechWriter:
    """Generates the speech of the clips of an evaluation and writes it to files.

    Args:
        pipeline: the model.
        clips: all clips of the evaluation.
        folder: folder of the files ID.wav.
        ge2e: encoder of the voices of the prompts. None: voices are predicted from the faces.
        expressions: see `write_outputs`.
        seed: seed of the first clip.
    """

    def __init__(
        self,
        pipeline: HiCoDiTPipeline,
        clips: Sequence[Clip],
        folder: Path,
        ge2e: GE2EEncoder | None,
        expressions: str,
        seed: int,
    ) -> None:
        self.pipeline = pipeline
        self.clips = clips
        self.folder = folder
        self.ge2e = ge2e
        self.expressions = expressions
        self.seed = seed
        self.others = derangement(len(clips), np.random.default_rng(0))  # index of another clip for each clip

    def inputs(self, number: int, clip: Clip) -> list[Path | int | None]:
        """Return the files and seeds that the speech of clip `number` depends on."""
        other = self.clips[self.others[number]].truth.source if self.expressions == "shuffled" else None
        return [clip.truth.source, clip.prompt.audio if self.ge2e is not None else None, other, self.seed + number]

    def write(self, batch: Sequence[tuple[int, Clip]]) -> None:
        """Generate and write the speech of a batch of clips, given with their indices.

        Raises:
            UserError: If a clip has no video, or no prompt although its voice is requested.
        """
        if any(clip.truth.source is None for _, clip in batch):
            raise UserError("no input video: expected ID.mp4 in references=, or video in the manifest")
        crops = [self.crops(i, clip) for i, clip in batch]
        identity = None if self.ge2e is None else self.voice(batch[0][1])
        speeches = self.pipeline.run(crops, [self.seed + i for i, _ in batch], identity)
        for (_, clip), speech in zip(batch, speeches):
            spans = len(sampling_windows(len(speech.crops), self.pipeline.sampler))
            write_take(self.folder, clip.id, speech.wave, speech.rate, evaluations=(speech.evaluations, spans))

    def crops(self, number: int, clip: Clip) -> Crops:
        """Return the crops of clip `number`, with the expressions to generate."""
        crops = self.pipeline.crops(clip.truth.source)
        if self.expressions == "own":
            return crops
        if self.expressions == "exchanged":
            classes = exchange(crops.expression.cpu().numpy())
        else:
            other = self.pipeline.crops(self.clips[self.others[number]].truth.source)
            classes = np.resize(other.expression.cpu().numpy(), len(crops.expression))
        return replace(crops, expression=torch.from_numpy(classes))

    def voice(self, clip: Clip) -> np.ndarray:
        """Return the GE2E embedding (256,) of the voice of a clip's prompt."""
        if clip.prompt.audio is None:
            raise UserError("there is no other clip of the same speaker: set reference_audio in the manifest")
        return self.ge2e.embed(wave_of(clip.prompt.audio, 16_000).copy(), 16_000)


def seconds_of_video(clip: Clip) -> float:
    """Return the length of the input video of a clip in seconds, 0 without a video."""
    return probe(clip.truth.source).seconds if clip.truth.source else 0.0


def exchange(classes: np.ndarray) -> np.ndarray:
    """Swap the first and the last of the classes (J,), wherever they occur."""
    first = classes[0]
    last = classes[-1]
    return np.where(classes == first, last, np.where(classes == last, first, classes))

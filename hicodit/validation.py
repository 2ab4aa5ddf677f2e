"""Validation of HiCoDiT during training: speech for held-out clips, and its figures.

Axes: J half seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.device import to_device
from engine.evaluation.validation import ByClip, Share, measure_outputs
from engine.faces.clip import ClipFrames
from engine.faces.source import FaceSource
from engine.faces.track import FaceTrack
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.metrics.registry import metrics_of
from engine.shards.recordings import spread
from hicodit.conditions.types import FPS, Conditions, Crops
from hicodit.data import HiCoDiTDataset, picture_frames
from hicodit.generation import generate
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.system import voice_face_frames

BATCH = 16
# clips per split whose files a validation keeps
WAVES = 4
VIDEOS = 2


class Recordings:
    """The original recordings of held-out clips, in which each face is tracked once for all validations.

    All copies of a task share one object, and so its detector and tracks.

    Args:
        folder: folder of the recordings.
        face_source: name of the face detector and landmarks, see `FaceSource.from_name`.
        shards: the shards that were prepared from the recordings.

    Raises:
        UserError: If the package of the detector is not installed.
    """

    def __init__(self, folder: Path, face_source: str, shards: str) -> None:
        self.folder = folder
        self.arguments = folder, face_source, shards
        self.face_source = FaceSource.from_name(face_source, shards)
        self.tracks: dict[str, tuple[int, FaceTrack]] = {}  # longer side of the frames, and track, by file name

    def __deepcopy__(self, memo: dict) -> Recordings:
        return self

    def __reduce__(self) -> tuple[type, tuple]:
        return Recordings, self.arguments  # not every detector can be pickled

    def crops(self, pipeline: HiCoDiTPipeline, name: str) -> Crops:
        """Crop mouth and face of a recording, as `HiCoDiTPipeline.crops`."""
        path = self.folder / name
        if name in self.tracks:
            side, track = self.tracks[name]
            frames = ClipFrames(path, FPS, side)
        else:
            frames, track = next(pipeline.track_faces(path))
            self.tracks[name] = frames.max_side, track
        return pipeline.crop_track(frames, track)


def evaluate_clips(
    pipeline: HiCoDiTPipeline,
    data: HiCoDiTDataset,
    recogniser: Path | None,
    clips: int,
    folder: Path,
    metrics: Sequence[str],
    share: Share,
    recordings: Recordings | None = None,
) -> dict[str, ByClip]:
    """Measure a share of `clips` prepared clips, with speech generated only from their video.

    Four waveforms are written to `folder`, and two videos of the mouth crops from which speech was
    generated, except when it was generated from stored features.

    Args:
        recogniser: recogniser for WER, see `words_by`.
        metrics: names of `engine.metrics.registry`. The ground truth is decoded from the ground-truth tokens.
        recordings: the original recordings, which are processed as in inference. None: speech is generated from the
            crops or features in the shards.

    Raises:
        UserError: If a recording is missing, or no face is found in it.
    """
    chosen = spread(len(data), clips)
    own = share.range(len(chosen))
    samples = [data.read(chosen[i]) for i in own]
    if not own:
        return {}
    infos, stored = zip(*samples)
    mouths = [clip.get("mouth") for clip in stored]  # crops of recordings replace them
    order = sorted(range(len(stored)), key=lambda i: len(stored[i]["phoneme"]))
    spoken: dict[int, np.ndarray] = {}
    model = pipeline.system.model
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        if recordings is None:
            conditions = stored_conditions(pipeline, [stored[i] for i in group])
        else:
            crops = [recordings.crops(pipeline, infos[i]["source"]) for i in group]
            conditions = pipeline.conditions(crops)
            for i, clip in zip(group, crops):
                mouths[i] = clip.mouth
        seeds = [own.start + i for i in group]
        tokens = generate(model, conditions, pipeline.sampler, pipeline.guidance, seeds, graphs=pipeline.graphs)
        spoken |= zip(group, pipeline.decode(tokens))
    waves = [spoken[i] for i in range(len(stored))]
    rate = pipeline.codec.sample_rate
    for n, info, mouth, wave in zip(range(WAVES)[own.start :], infos, mouths, waves):
        write_wav(folder / f"{info['key']}.wav", wave, rate)
        if n < VIDEOS and mouth is not None:
            enlarged = np.asarray(mouth).repeat(4, 1).repeat(4, 2)
            write_video(folder / f"{info['key']}.mp4", enlarged[..., None].repeat(3, 3), FPS, wave, rate)
    compared = any(metric.needs_truth for metric in metrics_of(metrics))
    true = pipeline.decode([clip["tokens"].T for clip in stored]) if compared else None
    texts = [info["text"] for info in infos]
    device = str(pipeline.device)
    return measure_outputs(metrics, texts, waves, true, rate, recogniser, device=device, numbers=own)


@torch.inference_mode()
def stored_conditions(pipeline: HiCoDiTPipeline, clips: Sequence[Mapping[str, Tensor]]) -> Conditions:
    """Encode the conditions of prepared clips (`HiCoDiTDataset.read`), from their crops or stored features.

    Each classified frame uses the nearest stored face crop.
    """
    system = pipeline.system
    if "lip" in clips[0]:

        def padded(name: str) -> Tensor:
            return to_device(pad_sequence([clip[name] for clip in clips], True), pipeline.device)

        identity = system.model.adapt_identity(padded("face_identity").float().mean(1))
        frames = torch.tensor([len(clip["lip"]) for clip in clips])
        return Conditions(padded("lip").float(), identity, padded("expression"), frames)
    crops = []
    for clip in clips:
        frames = len(clip["mouth"])
        faces = clip["faces"]
        classified = nearest_faces(faces, np.arange(0, frames, system.encoders.config.picture_every), frames)
        expression = system.window_classes(system.read_expressions(classified.movedim(-1, 1)), frames)
        voice_faces = nearest_faces(faces, np.array(voice_face_frames(frames)), frames)
        crops.append(Crops(clip["mouth"].numpy(), voice_faces.numpy(), expression))
    return pipeline.conditions(crops)


def nearest_faces(faces: Tensor, positions: np.ndarray, frames: int) -> Tensor:
    """Return the stored face crop (F, ...) that is nearest to each of n frame indices of a clip, (n, ...)."""
    return faces[np.abs(positions[:, None] - picture_frames(frames, len(faces))).argmin(1)]

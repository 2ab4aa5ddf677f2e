"""The `infer.py` job: clips in, for each a WAV, the clip with its new sound, and a figure.

Axes: T video frames, N samples.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from engine.batch_runner import run_batches
from engine.bounds import SEEDS, bounded, check_bounds
from engine.config import override, typed
from engine.errors import UserError
from engine.faces.detectors import YuNetDetector
from engine.faces.landmarks import landmark_source
from engine.faces.track import read_boxes
from engine.files import all_or_none, writable
from engine.media.audio import read_voice, write_wav
from engine.media.limits import Limits, set_limits
from engine.media.video import mux_audio
from engine.metrics.speaker import GE2EEncoder
from engine.training.distributed import pick_device
from hicodit.generation import windows
from hicodit.pipeline import BUNDLED, FPS, Crops, HiCoDiTPipeline, Speech

FACE = "_face.png", "_face.json"  # endings of the picture and of the numbers of a face track
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass
class InferConfig:
    """Types of configs/infer.yaml; what each field means stands there."""

    model: str = "hicodit"
    weights: str | None = None
    codec: str | None = None
    input: str | None = None
    output: str = ""
    reference_audio: str | None = None
    seed: int = bounded(*SEEDS, default=0)
    device: str = "auto"
    batch_size: int = bounded(1, 1024, default=8)
    figure: bool = True
    face: str = "largest"
    face_box: str | None = None
    detector: str | None = None
    face_landmarks: str | None = None
    debug: bool = False
    encoders: str | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


def find_clips(source: Path, output: Path, debug: bool = False) -> list[Path]:
    """The clip itself, or the video files of a folder in order of name.

    Raises:
        UserError: nothing there, two clips that would share output files, or a clip that its own output would replace.
    """
    try:
        source.stat()
    except OSError as error:
        raise UserError(f"no such file or folder: input={source} ({error.strerror})") from error
    if source.is_file():
        clips = [source]
    elif source.is_dir():
        clips = sorted(p for p in source.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
        if not clips:
            raise UserError(f"no clip in folder input={source}: looked for {', '.join(VIDEO_SUFFIXES)}")
    else:
        raise UserError(f"input={source} is neither a file nor a folder")
    owners: dict[Path, Path] = {}
    for clip in clips:
        for target in outputs_of(clip, output, debug):
            other = owners.setdefault(target, clip)
            if other != clip:
                raise UserError(f"{other} and {clip} would both be written to {target}: rename one")
            if os.path.realpath(target) == os.path.realpath(clip):
                raise UserError(f"output={output} would replace the clip {clip} itself: choose another folder")
            if target.is_dir():
                raise UserError(f"cannot write {target}: it is a folder")
    return clips


def outputs_of(clip: Path, folder: Path, debug: bool = False) -> list[Path]:
    suffixes = (".mp4", ".png", ".wav", *FACE) if debug else (".mp4", ".png", ".wav")
    return [folder / f"{clip.stem}{suffix}" for suffix in suffixes]


def write_outputs(clip: Path, speech: Speech, folder: Path, figure: bool, strip: Path | None = None) -> list[Path]:
    """Write all files of a clip, or none; the picture `strip` of its face track and the JSON beside it are copied."""
    with all_or_none(folder) as staging:
        if strip is not None:
            for path in (strip, strip.with_suffix(".json")):
                shutil.copyfile(path, staging / path.name)
        write_wav(staging / f"{clip.stem}.wav", speech.wave, speech.rate)
        mux_audio(clip, speech.wave, speech.rate, staging / f"{clip.stem}.mp4")
        if figure:
            from hicodit.figure import draw  # matplotlib takes a second to import

            draw(speech, staging / f"{clip.stem}.png")
        names = [path.name for path in sorted(staging.iterdir())]
    return [folder / name for name in names]


def run(config: DictConfig) -> int:
    """Do the job; returns the exit code: 0 when all clips are done, 1 when some clips of a folder failed.

    Raises:
        UserError: a setting has the wrong type, or no clip could be done.
    """
    c = typed(config, InferConfig)
    check_bounds(c)
    set_limits(c.limits)
    output = Path(c.output)
    clips = find_clips(Path(c.input) if c.input else BUNDLED.parent / "demo" / "silent.mp4", output, c.debug)
    with writable(c.output), tempfile.TemporaryDirectory() as scratch:
        detector = YuNetDetector(c.detector) if c.detector else None
        landmarks = landmark_source(c.face_landmarks, detector)
        weights, device = c.weights or BUNDLED, pick_device(c.device)
        pipeline = HiCoDiTPipeline.from_pretrained(weights, device, c.codec, c.encoders, detector, landmarks)
        pipeline.sampler = override(pipeline.sampler, c.sampler)
        pipeline.guidance = override(pipeline.guidance, c.guidance)
        identity = None
        if c.reference_audio is not None:
            identity = GE2EEncoder().embed(read_voice(c.reference_audio, 16_000), 16_000)
        face, box = int(c.face) if c.face.isdecimal() else c.face, read_boxes(c.face_box) if c.face_box else None

        def strip_of(clip: Path) -> Path | None:
            return Path(scratch) / f"{clip.stem}{FACE[0]}" if c.debug else None

        def prepare(clip: Path) -> Crops:
            return pipeline.crops(clip, face, box, strip_of(clip))

        def process(batch: list[Crops], bar: tqdm) -> list[Speech]:
            rounds = max(len(windows(len(crops.mouth), pipeline.sampler)) for crops in batch)
            bar.total += pipeline.sampler.steps * rounds
            return pipeline.run(batch, [c.seed] * len(batch), identity, on_step=lambda _: bar.update())

        def write(name: str, crops: Crops, speech: Speech) -> tuple[str, float]:
            written = write_outputs(Path(name), speech, output, c.figure, strip_of(Path(name)))
            unseen = crops.track.unseen(FPS)
            note = f" (face seen in {crops.track.coverage:.0%}; not at {unseen})" if unseen else ""
            return f"{name} -> {', '.join(p.name for p in written)}{note}", len(speech.wave) / speech.rate

        jobs = [(str(clip), clip) for clip in clips]
        summary = run_batches(jobs, c.batch_size, prepare, process, write, unit="step")
    return summary.report("clips", output, pipeline.device, pipeline.seconds, f" of input={c.input}")

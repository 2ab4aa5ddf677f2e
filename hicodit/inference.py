"""The `infer.py` job for HiCoDiT: for each clip, a WAV file, the clip with generated speech, and a figure.

Axes: T video frames, N samples.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.batch_runner import JobRunner
from engine.device import pick_device
from engine.errors import UserError
from engine.faces.source import FaceSource
from engine.faces.track import ADVICE, MOST_FACES, FaceError, read_boxes
from engine.files import all_or_none
from engine.media.audio import read_voice, write_wav
from engine.media.video import mux_audio
from engine.progress import stage
from engine.settings import override
from hicodit.bundled import PipelineChooser
from hicodit.figure import draw
from hicodit.pipeline import FPS, GENERATED, Crops, HiCoDiTPipeline, Speech
from hicodit.settings import TRACK_SUFFIXES, InferConfig, require_compatible, stem_of

if TYPE_CHECKING:
    from hicodit.streaming import SpeechChunk


def runner_of(c: InferConfig) -> Callable[..., HiCoDiTRunner]:
    """Return a function that creates the runner of a process, given the index of its GPU; see `run_jobs`."""
    return partial(StreamRunner if c.stream else ClipRunner, c)


class HiCoDiTRunner(JobRunner):
    """Loads the pipelines and the reference voice.

    Args:
        index: GPU index, if several processes share the clips.

    Attributes:
        pipelines: the pipeline of `weights`, or those of the bundled releases.
        identity: (256,) embedding of the reference voice. None: the voice is predicted from the face.
    """

    def __init__(self, c: InferConfig, index: int | None = None) -> None:
        self.config = c
        self.face_source = None
        if c.detector or c.face_landmarks:
            self.face_source = FaceSource.from_settings(c.detector, c.face_landmarks)
        self.device = pick_device(c.device, index)
        self.identity = None
        if c.reference_audio is not None:
            from engine.nn.ge2e import GE2EEncoder

            with stage("reading"):
                voice = read_voice(c.reference_audio, 16_000)
            with stage("conditions"):
                self.identity = GE2EEncoder().embed(voice, 16_000)
        self.pipelines = PipelineChooser(self.load, c.weights)
        overrides = (*c.sampler.values(), *c.guidance.values())
        if c.weights is not None or any(value is not None for value in overrides):
            self.pipelines.load_all()  # `load` checks the settings before the first clip is read

    def load(self, weights: str | Path) -> HiCoDiTPipeline:
        """Load the pipeline of a release with the settings of the job."""
        c = self.config
        with stage("loading"):
            pipeline = HiCoDiTPipeline.from_pretrained(
                weights, self.device, c.codec, c.encoders, self.face_source, c.precision, c.compile
            )
        pipeline.sampler = override(pipeline.sampler, c.sampler)
        pipeline.guidance = override(pipeline.guidance, c.guidance)
        require_compatible(pipeline.sampler, pipeline.guidance)
        return pipeline


class ClipRunner(HiCoDiTRunner):
    """Detects the faces in clips, generates speech and writes the output files."""

    def __init__(self, c: InferConfig, index: int | None = None) -> None:
        super().__init__(c, index)
        self.box = read_boxes(c.face_box) if c.face_box else None
        self.scratch = tempfile.TemporaryDirectory()
        self.times = None
        if c.timestamps:
            from engine.word_times import WordTimes

            self.times = WordTimes()

    def prepare(self, clip: Path) -> tuple[HiCoDiTPipeline, list[Crops]]:
        """Select the pipeline, detect one face or all, and crop mouth and face."""
        c = self.config
        folder = Path(self.scratch.name)
        pipeline = self.pipelines.for_clip(clip)
        strips = [folder / f"{stem_of(clip, number, c)}{TRACK_SUFFIXES[0]}" for number in range(1, MOST_FACES + 1)]
        try:
            return pipeline, list(pipeline.all_crops(clip, c.face, self.box, strips if c.debug else None))
        except FaceError as error:
            if str(error).endswith(ADVICE):
                raise UserError(f"{error}, or set its position (face_box)") from error
            raise

    def generate(self, batch: list[tuple[HiCoDiTPipeline, list[Crops]]]) -> list[list[Speech]]:
        """Generate the speech of each face of each clip. The faces of one pipeline are generated together."""
        faces_of: dict[HiCoDiTPipeline, list[tuple[int, Crops]]] = defaultdict(list)  # with the index of their clip
        for clip, (pipeline, crops_of_faces) in enumerate(batch):
            faces_of[pipeline] += [(clip, crops) for crops in crops_of_faces]
        speeches: list[list[Speech]] = [[] for _ in batch]
        for pipeline, faces in faces_of.items():
            crops = [crops for _, crops in faces]
            generated = pipeline.run(crops, [self.config.seed] * len(crops), self.identity)
            for (clip, _), speech in zip(faces, generated, strict=True):
                speeches[clip].append(speech)
        return speeches

    def write(
        self, name: str, prepared: tuple[HiCoDiTPipeline, list[Crops]], speeches: list[Speech]
    ) -> tuple[str, float]:
        """Write the files of a clip atomically. Return a summary line and the length of the speech in seconds."""
        clip = Path(name)
        remarks = []
        total = 0.0
        with all_or_none(self.config.output) as staging:
            for number, speech in enumerate(speeches, 1):
                stem = stem_of(clip, number, self.config)
                for ending in TRACK_SUFFIXES if self.config.debug else ():
                    shutil.copyfile(Path(self.scratch.name) / f"{stem}{ending}", staging / f"{stem}{ending}")
                write_speech(clip, speech, staging, stem, self.config.figure)
                if self.times is not None:
                    words = self.times.recognise(speech.wave, speech.rate)
                    self.times.write(staging / stem, words, "recogniser")
                total += len(speech.wave) / speech.rate
                face = f"face {number}: " if len(speeches) > 1 else ""
                remarks += [f"{face}{remark}" for remark in speech.remarks]
            files = [path.name for path in sorted(staging.iterdir())]
        return f"{name}, {total:.1f} s -> {', '.join(files)}{''.join(f' ({remark})' for remark in remarks)}", total


class StreamRunner(HiCoDiTRunner):
    """Processes clips as streams: speech is generated in hops, without access to the whole clip."""

    def prepare(self, clip: Path) -> Path:
        """Return the clip, which `generate` reads frame by frame."""
        return clip

    def generate(self, batch: list[Path]) -> list[list[SpeechChunk]]:
        """Generate the speech of each clip in turn."""
        c = self.config
        settings = {"lookahead": c.lookahead}
        if c.sampler.get("steps") is not None:
            settings["steps"] = c.sampler["steps"]
        return [list(self.pipelines.for_clip(clip).stream(clip, c.seed, self.identity, **settings)) for clip in batch]

    def write(self, name: str, clip: Path, chunks: list[SpeechChunk]) -> tuple[str, float]:
        """Write the WAV file and the clip. Return a summary line and the length of the speech in seconds."""
        wave = np.concatenate([chunk.wave for chunk in chunks])
        rate = chunks[0].rate
        with all_or_none(self.config.output) as staging:
            write_wav(staging / f"{clip.stem}.wav", wave, rate, comment=GENERATED)
            mux_audio(clip, wave, rate, staging / f"{clip.stem}.mp4", GENERATED)
        seconds = len(wave) / rate
        compute = sum(chunk.compute for chunk in chunks)
        first = chunks[0].needed / FPS + chunks[0].compute
        figures = f"first audio after {first:.2f} s, RTF {compute / seconds:.2f}"
        return f"{name}, {seconds:.1f} s -> {clip.stem}.wav, {clip.stem}.mp4 ({figures})", seconds


def write_speech(clip: Path, speech: Speech, folder: Path, stem: str, figure: bool) -> None:
    """Write the speech of a clip, the clip with this audio and optionally the figure: STEM.wav, .mp4 and .png."""
    speech.save(folder / f"{stem}.wav")
    mux_audio(clip, speech.wave, speech.rate, folder / f"{stem}.mp4", GENERATED)
    if figure:
        draw(speech, folder / f"{stem}.png")

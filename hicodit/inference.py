"""The `infer.py` job: clips in, for each a WAV, the clip with its new sound, and a figure.

Axes: T video frames, N samples.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from engine.batch_runner import run_batches
from engine.device import count_devices, pick_device
from engine.faces.detectors import YuNetDetector
from engine.faces.landmarks import landmark_source
from engine.faces.track import read_boxes
from engine.files import all_or_none, writable
from engine.media.audio import read_voice, write_wav
from engine.media.video import mux_audio
from engine.metrics.speaker import GE2EEncoder
from engine.progress import stage
from engine.settings import override
from engine.word_times import Word, WordTimes, write_words
from hicodit.pipeline import FPS, Crops, HiCoDiTPipeline, Speech
from hicodit.settings import BUNDLED, FACE, InferConfig
from hicodit.streaming import SpeechChunk, StreamSettings


def run(c: InferConfig, clips: list[Path]) -> int:
    """Generate the speech of the clips that `read_settings` returns. Return the exit code: 1 if some clips failed."""
    start, jobs = partial(StreamJobs if c.stream else ClipJobs, c), [(str(clip), clip) for clip in clips]
    with writable(c.output):
        devices, ray = count_devices(c.devices, c.device), c.ray if c.executor == "ray" else None
        summary = run_batches(jobs, 1 if c.stream else c.batch_size, start, devices, ray)
    return summary.report("clips", Path(c.output), f" of input={c.input}")


class ClipJobs:
    """The four parts of the work: load the networks, prepare clips, generate their speech, write the files."""

    def __init__(self, c: InferConfig) -> None:
        self.config, self.output, self.identity = c, Path(c.output), None
        self.box = read_boxes(c.face_box) if c.face_box else None
        detector = YuNetDetector(c.detector) if c.detector else None
        landmarks = landmark_source(c.face_landmarks, detector)
        weights, self.device = c.weights or BUNDLED, pick_device(c.device)
        if c.reference_audio is not None:
            with stage("reading"):
                voice = read_voice(c.reference_audio, 16_000)
            with stage("conditions"):
                self.identity = GE2EEncoder().embed(voice, 16_000)
        with stage("loading"):
            pipeline = self.pipeline = HiCoDiTPipeline.from_pretrained(
                weights, self.device, c.codec, c.encoders, detector, landmarks, c.precision, c.compile
            )
        pipeline.sampler = override(pipeline.sampler, c.sampler)
        pipeline.guidance = override(pipeline.guidance, c.guidance)
        limit = pipeline.system.model.config.guidance_limit
        if limit is not None:
            pipeline.guidance.check_input(limit)
        self.scratch = tempfile.TemporaryDirectory()
        self.times = WordTimes() if c.timestamps else None

    def prepare(self, clip: Path) -> Crops:
        """Find the face and cut out mouth and face."""
        return self.pipeline.crops(clip, self.config.chosen_face, self.box, self._strip(clip))

    def generate(self, batch: list[Crops]) -> list[Speech]:
        """Generate the speech of a batch."""
        return self.pipeline.run(batch, [self.config.seed] * len(batch), self.identity)

    def write(self, name: str, crops: Crops, speech: Speech) -> tuple[str, float]:
        """Write the files of a clip. Return a line about them, and the seconds of speech."""
        strip = self._strip(Path(name))
        words = self.times.recognise(speech.wave, speech.rate) if self.times is not None else None
        files = write_outputs(Path(name), speech, self.output, self.config.figure, strip, words)
        unseen = crops.track.unseen(FPS)
        note = f" (face seen in {crops.track.coverage:.0%}; not at {unseen})" if unseen else ""
        seconds = len(speech.wave) / speech.rate
        return f"{name}, {seconds:.1f} s -> {', '.join(path.name for path in files)}{note}", seconds

    def _strip(self, clip: Path) -> Path | None:
        return Path(self.scratch.name) / f"{clip.stem}{FACE[0]}" if self.config.debug else None


class StreamJobs(ClipJobs):
    """The same for clips that are read as streams."""

    def __init__(self, c: InferConfig) -> None:
        super().__init__(c)
        steps = c.sampler.get("steps")
        self.settings = StreamSettings(c.lookahead, **({} if steps is None else {"steps": steps}))

    def prepare(self, clip: Path) -> Path:
        return clip

    def generate(self, batch: list[Path]) -> list[list[SpeechChunk]]:
        seed, identity, settings = self.config.seed, self.identity, vars(self.settings)
        return [list(self.pipeline.stream(clip, seed, identity, **settings)) for clip in batch]

    def write(self, name: str, clip: Path, chunks: list[SpeechChunk]) -> tuple[str, float]:
        wave, rate = np.concatenate([chunk.wave for chunk in chunks]), chunks[0].rate
        with all_or_none(self.output) as staging:
            write_wav(staging / f"{clip.stem}.wav", wave, rate)
            mux_audio(clip, wave, rate, staging / f"{clip.stem}.mp4")
        seconds, compute = len(wave) / rate, sum(chunk.compute for chunk in chunks)
        first = chunks[0].needed / FPS + chunks[0].compute
        figures = f"first sound after {first:.2f} s, {compute / seconds:.2f} s of computing for a second"
        return f"{name}, {seconds:.1f} s -> {clip.stem}.wav, {clip.stem}.mp4 ({figures})", seconds


def write_outputs(
    clip: Path,
    speech: Speech,
    folder: Path,
    figure: bool,
    strip: Path | None = None,
    words: list[Word] | None = None,
) -> list[Path]:
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
        if words is not None:
            write_words(staging / clip.stem, words, "recogniser", subtitles=True)
        names = [path.name for path in sorted(staging.iterdir())]
    return [folder / name for name in names]

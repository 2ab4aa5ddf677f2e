"""The `infer.py model=talker_t2av` job: texts, sounds or clips in, speech and talking faces out.

Axes: N samples at 24 kHz, F frames at 25 a second.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.batch_runner import run_batches
from engine.device import count_devices, pick_device
from engine.errors import UserError
from engine.files import all_or_none, writable, write_json
from engine.media.audio import write_wav
from engine.media.video import join_audio, mux_audio, write_video
from engine.progress import stage
from engine.settings import override
from engine.word_times import Word, WordTimes, write_words
from talker_t2av.jobs import FindWords, PreparedJob
from talker_t2av.pipeline import Talk, TalkerPipeline
from talker_t2av.settings import InferConfig, Job, outputs_of
from talker_t2av.system import BUNDLED


def run(c: InferConfig, jobs: list[tuple[str, Job | UserError]], finder: Callable[[], FindWords] | None = None) -> int:
    """Do the jobs that `read_settings` returns. Return the exit code: 1 if some of several jobs failed.

    Args:
        finder: makes, in each process, what completes jobs with the text `auto`; can be pickled.
    """
    with writable(c.output):
        devices, ray = count_devices(c.devices, c.device), c.ray if c.executor == "ray" else None
        summary = run_batches(jobs, c.batch_size, partial(TalkJobs, c, finder), devices, ray, name_errors=True)
    return summary.report("jobs", Path(c.output))


class TalkJobs:
    """The four parts of the work: load the networks, prepare jobs, generate, write the files."""

    def __init__(self, c: InferConfig, finder: Callable[[], FindWords] | None) -> None:
        self.find_words = finder() if finder else None
        self.config, self.device = c, pick_device(c.device)
        codecs = {stream: folder for stream, folder in vars(c.codecs).items() if folder}
        with stage("loading"):
            self.pipeline = TalkerPipeline.from_pretrained(
                c.weights or BUNDLED, self.device, codecs, c.precision, c.compile
            )
        self.pipeline.sampling = override(self.pipeline.sampling, c.sampling)
        self.times = WordTimes() if c.timestamps else None

    def prepare(self, job: Job | UserError) -> PreparedJob:
        """Read and encode the files of a job."""
        if isinstance(job, UserError):
            raise job
        if not job.is_auto:
            return self.pipeline.prepare(job)
        job, origin = self.find_words(job)
        prepared = self.pipeline.prepare(job)
        return replace(prepared, origin=origin, remark="; ".join(filter(None, (describe(origin), prepared.remark))))

    def generate(self, batch: list[PreparedJob]) -> list[Talk]:
        """Generate the results of a batch."""
        return self.pipeline.finish(batch)

    def write(self, name: str, prepared: PreparedJob, talk: Talk) -> tuple[str, float]:
        """Write the files of a job. Return a line about them, and the seconds of speech."""
        words = None
        if self.times is not None:
            words = self.times.align(prepared.job.text, talk.wave, self.pipeline.rate)
        files = write_outputs(
            prepared.job, name, talk, Path(self.config.output), self.config.figure, words, prepared.origin
        )
        seconds = len(talk.wave) / self.pipeline.rate
        remarks = [prepared.remark] if prepared.remark else []
        if prepared.mode.open_ended and not talk.stopped:
            remarks.append("cut off at the longest length allowed: see max_seconds")
        remark = f" ({'; '.join(remarks)})" if remarks else ""
        return f"{name}, {seconds:.1f} s -> {', '.join(files)}{remark}", seconds


def write_outputs(
    job: Job,
    name: str,
    talk: Talk,
    folder: Path,
    figure: bool = False,
    words: list[Word] | None = None,
    origin: Mapping[str, str] | None = None,
) -> list[str]:
    """Write all files of a job, or none; return their names. Figure, times of words and `origin` are optional.

    Given streams stay as they are: in a2v the sound, sample for sample, in v2a the pictures.
    """
    with all_or_none(folder) as staging:
        video = staging / f"{name}.mp4"
        if job.mode == "a2v":
            for target in outputs_of(job, name)[:-1]:
                shutil.copyfile(job.audio, staging / target)
            write_video(staging / "silent.mp4", talk.frames, TalkerPipeline.fps)
            join_audio(staging / "silent.mp4", job.audio, video)
            (staging / "silent.mp4").unlink()
        else:
            write_wav(staging / f"{name}.wav", talk.wave, TalkerPipeline.rate)
        if job.mode == "t2av":
            write_video(video, talk.frames, TalkerPipeline.fps, talk.wave, TalkerPipeline.rate)
        elif job.mode == "v2a":
            mux_audio(job.video, talk.wave, TalkerPipeline.rate, video)
        if figure and talk.frames is not None:
            from talker_t2av.figure import draw  # matplotlib takes a second to import

            draw(talk, job.text, staging / f"{name}.png")
        if words is not None:
            write_words(staging / name, words, "text", subtitles=job.mode != "tts", **(origin or {}))
        elif origin:
            write_json(staging / f"{name}.json", origin)
    files = outputs_of(job, name, figure, words is not None)
    return files + ([f"{name}.json"] if origin and words is None else [])


def describe(origin: Mapping[str, str]) -> str:
    """Return a remark on the words that were found for a clip, and where they and the voice come from."""
    return f"{origin['text']!r}, words: {origin['text_origin']}; voice: {origin['voice_origin']}"

"""The `infer.py model=talker_t2av` job: texts, audio or clips in, speech and talking faces out.

Axes: N samples at 24 kHz, F frames at 25 per second.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.batch_runner import JobRunner
from engine.device import pick_device
from engine.files import all_or_none
from engine.media.video import join_audio, mux_audio, write_video
from engine.progress import stage
from engine.settings import override
from talker_t2av.figure import draw
from talker_t2av.jobs import PreparedJob
from talker_t2av.pipeline import Talk, TalkerPipeline
from talker_t2av.settings import InferConfig, Job, outputs_of
from talker_t2av.system import BUNDLED


def runner_of(c: InferConfig) -> Callable[..., TalkRunner]:
    """Return a function that creates the runner of a process, given the index of its GPU; see `run_jobs`."""
    return partial(TalkRunner, c)


class TalkRunner(JobRunner):
    """Reads the files of jobs of all modes, generates speech and faces, and writes the output files."""

    def __init__(self, c: InferConfig, index: int | None = None) -> None:
        self.config = c
        self.device = pick_device(c.device, index)
        codecs = {stream: folder for stream, folder in vars(c.codecs).items() if folder}
        with stage("loading"):
            self.pipeline = TalkerPipeline.from_pretrained(
                c.weights or BUNDLED, self.device, codecs, c.precision, c.compile
            )
        self.pipeline.sampling = override(self.pipeline.sampling, c.sampling)
        self.times = None
        if c.timestamps:
            from engine.word_times import WordTimes

            self.times = WordTimes()

    def prepare(self, job: Job) -> PreparedJob:
        """Read and encode the input files of a job."""
        return self.pipeline.prepare(job)

    def generate(self, batch: list[PreparedJob]) -> list[Talk]:
        """Generate the results of a batch."""
        return self.pipeline.generate(batch)

    def write(self, name: str, prepared: PreparedJob, talk: Talk) -> tuple[str, float]:
        """Write the files of a job atomically. Return a summary line and the length of the speech in seconds."""
        c = self.config
        job = prepared.job
        rate = self.pipeline.rate
        with all_or_none(c.output) as staging:
            write_talk(job, name, talk, staging)
            if c.figure and talk.frames is not None:
                draw(talk, job.text, staging / f"{name}.png")
            if self.times is not None:
                words = self.times.align(job.text, talk.wave, rate)
                self.times.write(staging / name, words, "text")
        files = outputs_of(job, name, c.figure, c.timestamps)
        remark = f" ({'; '.join(talk.remarks)})" if talk.remarks else ""
        seconds = len(talk.wave) / rate
        return f"{name}, {seconds:.1f} s -> {', '.join(files)}{remark}", seconds


def write_talk(job: Job, name: str, talk: Talk, folder: Path) -> None:
    """Write audio and video of a job to `folder`.

    Given streams are copied losslessly: the audio in a2v, the frames in v2a.
    """
    video = folder / f"{name}.mp4"
    if job.mode == "a2v":
        for target in outputs_of(job, name)[:-1]:
            shutil.copyfile(job.audio, folder / target)
        silent = folder / ".silent.mp4"  # not the name of a job
        write_video(silent, talk.pictures(), TalkerPipeline.fps)
        join_audio(silent, job.audio, video, talk.comment)
        silent.unlink()
    else:
        talk.save(folder / f"{name}.wav")
    if job.mode == "t2av":
        talk.save(video)
    elif job.mode == "v2a":
        mux_audio(job.video, talk.wave, TalkerPipeline.rate, video, talk.comment)

"""The `infer.py model=talker_t2av` job: texts, sounds or clips in, speech and talking faces out.

Axes: N samples at 24 kHz, F frames at 25 a second.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from engine.batch_runner import run_batches
from engine.bounds import bounded, check_bounds
from engine.config import override, typed
from engine.errors import UserError
from engine.files import all_or_none, writable
from engine.media.audio import write_wav
from engine.media.limits import Limits, set_limits
from engine.media.video import join_audio, mux_audio, write_video
from engine.training.distributed import pick_device
from engine.untrusted import parse_json, safe_name
from talker_t2av.generation import step_limit
from talker_t2av.jobs import PreparedJob
from talker_t2av.pipeline import Job, Talk, TalkerPipeline
from talker_t2av.system import ASSETS, BUNDLED

DEMO = ASSETS / "demo"
JOB_FIELDS = {f.name for f in fields(Job)}


@dataclass
class CodecFolders:
    speech: str | None = None
    motion: str | None = None
    speaker: str | None = None


@dataclass
class SamplingOverrides:
    steps: int | None = None
    temperature: float | None = None
    guidance: float | None = None


@dataclass
class InferConfig:
    """Types of configs/infer_talker.yaml; what each field means stands there."""

    model: str = "talker_t2av"
    mode: str = "t2av"
    text: str = ""
    reference_audio: str | None = None
    reference_video: str | None = None
    reference_motion: str | None = None
    reference_text: str = ""
    audio: str | None = None
    video: str | None = None
    crop: str = "face"
    face_box: str | None = None
    jobs: str | None = None
    name: str | None = None
    output: str = ""
    weights: str | None = None
    codecs: CodecFolders = field(default_factory=CodecFolders)
    prefix_seconds: float = 0.0
    min_seconds: float = 0.16
    max_seconds: float | None = None
    compat: str = "paper"
    seed: int = 0
    device: str = "auto"
    batch_size: int = bounded(1, 1024, default=8)
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    limits: Limits = field(default_factory=Limits)


def run(config: DictConfig) -> int:
    """Do the job; 0 when all is done, 1 when some of several jobs failed.

    Raises:
        UserError: nothing could be done.
    """
    c = typed(config, InferConfig)
    check_bounds(c)
    set_limits(c.limits)
    output = Path(c.output)
    jobs = read_jobs(c)
    for name, job in jobs:
        if isinstance(job, Job):
            _check_outputs(job, name, output)
    with writable(c.output):
        codecs = {stream: folder for stream, folder in vars(c.codecs).items() if folder}
        pipeline = TalkerPipeline.from_pretrained(c.weights or BUNDLED, pick_device(c.device), codecs)
        pipeline.sampling = override(pipeline.sampling, vars(c.sampling))

        def prepare(job: Job | UserError) -> PreparedJob:
            if isinstance(job, UserError):
                raise job
            return pipeline.prepare(job)

        def process(batch: list[PreparedJob], bar: tqdm) -> list[Talk]:
            # The longest that each job may last: when the model stops earlier, the rest counts as done.
            most = sum(step_limit(pipeline.system.model, p.request, p.mode) for p in batch)
            bar.total += most
            before = bar.n
            talks = pipeline.finish(batch, lambda step: bar.update(step.running))
            bar.update(before + most - bar.n)
            return talks

        def write(name: str, prepared: PreparedJob, talk: Talk) -> tuple[str, float]:
            written = write_outputs(prepared.job, name, talk, output)
            return f"{name}: {', '.join(written)}{_remark(prepared, talk)}", len(talk.wave) / pipeline.rate

        summary = run_batches(jobs, c.batch_size, prepare, process, write, unit="patch", name_errors=True)
    return summary.report("jobs", output, pipeline.system.device, pipeline.seconds)


def read_jobs(c: InferConfig) -> list[tuple[str, Job | UserError]]:
    """Names and jobs of the command line, or of each line of `jobs`; of a line that is wrong, what is wrong with it.

    Raises:
        UserError: the only job, or every line, is wrong, or two would share their output files.
    """
    common = {name: value for name, value in vars(c).items() if name in JOB_FIELDS and value not in (None, "")}
    if c.jobs is None:
        fields_ = with_demo(common) if c.weights is None else common
        return [(safe_name(c.name or c.mode, "name="), Job(**fields_))]
    path, jobs = Path(c.jobs), []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read jobs={path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            jobs.append(_job_of_line(line, common, f"{number:04d}"))
        except UserError as error:
            jobs.append((f"line {number}", UserError(f"jobs={path}, line {number}: {error}")))
    if not jobs:
        raise UserError(f"jobs={path} has no line with a job")
    if all(isinstance(job, UserError) for _, job in jobs):
        raise jobs[0][1]
    seen: set[str] = set()
    for name, _ in jobs:
        if name in seen:
            raise UserError(f"jobs={path}: two jobs have the name {name}: their files would be one")
        seen.add(name)
    return jobs


def with_demo(given: dict[str, Any]) -> dict[str, Any]:
    """The job's fields with the bundled voice, face and sentence where the bundled model has none to work on."""
    mode, job = given.get("mode", "t2av"), dict(given)
    voice, face = str(DEMO / "voice.wav"), str(DEMO / "silent.mp4")
    if mode in ("t2av", "tts"):
        job.setdefault("text", _words("silent"))
    if mode == "a2v" and "audio" not in job:
        job["audio"] = voice
        job.setdefault("text", _words("voice"))
    if mode == "v2a" and "video" not in job:
        job["video"] = face
        job.setdefault("text", _words("silent"))
    if mode in ("t2av", "tts", "v2a") and "reference_video" not in job:
        job.setdefault("reference_audio", voice)
    if mode in ("t2av", "a2v"):
        job.setdefault("reference_video", face)
    return job


def outputs_of(job: Job, name: str) -> list[str]:
    """Names of the files that a job writes: NAME.wav, or the given sound as it is, and NAME.mp4 unless tts."""
    suffix = Path(job.audio).suffix if job.mode == "a2v" else ".wav"
    sound = [] if suffix.lower() == ".mp4" else [f"{name}{suffix}"]
    return sound + ([] if job.mode == "tts" else [f"{name}.mp4"])


def write_outputs(job: Job, name: str, talk: Talk, folder: Path) -> list[str]:
    """Write all files of a job, or none; gives their names.

    What was given stays as it was: in a2v the sound, sample for sample, in v2a the pictures.
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
    return outputs_of(job, name)


def _remark(prepared: PreparedJob, talk: Talk) -> str:
    remarks = [prepared.remark] if prepared.remark else []
    if prepared.mode.open_ended and not talk.stopped:
        remarks.append("cut off at the longest length allowed: see max_seconds")
    return f" ({'; '.join(remarks)})" if remarks else ""


def _job_of_line(line: str, common: dict[str, Any], number: str) -> tuple[str, Job]:
    row = parse_json(line, "the line")
    if not isinstance(row, dict):
        raise UserError('give an object, as in {"text": "hello"}')
    name = row.pop("name", number)
    safe_name(str(name) if type(name) is int else name, "name=")
    unknown = sorted(row.keys() - JOB_FIELDS)
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}; there are: name, {', '.join(sorted(JOB_FIELDS))}")
    return str(name), Job(**{**common, **row})


def _check_outputs(job: Job, name: str, folder: Path) -> None:
    inputs = [job.reference_audio, job.reference_video, job.reference_motion, job.audio, job.video]
    for target in (folder / file for file in outputs_of(job, name)):
        if target.is_dir():
            raise UserError(f"cannot write {target}: it is a folder")
        if any(os.path.realpath(target) == os.path.realpath(file) for file in inputs if file):
            raise UserError(f"output={folder} would replace the input {target}: choose another folder or name")


def _words(stem: str) -> str:
    return (DEMO / f"{stem}.txt").read_text().strip()

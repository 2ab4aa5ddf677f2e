"""The `infer.py model=talker_t2av` job: texts, sounds or clips in, speech and talking faces out.

Axes: N samples at 24 kHz, F frames at 25 a second.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from engine.batch_runner import run_batches
from engine.config import override, typed
from engine.errors import UserError
from engine.files import all_or_none, writable
from engine.media.audio import write_wav
from engine.media.video import join_audio, mux_audio, write_video
from engine.training.distributed import pick_device
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
    batch_size: int = 8
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)


def run(config: DictConfig) -> int:
    """Do the job; 0 when all is done, 1 when some of several jobs failed.

    Raises:
        UserError: nothing could be done.
    """
    c = typed(config, InferConfig)
    if c.batch_size < 1:
        raise UserError(f"batch_size={c.batch_size} must be at least 1")
    output = Path(c.output)
    jobs = read_jobs(c)
    for name, job in jobs:
        _check_outputs(job, name, output)
    with writable(c.output):
        codecs = {stream: folder for stream, folder in vars(c.codecs).items() if folder}
        pipeline = TalkerPipeline.from_pretrained(c.weights or BUNDLED, pick_device(c.device), codecs)
        pipeline.sampling = override(pipeline.sampling, vars(c.sampling))

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

        summary = run_batches(jobs, c.batch_size, pipeline.prepare, process, write, unit="patch", name_errors=True)
    return summary.report("jobs", output, pipeline.system.device, pipeline.seconds)


def read_jobs(c: InferConfig) -> list[tuple[str, Job]]:
    """Names and jobs of the command line, or of each line of `jobs`.

    Raises:
        UserError: a job is incomplete or contradicts itself, or two would share their output files.
    """
    common = {name: value for name, value in vars(c).items() if name in JOB_FIELDS and value not in (None, "")}
    if c.jobs is None:
        fields_ = with_demo(common) if c.weights is None else common
        return [(_checked_name(c.name or c.mode), Job(**fields_))]
    path, jobs = Path(c.jobs), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read jobs={path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            jobs.append(_job_of_line(line, common, f"{number:04d}"))
        except ValueError as error:  # JSON's own errors, and ours
            raise UserError(f"jobs={path}, line {number}: {error}") from error
    if not jobs:
        raise UserError(f"jobs={path} has no line with a job")
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
    row = json.loads(line)
    if not isinstance(row, dict):
        raise UserError('give an object, as in {"text": "hello"}')
    name = _checked_name(str(row.pop("name", number)))
    unknown = sorted(row.keys() - JOB_FIELDS)
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}; there are: name, {', '.join(sorted(JOB_FIELDS))}")
    for key, value in row.items():
        wanted = Job.__dataclass_fields__[key].type
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        fits = isinstance(value, str) if "str" in wanted else numeric and ("int" not in wanted or value == int(value))
        if not (fits or (value is None and "None" in wanted)):
            raise UserError(f"{key}={value!r} is not of type {wanted}")
    return name, Job(**{**common, **row})


def _checked_name(name: str) -> str:
    if not name or name != Path(name).name or name.startswith("."):
        raise UserError(f"name={name!r} must be a file name without folders")
    return name


def _check_outputs(job: Job, name: str, folder: Path) -> None:
    inputs = [job.reference_audio, job.reference_video, job.reference_motion, job.audio, job.video]
    for target in (folder / file for file in outputs_of(job, name)):
        if target.is_dir():
            raise UserError(f"cannot write {target}: it is a folder")
        if any(target.resolve() == Path(file).resolve() for file in inputs if file):
            raise UserError(f"output={folder} would replace the input {target}: choose another folder or name")


def _words(stem: str) -> str:
    return (DEMO / f"{stem}.txt").read_text().strip()

"""What `infer.py model=talker_t2av` can be asked for, checked before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from engine.config import plain
from engine.errors import UserError
from engine.faces.track import given_track, read_boxes
from engine.files import writable
from engine.hub import check_release
from engine.media.ffmpeg import check_readable, probe, require_stream
from engine.media.limits import Limits, set_limits
from engine.settings import DEVICES, PRECISIONS, SEEDS, check_settings, group, make, setting
from engine.untrusted import parse_json, read_lines, safe_name
from talker_t2av.request import MODES, Sampling

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMO = ASSETS / "demo"
MAX_TEXT = 2000  # bytes: about two minutes of speech, whose pictures take 2.4 GB at 512 pixels
COMPAT = ("paper", "official", "library")
CROPS = ("face", "centre")
FILES = ("reference_audio", "reference_video", "reference_motion", "audio", "video", "face_box")  # of a job
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class JobFields:
    """What to generate from which files: settings of the command line and of a line of JSONL.

    Attributes:
        mode: t2av, tts, a2v or v2a.
        text: the words to speak. In a2v and v2a, the words of the given sound or lips; it may be empty. If it is longer
            than `Sampling.text_bytes`, t2av and tts speak it in parts, with a pause of 0.2 s between two: whole
            sentences, else clauses, else words (compat=paper only).
        reference_audio: file with the voice. By default the given audio (a2v), or the sound of one of the videos.
        reference_video: video or picture with the face; its first frame that shows the face is animated (t2av, a2v).
        reference_motion: torch file with the motion codes (F, Dm) of the reference; by default they are computed.
        reference_text: what the reference says; needed if it is used as a prefix.
        audio: a2v: the sound to which the face moves. video: v2a: the clip that gets a voice.
        crop: part of the videos that is used: "face", the square round it, or "centre", the largest centred square.
        face_box: position of the face, which is then not detected, in `video` or else in `reference_video`; see
            `engine.faces.track.read_boxes`.
        prefix_seconds: length of the reference's beginning that the result continues, in its style.
        min_seconds, max_seconds: length of the result, or of each part; max None: estimated from the text.
        compat: paper: as in training. official: as the released command line (t2av) and the released method for speech
            alone (tts). library: as the released methods. See talker_t2av/official.py.
        seed: of the noise.
    """

    mode: str = setting("t2av", choices=MODES)
    text: str = ""
    reference_audio: str | None = None
    reference_video: str | None = None
    reference_motion: str | None = None
    reference_text: str = ""
    audio: str | None = None
    video: str | None = None
    crop: str = setting("face", choices=CROPS)
    face_box: str | None = None
    prefix_seconds: float = setting(0.0, 0.0, 30.0)
    min_seconds: float = setting(0.16, 0.0, 30.0)
    max_seconds: float | None = setting(None, 0.16, 30.0)
    compat: str = setting("paper", choices=COMPAT)
    seed: int = setting(0, *SEEDS)


@dataclass(frozen=True)
class Job(JobFields):
    """`JobFields` that fit together."""

    def __post_init__(self) -> None:
        check_settings(self)
        for name in FILES:
            if getattr(self, name) == "":
                raise UserError(f"{name}= is empty: name a file, or leave it out")
        if self.compat != "paper" and self.mode not in ("t2av", "tts"):
            raise UserError(f"compat={self.compat} has no mode={self.mode}: the released programs offer t2av and tts")
        if not self.text.strip() and self.mode in ("t2av", "tts"):
            raise UserError(f"mode={self.mode} needs text=... to say")
        if (size := len(self.text.encode(errors="replace"))) > MAX_TEXT:
            raise UserError(f"the text has {size:,} bytes, and {MAX_TEXT:,} is the most: make several jobs of it")
        needed = {"t2av": "reference_video", "a2v": "reference_video", "v2a": "video"}.get(self.mode)
        if needed and not getattr(self, needed):
            raise UserError(f"mode={self.mode} needs {needed}=FILE")
        if self.mode == "a2v" and not self.audio:
            raise UserError("mode=a2v needs audio=FILE, the sound to which the face moves")
        if not (self.reference_audio or self.mode == "a2v" or self.reference_video or self.video):
            raise UserError(f"mode={self.mode} needs reference_audio=FILE, the voice to speak with")
        if self.prefix_seconds and self.mode in ("a2v", "v2a") and not (self.reference_audio and self.reference_video):
            raise UserError(f"prefix_seconds with mode={self.mode} needs both reference_audio and reference_video")

    @property
    def unused(self) -> list[str]:
        """Names of the inputs that are given, but that the mode does not use."""
        mode, prefix = MODES[self.mode], self.prefix_seconds > 0
        used = {
            "reference_audio": mode.speech == "generated" or prefix,
            "reference_video": mode.motion == "generated"
            or not self.reference_audio
            or (prefix and self.mode != "tts"),
            "reference_motion": mode.motion == "generated" or (prefix and self.mode != "tts"),
            "audio": mode.speech == "given",
            "video": mode.motion == "given",
            "max_seconds": mode.open_ended,
        }
        return [name for name, is_used in used.items() if getattr(self, name) is not None and not is_used]

    @property
    def keeps_prefix(self) -> bool:
        """The result begins with the prefix, as that of the released programs does."""
        return self.compat != "paper"

    @property
    def voice_file(self) -> str:
        """The file whose sound is the voice.

        Raises:
            UserError: none of the job's files has sound.
        """
        if self.reference_audio:
            return self.reference_audio
        if self.mode == "a2v":
            return self.audio
        for video in (self.reference_video, self.video):
            if video and not is_picture(video) and probe(video).audio:
                return video
        raise UserError(f"{self.reference_video or self.video} has no sound: give reference_audio=FILE")

    def check_files(self) -> None:
        """Look into the files that the mode uses, without decoding them.

        Raises:
            UserError: one is missing or unreadable, or has not what is needed.
        """
        kinds = {"audio": "audio", "reference_audio": "audio", "video": "video", "reference_video": "video"}
        for name in (name for name in kinds if getattr(self, name) and name not in self.unused):
            path = getattr(self, name)
            if name == "reference_video" and is_picture(path):
                check_readable(path)
            elif name == "video" and is_picture(path):
                raise UserError(f"video={path} is a picture: give the clip that is to get a voice")
            else:
                require_stream(path, kinds[name])
        if self.reference_motion and "reference_motion" not in self.unused:
            check_readable(self.reference_motion)
        if self.face_box is not None:
            given_track(read_boxes(self.face_box), 1)
        if MODES[self.mode].speech == "generated":
            require_stream(self.voice_file, "audio")


@dataclass
class CodecFolders:
    speech: str | None = None
    motion: str | None = None
    speaker: str | None = None


@dataclass(frozen=True)
class InferConfig(JobFields):
    """Types of configs/infer_talker.yaml; what each field means stands there."""

    model: str = "talker_t2av"
    jobs: str | None = None
    name: str | None = None
    output: str = ""
    weights: str | None = None
    codecs: CodecFolders = group(CodecFolders)
    device: str = setting("auto", choices=DEVICES)
    precision: str = setting("auto", choices=PRECISIONS)
    compile: bool = False
    batch_size: int = setting(8, 1, 1024)
    figure: bool = True
    sampling: dict[str, Any] = group(Sampling, unset=True)
    limits: Limits = group(Limits)

    def __post_init__(self) -> None:
        check_settings(self)


JOB_FIELDS = {own.name for own in fields(JobFields)}


def read_settings(config: DictConfig) -> tuple[InferConfig, list[tuple[str, Job | UserError]]]:
    """The settings and the named jobs; for a line of `jobs` that is wrong, what is wrong with it.

    Raises:
        UserError: a value is wrong, or a file or folder that is named is missing or unreadable.
    """
    c = make(InferConfig, plain(config))
    set_limits(c.limits)
    check_release("weights", c.weights)
    for stream, place in vars(c.codecs).items():
        check_release(f"codecs.{stream}", place)
    jobs, output = read_jobs(c), Path(c.output)
    for name, job in jobs:
        if isinstance(job, Job):
            _check_outputs(job, name, output, c.figure)
    if c.jobs is None:  # of several, one with a bad file is reported and the others go on
        jobs[0][1].check_files()
    with writable(c.output):
        return c, jobs


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
    lines = read_lines(path, f"jobs={path}")
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


def outputs_of(job: Job, name: str, figure: bool = False) -> list[str]:
    """Names of the files that a job writes: NAME.wav, or the given sound as it is, NAME.mp4 unless tts, and NAME.png.

    NAME.png, the figure, is written where a face is drawn.
    """
    suffix = Path(job.audio).suffix if job.mode == "a2v" else ".wav"
    sound = [] if suffix.lower() == ".mp4" else [f"{name}{suffix}"]
    video = [] if job.mode == "tts" else [f"{name}.mp4"]
    return sound + video + ([f"{name}.png"] if figure and job.mode in ("t2av", "a2v") else [])


def is_picture(path: str | Path) -> bool:
    return Path(path).suffix.lower() in PICTURES


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


def _check_outputs(job: Job, name: str, folder: Path, figure: bool) -> None:
    inputs = [job.reference_audio, job.reference_video, job.reference_motion, job.audio, job.video]
    for target in (folder / file for file in outputs_of(job, name, figure)):
        if target.is_dir():
            raise UserError(f"cannot write {target}: it is a folder")
        if any(os.path.realpath(target) == os.path.realpath(file) for file in inputs if file):
            raise UserError(f"output={folder} would replace the input {target}: choose another folder or name")


def _words(stem: str) -> str:
    return (DEMO / f"{stem}.txt").read_text().strip()

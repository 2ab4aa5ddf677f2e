"""Settings and jobs of `infer.py model=talker_t2av`, validated before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from engine.config import plain, read_preset
from engine.errors import UserError
from engine.faces.track import read_boxes, track_of_boxes
from engine.files import CHECKOUT, writable
from engine.hub import check_release
from engine.media.ffmpeg import check_readable, probe, require_stream
from engine.settings import (
    FACE_BOX,
    SEED,
    SEEDS,
    WORD_FILES,
    Group,
    NamedJob,
    RunConfig,
    group,
    make,
    override,
    set_limits,
    setting,
)
from engine.untrusted import parse_object, read_lines, safe_name
from talker_t2av.request import MODES, Sampling

ASSETS = CHECKOUT / "assets"
DEMO = ASSETS / "demo"
DEMO_VOICE = str(DEMO / "voice.wav")
DEMO_FACE = str(DEMO / "silent.mp4")
MAX_TEXT = 2000  # maximum bytes of a text: about two minutes of speech, whose frames take 2.4 GB at 512 pixels
MAX_SPEECH_TEXT = 16_384  # maximum bytes of a text without video
COMPAT = ("paper", "official", "library")
CROPS = ("face", "centre")
FILES = ("reference_audio", "reference_video", "reference_motion", "audio", "video", "face_box")  # of a job
NEEDED = {"t2av": ("reference_video",), "tts": (), "a2v": ("reference_video", "audio"), "v2a": ("video",)}  # files
IMAGE_START = re.compile(rb"\x89PNG|\xff\xd8\xff|BM|RIFF....WEBP", re.DOTALL)  # of PNG, JPEG, BMP and WebP files
SAVED_VOICE = ".safetensors"


@dataclass(frozen=True)
class Job(Group):
    """A generation job: fields of the command line, of a line of JSONL, and of a request.

    Attributes:
        compat: `official` reproduces the released command line (t2av) and the released method for speech (tts),
            `library` the released methods; see talker_t2av/official.py.
    """

    mode: str = setting(
        "t2av",
        choices=MODES,
        about="t2av: text to talking face; tts: text to speech; a2v: audio to face; v2a: face to audio",
    )
    text: str = setting(
        "",
        about="text to speak, up to 2,000 bytes (tts: 16,384); a2v, v2a: transcript of the given audio or video",
    )
    reference_audio: str | None = setting(
        None,
        about="recording of the voice, or a saved voice (.safetensors); null: the audio of audio= or reference_video=; "
        "without these, the voice of the bundled model, or with other weights the audio of video=",
    )
    reference_video: str | None = setting(
        None, about="video or image of the face; its first frame with a face is animated (t2av, a2v)"
    )
    reference_motion: str | None = setting(
        None, about="motion codes of reference_video as a torch file (frames, 40); null: computed from its frames"
    )
    reference_text: str = setting("", about="transcript of the reference's beginning, where prefix_seconds is used")
    audio: str | None = setting(None, about="a2v: the driving audio; null: that of the bundled model")
    video: str | None = setting(
        None, about="v2a: the clip for which speech is generated; null: that of the bundled model"
    )
    crop: str = setting(
        "face",
        choices=CROPS,
        about="square cut from videos: face (around the face) or centre (the largest in the middle)",
    )
    face_box: str | None = setting(None, about=FACE_BOX)
    paste_back: bool = setting(
        True,
        about="t2av, a2v: paste the generated face back into the image from which it was cropped; false: only "
        "the square",
    )
    prefix_seconds: float = setting(
        0.0,
        0.0,
        30.0,
        "length of the start of the reference that is continued, to copy its style, in seconds; multiple of 0.16",
    )
    min_seconds: float = setting(0.16, 0.0, 30.0, "minimum length of the result of t2av and tts in seconds")
    max_seconds: float | None = setting(
        None,
        0.16,
        30.0,
        "maximum length of the result, or of a part of a long text, in seconds; null: estimated from the text",
    )
    compat: str = setting(
        "paper",
        choices=COMPAT,
        about="paper, or reproduce the released code (t2av, tts): official (its command line), library (its methods)",
    )
    seed: int = setting(0, *SEEDS, SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in FILES:
            if getattr(self, name) == "":
                raise UserError(f"{name} is empty: expected a file, or omit it")
        if self.compat != "paper" and self.mode not in ("t2av", "tts"):
            raise UserError(f"compat={self.compat} has no mode={self.mode}: the released programs offer t2av and tts")
        if not self.text.strip() and self.mode in ("t2av", "tts"):
            raise UserError(f"mode={self.mode} requires text")
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in self.text + self.reference_text):
            raise UserError(
                "the text contains a null character or half of a surrogate pair: remove it, or correct the encoding"
            )
        size = len(self.text.encode())
        max_bytes = MAX_SPEECH_TEXT if self.mode == "tts" and self.compat == "paper" else MAX_TEXT
        if size > max_bytes:
            raise UserError(
                f"the text has {size:,} bytes, at most {max_bytes:,} are supported: split it into several jobs"
            )
        for name in NEEDED[self.mode]:
            if not getattr(self, name):
                raise UserError(f"mode={self.mode} requires the file {name}")
        if self.max_seconds is not None and self.max_seconds < self.min_seconds:
            raise UserError(f"max_seconds={self.max_seconds:g} is below min_seconds={self.min_seconds:g}")
        if self.mode == "v2a" and is_picture(self.video):
            raise UserError(f"video={self.video} is an image: expected a clip")
        if not (self.reference_audio or self.mode == "a2v" or self.reference_video or self.video):
            raise UserError(f"mode={self.mode} requires reference_audio, a recording of the voice")
        if is_voice(self.reference_audio) and (self.prefix_seconds or self.compat != "paper"):
            raise UserError(f"reference_audio={self.reference_audio} is a saved voice: prefixes need the recording")
        if self.prefix_seconds and self.mode in ("a2v", "v2a") and not (self.reference_audio and self.reference_video):
            raise UserError(f"prefix_seconds with mode={self.mode} needs both reference_audio and reference_video")

    @property
    def unused(self) -> list[str]:
        """Names of the inputs of the job that the mode does not use."""
        mode = MODES[self.mode]
        prefix = self.prefix_seconds > 0
        needs = {
            "reference_audio": mode.speech == "generated" or prefix,
            "reference_video": mode.motion == "generated"
            or not self.reference_audio
            or (prefix and self.mode != "tts"),
            "reference_motion": mode.motion == "generated" or (prefix and self.mode != "tts"),
            "audio": mode.speech == "given",
            "video": mode.motion == "given",
            "reference_text": prefix,
            "max_seconds": mode.open_ended and self.compat == "paper",
            "min_seconds": mode.open_ended,
            "face_box": mode.motion != "absent",
        }
        defaults = {field.name: field.default for field in fields(self)}
        return [
            name
            for name, needed in needs.items()
            if getattr(self, name) not in (None, "", defaults[name]) and not needed
        ]

    @property
    def keeps_prefix(self) -> bool:
        """Whether the result includes the prefix, as in the released programs."""
        return self.compat != "paper"

    @property
    def voice_file(self) -> str:
        """File whose audio is the reference voice."""
        if self.reference_audio:
            return self.reference_audio
        if self.mode == "a2v":
            return self.audio
        for video in (self.reference_video, self.video):
            if video and not is_picture(video) and probe(video).audio:
                return video
        raise UserError(f"{self.reference_video or self.video} has no audio: set reference_audio")

    def check_files(self) -> None:
        """Check the files that the mode uses, without decoding them."""
        kinds = {"audio": "audio", "reference_audio": "audio", "video": "video", "reference_video": "video"}
        for name in (name for name in kinds if getattr(self, name) and name not in self.unused):
            path = getattr(self, name)
            if (name == "reference_video" and is_picture(path)) or (name == "reference_audio" and is_voice(path)):
                check_readable(path)
            else:
                require_stream(path, kinds[name])
        if self.reference_motion and "reference_motion" not in self.unused:
            check_readable(self.reference_motion)
        if self.face_box is not None:
            track_of_boxes(read_boxes(self.face_box), 1)
        speaks = MODES[self.mode].speech == "generated" and not is_voice(self.reference_audio)
        if speaks:
            require_stream(self.voice_file, "audio")


def with_preset(name: str, sampling: Sampling) -> Sampling:
    """Override these settings with those of configs/sampling/NAME.yaml."""
    return override(sampling, read_preset("sampling", name).get("sampling", {}))


@dataclass(frozen=True)
class CodecFolders:
    """Release folders of the codecs."""

    speech: str | None = setting(None, about="WhisperX-VAE")
    motion: str | None = setting(None, about="LIA-X")
    speaker: str | None = setting(None, about="release folder of the speaker encoder")


@dataclass(frozen=True)
class InferConfig(RunConfig, Job):
    """Settings of `infer.py model=talker_t2av`: a job, or the common fields of the jobs in a file, and execution
    settings.
    """

    model: str = setting("talker_t2av", about="talker_t2av or hicodit")
    jobs: str | None = setting(None, about="JSONL file with one job per line, whose settings override those given here")
    name: str | None = setting(
        None, about='name of the output files; null: the mode, or for jobs their "name" or line number'
    )
    weights: str | None = setting(
        None,
        about="release folder, OWNER/NAME on the hub, or a folder of the released files; null: the bundled model",
    )
    codecs: CodecFolders = group(CodecFolders, about="release folders of codecs; null: those of the weights")
    sampling: dict[str, Any] = group(Sampling, unset=True, about="null: as in the release")


JOB_FIELDS = {field.name for field in fields(Job)}


def read_settings(config: DictConfig) -> tuple[InferConfig, list[NamedJob]]:
    """Return the settings and the named jobs, after all checks that do not require loading a model."""
    c = make(InferConfig, plain(config))
    set_limits(c.limits)
    check_release("weights", c.weights)
    for stream, folder in vars(c.codecs).items():
        check_release(f"codecs.{stream}", folder)
    jobs = read_jobs(c)
    check_outputs(c, jobs)
    if c.jobs is None:  # with several jobs, invalid ones are reported and the others continue
        jobs[0][1].check_files()
    with writable(c.output):
        return c, jobs


def check_outputs(c: InferConfig, jobs: Sequence[NamedJob]) -> None:
    """Raise UserError if an output is a folder, or a file that any of the jobs reads."""
    valid = [(name, job) for name, job in jobs if isinstance(job, Job)]
    files = [c.jobs, *(getattr(job, name) for _, job in valid for name in FILES)]
    inputs = {os.path.realpath(file) for file in files if file}
    for name, job in valid:
        for output in outputs_of(job, name, c.figure, c.timestamps):
            target = Path(c.output) / output
            if target.is_dir():
                raise UserError(f"cannot write {target}: it is a folder")
            if os.path.realpath(target) in inputs:
                raise UserError(f"output={c.output} would replace the input {target}: choose another folder or name")


def read_jobs(c: InferConfig) -> list[NamedJob]:
    """Return names and jobs of the command line, or of each line of `jobs`. Invalid lines yield their error."""
    common = {name: value for name, value in vars(c).items() if name in JOB_FIELDS and value not in (None, "")}
    complete = with_demo_references if c.weights is None else dict
    if c.jobs is None:
        fields_ = with_demo(common) if c.weights is None else common
        return [(safe_name(c.name or c.mode, "name="), Job(**complete(fields_)))]
    if c.name is not None:
        raise UserError(f"name={c.name} only applies to a single job: set names in jobs={c.jobs}")
    path = Path(c.jobs)
    jobs = []
    for number, line in enumerate(read_lines(path, f"jobs={path}"), 1):
        try:
            if line.strip():
                row = parse_object(line, "the line", {"name", *JOB_FIELDS}, '{"text": "hello"}')
                name = row.pop("name", f"{number:04d}")
                name = safe_name(str(name) if type(name) is int else name, "name=")
                jobs.append((name, Job(**complete({**common, **row}))))
        except UserError as error:
            jobs.append((f"line {number}", UserError(f"jobs={path}: {error}")))
    if not jobs:
        raise UserError(f"jobs={path} has no line with a job")
    if all(isinstance(job, UserError) for _, job in jobs):
        line, error = jobs[0]
        raise UserError(f"{line} of {error}")
    for name, count in Counter(name for name, _ in jobs).items():
        if count > 1:
            raise UserError(f"jobs={path}: two jobs have the name {name}: names must be unique")
    return jobs


def with_demo(values: dict[str, Any]) -> dict[str, Any]:
    """Fill missing inputs of a job with the bundled sentence, or in a2v and v2a with a bundled file and its text."""
    mode = values.get("mode", "t2av")
    job = dict(values)
    given = {"a2v": ("audio", DEMO_VOICE), "v2a": ("video", DEMO_FACE)}.get(mode)
    if given is None or given[0] not in job:  # the transcript of the bundled file
        if given is not None:
            job[given[0]] = given[1]
        job.setdefault("text", (DEMO / f"{'voice' if mode == 'a2v' else 'silent'}.txt").read_text().strip())
    return job


def with_demo_references(values: dict[str, Any]) -> dict[str, Any]:
    """Fill the missing voice and face of a job with the bundled ones."""
    mode = values.get("mode", "t2av")
    job = dict(values)
    if mode in ("t2av", "tts", "v2a") and "reference_video" not in job:
        job.setdefault("reference_audio", DEMO_VOICE)
    if mode in ("t2av", "a2v"):
        job.setdefault("reference_video", DEMO_FACE)
    return job


def outputs_of(job: Job, name: str, figure: bool = False, timestamps: bool = False) -> list[str]:
    """Return the names of a job's output files: NAME.wav, or the given audio unchanged; NAME.mp4 except for tts;
    NAME.png.

    NAME.png, the figure, is written if a face is generated. NAME.json, .srt and .vtt contain word timestamps.
    """
    suffix = Path(job.audio).suffix if job.mode == "a2v" else ".wav"
    sound = [] if suffix.lower() == ".mp4" else [f"{name}{suffix}"]
    video = [] if job.mode == "tts" else [f"{name}.mp4"]
    words = [f"{name}{end}" for end in WORD_FILES] if timestamps else []
    return sound + video + ([f"{name}.png"] if figure and job.mode in ("t2av", "a2v") else []) + words


def is_voice(path: str | Path | None) -> bool:
    """Return whether a file name is that of a saved voice; see `talker_t2av.reference.save_voice`."""
    return path is not None and Path(path).suffix.lower() == SAVED_VOICE


def is_picture(path: str | Path) -> bool:
    """Return whether a file begins like a PNG, JPEG, BMP or WebP image. Its name does not matter."""
    if not os.path.isfile(path):
        return False
    with suppress(OSError), open(path, "rb") as file:
        return bool(IMAGE_START.match(file.read(12)))
    return False

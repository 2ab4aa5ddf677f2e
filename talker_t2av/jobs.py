"""From files to what the loop is asked: voices, faces, given streams and style prefixes of one job.

Axes: N samples at 24 kHz, F frames at 25 a second, Ds / Dm speech / motion channels, G speaker embedding, S picture
side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.media.audio import read_audio, resample
from engine.media.ffmpeg import probe
from engine.nn.mel import pad_or_trim
from lia_x.pictures import identity_to_tensor, video_to_tensor
from talker_t2av.data import HOP, MAX_FRAMES, RATE, RATE16
from talker_t2av.faces import CROPS, Square, find_square, is_picture, read_square
from talker_t2av.model import FPS
from talker_t2av.request import GENERATE_SPEECH, MODES, PAPER, SCRIPT, Compat, Mode, Request
from talker_t2av.system import TalkerSystem

COMPAT = {"paper": {}, "official": {"tts": GENERATE_SPEECH, "t2av": SCRIPT}}
PAUSE, BYTE = 1.5, 0.15  # seconds: an utterance takes at most PAUSE + BYTE a byte of text, slow speech included


@dataclass(frozen=True)
class Job:
    """One thing to generate; the fields are those of the command line and of a line of JSONL.

    Attributes:
        mode: t2av, tts, a2v or v2a.
        text: what is said; in a2v and v2a too, the model was trained with it. It may be empty there.
        reference_audio: a file with the voice. If absent: the given audio (a2v), else the sound of the videos.
        reference_video: a file with the face, also a picture; the first frame that shows it is animated (t2av, a2v).
        reference_motion: a torch file (F, Dm) of its motion codes, which else come from the frames.
        reference_text: what the reference says, if it serves as a prefix that the text goes on from.
        audio: a2v: the sound to which the face moves. video: v2a: the clip that gets a voice.
        crop: what of the videos is used: "face", the square round it, or "centre", the largest square in the middle.
        face_box: where the face is, instead of looking for it, in `video`, else in `reference_video`; see
            `engine.faces.track.read_boxes`.
        prefix_seconds: of the reference that the new streams continue, to take over its style.
        min_seconds, max_seconds: of what is generated; max None: from the length of the text.
        compat: paper, or official for the departures of the released programs (t2av and tts).
        seed: of the noise.
    """

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
    prefix_seconds: float = 0.0
    min_seconds: float = 0.16
    max_seconds: float | None = None
    compat: str = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("compat", COMPAT), ("crop", CROPS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)} is unknown; choose {', '.join(allowed)}")
        if self.compat == "official" and self.mode not in COMPAT["official"]:
            raise UserError(f"compat=official has no mode={self.mode}: the released programs offer t2av and tts")
        if not self.text.strip() and self.mode in ("t2av", "tts"):
            raise UserError(f"mode={self.mode} needs text=... to say")
        needed = {"t2av": "reference_video", "a2v": "reference_video", "v2a": "video"}.get(self.mode)
        if needed and not getattr(self, needed):
            raise UserError(f"mode={self.mode} needs {needed}=FILE")
        if self.mode == "a2v" and not self.audio:
            raise UserError("mode=a2v needs audio=FILE, the sound to which the face moves")
        if not (self.reference_audio or self.mode == "a2v" or self.reference_video or self.video):
            raise UserError(f"mode={self.mode} needs reference_audio=FILE, the voice to speak with")
        if not 0 <= self.prefix_seconds <= 30:
            raise UserError(f"prefix_seconds={self.prefix_seconds} must be in 0..30")
        if self.min_seconds < 0 or (self.max_seconds is not None and not 0.16 <= self.max_seconds <= 30):
            raise UserError(f"min_seconds={self.min_seconds}, max_seconds={self.max_seconds}: give 0.16..30 seconds")
        if self.prefix_seconds and self.mode in ("a2v", "v2a") and not (self.reference_audio and self.reference_video):
            raise UserError(f"prefix_seconds with mode={self.mode} needs both reference_audio and reference_video")

    @property
    def switches(self) -> Compat:
        return COMPAT[self.compat].get(self.mode, PAPER)


@dataclass(frozen=True)
class Prepared:
    """A job ready for the loop.

    Attributes:
        request: of the loop.
        mode, compat: of the loop.
        prefix_speech: (F, Ds) latents that the decoder hears before the new ones.
        prefix_motion: (F, Dm) motion of the prefix, not normalised.
        picture: (3, S, S) in [-1, 1], the face; None where none is drawn.
        wave: (N,) given sound at 24 kHz (a2v). frames: how many come out at most, where a given stream tells it.
        remark: what the user should know of the files, or "".
    """

    job: Job
    request: Request
    mode: Mode
    compat: Compat
    prefix_speech: Tensor
    prefix_motion: Tensor
    picture: Tensor | None
    wave: np.ndarray | None
    frames: int | None
    remark: str = ""


class Reference:
    """The files of a job, each read when it is first needed; of the face, the first `count` frames."""

    def __init__(self, job: Job, system: TalkerSystem, count: int) -> None:
        self.job, self.system, self.count = job, system, count

    @cached_property
    def wave(self) -> Tensor:
        """(N,) of the voice."""
        return torch.from_numpy(read_audio(self._voice_file(), RATE).copy())

    @cached_property
    def square(self) -> Square:
        """Where the face is in its video."""
        box = None if self.job.mode == "v2a" else self.job.face_box
        return find_square(self.job.reference_video, self.count, self.job.crop, box)

    def speaker(self, seconds: float | None = None) -> Tensor:
        """(G,) of the voice. The official `generate_speech` hears its prefix only, or 30 s filled up with silence."""
        wave = resample(self.wave, RATE, RATE16)
        if seconds is not None:
            wave = wave[: round(seconds * RATE16)] if seconds else pad_or_trim(wave, 30 * RATE16)
        return self.system.encoders.speaker.embed(wave.to(self.system.device)).cpu()

    def speech(self) -> Tensor:
        """(F, Ds) latents of the voice file, all of it."""
        return encode_speech(self.system, self.wave)

    def motion(self) -> Tensor:
        """(F, Dm) motion of the face, not normalised; of the first frame that shows it, if one is all."""
        if self.job.reference_motion is None:
            start = self.square.first if self.count == 1 else 0
            blocks = read_square(self.job.reference_video, self.square, self.count, start)
            return torch.cat([encode_motion(self.system, block) for block in blocks])
        path, wanted = self.job.reference_motion, self.system.model.config.motion_dim
        try:
            motion = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types for what is no tensor file
            raise UserError(f"reference_motion={path} cannot be read as a tensor: {error}") from error
        if not isinstance(motion, Tensor) or motion.ndim != 2 or motion.shape[1] != wanted or not len(motion):
            raise UserError(f"reference_motion={path} must hold a tensor (frames, {wanted})")
        return motion.float()[: self.count]

    def picture(self) -> Tensor:
        """(3, S, S) of the first frame that shows the face."""
        blocks = read_square(self.job.reference_video, self.square, 1, self.square.first)
        return identity_to_tensor(next(blocks)[0], self.system.encoders.motion.config.size)

    def _voice_file(self) -> str:
        if self.job.reference_audio:
            return self.job.reference_audio
        if self.job.mode == "a2v":
            return self.job.audio
        for video in (self.job.reference_video, self.job.video):
            if video and not is_picture(video) and probe(video).audio:
                return video
        raise UserError(f"{self.job.reference_video or self.job.video} has no sound: give reference_audio=FILE")


@torch.no_grad()
def prepare(job: Job, system: TalkerSystem) -> Prepared:
    """Read and encode the files of a job.

    Raises:
        UserError: a file is missing or unreadable, or a given stream is too long or too short.
    """
    mode, compat, c = MODES[job.mode], job.switches, system.model.config
    size, moving = c.patch_size, mode.motion != "absent"
    whole = job.prefix_seconds > 0 or compat.extra_patches is not None
    reference = Reference(job, system, MAX_FRAMES if whole else 1)
    speech, motion = torch.zeros(0, c.speech_dim), torch.zeros(0, c.motion_dim)
    if whole:
        speech = reference.speech()
    if mode.motion == "generated" or (whole and moving):
        motion = reference.motion()
    available = len(motion) if compat is SCRIPT else min(len(speech), len(motion)) if moving else len(speech)
    frames = compat.prefix_frames(job.prefix_seconds, available, size)
    if job.prefix_seconds and not frames:
        raise UserError(f"prefix_seconds={job.prefix_seconds}: the reference gives no whole patch of {size / FPS} s")
    first_motion = system.stats.normalise(motion[:1])[0] if len(motion) else None
    kept = motion[:frames]
    normalised = system.stats.normalise(kept)
    if compat.bf16_motion:
        first_motion, normalised = first_motion.bfloat16().float(), normalised.bfloat16().float()

    prefix = -(-frames // size)
    if compat is SCRIPT:
        prefix += c.delay
    limit = max_patches(job, size)
    if compat.extra_patches is not None:
        patches = -(-len(speech) // size)
        patches = max(patches, len(motion) // size + c.delay) if moving else patches
        limit = compat.limit(patches, prefix, c.delay if moving else 0)
    speech = speech[: prefix * size] if compat is SCRIPT else speech[:frames]

    wave, total, given_speech, given_motion, remark = None, None, speech, normalised, ""
    if mode.speech == "given":
        wave = read_audio(job.audio, RATE)
        total = -(-len(wave) // HOP)
        _check_given(total, f"audio={job.audio}")
        given_speech = torch.cat([speech, encode_speech(system, np.pad(wave, (0, total * HOP - len(wave))))])
    if mode.motion == "given":
        if is_picture(job.video):
            raise UserError(f"video={job.video} is a picture: give the clip that is to get a voice")
        square = find_square(job.video, MAX_FRAMES, job.crop, job.face_box)
        new = torch.cat([encode_motion(system, b) for b in read_square(job.video, square, MAX_FRAMES + 1)])
        total, remark = len(new), square.remark
        _check_given(total, f"video={job.video}")
        new = torch.cat([new, new[-1:].expand(-total % size, -1)])  # motion comes in whole patches
        given_motion = torch.cat([normalised, system.stats.normalise(new)])
    speaker = torch.zeros(c.speaker_dim)  # of no use where no speech is drawn
    if mode.speech == "generated":
        speaker = reference.speaker(job.prefix_seconds if compat is GENERATE_SPEECH else None)
    request = Request(
        prompt=system.tokenizer.prompt(f"{job.reference_text} {job.text}".strip()),
        speaker=speaker,
        speech=given_speech,
        motion=given_motion,
        first_motion=first_motion,
        prefix=prefix,
        max_patches=limit,
        min_patches=min(limit, max(1, round(job.min_seconds * FPS / size))),
        seed=job.seed,
    )
    picture = None
    if mode.motion == "generated":
        picture, remark = reference.picture(), reference.square.remark
    return Prepared(job, request, mode, compat, speech, kept, picture, wave, total, remark)


def max_patches(job: Job, patch_size: int) -> int:
    """Most patches of an open-ended job: from `max_seconds`, or from the text's length in bytes, 30 s at most."""
    seconds = job.max_seconds or min(MAX_FRAMES / FPS, PAUSE + BYTE * len(job.text.encode()))
    return max(1, -(-round(seconds * FPS) // patch_size))


def encode_speech(system: TalkerSystem, wave: Tensor | np.ndarray) -> Tensor:
    """Sound (N,) at 24 kHz -> latents (F, Ds) on the CPU."""
    wave = torch.as_tensor(wave)
    if len(wave) < HOP:
        raise UserError(f"{len(wave) / RATE:.3f} s of sound is too short: give {HOP / RATE} s or more")
    return system.encoders.speech.encode_wave(wave[None, None].to(system.device))[0].cpu()


def encode_motion(system: TalkerSystem, frames: np.ndarray) -> Tensor:
    """Square frames (F, S, S, 3) uint8 -> motion (F, Dm) on the CPU, not normalised."""
    codec = system.encoders.motion
    return codec.motion(video_to_tensor(frames, codec.config.size)).cpu()


def _check_given(frames: int, what: str) -> None:
    if frames > MAX_FRAMES:
        raise UserError(f"{what} lasts {frames / FPS:.1f} s: give at most {MAX_FRAMES / FPS:.0f} s at once")

"""A job's files to the loop's request: voices, faces, given streams and prefixes.

Axes: N samples at 24 kHz, F frames at 25 a second, Ds / Dm speech / motion channels, G speaker embedding, S picture
side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.bounds import SEEDS, bounded, check_bounds
from engine.errors import UserError
from engine.media.audio import read_audio, read_voice, resample
from engine.media.ffmpeg import probe
from engine.media.pictures import identity_to_tensor, video_to_tensor
from engine.nn.mel import pad_or_trim
from engine.safe_pickle import read_matrix
from talker_t2av import official
from talker_t2av.faces import CROPS, Square, find_square, is_picture, read_square
from talker_t2av.model import FPS, HOP, HOP16, MAX_FRAMES, RATE, RATE16
from talker_t2av.request import MODES, PAPER, LoopRules, Mode, Request
from talker_t2av.system import TalkerSystem

COMPAT = ("paper", "official", "library")
PAUSE, BYTE = 1.5, 0.15  # seconds: even slow speech takes less than PAUSE + BYTE for each byte of text


@dataclass(frozen=True)
class Job:
    """What to generate from which files; a field for each setting of the command line and of a line of JSONL.

    Attributes:
        mode: t2av, tts, a2v or v2a.
        text: the words to speak. In a2v and v2a, the words of the given sound or lips; it may be empty.
        reference_audio: file with the voice. By default the given audio (a2v), or the sound of one of the videos.
        reference_video: video or picture with the face; its first frame that shows the face is animated (t2av, a2v).
        reference_motion: torch file with the motion codes (F, Dm) of the reference; by default they are computed.
        reference_text: what the reference says; needed if it is used as a prefix.
        audio: a2v: the sound to which the face moves. video: v2a: the clip that gets a voice.
        crop: part of the videos that is used: "face", the square round it, or "centre", the largest centred square.
        face_box: position of the face, which is then not detected, in `video` or else in `reference_video`; see
            `engine.faces.track.read_boxes`.
        prefix_seconds: length of the reference's beginning that the result continues, in its style.
        min_seconds, max_seconds: length of the result; max None: estimated from the text.
        compat: paper: as in training. official: as the released command line (t2av) and the released method for speech
            alone (tts). library: as the released methods. See talker_t2av/official.py.
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
    prefix_seconds: float = bounded(0.0, 30.0, default=0.0)
    min_seconds: float = bounded(0.0, 30.0, default=0.16)
    max_seconds: float | None = bounded(0.16, 30.0, default=None)
    compat: str = "paper"
    seed: int = bounded(*SEEDS, default=0)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if "str" in field.type and not isinstance(value, str) and not (value is None and "None" in field.type):
                raise UserError(f"{field.name}={value!r} must be a text")
            if value == "" and "None" in field.type:
                raise UserError(f"{field.name}= is empty: name a file, or leave it out")
        check_bounds(self)
        for name, allowed in (("mode", MODES), ("compat", COMPAT), ("crop", CROPS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)} is unknown; choose {', '.join(allowed)}")
        if self.compat != "paper" and self.mode not in ("t2av", "tts"):
            raise UserError(f"compat={self.compat} has no mode={self.mode}: the released programs offer t2av and tts")
        if not self.text.strip() and self.mode in ("t2av", "tts"):
            raise UserError(f"mode={self.mode} needs text=... to say")
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


@dataclass(frozen=True)
class PreparedJob:
    """A job whose files are read and encoded.

    Attributes:
        request, mode, rules: of the loop.
        prefix_speech: (F, Ds) latents of the prefix, which the decoder needs before the new ones.
        prefix_motion: (F, Dm) motion of the prefix, not normalised.
        picture: (3, S, S) in [-1, 1], the face; None where none is drawn.
        wave: (N,) given sound at 24 kHz (a2v). frames: length of the result if a given stream sets it.
        remark: a note to the user about the files, or "".
    """

    job: Job
    request: Request
    mode: Mode
    rules: LoopRules
    prefix_speech: Tensor
    prefix_motion: Tensor
    picture: Tensor | None
    wave: np.ndarray | None
    frames: int | None
    remark: str = ""


class Reference:
    """The files with a job's voice and face, each read when it is first needed; of longer ones, the first 30 s.

    Attributes:
        remarks: notes to the user about the files.
    """

    def __init__(self, job: Job, system: TalkerSystem) -> None:
        self.job, self.system, self.remarks = job, system, []
        self.whole = bool(job.prefix_seconds) or job.compat != "paper"  # else one picture of the face is enough

    @cached_property
    def wave(self) -> Tensor:
        """(N,) of the voice."""
        path = self._voice_file()
        wave = torch.from_numpy(read_voice(path, RATE))
        self._say_if_cut(path, len(wave) / RATE)
        return wave[: MAX_FRAMES * HOP]

    @cached_property
    def wave16(self) -> Tensor:
        """(N,) of the voice at 16 kHz."""
        return resample(self.wave, RATE, RATE16)

    @property
    def frames(self) -> int:
        """Frames of the voice."""
        return max(1, len(self.wave16) // HOP16)

    @cached_property
    def square(self) -> Square:
        """Where the face is in its video."""
        box = None if self.job.mode == "v2a" else self.job.face_box
        return find_square(self.job.reference_video, MAX_FRAMES if self.whole else 1, self.job.crop, box)

    def speaker(self, frames: int | None = None) -> Tensor:
        """(G,) of the voice, or of its first `frames`, which silence fills up."""
        wave = self.wave16 if frames is None else pad_or_trim(self.wave16, frames * HOP16)
        return self.system.speaker.embed(wave.to(self.system.device)).cpu()

    def speech(self) -> Tensor:
        """(F, Ds) latents of the voice."""
        return encode_speech(self.system, self.wave)

    def prefix_alone(self, frames: int) -> tuple[Tensor, Tensor]:
        """Speaker embedding (G,) and latents (frames, Ds) as if the voice ended after `frames`; see `official`."""
        speech = torch.zeros(0, self.system.model.config.speech_dim)
        if frames:
            speech = self.system.speech.encode_beginning(self.wave[None, None], frames)[0].cpu()
        return self.speaker(official.voice_frames(frames)), speech

    def motion(self, count: int = MAX_FRAMES) -> Tensor:
        """(F, Dm) of the first `count` frames of the face, not normalised; of one: the first that shows the face."""
        if self.job.reference_motion is None:
            start = self.square.first if count == 1 else 0
            blocks = read_square(self.job.reference_video, self.square, count, start)
            return torch.cat([encode_motion(self.system, block) for block in blocks])
        path = self.job.reference_motion
        motion = read_matrix(path, self.system.model.config.motion_dim)
        if count > 1:
            self._say_if_cut(path, len(motion) / FPS)
        return motion.float()[:count]

    def picture(self) -> Tensor:
        """(3, S, S) of the first frame that shows the face."""
        if self.square.remark:
            self.remarks.append(self.square.remark)
        blocks = read_square(self.job.reference_video, self.square, 1, self.square.first)
        return identity_to_tensor(next(blocks)[0], self.system.motion.size)

    def _say_if_cut(self, path: str, seconds: float) -> None:
        if seconds > MAX_FRAMES / FPS:
            self.remarks.append(f"{path} lasts {seconds:.0f} s: only its first {MAX_FRAMES // FPS} s are used")

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
def prepare_job(job: Job, system: TalkerSystem) -> PreparedJob:
    """Read and encode the files of a job.

    Raises:
        UserError: a file is missing or unreadable, or a given stream is too long or too short.
    """
    mode, size, reference = MODES[job.mode], system.model.config.patch_size, Reference(job, system)
    system.require(job.mode)
    request, rules, prefix_motion = _request(job, system, reference)
    prefix_speech, wave, total = request.speech, None, None
    if mode.speech == "given":
        wave = read_audio(job.audio, RATE)
        total = -(-len(wave) // HOP)
        _check_given(total, f"audio={job.audio}")
        new = encode_speech(system, np.pad(wave, (0, total * HOP - len(wave))))
        request = replace(request, speech=torch.cat([prefix_speech, new]))
    if mode.motion == "given":
        if is_picture(job.video):
            raise UserError(f"video={job.video} is a picture: give the clip that is to get a voice")
        square = find_square(job.video, MAX_FRAMES, job.crop, job.face_box)
        new = torch.cat([encode_motion(system, b) for b in read_square(job.video, square, MAX_FRAMES + 1)])
        total = len(new)
        _check_given(total, f"video={job.video}")
        if square.remark:
            reference.remarks.append(square.remark)
        new = torch.cat([new, new[-1:].expand(-total % size, -1)])  # motion comes in whole patches
        request = replace(request, motion=torch.cat([request.motion, system.stats.normalise(new)]))
    picture = reference.picture() if mode.motion == "generated" else None
    fewest = max(1, round(job.min_seconds * FPS / size))
    request = replace(request, min_patches=min(request.max_patches, fewest), seed=job.seed)
    reference.remarks += [f"{name}= is not used by mode={job.mode}" for name in job.unused]
    unknown = system.tokenizer.unknown_words(job.text)
    if unknown:
        reference.remarks.append(f"not in the training text, expect babble: {', '.join(unknown[:8])}")
    remark = "; ".join(dict.fromkeys(reference.remarks))
    return PreparedJob(job, request, mode, rules, prefix_speech, prefix_motion, picture, wave, total, remark)


def _request(job: Job, system: TalkerSystem, reference: Reference) -> tuple[Request, LoopRules, Tensor]:
    """The request without the given stream of a2v and v2a, how its row ends, and the prefix's raw motion (F, Dm)."""
    mode, c, seconds = MODES[job.mode], system.model.config, job.prefix_seconds
    prompt = system.tokenizer.prompt(f"{job.reference_text} {job.text}".strip())
    motion = torch.zeros(0, c.motion_dim)
    if job.compat == "paper":
        request, motion = _paper_request(job, system, reference, prompt)
        rules, frames = PAPER, len(request.speech)
    elif job.compat == "official" and job.mode == "t2av":
        motion = reference.motion()
        request, rules = official.inference_script(
            c, system.stats, prompt, reference.speaker(), reference.speech(), motion, seconds
        )
        frames = len(request.motion)
    elif mode.motion == "absent":
        frames = official.prefix_frames(seconds, reference.frames)
        speaker, speech = reference.prefix_alone(frames)
        request, rules = official.generate_speech(c, prompt, speaker, speech, reference.frames)
    else:
        frames = official.whole_prefix_frames(seconds, reference.frames, c.patch_size)
        speaker, speech = reference.prefix_alone(frames)
        motion = reference.motion(max(1, frames))
        first = system.stats.normalise(motion[0])
        request, rules = official.generate_speech_motion(c, prompt, speaker, speech, first, reference.frames)
    if seconds and not frames:
        raise UserError(f"prefix_seconds={seconds}: the reference gives no whole patch of {c.patch_size / FPS} s")
    return request, rules, motion[:frames]


def _paper_request(job: Job, system: TalkerSystem, reference: Reference, prompt: list[int]) -> tuple[Request, Tensor]:
    """The request as training has it, and the reference's motion (F, Dm): all of it, or of one frame."""
    mode, c = MODES[job.mode], system.model.config
    speech, motion = torch.zeros(0, c.speech_dim), torch.zeros(0, c.motion_dim)
    frames = 0
    if job.prefix_seconds:
        speech = reference.speech()
        frames = len(speech)
    if mode.motion == "generated" or (job.prefix_seconds and mode.motion == "given"):
        motion = reference.motion(MAX_FRAMES if job.prefix_seconds else 1)
        frames = min(frames, len(motion))
    frames = min(round(job.prefix_seconds * FPS), frames) // c.patch_size * c.patch_size
    request = Request(
        prompt,
        # Not used where no speech is drawn.
        reference.speaker() if mode.speech == "generated" else torch.zeros(c.speaker_dim),
        speech[:frames],
        system.stats.normalise(motion[:frames]),
        system.stats.normalise(motion[0]) if len(motion) else None,
        frames // c.patch_size,
        max_patches(job, c.patch_size),
    )
    return request, motion


def max_patches(job: Job, patch_size: int) -> int:
    """Most patches of an open-ended job: from `max_seconds`, or from the text's length in bytes, 30 s at most."""
    seconds = job.max_seconds or min(MAX_FRAMES / FPS, PAUSE + BYTE * len(job.text.encode()))
    return max(1, -(-round(seconds * FPS) // patch_size))


def encode_speech(system: TalkerSystem, wave: Tensor | np.ndarray) -> Tensor:
    """Sound (N,) at 24 kHz -> latents (F, Ds) on the CPU."""
    wave = torch.as_tensor(wave)
    if len(wave) < HOP:
        raise UserError(f"{len(wave) / RATE:.3f} s of sound is too short: give {HOP / RATE} s or more")
    return system.speech.encode(wave[None, None].to(system.device))[0].cpu()


def encode_motion(system: TalkerSystem, frames: np.ndarray) -> Tensor:
    """Square frames (F, S, S, 3) uint8 -> motion (F, Dm) on the CPU, not normalised."""
    codec = system.motion
    return codec.encode(video_to_tensor(frames, codec.size)).cpu()


def _check_given(frames: int, what: str) -> None:
    if frames > MAX_FRAMES:
        raise UserError(f"{what} lasts longer than {MAX_FRAMES / FPS:.0f} s: give a part of it")

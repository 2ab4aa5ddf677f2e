"""Preparation of generation jobs: their files are read, encoded, and converted to requests of a `BatchedDecoder`.

Axes: N samples at 24 kHz, F frames at 25 per second, Ds / Dm speech / motion channels, G speaker embedding, S image
side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.device import to_device
from engine.errors import UserError
from engine.files import atomic_output
from engine.media.audio import read_audio, read_voice, resample
from engine.media.ffmpeg import check_readable
from engine.media.pictures import identity_to_tensor, video_to_tensor
from engine.nn.mel import pad_or_trim
from engine.progress import stage
from engine.seeding import seed_for
from engine.torch_files import read_matrix
from talker_t2av import official
from talker_t2av.faces import Square, Surroundings, find_square, read_square, read_surroundings
from talker_t2av.model import FPS, HOP, HOP16, MAX_FRAMES, RATE, RATE16
from talker_t2av.request import MODES, Mode, Request
from talker_t2av.settings import Job, is_voice
from talker_t2av.system import TalkerSystem
from talker_t2av.text import split_text

# Upper bounds of the speech duration in seconds: MARGIN, plus SLOW_BYTE per byte of text or SLOW_PHONEME per phoneme.
MARGIN = 1.5
SLOW_BYTE = 0.15
SLOW_PHONEME = 0.2
MAX_VOICE = 2**20  # maximum size of a saved voice in bytes


@dataclass(frozen=True)
class PreparedJob:
    """A job whose files have been read and encoded.

    Attributes:
        requests: requests of a `BatchedDecoder`, one per part of the text. They differ in prompt, limits and seed.
        prefix_motion: (F, Dm) motion of the prefix, not normalised.
        picture: (3, S, S) in [-1, 1], image of the face. None if no face is generated.
        wave: (N,) given audio at 24 kHz. None if speech is generated.
        frames: number of frames of the given stream, which is the length of the result. None if both are generated.
        remarks: one-line notes about the inputs; see `remarks_of`.
        surroundings: image into which the generated face is pasted. None if it is not pasted.
    """

    job: Job
    requests: tuple[Request, ...]
    prefix_motion: Tensor
    picture: Tensor | None
    wave: np.ndarray | None
    frames: int | None
    remarks: tuple[str, ...] = ()
    surroundings: Surroundings | None = None

    @property
    def mode(self) -> Mode:
        return MODES[self.job.mode]


class Reference:
    """Reference voice and face of a job. Files are read on first use. Only their first 30 s are used.

    Attributes:
        durations: total duration in seconds of the recording and motion file, by path, if they have been read. Motion
            of which only one frame is needed is not included.
    """

    def __init__(self, job: Job, system: TalkerSystem) -> None:
        self.job = job
        self.system = system
        self.durations: dict[str, float] = {}

    @cached_property
    def wave(self) -> Tensor:
        """Waveform (N,) of the voice at 24 kHz."""
        path = self.job.voice_file
        with stage("reading"):
            wave = torch.from_numpy(read_voice(path, RATE))
        self.durations[path] = len(wave) / RATE
        return wave[: MAX_FRAMES * HOP]

    @cached_property
    def wave16(self) -> Tensor:
        """Waveform (N,) of the voice at 16 kHz."""
        return resample(self.wave, RATE, RATE16)

    @property
    def frames(self) -> int:
        """Length of the voice in frames, at least 1."""
        return max(1, len(self.wave16) // HOP16)

    @cached_property
    def square(self) -> Square:
        """Square crop around the face in `reference_video`."""
        job = self.job
        box = None if job.mode == "v2a" else job.face_box
        count = MAX_FRAMES if job.prefix_seconds or job.compat != "paper" else 1  # a single image of the face suffices
        return find_square(job.reference_video, count, job.crop, box)

    def speaker(self, frames: int | None = None) -> Tensor:
        """Return the speaker embedding (G,) of the voice, or of its first `frames` frames, padded with silence."""
        if is_voice(self.job.voice_file):
            return read_saved_voice(self.job.voice_file, self.system.voice_digest, self.system.model.config.speaker_dim)
        wave = self.wave16 if frames is None else pad_or_trim(self.wave16, frames * HOP16)
        return self.system.speaker.embed(to_device(wave, self.system.device)).cpu()

    def motion(self, count: int = MAX_FRAMES) -> Tensor:
        """Return the motion (F, Dm) of the first `count` frames, not normalised.

        It is read from `reference_motion` if given, otherwise encoded from `reference_video`. With `count=1`, the first
        frame that shows the face is encoded.
        """
        if self.job.reference_motion is None:
            start = self.square.first if count == 1 else 0
            blocks = read_square(self.job.reference_video, self.square, count, start)
            return encode_motion(self.system, blocks)
        path = self.job.reference_motion
        motion = read_matrix(path, self.system.model.config.motion_dim)
        if count > 1:
            self.durations[path] = len(motion) / FPS
        return motion.float()[:count]

    def picture(self) -> Tensor:
        """Read the image (3, S, S) of the first frame that shows the face."""
        blocks = read_square(self.job.reference_video, self.square, 1, self.square.first)
        return identity_to_tensor(next(blocks)[0], self.system.motion.size)


@dataclass(frozen=True)
class ReferenceRequest:
    """Request whose inputs come from the reference alone, to which given streams are then appended.

    Attributes:
        request: its `speech` and `motion` are those of the prefix.
        prefix_frames: number of frames of the prefix, 0 without a prefix.
        prefix_motion: (F, Dm) motion of the prefix, not normalised. F is 0 without motion.
    """

    request: Request
    prefix_frames: int
    prefix_motion: Tensor


def reference_request(reference: Reference, prompt: list[int]) -> ReferenceRequest:
    """Create a request in the layout that `Job.compat` selects.

    Args:
        prompt: text tokens.

    Raises:
        UserError: If a prefix is requested, but is shorter than one patch.
    """
    job = reference.job
    if job.compat == "paper":
        start = paper_request(reference, prompt)
    elif job.compat == "official" and MODES[job.mode].motion != "absent":
        start = script_request(reference, prompt)
    else:
        start = library_request(reference, prompt)
    if job.prefix_seconds and not start.prefix_frames:
        seconds = reference.system.model.config.patch_size / FPS
        raise UserError(f"prefix_seconds={job.prefix_seconds}: the reference is shorter than one patch of {seconds} s")
    return start


def paper_request(reference: Reference, prompt: list[int]) -> ReferenceRequest:
    """Create a request in the layout of training. The prefix is truncated to whole patches."""
    job = reference.job
    system = reference.system
    config = system.model.config
    mode = MODES[job.mode]
    speech = torch.zeros(0, config.speech_dim)
    motion = torch.zeros(0, config.motion_dim)
    speaker = torch.zeros(config.speaker_dim)  # unused if speech is given
    if job.prefix_seconds:
        speech = encode_speech(system, reference.wave)
    frames = min(round(job.prefix_seconds * FPS), len(speech))
    if mode.motion == "generated" or (job.prefix_seconds and mode.motion == "given"):
        motion = reference.motion(MAX_FRAMES if job.prefix_seconds else 1)
        frames = min(frames, len(motion))
    if mode.speech == "generated":
        speaker = reference.speaker()
    patches = frames // config.patch_size
    frames = patches * config.patch_size
    normalised = system.stats.normalise(motion)
    first_motion = normalised[0] if len(motion) else None
    request = Request(prompt, speaker, speech[:frames], normalised[:frames], first_motion, patches)
    return ReferenceRequest(request, frames, motion[:frames])


def library_request(reference: Reference, prompt: list[int]) -> ReferenceRequest:
    """Create the request of an official method; see `official.library_method`."""
    job = reference.job
    system = reference.system
    config = system.model.config
    has_motion = MODES[job.mode].motion != "absent"
    frames = official.prefix_frames(job.prefix_seconds, reference.frames, config.patch_size if has_motion else 1)
    speech = torch.zeros(0, config.speech_dim)
    motion = torch.zeros(0, config.motion_dim)
    first_motion = None
    if frames:
        wave = to_device(reference.wave[None, None], system.device)
        speech = system.speech.encode_beginning(wave, frames)[0].cpu()
    speaker = reference.speaker(official.voice_frames(frames))
    if has_motion:
        motion = reference.motion(max(1, frames))
        first_motion = system.stats.normalise(motion[0])
    request = official.library_method(config, prompt, speaker, speech, reference.frames, first_motion)
    return ReferenceRequest(request, frames, motion[:frames])


def script_request(reference: Reference, prompt: list[int]) -> ReferenceRequest:
    """Create the request of the official command line; see `official.inference_script`."""
    system = reference.system
    motion = reference.motion()
    speech = encode_speech(system, reference.wave)
    request = official.inference_script(
        system.model.config,
        system.stats,
        prompt,
        reference.speaker(),
        speech,
        motion,
        reference.job.prefix_seconds,
    )
    frames = len(request.motion)  # `request.speech` has `delay` more patches
    return ReferenceRequest(request, frames, motion[:frames])


@torch.no_grad()
def prepare_job(job: Job, system: TalkerSystem, text_bytes: int) -> PreparedJob:
    """Read and encode the files of a job.

    Args:
        text_bytes: maximum length of a part of the text in bytes; longer texts are split.

    Raises:
        UserError: If a file cannot be read, is too long or too short, or if the text cannot be split or tokenized.
    """
    mode = MODES[job.mode]
    texts = parts_of_text(job, text_bytes)
    system.require(job.mode)
    prompts = [system.tokenizer.prompt(f"{job.reference_text} {text}".strip()) for text in texts]
    reference = Reference(job, system)
    start = reference_request(reference, prompts[0])
    request = start.request
    wave = None
    frames = None
    square = None
    picture = None
    surroundings = None
    if mode.speech == "given":
        wave = read_given_audio(job)
        speech = given_speech(system, wave)
        frames = len(speech)
        request = replace(request, speech=torch.cat([request.speech, speech]))
    if mode.motion == "given":
        square = find_square(job.video, MAX_FRAMES, job.crop, job.face_box)
        given = given_motion(job, system, square)
        frames = len(given)
        given = pad_to_patches(system.stats.normalise(given), system.model.config.patch_size)
        request = replace(request, motion=torch.cat([request.motion, given]))
    if mode.motion == "generated":
        square = reference.square
        picture = reference.picture()
        if job.paste_back:
            surroundings = read_surroundings(job.reference_video, square)
    requests = requests_of_parts(request, job, system, texts, prompts)
    remarks = remarks_of(job, reference, square)
    return PreparedJob(job, requests, start.prefix_motion, picture, wave, frames, remarks, surroundings)


def parts_of_text(job: Job, text_bytes: int) -> list[str]:
    """Split the text of a job into parts of at most `text_bytes` bytes.

    The text is a single part if a given stream determines the length, and in the official routines.
    """
    if MODES[job.mode].open_ended and job.compat == "paper":
        return split_text(job.text, text_bytes)
    return [job.text]


def read_given_audio(job: Job) -> np.ndarray:
    """Read the given audio (N,) at 24 kHz.

    Raises:
        UserError: If it cannot be read or is longer than 30 s.
    """
    with stage("reading"):
        wave = read_audio(job.audio, RATE)
    check_length(-(-len(wave) // HOP), f"audio={job.audio}")
    return wave


def given_speech(system: TalkerSystem, wave: np.ndarray) -> Tensor:
    """Encode given audio (N,) at 24 kHz to latents (F, Ds). The last frame is padded with silence."""
    return encode_speech(system, np.pad(wave, (0, -len(wave) % HOP)))


def given_motion(job: Job, system: TalkerSystem, square: Square) -> Tensor:
    """Encode the face in the given video to motion (F, Dm), not normalised.

    Raises:
        UserError: If the video is longer than 30 s.
    """
    motion = encode_motion(system, read_square(job.video, square, MAX_FRAMES + 1))
    check_length(len(motion), f"video={job.video}")
    return motion


def pad_to_patches(motion: Tensor, size: int) -> Tensor:
    """Repeat the last frame of motion (F, Dm) until F is a multiple of the patch size."""
    return torch.cat([motion, motion[-1:].expand(-len(motion) % size, -1)])


def check_length(frames: int, name: str) -> None:
    """Raise UserError if a given stream is longer than 30 s."""
    if frames > MAX_FRAMES:
        raise UserError(f"{name} is longer than {MAX_FRAMES / FPS:.0f} s: use a part of it")


def requests_of_parts(
    request: Request, job: Job, system: TalkerSystem, texts: Sequence[str], prompts: Sequence[list[int]]
) -> tuple[Request, ...]:
    """Return a copy of the request for each part of the text, with its prompt, limits and seed.

    The first part has the seed of the job.
    """
    min_patches = max(1, round(job.min_seconds * FPS / system.model.config.patch_size))
    requests = []
    for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        limit = max_patches(text, job, system) if job.compat == "paper" else request.max_patches
        seed = seed_for(job.seed, "part", number) if number else job.seed
        part = replace(request, prompt=prompt, max_patches=limit, min_patches=min(limit, min_patches), seed=seed)
        requests.append(part)
    return tuple(requests)


def max_patches(text: str, job: Job, system: TalkerSystem) -> int:
    """Return the maximum number of patches of a text, from `max_seconds` or from its length, up to 30 s."""
    tokenizer = system.tokenizer
    slow = SLOW_PHONEME * len(tokenizer.prompt(text)) if tokenizer.language else SLOW_BYTE * len(text.encode())
    seconds = job.max_seconds or min(MAX_FRAMES / FPS, MARGIN + slow)
    return max(1, -(-round(seconds * FPS) // system.model.config.patch_size))


def encode_speech(system: TalkerSystem, wave: Tensor | np.ndarray) -> Tensor:
    """Encode audio (N,) at 24 kHz to latents (F, Ds) on the CPU, where F = N // 960.

    Raises:
        UserError: If the audio is shorter than one frame.
    """
    wave = torch.as_tensor(wave)
    if len(wave) < HOP:
        raise UserError(f"{len(wave) / RATE:.3f} s of audio is too short: at least {HOP / RATE} s are required")
    return system.speech.encode(to_device(wave[None, None], system.device))[0].cpu()


def encode_motion(system: TalkerSystem, blocks: Iterable[np.ndarray]) -> Tensor:
    """Encode blocks of square frames (n, S, S, 3) uint8 to motion (F, Dm) on the CPU, not normalised."""
    codec = system.motion
    return torch.cat([codec.encode(video_to_tensor(block, codec.size)) for block in blocks]).cpu()


def remarks_of(job: Job, reference: Reference, square: Square | None) -> tuple[str, ...]:
    """Return one-line notes about the inputs: references that were cut, the crop of the face, and unused inputs.

    Args:
        square: crop of the face that is animated or whose speech is generated, if there is one.
    """
    remarks = []
    for path, seconds in reference.durations.items():
        if seconds > MAX_FRAMES / FPS:
            remarks.append(f"{path} lasts {seconds:.0f} s: only its first {MAX_FRAMES // FPS} s are used")
    if square is not None and square.remark:
        remarks.append(square.remark)
    remarks += [f"{name} is not used by mode={job.mode}" for name in job.unused]
    return tuple(remarks)


def save_voice(path: str | Path, speaker: Tensor, digest: str) -> None:
    """Save a speaker embedding as a safetensors file, atomically.

    Args:
        speaker: (G,) speaker embedding.
        digest: digest of the speaker encoder that computed it, which is stored in the file's metadata.
    """
    with atomic_output(path) as staging:
        staging.write_bytes(save({"speaker": speaker.detach().float().cpu().contiguous()}, {"encoder": digest}))


def read_saved_voice(path: str | Path, digest: str, size: int) -> Tensor:
    """Read the speaker embedding (G,) of a file written by `save_voice`.

    Args:
        digest: digest of the speaker encoder with which the model was trained.
        size: G.

    Raises:
        UserError: If the file cannot be read, or its embedding was computed by another speaker encoder.
    """
    path = check_readable(path)
    if path.stat().st_size > MAX_VOICE:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a saved voice: use another file")
    content = path.read_bytes()
    try:
        speaker = load(content)["speaker"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is not a saved voice ({error}): save it again from a recording") from error
    if f'"{digest}"'.encode() not in content or speaker.shape != (size,) or not torch.isfinite(speaker).all():
        raise UserError(f"{path} was saved by another speaker encoder: save it again from a recording")
    return speaker

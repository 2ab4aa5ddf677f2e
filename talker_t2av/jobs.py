"""Preparation of generation jobs: their files are read, encoded, and converted to requests of a `BatchedDecoder`.

Axes: N samples at 24 kHz, F frames at 25 per second, Ds / Dm speech / motion channels, S image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.device import to_device
from engine.errors import UserError
from engine.media.audio import read_audio
from engine.progress import stage
from engine.seeding import seed_for
from talker_t2av import official
from talker_t2av.faces import Square, Surroundings, find_square, read_square, read_surroundings
from talker_t2av.model import FPS, HOP, MAX_FRAMES, RATE
from talker_t2av.reference import Reference, encode_motion, encode_speech
from talker_t2av.request import MODES, Mode, Request
from talker_t2av.settings import Job
from talker_t2av.system import TalkerSystem
from talker_t2av.text import TalkerTokenizer, has_words, split_text

# Upper bounds of the speech duration in seconds: MARGIN, plus SLOW_BYTE per byte of text or SLOW_PHONEME per phoneme.
MARGIN = 1.5
SLOW_BYTE = 0.15
SLOW_PHONEME = 0.2


@dataclass(frozen=True)
class PreparedJob:
    """A job whose files have been read and encoded.

    Attributes:
        requests: requests of a `BatchedDecoder`, one per part of the text. They differ in prompt, limits and seed.
        prefix_motion: (F, Dm) motion of the prefix, not normalised.
        picture: (3, S, S) in [-1, 1], image of the face. None if no face is generated.
        wave: (N,) given audio at 24 kHz. None if speech is generated.
        frames: number of frames of the given stream, which is the length of the result. None without a given stream.
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
        """State of both streams."""
        return MODES[self.job.mode]


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
        UserError: If a prefix is requested, but it or the reference is shorter than one patch.
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
        raise UserError(f"prefix_seconds={job.prefix_seconds}: prefix and reference need a patch ({seconds} s) or more")
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
    request = Request(prompt, speaker, speech[:frames], normalised[:frames], first_motion, prefix=patches)
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
    texts = parts_of_text(job, system.tokenizer, text_bytes)
    system.require(job.mode)
    spoken = job.reference_text if job.prefix_seconds else ""
    prompts = [system.tokenizer.prompt(f"{spoken} {text}".strip()) for text in texts]
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


def parts_of_text(job: Job, tokenizer: TalkerTokenizer, text_bytes: int) -> list[str]:
    """Split the text of a job into parts of at most `text_bytes` bytes that take at most 30 s, or are single words.

    The text is a single part if a given stream determines the length, and in the official routines.
    """

    def fits(part: str) -> bool:
        if len(part.encode()) > text_bytes:
            return False
        is_word = len(part.split()) < 2 or not has_words(part)
        return is_word or slow_seconds(part, tokenizer) <= MAX_FRAMES / FPS

    if MODES[job.mode].open_ended and job.compat == "paper":
        return split_text(job.text, fits)
    return [job.text]


def read_given_audio(job: Job) -> np.ndarray:
    """Read the given audio (N,) at 24 kHz.

    Raises:
        UserError: If it cannot be read, is shorter than a frame, or longer than 30 s.
    """
    with stage("reading"):
        wave = read_audio(job.audio, RATE)
    check_length(-(-len(wave) // HOP), f"audio={job.audio}")
    if len(wave) < HOP:
        raise UserError(f"audio={job.audio} has {len(wave) / RATE:.3f} s: at least {HOP / RATE:g} s is needed")
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
    min_patches = max(1, -(-round(job.min_seconds * FPS) // system.model.config.patch_size))
    requests = []
    for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        limit = request.max_patches
        if job.compat == "paper":
            limit = max(min_patches, max_patches(text, job, system))
        seed = seed_for(job.seed, "part", number) if number else job.seed
        part = replace(request, prompt=prompt, max_patches=limit, min_patches=min(limit, min_patches), seed=seed)
        requests.append(part)
    return tuple(requests)


def max_patches(text: str, job: Job, system: TalkerSystem) -> int:
    """Return the maximum number of patches of a text, from `max_seconds` or from its length, up to 30 s."""
    seconds = job.max_seconds or min(MAX_FRAMES / FPS, slow_seconds(text, system.tokenizer))
    return max(1, -(-round(seconds * FPS) // system.model.config.patch_size))


def slow_seconds(text: str, tokenizer: TalkerTokenizer) -> float:
    """Return an upper bound of the duration of a text in seconds."""
    if tokenizer.language:
        return MARGIN + SLOW_PHONEME * len(tokenizer.prompt(text))
    return MARGIN + SLOW_BYTE * len(text.encode())


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
    remarks += [f"{name} has no effect on this job (mode={job.mode})" for name in job.unused]
    return tuple(remarks)

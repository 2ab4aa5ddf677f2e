"""Reference voice and face of a job, encoding of audio and video, and saved voices.

Axes: N samples at 24 kHz, F frames at 25 per second, Ds / Dm speech / motion channels, G speaker embedding, S image
side.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from engine.media.audio import read_voice, resample
from engine.media.ffmpeg import check_readable
from engine.media.pictures import identity_to_tensor, video_to_tensor
from engine.nn.mel import pad_or_trim
from engine.progress import stage
from engine.torch_files import read_matrix
from talker_t2av.faces import Square, find_square, read_square
from talker_t2av.model import FPS, HOP, HOP16, MAX_FRAMES, RATE, RATE16
from talker_t2av.settings import Job, is_voice
from talker_t2av.system import TalkerSystem

MAX_VOICE = 2**20  # maximum size of a saved voice in bytes


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

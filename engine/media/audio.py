"""Audio files as float32 mono waveforms, and spectrograms.

Axes: N samples, T video frames.
"""

from __future__ import annotations

import io
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from engine.device import to_device
from engine.errors import UserError
from engine.files import atomic_output
from engine.media.ffmpeg import (
    SHORT,
    check_complete,
    check_readable,
    check_whole,
    command,
    damaged,
    decoding,
    last_line,
    stated_seconds,
    stream_codec,
)
from engine.settings import LIMITS

BLOCK = 2**20  # block size for reading and writing, in samples per channel
LOUDEST = 100.0  # maximum magnitude of a sample, where full scale is 1
UNKNOWN = 2**62  # frame count of a file that does not state its length
PICTURE_FRAMES = 6000  # spectrogram frames computed at once
SILENT = 1e-3  # minimum peak of a voice, -60 dB
MIN_VOICE = 0.25  # minimum length of a voice in seconds


def resample(wave: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Resample (..., N) to (..., ceil(N * target_rate / source_rate)) by torchaudio's windowed sinc."""
    if wave.shape[-1] == 0:
        return wave
    if wave.device.type == "cuda":  # torchaudio would copy constants to the device, which synchronises
        resampler = _resampler(int(source_rate), int(target_rate), wave.dtype)
        kernel = {name: to_device(of, wave.device) for name, of in resampler.named_buffers()}  # none for equal rates
        return torch.func.functional_call(resampler, kernel, (wave,))
    return torchaudio.functional.resample(wave, int(source_rate), int(target_rate))


def resample_wave(wave: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resample a waveform of any dtype like `resample`. Return float32."""
    return resample(torch.as_tensor(np.asarray(wave), dtype=torch.float32), source_rate, target_rate).numpy()


@lru_cache(maxsize=8)
def _resampler(source_rate: int, target_rate: int, dtype: torch.dtype) -> torchaudio.transforms.Resample:
    """Return the resampling module, whose kernel is kept in main memory."""
    return torchaudio.transforms.Resample(source_rate, target_rate, dtype=dtype)


def read_audio(path: str | Path, rate: int, span: tuple[float, float] | None = None) -> np.ndarray:
    """Read the audio of an audio or video file as (N,) float32 at `rate` Hz, averaged over channels.

    Args:
        span: start and end in seconds of the part to read. None: the whole file.

    Raises:
        UserError: If the file cannot be read, is truncated or has no audio, or if its samples are not finite or exceed
            `LOUDEST`.
    """
    path = check_readable(path)
    check_complete(path)
    wave = _read_with_soundfile(path, rate) if span is None else None  # ffmpeg reads parts
    if wave is None:
        wave = _read_with_ffmpeg(path, rate, span)
    if len(wave) == 0:
        raise UserError(f"{path} has no audio samples")
    if not np.abs(wave).max() < LOUDEST:  # also true for NaN
        raise UserError(
            f"{path} has samples that are not finite, or above {LOUDEST:g} where full scale is 1: save it as 16-bit PCM"
        )
    return wave


def _read_with_soundfile(path: Path, rate: int) -> np.ndarray | None:
    """Read a file with libsndfile. Return None for unsupported formats."""
    try:
        with soundfile.SoundFile(path) as file:
            file_rate = file.samplerate
            most = LIMITS.seconds * file.samplerate
            blocks = []
            count = 0
            if most < file.frames < UNKNOWN:
                raise _too_long(path)
            # `file.blocks` would return uninitialised memory if an MP3 states more frames than it has.
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(1))
                count += len(block)
                if count > most:
                    raise _too_long(path)
            # The log of libsndfile for a WAV file has the stated and the actual number of bytes.
            size = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
            share = int(size[2]) / int(size[1]) if size and int(size[2]) < int(size[1]) < 2**31 - 2**9 else 1.0
            total = count / share if 0 < share < 1 else file.frames
            if 0 < count < total - SHORT * file_rate and file.frames < UNKNOWN:
                raise damaged(path, "audio", count / file_rate, total / file_rate, "the file ends early")
    except soundfile.LibsndfileError:
        return None
    return resample_wave(np.concatenate(blocks or [np.zeros(0, np.float32)]), file_rate, rate)


def read_voice(path: str | Path, rate: int) -> np.ndarray:
    """Read a reference voice with `read_audio`. Recordings that are silent or under `MIN_VOICE` s are rejected."""
    wave = read_audio(path, rate)
    if len(wave) < MIN_VOICE * rate:
        raise UserError(f"{path} has {len(wave) / rate:.2f} s of audio: a voice needs at least {MIN_VOICE:g} s")
    if np.abs(wave).max() < SILENT:
        raise UserError(f"{path} is silent: expected a recording of the voice")
    return wave


def write_wav(
    path: str | Path, wave: np.ndarray | Tensor, rate: int, lossless: bool = False, comment: str = ""
) -> None:
    """Write samples (N,), clipped to [-1, 1], as 16-bit mono WAV. The file is written atomically.

    Args:
        lossless: write 32-bit floats without clipping, for waveforms that are measured.
        comment: metadata comment, see `generated_comment`. Omitted if empty.
    """
    if Path(path).suffix.lower() != ".wav":
        raise UserError(f"cannot write {path}: its name must end in .wav")
    wave = np.asarray(wave.detach().cpu() if isinstance(wave, Tensor) else wave)
    assert wave.ndim == 1, f"expected samples (N,), got {wave.shape}"
    samples = np.empty(len(wave), np.float32 if lossless else np.int16)
    for start in range(0, len(wave), BLOCK):  # converting an hour of float64 at once would take gigabytes
        part = wave[start : start + BLOCK].astype(np.float64)
        if not np.isfinite(part).all():
            raise UserError(f"cannot write {path}: its samples are not finite numbers")
        samples[start : start + BLOCK] = part if lossless else np.round(part.clip(-1, 1) * 32767)
    content = encode_wav(samples, rate, comment)
    with atomic_output(path) as staging:  # libsndfile would call a full disk a "System error"
        staging.write_bytes(content)


def encode_wav(samples: np.ndarray, rate: int, comment: str = "") -> bytes:
    """Return mono samples (N,), int16 or float32, as the bytes of a WAV file. `comment` is stored as INFO metadata
    (ICMT).
    """
    content = io.BytesIO()
    subtype = "PCM_16" if samples.dtype == np.int16 else "FLOAT"
    with soundfile.SoundFile(content, "w", int(rate), 1, subtype, format="WAV") as file:
        if comment:
            file.comment = comment
        file.write(samples)
    return content.getvalue()


def loudness(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return the RMS of the audio of each video frame: (N,) -> (T,), T = floor(25 N / rate)."""
    frame = rate // 25
    whole = wave[: len(wave) // frame * frame].reshape(-1, frame)
    return np.sqrt(np.mean(np.square(whole, dtype=np.float64), 1))


def generated_comment(model: str, what: str) -> str:
    """Return the metadata comment of generated MP4, WAV, MP3, FLAC and Ogg files.

    The last word is the value of IPTC's property `digitalSourceType` for media that a trained model generated.

    Args:
        model: name of the model, such as "HiCoDiT".
        what: what it generated, such as "speech and face".
    """
    return f"AI-generated {what}: {model}, speaking-faces; digitalSourceType trainedAlgorithmicMedia"


def mel_picture(wave: np.ndarray, rate: int) -> np.ndarray:
    """Compute a log-mel spectrogram (80, frames) in dB for visualisation, 100 frames per second."""
    hop = rate // 100
    size = 1024
    mel = torchaudio.transforms.MelSpectrogram(rate, n_fft=size, hop_length=hop, n_mels=80, center=False)
    padded = np.pad(wave, size // 2, mode="reflect")
    frames = 1 + (len(padded) - size) // hop
    parts = []
    for start in range(0, frames, PICTURE_FRAMES):
        end = min(start + PICTURE_FRAMES, frames)
        part = torch.from_numpy(padded[hop * start : hop * (end - 1) + size])
        parts.append(10 * torch.log10(mel(part).clamp(min=1e-8)).numpy())
    return np.concatenate(parts, 1)


def _read_with_ffmpeg(path: Path, rate: int, span: tuple[float, float] | None = None) -> np.ndarray:
    # Audio that begins after the video is padded with silence, so that sample and frame indices have the same
    # origin.
    # Channels are averaged (rematrix_maxval=1); by default, ffmpeg's sum of floating-point channels is louder.
    filters = f"aresample={int(rate)}:async=1:first_pts=0:rematrix_maxval=1"
    arguments = ["-map", "0:a:0", "-af", filters, "-ac", "1", "-c:a", "pcm_f32le"]
    if span is None:
        arguments += ["-t", str(LIMITS.seconds + 1)]
    call = command("-v", "level+info", "-nostats", *decoding(path, span), *arguments, "-f", "f32le", "pipe:1")
    result = subprocess.run(call, capture_output=True)
    log = result.stderr.decode(errors="replace")
    if result.returncode != 0:
        stream_codec(path, "audio")
        raise UserError(f"{path} cannot be decoded ({last_line(log)})")
    wave = np.frombuffer(result.stdout, "<f4")
    if max(stated_seconds(log) if span is None else 0.0, len(wave) / rate) > LIMITS.seconds:
        raise _too_long(path)
    check_whole(path, "audio", len(wave) / rate, log, span)
    return wave.copy()


def _too_long(path: Path) -> UserError:
    return UserError(f"{path} has more than {LIMITS.seconds:g} s of audio (limits.seconds): use a part of it")

"""Audio files as float32 mono waveforms.

Axes: N samples.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from engine.errors import UserError
from engine.files import atomic_output
from engine.media.ffmpeg import check_readable, command, last_line, probe, source


def resample(wave: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """(..., N) at `source_rate` -> (..., ceil(N * target_rate / source_rate)); windowed sinc of torchaudio."""
    if wave.shape[-1] == 0:
        return wave
    return torchaudio.functional.resample(wave, int(source_rate), int(target_rate))


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """The sound of an audio or video file, channels averaged: (N,) float32 at `rate` Hz.

    Raises:
        UserError: no such file, a folder, not a media file, no audio stream, or zero samples.
    """
    path = check_readable(path)
    try:
        wave, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        wave = _read_with_ffmpeg(path, rate)
    else:
        wave = resample(torch.from_numpy(wave.mean(1)), own_rate, rate).numpy()
    if len(wave) == 0:
        raise UserError(f"{path} has zero audio samples")
    return wave


def write_wav(path: str | Path, wave: np.ndarray | Tensor, rate: int) -> None:
    """Write (N,) samples, clipped to [-1, 1], as 16-bit mono WAV; the file appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    wave = np.asarray(wave.detach().cpu() if isinstance(wave, Tensor) else wave, dtype=np.float64)
    assert wave.ndim == 1 and np.isfinite(wave).all(), f"expected finite samples (N,), got {wave.shape}"
    pcm = np.round(wave.clip(-1, 1) * 32767).astype(np.int16)
    with atomic_output(path) as staging:
        try:
            soundfile.write(staging, pcm, int(rate), subtype="PCM_16", format="WAV")
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot write {path}: {error}") from error


def mel_picture(wave: np.ndarray, rate: int) -> np.ndarray:
    """Log-mel spectrogram (80, frames) in dB for the eye, 100 frames a second."""
    mel = torchaudio.transforms.MelSpectrogram(rate, n_fft=1024, hop_length=rate // 100, n_mels=80)
    return 10 * torch.log10(mel(torch.from_numpy(wave)).clamp(min=1e-8)).numpy()


def _read_with_ffmpeg(path: Path, rate: int) -> np.ndarray:
    # Sound that begins later than the picture is filled with silence, so that sample and frame indices share their
    # origin.
    filters = f"aresample={int(rate)}:async=1:first_pts=0"
    arguments = ["-map", "0:a:0", "-af", filters, "-ac", "1", "-c:a", "pcm_f32le", "-f", "f32le", "pipe:1"]
    done = subprocess.run(command("-v", "error", *source(path), *arguments), capture_output=True)
    if done.returncode != 0:
        if probe(path).audio is None:
            raise UserError(f"{path} has no audio stream")
        raise UserError(f"{path} cannot be decoded ({last_line(done.stderr.decode(errors='replace'))})")
    return np.frombuffer(done.stdout, "<f4").astype(np.float32)

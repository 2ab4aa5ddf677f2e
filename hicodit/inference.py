"""The `infer.py` job: clips in, for each a WAV, the clip with its new sound, and a figure.

Axes: T video frames, N samples.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from engine.errors import UserError
from engine.media.audio import read_audio, write_wav
from engine.media.video import mux_audio
from engine.metrics.speaker import SpeakerEncoder
from hicodit.pipeline import Crops, HiCoDiTPipeline, Speech

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass
class SamplerOverrides:
    method: str | None = None
    steps: int | None = None
    temperature: float | None = None
    choice_noise: float | None = None


@dataclass
class GuidanceOverrides:
    all: float | None = None
    identity: float | None = None
    expression: float | None = None
    lip: float | None = None
    reading: str | None = None


@dataclass
class InferConfig:
    """Types of configs/infer.yaml; what each field means stands there."""

    model: str = "hicodit"
    weights: str = ""
    codec: str | None = None
    input: str = ""
    output: str = ""
    reference_audio: str | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int = 8
    figure: bool = True
    sampler: SamplerOverrides = field(default_factory=SamplerOverrides)
    guidance: GuidanceOverrides = field(default_factory=GuidanceOverrides)


def checked(config: DictConfig) -> InferConfig:
    """The composed config with its types checked.

    Raises:
        UserError: a value has the wrong type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(InferConfig), config))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{error.full_key or 'config'}: {reason}") from error


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def find_clips(source: Path) -> list[Path]:
    """The clip itself, or the video files of a folder in order of name."""
    if not source.exists():
        raise UserError(f"no such file or folder: input={source}")
    if source.is_file():
        return [source]
    clips = sorted(p for p in source.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    if not clips:
        raise UserError(f"no clip in folder input={source}: looked for {', '.join(VIDEO_SUFFIXES)}")
    return clips


def check_writable(folder: Path) -> None:
    """Fail before any work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to output={folder}: {error.strerror or error}") from error


def write_outputs(clip: Path, speech: Speech, folder: Path, figure: bool) -> list[Path]:
    """Write all files of a clip, or none: they are made aside and moved in when all are there."""
    staging = Path(tempfile.mkdtemp(prefix=".speech-", dir=folder))
    try:
        write_wav(staging / f"{clip.stem}.wav", speech.wave, speech.rate)
        mux_audio(clip, speech.wave, speech.rate, staging / f"{clip.stem}.mp4")
        if figure:
            from hicodit.figure import draw  # matplotlib takes a second to import

            draw(speech, staging / f"{clip.stem}.png")
        written = []
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
            written.append(folder / path.name)
        return written
    except OSError as error:
        raise UserError(f"cannot write to output={folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def run(config: DictConfig) -> int:
    """Do the job; 0 when all clips are done, 1 when some of a folder failed.

    Raises:
        UserError: nothing could be done.
    """
    c = checked(config)
    if c.batch_size < 1:
        raise UserError(f"batch_size={c.batch_size} must be at least 1")
    clips, output = find_clips(Path(c.input)), Path(c.output)
    check_writable(output)
    device = pick_device(c.device)
    pipeline = HiCoDiTPipeline.from_pretrained(c.weights, device, c.codec)
    pipeline.sampler = replace(pipeline.sampler, **_given(c.sampler))
    pipeline.guidance = replace(pipeline.guidance, **_given(c.guidance))
    identity = None
    if c.reference_audio is not None:
        identity = SpeakerEncoder().embed(read_audio(c.reference_audio, 16_000), 16_000)

    failed: list[tuple[Path, str]] = []
    start, spoken, single = time.monotonic(), 0.0, len(clips) == 1
    passes = -(-len(clips) // c.batch_size)
    with tqdm(
        total=passes * pipeline.sampler.steps, unit="step", disable=not sys.stderr.isatty(), leave=False
    ) as progress:
        for first in range(0, len(clips), c.batch_size):
            group: list[tuple[Path, Crops]] = []
            for clip in clips[first : first + c.batch_size]:
                try:
                    group.append((clip, pipeline.crops(clip)))
                except UserError as error:
                    if single:
                        raise
                    failed.append((clip, str(error)))
                    print(f"failed: {error}", file=sys.stderr, flush=True)
            if not group:
                continue
            seeds = [c.seed] * len(group)
            speeches = pipeline.run([crops for _, crops in group], seeds, identity, lambda _: progress.update())
            for (clip, _), speech in zip(group, speeches):
                written = write_outputs(clip, speech, output, c.figure)
                spoken += len(speech.wave) / speech.rate
                tqdm.write(f"{clip} -> {', '.join(p.name for p in written)}", file=sys.stdout)
    elapsed = time.monotonic() - start
    done = len(clips) - len(failed)
    if not done:
        raise UserError(f"none of the {len(clips)} clips of input={c.input} could be done; the first: {failed[0][1]}")
    print(f"{done} of {len(clips)} clips in {output}: {spoken:.1f} s of speech in {elapsed:.1f} s on {device}")
    return 1 if failed else 0


def _given(overrides: SamplerOverrides | GuidanceOverrides) -> dict[str, object]:
    return {name: value for name, value in vars(overrides).items() if value is not None}


def mel_picture(wave: np.ndarray, rate: int) -> np.ndarray:
    """Log-mel spectrogram (80, frames) in dB for the eye."""
    from torchaudio.transforms import MelSpectrogram

    mel = MelSpectrogram(rate, n_fft=1024, hop_length=rate // 100, n_mels=80)(torch.from_numpy(wave))
    return 10 * torch.log10(mel.clamp(min=1e-8)).numpy()

"""Waves as bytes of a sound format, piece by piece, by the ffmpeg binary that imageio-ffmpeg ships."""

from __future__ import annotations

import asyncio
import io
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import suppress

import numpy as np
import soundfile
import torch

from engine.media.ffmpeg import command

FORMATS = {  # by name: media type, and what ffmpeg is told
    "wav": ("audio/wav", ["-f", "wav"]),
    "pcm": ("audio/pcm", ["-f", "s16le"]),
    "mp3": ("audio/mpeg", ["-c:a", "libmp3lame", "-b:a", "96k", "-f", "mp3"]),
    "flac": ("audio/flac", ["-f", "flac"]),
    "opus": ("audio/ogg", ["-c:a", "libopus", "-b:a", "48k", "-f", "ogg"]),
    "aac": ("audio/aac", ["-c:a", "aac", "-b:a", "96k", "-f", "adts"]),
}
BLOCK = 2**16  # bytes that are read from ffmpeg at once


def samples(wave: torch.Tensor) -> bytes:
    """Return a wave (1, 1, N) in [-1, 1] as 16-bit samples, little-endian."""
    return (wave[0, 0].clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy().tobytes()


def tempo(speed: float) -> list[str]:
    """Return ffmpeg's arguments that change the speed and keep the pitch; its filter takes 0.5 and more at once."""
    if speed == 1:
        return []
    factors = [0.5, speed / 0.5] if speed < 0.5 else [speed]
    return ["-af", ",".join(f"atempo={factor:g}" for factor in factors)]


async def encode(waves: AsyncIterator[torch.Tensor], rate: int, kind: str, speed: float = 1.0) -> AsyncIterator[bytes]:
    """Encode waves (1, 1, N) as they come.

    Args:
        kind: one of `FORMATS`; the header of a WAV stream cannot state its length.
    """
    if kind == "pcm" and speed == 1:
        async for wave in waves:
            yield samples(wave)
        return
    raw = ["-f", "s16le", "-ar", str(rate), "-ac", "1", "-i", "pipe:0"]
    call = command("-v", "error", *raw, *tempo(speed), "-flush_packets", "1", *FORMATS[kind][1], "pipe:1")
    call.remove("-nostdin")
    process = await asyncio.create_subprocess_exec(*call, stdin=PIPE, stdout=PIPE)

    async def feed() -> None:
        try:
            async for wave in waves:
                process.stdin.write(samples(wave))
                await process.stdin.drain()
        finally:
            process.stdin.close()

    feeding = asyncio.ensure_future(feed())
    try:
        while block := await process.stdout.read(BLOCK):
            yield block
        await feeding
    finally:
        feeding.cancel()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def encode_whole(waves: AsyncIterator[torch.Tensor], rate: int, kind: str, speed: float = 1.0) -> bytes:
    """Encode all waves; a WAV file states its length."""
    content = b"".join([part async for part in encode(waves, rate, "pcm" if kind == "wav" else kind, speed)])
    if kind != "wav":
        return content
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(content, np.int16), rate, subtype="PCM_16", format="WAV")
    return file.getvalue()

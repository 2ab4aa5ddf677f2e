"""Audio of Talker-T2AV while it is generated, and waveforms in an audio format, by imageio-ffmpeg's binary."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from engine.codec import StreamDecoder
from engine.media.audio import encode_wav, generated_comment
from engine.media.ffmpeg import command
from service.service import TALKER, Service
from service.workers import Ticket
from talker_t2av.jobs import PreparedJob
from talker_t2av.model import HOP
from talker_t2av.pipeline import PAUSE_FRAMES

FORMATS = {  # by name: media type, and what ffmpeg is told
    "wav": ("audio/wav", ["-f", "wav"]),
    "pcm": ("audio/pcm", ["-f", "s16le"]),
    "mp3": ("audio/mpeg", ["-c:a", "libmp3lame", "-b:a", "96k", "-f", "mp3"]),
    "flac": ("audio/flac", ["-f", "flac"]),
    "opus": ("audio/ogg", ["-c:a", "libopus", "-b:a", "48k", "-f", "ogg"]),
    "aac": ("audio/aac", ["-c:a", "aac", "-b:a", "96k", "-f", "adts"]),
}
GENERATED = generated_comment("Talker-T2AV", "speech")
BLOCK = 2**16  # bytes that are read from ffmpeg at once


def parts_of(prepared: PreparedJob) -> list[PreparedJob]:
    """Return a job for each part of a long text."""
    return [replace(prepared, requests=(request,)) for request in prepared.requests]


async def speak(service: Service, prepared: PreparedJob, stream: bool) -> AsyncIterator[torch.Tensor]:
    """Yield the audio (1, 1, N) of a tts job, with pauses between the parts of a long text.

    Args:
        stream: yield audio while it is generated. Otherwise whole parts are yielded, which is more efficient.
    """
    loop = asyncio.get_running_loop()
    for number, part in enumerate(parts_of(prepared)):
        if number:
            yield torch.zeros(1, 1, PAUSE_FRAMES * HOP)
        patches: asyncio.Queue[torch.Tensor | None] = asyncio.Queue()
        put = partial(loop.call_soon_threadsafe, patches.put_nowait)
        decoder = StreamDecoder(service.talker.system.speech)
        silent = partial(service.talker.without_padding, part)
        ticket = Ticket(part)
        if stream:
            ticket.on_patch = put
        service.workers[TALKER].submit(ticket)
        ticket.add_done_callback(lambda _, put=put: put(None))
        try:
            while stream and (patch := await patches.get()) is not None:
                if (wave := await asyncio.to_thread(decoder.push, silent(patch))) is not None:
                    yield wave.cpu()
            speech = silent((await asyncio.wrap_future(ticket)).speech)[None]  # or raises what went wrong
            finish = decoder.finish if stream else partial(decoder.push, speech, last=True)
            if (wave := await asyncio.to_thread(finish)) is not None:
                yield wave.cpu()
        finally:
            ticket.cancel()


def samples(wave: torch.Tensor) -> bytes:
    """Return a wave (1, 1, N) in [-1, 1] as 16-bit samples, little-endian."""
    return (wave[0, 0].clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()


async def encode(waves: AsyncIterator[torch.Tensor], rate: int, kind: str, speed: float = 1.0) -> AsyncIterator[bytes]:
    """Encode waves (1, 1, N) as they arrive.

    Args:
        kind: one of `FORMATS`; the header of a WAV stream cannot state its length.
        speed: factor of the speaking rate; the pitch is preserved.
    """
    if kind == "pcm" and speed == 1:
        async for wave in waves:
            yield samples(wave)
        return
    factors = [0.5, speed / 0.5] if speed < 0.5 else [speed]  # ffmpeg's filter takes 0.5 and more at once
    tempo = [] if speed == 1 else ["-af", ",".join(f"atempo={factor:g}" for factor in factors)]
    raw = ["-f", "s16le", "-ar", str(rate), "-ac", "1", "-i", "pipe:0"]
    comment = ["-metadata", f"comment={GENERATED}"]
    call = command("-v", "error", *raw, *tempo, *comment, "-flush_packets", "1", *FORMATS[kind][1], "pipe:1")
    call.remove("-nostdin")
    process = await asyncio.create_subprocess_exec(*call, stdin=PIPE, stdout=PIPE)

    async def feed() -> None:
        try:
            async for wave in waves:
                process.stdin.write(samples(wave))
                await process.stdin.drain()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()  # it would write the header of an empty file
            raise
        finally:
            process.stdin.close()

    feeding = asyncio.ensure_future(feed())
    try:
        while block := await process.stdout.read(BLOCK):
            yield block
        await feeding
        if code := await process.wait():
            raise RuntimeError(f"ffmpeg ended with exit code {code}")
    finally:
        feeding.cancel()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def collect(waves: AsyncIterator[torch.Tensor]) -> np.ndarray:
    """Concatenate waves (1, 1, N) to one (N,)."""
    return torch.cat([wave async for wave in waves], -1)[0, 0].numpy()


async def encode_whole(wave: np.ndarray, rate: int, kind: str, speed: float = 1.0) -> bytes:
    """Encode a wave (N,) as `encode` does; a WAV file states its length."""

    async def waves() -> AsyncIterator[torch.Tensor]:
        yield torch.from_numpy(wave)[None, None]

    content = b"".join([part async for part in encode(waves(), rate, "pcm" if kind == "wav" else kind, speed)])
    if kind != "wav":
        return content
    return encode_wav(np.frombuffer(content, np.int16), rate, GENERATED)

"""Speech of a prepared job as it is generated, for WebSockets and for chunked answers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from engine.codec import StreamDecoder
from engine.errors import UserError
from service.admission import WATCH, ClientLeft, Service
from service.workers import Ticket
from talker_t2av.jobs import PreparedJob
from talker_t2av.model import HOP
from talker_t2av.pipeline import PAUSE

T = TypeVar("T")


@contextlib.contextmanager
def request_folder() -> Iterator[Path]:
    """Make a folder for the files of a request; its path is removed from error messages."""
    folder = Path(tempfile.mkdtemp(prefix="serve-"))
    try:
        yield folder
    except UserError as error:
        if str(folder) not in str(error):
            raise
        raise UserError(str(error).replace(f"{folder}/", "")) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parts_of(prepared: PreparedJob) -> list[PreparedJob]:
    """Return a job for each part of a long text."""
    return [replace(prepared, requests=(request,)) for request in prepared.requests]


async def speak(
    service: Service, prepared: PreparedJob, disconnected: Callable[[], Awaitable[bool]]
) -> AsyncIterator[torch.Tensor]:
    """Yield the sound (1, 1, N) of a tts job as it is generated, with pauses between the parts of a long text.

    `ClientLeft` ends it when `disconnected` says so.
    """
    for number, part in enumerate(parts_of(prepared)):
        if number:
            yield torch.zeros(1, 1, PAUSE * HOP)
        patches: asyncio.Queue = asyncio.Queue()
        loop, decoder = asyncio.get_running_loop(), StreamDecoder(service.talker.system.speech)
        ticket = Ticket(
            part,
            on_patch=lambda patch, loop=loop, patches=patches: loop.call_soon_threadsafe(patches.put_nowait, patch),
        )
        service.workers["talker_t2av"].submit(ticket)
        ticket.add_done_callback(
            lambda _, loop=loop, patches=patches: loop.call_soon_threadsafe(patches.put_nowait, None)
        )
        try:
            while (patch := await _next(patches, disconnected)) is not None:
                wave = await service.in_thread(decoder.push, patch)
                if wave is not None and wave.numel():
                    yield wave
            ticket.result()
            wave = await service.in_thread(decoder.finish)
            if wave is not None and wave.numel():
                yield wave
        finally:
            ticket.cancel()


async def _next(queue: asyncio.Queue, disconnected: Callable[[], Awaitable[bool]]) -> torch.Tensor | None:
    """Return the queue's next item; look in between whether the client is still there."""
    while True:
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(queue.get(), WATCH)
        if await disconnected():
            raise ClientLeft


async def always(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yield an item that was taken already, and the others."""
    yield first
    async for item in rest:
        yield item


async def noting(waves: AsyncIterator[torch.Tensor], whole: list[torch.Tensor]) -> AsyncIterator[torch.Tensor]:
    """Yield waves and put them into `whole`."""
    async for wave in waves:
        whole.append(wave)
        yield wave

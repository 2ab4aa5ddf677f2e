"""What the routes share: the models with workers and voices, admission, errors as status and sentence."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from engine.errors import UserError
from engine.word_times import WordTimes
from hicodit.pipeline import HiCoDiTPipeline
from service.limits import ServeLimits
from service.voices import Voices
from service.workers import HiCoDiTWorker, TalkerWorker, Ticket, Worker, WorkerEnded
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.settings import DEMO

T = TypeVar("T")
WATCH = 0.2  # seconds between two checks whether the client is still connected
TALKER, HICODIT = "talker-t2av", "hicodit"  # names of the models in requests
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
FOLDER = "serve-"  # begin of the names of folders with a request's files


class Service:
    """Both models with their workers; admits requests up to the limits.

    Args:
        demo: offer the bundled voice.
        voices: folder of others, see `Voices`.
    """

    def __init__(
        self,
        hicodit: HiCoDiTPipeline | None,
        talker: TalkerPipeline | None,
        limits: ServeLimits,
        demo: bool,
        voices: Path | None = None,
    ) -> None:
        self.hicodit, self.talker, self.limits, self.voices = hicodit, talker, limits, None
        self.served: dict[str, Any] = {}  # pipelines by name in requests
        self.workers: dict[str, Worker] = {}
        if talker is not None:
            talker.system.require("t2av")
            self.served[TALKER], self.workers["talker_t2av"] = talker, TalkerWorker(talker, limits.rows)
            self.voices = Voices(talker, voices, DEMO / "voice.wav" if demo else None)
        if hicodit is not None:
            self.served[HICODIT], self.workers["hicodit"] = hicodit, HiCoDiTWorker(hicodit, limits.rows)
        self.inside = {"requests": 0, "streams": 0}  # admitted, without an answer yet
        self.closing = False
        self.words_pool = ThreadPoolExecutor(1, "words")  # the aligner has one state

    @cached_property
    def word_times(self) -> WordTimes:
        return WordTimes()

    def find(self, name: str) -> Any:
        """Return the pipeline of a model; answer 404 if it is not served."""
        if name not in self.served:
            raise HTTPException(404, f"model {name[:80]!r} is not served here; there are: {', '.join(self.served)}")
        return self.served[name]

    @contextlib.contextmanager
    def admitted(self, kind: str = "requests") -> Iterator[None]:
        """Hold one of the limited places of requests or streams; answer 503 or 429 if there is none."""
        if self.closing:
            raise HTTPException(503, "the server is shutting down")
        if self.inside[kind] >= getattr(self.limits, kind):
            raise HTTPException(429, "the server is busy: try again in a moment")
        self.inside[kind] += 1
        try:
            yield
        finally:
            self.inside[kind] -= 1

    async def place(self) -> AsyncIterator[None]:
        """Hold the place of a request until its answer is sent: a dependency of routes."""
        with self.admitted():
            yield

    async def generate(self, model: str, ticket: Ticket) -> Any:
        """Submit a ticket and return its result; it is cancelled together with the caller."""
        self.workers[model].submit(ticket)
        return await asyncio.wrap_future(ticket)


async def request_folder() -> AsyncIterator[Path]:
    """Make a folder for the files of a request, which is deleted when the answer is sent: a dependency of routes."""
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        yield Path(folder)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`; cancel it when the client has disconnected."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=WATCH))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        task.cancel()


def without_folders(message: str) -> str:
    """Return a message in one line, without the paths of request folders."""
    message = re.sub(rf"{re.escape(tempfile.gettempdir())}/{FOLDER}[^/]*/", "", message)
    return " ".join(message.split())


def explain(error: BaseException) -> tuple[int, str]:
    """Return the status and the sentence of an error, without the paths of request folders."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return 507, f"the server cannot write files: {cause.strerror}"
        cause = cause.__cause__
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return 400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, WorkerEnded):
        return 503, str(error)
    if isinstance(error, UserError):
        return 400, without_folders(str(error))
    print(f"unforeseen {type(error).__name__}: {error}", flush=True)
    return 500, f"internal error: {type(error).__name__}"

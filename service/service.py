"""Shared state of the routes: models with workers and voices, admission control, and conversion of errors."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from engine.errors import UserError
from engine.files import write_failure
from engine.word_times import WordTimes
from hicodit.bundled import PipelineChooser
from hicodit.pipeline import HiCoDiTPipeline
from service.limits import ServeLimits
from service.voices import Voices
from service.workers import HiCoDiTWorker, TalkerWorker, Ticket, Worker, WorkerEnded
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.settings import DEMO

T = TypeVar("T")
WATCH = 0.2  # seconds between two checks whether the client is still connected
# names of the models in requests
TALKER = "talker-t2av"
HICODIT = "hicodit"
MODEL_ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")  # OpenAI's model names, which are aliases of Talker-T2AV
BOUNDS = {"ge": "at least", "le": "at most", "gt": "more than", "lt": "less than"}  # of numbers, by pydantic's names
KINDS = {  # of values, by the beginning of pydantic's names of faults
    "bool": "true or false",
    "finite": "a number",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "string": "a text",
}
FOLDER = "serve-"  # begin of the names of folders with a request's files


class Service:
    """Both models with their workers. Admits requests up to the limits.

    Args:
        hicodit: a pipeline, or a chooser of pipelines for clips.
        demo: offer the bundled voice.
        voices: folder of additional voices, see `Voices`.
        aliases: whether OpenAI's model and voice names are aliases of Talker-T2AV and the default voice.
    """

    def __init__(
        self,
        hicodit: HiCoDiTPipeline | PipelineChooser | None,
        talker: TalkerPipeline | None,
        limits: ServeLimits,
        demo: bool,
        voices: Path | None = None,
        aliases: bool = True,
    ) -> None:
        if isinstance(hicodit, HiCoDiTPipeline):
            hicodit = PipelineChooser.of(hicodit)
        self.hicodit = hicodit
        self.talker = talker
        self.limits = limits
        self.voices: Voices | None = None
        self.aliases = aliases
        self.served: dict[str, Any] = {}  # pipelines by name in requests
        self.workers: dict[str, Worker] = {}  # by the same names
        if talker is not None:
            talker.system.require("t2av")
            self.served[TALKER] = talker
            self.workers[TALKER] = TalkerWorker(talker, limits.rows)
            self.voices = Voices(talker, voices, DEMO / "voice.wav" if demo else None, aliases)
        if hicodit is not None:
            self.served[HICODIT] = hicodit
            self.workers[HICODIT] = HiCoDiTWorker(hicodit, limits.rows)
        self.inside = {"requests": 0, "streams": 0}  # admitted, without an answer yet
        self.closing = False
        self.words_pool = ThreadPoolExecutor(1, "words")  # the aligner has one state

    @cached_property
    def word_times(self) -> WordTimes:
        """The aligner for word timestamps, loaded on first use."""
        return WordTimes()

    def find(self, name: str) -> Any:
        """Return the pipeline of a model, or HiCoDiT's chooser. Respond with 404 if it is not served."""
        if self.aliases and name in MODEL_ALIASES:
            name = TALKER
        if name not in self.served:
            raise HTTPException(404, f"model {name[:80]!r} is not served here; available: {', '.join(self.served)}")
        return self.served[name]

    @contextlib.contextmanager
    def admitted(self, kind: str = "requests") -> Iterator[None]:
        """Reserve one of the limited slots of requests or streams. Respond with 503 or 429 if there is none."""
        if self.closing:
            raise HTTPException(503, "the server is shutting down")
        if self.inside[kind] >= getattr(self.limits, kind):
            raise HTTPException(429, "the server is busy: try again in a moment")
        self.inside[kind] += 1
        try:
            yield
        finally:
            self.inside[kind] -= 1

    def close(self) -> None:
        """Stop admitting requests. After `limits.grace` seconds, unfinished requests receive 503."""
        if self.closing:
            return
        self.closing = True
        stopping = threading.Timer(self.limits.grace, self.stop)
        stopping.daemon = True
        stopping.start()

    def stop(self) -> None:
        """Stop the workers. Waiting requests fail with `WorkerEnded`."""
        self.closing = True
        for worker in self.workers.values():
            worker.stop()

    async def place(self) -> AsyncIterator[None]:
        """Reserve a slot until the response is sent (a dependency of routes)."""
        with self.admitted():
            yield

    async def generate(self, model: str, ticket: Ticket) -> Any:
        """Submit a ticket and return its result. It is cancelled with its caller."""
        self.workers[model].submit(ticket)
        return await asyncio.wrap_future(ticket)


async def request_folder() -> AsyncIterator[Path]:
    """Create a folder for the files of a request, which is deleted after the response (a dependency of routes)."""
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        yield Path(folder)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, which is cancelled when the client disconnects."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=WATCH))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client disconnected")
        return task.result()
    finally:
        task.cancel()


def without_folders(message: str) -> str:
    """Return a message as a single line, without the paths of request folders."""
    message = re.sub(rf"{re.escape(tempfile.gettempdir())}/{FOLDER}[^/]*/", "", message)
    return " ".join(message.split())


def invalid_field(error: dict[str, Any]) -> str:
    """Return one sentence about the first validation error of pydantic.

    Args:
        error: with the keys type, loc (body or query, field, ...), msg, input and ctx.
    """
    kind = error["type"]
    field = str(error["loc"][1])[:80] if len(error["loc"]) > 1 else ""
    value = f"{field}={str(error.get('input'))[:40]}"
    limits = error.get("ctx", {})
    if kind == "json_invalid" or not field:
        example = '{"model": "talker-t2av", "input": "Hello"}'
        return f"the body must be a JSON object, as in {example}, with the header Content-Type: application/json"
    if kind == "missing":
        return f"{field} is missing"
    if kind == "extra_forbidden":
        return f"{field} is not supported: omit it"
    if "expected" in limits:
        return f"{value} is unknown; choose {limits['expected'].replace(chr(39), '')}"
    for bound, words in BOUNDS.items():
        if bound in limits:
            return f"{value} must be {words} {limits[bound]}"
    words = KINDS.get(kind.partition("_")[0])
    return f"{value} must be {words}" if words else f"{value} cannot be used; see /docs"


def explain(error: BaseException) -> tuple[int, str]:
    """Return status code and message of an error, without the paths of request folders."""
    if (failure := write_failure(error)) is not None:
        return 507, f"the server cannot write files: {failure.strerror}"
    if isinstance(error, RequestValidationError):
        return 400, invalid_field(error.errors()[0])
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, WorkerEnded):
        return 503, str(error)
    if isinstance(error, UserError):
        return 400, without_folders(str(error))
    traceback.print_exception(error)
    return 500, f"internal error: {type(error).__name__}"

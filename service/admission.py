"""Admission, waiting for the models, errors as status and sentence, and Prometheus metrics of the service."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, Summary, disable_created_metrics
from starlette.exceptions import HTTPException

from engine.errors import UserError
from engine.word_times import Word, WordTimes
from hicodit.pipeline import HiCoDiTPipeline
from service.limits import ServeLimits
from service.voices import Voices
from service.workers import HiCoDiTWorker, TalkerWorker, Ticket, Worker, WorkerEnded
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.settings import DEMO

WATCH = 0.2  # seconds between two checks whether the client is still connected
TALKER, HICODIT = "talker-t2av", "hicodit"  # names of the models in requests
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class ClientLeft(Exception):
    """The client has disconnected."""


def explain(error: BaseException) -> tuple[int, str]:
    """Return the status and the sentence of an error."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return 507, f"the server cannot write files: {cause.strerror}"
        cause = cause.__cause__
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return 400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"
    if isinstance(error, ClientLeft):
        return 499, "the client went away"
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, WorkerEnded):
        return 503, str(error)
    if isinstance(error, UserError):
        return 400, " ".join(str(error).split())
    print(f"unforeseen {type(error).__name__}: {error}", flush=True)
    return 500, f"internal error: {type(error).__name__}"


class Service:
    """Both models with their workers; admits requests and counts them."""

    def __init__(
        self,
        hicodit: HiCoDiTPipeline | None,
        talker: TalkerPipeline | None,
        limits: ServeLimits,
        demo: bool,
        voices: Path | None = None,
    ) -> None:
        self.hicodit, self.talker, self.limits, self.demo = hicodit, talker, limits, demo
        models = {TALKER: talker, HICODIT: hicodit}
        self.served = {name: model for name, model in models.items() if model is not None}
        self.workers: dict[str, Worker] = {}
        if hicodit is not None:
            self.workers["hicodit"] = HiCoDiTWorker(hicodit, limits.rows)
        if talker is not None:
            talker.system.require("t2av")
            self.workers["talker_t2av"] = TalkerWorker(talker, limits.rows)
        self.voices = Voices(talker, voices, DEMO / "voice.wav" if demo else None) if talker is not None else None
        self.pool = ThreadPoolExecutor(4, "files")
        self.words_pool = ThreadPoolExecutor(1, "words")  # one thread, as the aligner has one state
        self.requests = self.streams = 0
        self.closing = False
        self._times: WordTimes | None = None
        self._add_metrics()

    def _add_metrics(self) -> None:
        disable_created_metrics()
        self.metrics = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.answers = Counter("requests", "Answers by path and status.", ["path", "status"], registry=registry)
        self.seconds = Summary("request_seconds", "Seconds from request to answer.", ["path"], registry=registry)
        running = Gauge("running", "Requests in the current batch of a model.", ["model"], registry=registry)
        waiting = Gauge("waiting", "Requests in the queue of a model.", ["model"], registry=registry)
        for name, worker in self.workers.items():
            running.labels(name).set_function(lambda worker=worker: worker.running)
            waiting.labels(name).set_function(lambda worker=worker: len(worker.waiting))
        inside = Gauge("requests_inside", "Admitted requests that have no answer yet.", registry=registry)
        inside.set_function(lambda: self.requests)
        Gauge("streams_open", "Open WebSockets.", registry=registry).set_function(lambda: self.streams)

    def find(self, name: str) -> Any:
        """Return the pipeline of a model; answer 404 if it is not served."""
        if name not in self.served:
            raise HTTPException(404, f"model {name[:80]!r} is not served here; there are: {', '.join(self.served)}")
        return self.served[name]

    def count(self, path: str, status: int, begin: float) -> None:
        """Count an answer to a request that came at `begin`, by time.monotonic."""
        self.answers.labels(path, status).inc()
        self.seconds.labels(path).observe(time.monotonic() - begin)

    async def place_words(self, text: str, wave: torch.Tensor, rate: int, speed: float) -> list[dict[str, Any]]:
        """Return the words of `text` in a wave (1, 1, N), with their start and end in seconds at a speed."""

        def place() -> list[Word]:
            if self._times is None:
                self._times = WordTimes()
            return self._times.align(text, wave[0, 0].cpu().numpy(), rate)

        words = await asyncio.get_running_loop().run_in_executor(self.words_pool, place)
        return [{"word": w.text, "start": round(w.begin / speed, 3), "end": round(w.end / speed, 3)} for w in words]

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, call, *arguments)

    @contextlib.contextmanager
    def admitted(self, stream: bool = False) -> Iterator[None]:
        """Hold one of the limited places of requests or streams; answer 503 or 429 if there is none."""
        if self.closing:
            raise HTTPException(503, "the server is shutting down")
        if (self.streams >= self.limits.streams) if stream else (self.requests >= self.limits.requests):
            raise HTTPException(429, "the server is busy: try again in a moment")
        self.requests, self.streams = self.requests + (not stream), self.streams + stream
        try:
            yield
        finally:
            self.requests, self.streams = self.requests - (not stream), self.streams - stream

    async def generate(
        self, model: str, ticket: Ticket, disconnected: Callable[[], Awaitable[bool]] | None = None
    ) -> Any:
        """Submit a ticket and return its result; cancel it when the client, if one waits, has disconnected."""
        self.workers[model].submit(ticket)
        future = asyncio.wrap_future(ticket)
        try:
            while not future.done():
                await asyncio.wait([future], timeout=WATCH)
                if not future.done() and disconnected and await disconnected():
                    raise ClientLeft
            return future.result()
        finally:
            ticket.cancel()


def counted(app: Callable, service: Service) -> Callable:
    """Count answers to HTTP requests, and refuse bodies that are too large, as middleware.

    Starlette's BaseHTTPMiddleware would hide disconnections; its RequestBodyLimitMiddleware answers in plain text.
    """
    most = service.limits.megabytes * 2**20

    async def call(scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        begin, status, size = time.monotonic(), 500, 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, f"a body of more than {most:,} bytes")
            return message

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, limited, watched)
        finally:
            service.count(scope["path"] if status not in (404, 405) else "other", status, begin)

    return call

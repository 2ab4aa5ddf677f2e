"""What the routes of `app.py` share: admission, waiting for the models, counts."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hicodit.pipeline import HiCoDiTPipeline
from service.workers import LipWorker, TalkWorker, Ticket, Worker
from talker_t2av.pipeline import TalkerPipeline

WATCH = 0.2  # seconds between two looks whether the client is still there


class Refusal(Exception):
    """An answer other than success: its status and its one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ServeLimits:
    """body: bytes of a request. text: characters. requests: that are worked on or wait. streams: open WebSockets.

    frame: bytes of a picture.
    """

    body: int = 32 * 2**20
    text: int = 400
    requests: int = 32
    streams: int = 8
    frame: int = 2 * 2**20


class Service:
    """Both models with their workers, and counts of what was done."""

    def __init__(
        self, lips: HiCoDiTPipeline | None, talker: TalkerPipeline | None, limits: ServeLimits, rows: int, demo: bool
    ) -> None:
        self.lips, self.talker, self.limits, self.demo = lips, talker, limits, demo
        self.workers: dict[str, Worker] = {}
        if lips is not None:
            self.workers["hicodit"] = LipWorker(lips, rows)
        if talker is not None:
            talker.system.require("t2av")
            self.workers["talker_t2av"] = TalkWorker(talker, rows)
        self.pool = ThreadPoolExecutor(4, "files")
        self.counts: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.inside = self.streams = 0
        self.closing = False

    async def work(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A call in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, call, *arguments)

    @contextlib.contextmanager
    def admitted(self, stream: bool = False) -> Any:
        """One of the requests that the service has room for.

        Raises:
            Refusal: there is none.
        """
        if self.closing:
            raise Refusal(503, "the server is shutting down")
        if (self.streams >= self.limits.streams) if stream else (self.inside >= self.limits.requests):
            raise Refusal(429, "the server is busy: try again in a moment")
        self.inside, self.streams = self.inside + (not stream), self.streams + stream
        try:
            yield
        finally:
            self.inside, self.streams = self.inside - (not stream), self.streams - stream

    async def wait(self, worker: str, ticket: Ticket, gone: Callable[[], Any]) -> Any:
        """The result of a ticket, which is given up when `gone` says that the client is.

        Raises:
            Refusal: it is.
        """
        self.workers[worker].submit(ticket)
        future = asyncio.wrap_future(ticket.future)
        while not future.done():
            await asyncio.wait([future], timeout=WATCH)
            if not future.done() and await gone():
                ticket.cancelled = True
                future.add_done_callback(lambda done: done.exception())
                raise Refusal(499, "the client went away")
        return future.result()

    def metrics(self) -> str:
        """In Prometheus' text format."""
        lines = [f'requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self.counts.items())]
        lines += [f'request_seconds_sum{{path="{path}"}} {seconds:.3f}' for path, seconds in self.seconds.items()]
        for name, worker in self.workers.items():
            lines.append(f'running{{model="{name}"}} {worker.running}')
            lines.append(f'waiting{{model="{name}"}} {len(worker.waiting)}')
        lines += [f"requests_inside {self.inside}", f"streams_open {self.streams}"]
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            lines.append(f"process_resident_memory_bytes {pages * resource.getpagesize()}")
        return "\n".join(lines) + "\n"


class Counting:
    """Counts the answers to HTTP requests. Starlette's own kind of middleware would hide that a client went away."""

    def __init__(self, app: Callable, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            path = scope["path"] if status not in (404, 405) else "other"
            self.service.counts[path, status] += 1
            self.service.seconds[path] += time.monotonic() - begin

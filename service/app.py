"""The web service `scripts/serve.py`: OpenAI's interface under /v1, and a WebSocket for speech while frames arrive."""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import torch
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from engine.errors import UserError, printable
from engine.media.pictures import picture_size
from engine.settings import LIMITS, check_seed
from engine.untrusted import parse_object
from hicodit.bundled import PipelineChooser
from hicodit.conditions.types import FPS
from hicodit.streaming import HOP, SpeechChunk, SpeechStream, StreamSettings
from service.limits import MAX_PICTURE
from service.openai import openai_error, openai_routes
from service.service import HICODIT, Service, explain
from service.sound import samples
from service.videos import video_routes

IDLE = 60.0  # seconds without a message after which a stream is closed
IMAGE_SIGNATURES = b"\x89PNG", b"\xff\xd8\xff"  # first bytes of a PNG or JPEG file


def make_app(service: Service) -> FastAPI:
    """Create the app: OpenAI's interface under /v1, the WebSocket /hicodit/stream, and /health."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4, "files"))  # threads of asyncio.to_thread
        for worker in service.workers.values():  # sequentially, as nothing else may run during a capture
            worker.start()
            await asyncio.to_thread(worker.ready.wait)
        yield
        service.stop()

    app = FastAPI(title="speaking-faces", lifespan=lifespan)
    app.state.service = service
    app.add_middleware(limit_bodies, service=service)
    for kind in (UserError, RequestValidationError, HTTPException, OSError, Exception):
        app.exception_handler(kind)(_answer_error)
    app.include_router(openai_routes(service))
    app.include_router(video_routes(service))

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        if service.closing or not all(worker.is_alive() for worker in service.workers.values()):
            raise HTTPException(503, "not ready")
        return {"status": "ok", "models": sorted(service.workers), "requests": service.inside["requests"]}

    @app.websocket("/hicodit/stream")
    async def hicodit_stream(socket: WebSocket) -> None:
        await socket.accept()
        try:
            with service.admitted("streams"):
                await _follow(socket, service.find(HICODIT))
        except WebSocketDisconnect:
            pass
        except Exception as error:
            status, message = explain(error)
            with contextlib.suppress(Exception):
                await socket.send_json({"error": message, "status": status})
        finally:
            with contextlib.suppress(Exception):
                await socket.close()

    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    status, message = explain(error)
    message = printable(message)  # half of a surrogate pair, which JSON can contain, cannot be encoded
    body = openai_error(status, message) if request.url.path.startswith("/v1/") else {"error": message}
    return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)


class LiveFace:
    """Speech stream of one WebSocket. The release is selected by its first frames.

    Args:
        chooser: selects among HiCoDiT's pipelines.
        fields: settings of the stream: fields of `StreamSettings`, and `seed`.
    """

    def __init__(self, chooser: PipelineChooser, fields: dict[str, Any]) -> None:
        self.chooser = chooser
        self.seed = fields.pop("seed", 0)
        check_seed(self.seed)
        self.settings = StreamSettings(**fields)
        self.rate = chooser.load_all()[0].codec.sample_rate
        self.count = 0  # number of frames so far
        # Frames before the release is selected: one hop, for which no audio can be generated yet.
        self.first: list[np.ndarray] = []
        self.stream: SpeechStream | None = None

    def push(self, data: bytes) -> bytes:
        """Add a frame (JPEG or PNG). Return the 16-bit samples that have become available, if any."""
        self.count += 1
        if self.count > FPS * LIMITS.seconds:
            raise UserError(f"the stream is longer than {LIMITS.seconds:g} s")
        picture = read_picture(data)
        if self.stream is not None:
            return _samples(self.stream.push(picture))
        self.first.append(picture)
        return self._begin() if len(self.first) == HOP else b""

    def finish(self) -> bytes:
        """Return the remaining samples."""
        if not self.count:
            raise UserError("no frame was received before the end")
        begin = b"" if self.stream is not None else self._begin()
        return begin + _samples(self.stream.finish())

    def _begin(self) -> bytes:
        """Select the pipeline and start the stream with the buffered frames."""
        if len({picture.shape for picture in self.first}) > 1:
            raise UserError("the frames differ in size: all frames must have the same size")
        pipeline = self.chooser.for_clip(np.stack(self.first))
        self.stream = SpeechStream(pipeline, self.settings, self.seed)
        return b"".join([_samples(self.stream.push(picture)) for picture in self.first])


async def _follow(socket: WebSocket, chooser: PipelineChooser) -> None:
    """Receive {"lookahead": seconds, "seed": number}, then frames (JPEG or PNG) at 25 per second, then a text message.

    Send the sampling rate, then audio (16-bit samples) in hops of 160 ms.
    """
    first = await _receive(socket)
    example = '{"lookahead": 0.4, "seed": 0}'
    face = LiveFace(chooser, parse_object(first.get("text") or "", "the first message", ("lookahead", "seed"), example))
    await socket.send_json({"rate": face.rate, "format": "s16le"})
    sent = 0
    picture = b""
    while picture is not None:
        picture = (await _receive(socket)).get("bytes")
        if picture is None:
            sound = await asyncio.to_thread(face.finish)
        else:
            sound = await asyncio.to_thread(face.push, picture)
        if sound:
            await socket.send_bytes(sound)
            sent += len(sound) // 2
    await socket.send_json({"done": True, "seconds": sent / face.rate})


async def _receive(socket: WebSocket) -> dict[str, Any]:
    """Return the next message, or raise WebSocketDisconnect, or UserError after `IDLE` seconds without a message."""
    try:
        message = await asyncio.wait_for(socket.receive(), IDLE)
    except TimeoutError:
        raise UserError(f"nothing was received for {IDLE:g} s") from None
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect
    return message


def _samples(chunk: SpeechChunk | None) -> bytes:
    return b"" if chunk is None else samples(torch.from_numpy(chunk.wave)[None, None])


def read_picture(data: bytes) -> np.ndarray:
    """Decode a JPEG or PNG image to (H, W, 3) uint8 RGB."""
    if len(data) > MAX_PICTURE:
        raise UserError(f"the image has {len(data):,} bytes: at most {MAX_PICTURE:,} are allowed")
    if not data.startswith(IMAGE_SIGNATURES):
        raise UserError("expected an image (JPEG or PNG), or a text message at the end")
    try:
        width, height = picture_size(io.BytesIO(data))
    except ValueError as error:
        raise UserError("the image cannot be decoded: send a complete JPEG or PNG file") from error
    if math.isinf(width):
        raise UserError(f"the image has more than {LIMITS.pixels:,} pixels: scale it down")
    if width * height > LIMITS.pixels:
        raise UserError(f"the image has {width} x {height} pixels: at most {LIMITS.pixels:,} are allowed")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise UserError("the image cannot be decoded: send a complete JPEG or PNG file")
    return picture


def limit_bodies(app: Callable, service: Service) -> Callable:
    """ASGI middleware that rejects request bodies beyond the limit.

    Starlette's BaseHTTPMiddleware would hide disconnections, and its RequestBodyLimitMiddleware responds in plain text.
    """
    max_bytes = service.limits.megabytes * 2**20

    async def call(scope: Any, receive: Callable, send: Callable) -> None:
        size = 0

        async def limited_receive() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > max_bytes:
                raise HTTPException(413, f"the request body exceeds {max_bytes:,} bytes")
            return message

        await app(scope, limited_receive if scope["type"] == "http" else receive, send)

    return call

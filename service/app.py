"""The web service `scripts/serve.py`: speech of silent clips, whole or while their pictures come, and /v1."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from fastapi import Depends, FastAPI, Query, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from engine.errors import UserError
from engine.faces.track import read_face
from engine.media.audio import write_wav
from engine.seeding import check_seed
from engine.settings import FACE, LIMITS
from engine.untrusted import parse_object
from hicodit.conditions.types import FPS
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.streaming import SpeechChunk, SpeechStream, StreamSettings
from service.limits import MAX_PICTURE
from service.openai import Folder, openai_error, openai_routes
from service.service import HICODIT, Service, explain, while_connected
from service.sound import samples
from service.videos import FIRST, video_routes
from service.workers import Ticket

PICTURES = b"\x89PNG", b"\xff\xd8\xff"  # begin of a PNG or JPEG file


def make_app(service: Service) -> FastAPI:
    """Make the app: /hicodit, its WebSocket, OpenAI's interface under /v1, /health and /metrics."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4, "files"))  # of asyncio.to_thread
        for worker in service.workers.values():
            worker.start()
        yield
        service.closing = True
        for worker in service.workers.values():
            worker.stop()

    app = FastAPI(title="speaking-faces", lifespan=lifespan)
    app.state.service = service
    app.add_middleware(counted, service=service)
    for kind in (UserError, RequestValidationError, HTTPException, OSError, Exception):
        app.exception_handler(kind)(_answer_error)
    app.include_router(openai_routes(service))
    app.include_router(video_routes(service))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if service.closing or not all(worker.is_alive() for worker in service.workers.values()):
            raise HTTPException(503, "not ready")
        return {"status": "ok", "models": sorted(service.workers)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics), media_type=CONTENT_TYPE_LATEST)

    @app.post("/hicodit", dependencies=[Depends(service.place)])
    async def hicodit(
        request: Request, folder: Folder, seed: int = 0, face: Annotated[str, Query(description=FACE)] = FIRST
    ) -> FileResponse:
        """Return the speech of a silent video, which is the body, as WAV."""
        model = service.find(HICODIT)
        check_seed(seed)
        if (chosen := read_face(face)) == "all":
            raise UserError("face=all makes a file for each face: use /v1/videos")
        if not (body := await request.body()):
            raise UserError("the body is empty")
        (folder / "clip.mp4").write_bytes(body)
        crops = await asyncio.to_thread(model.crops, folder / "clip.mp4", chosen)
        speech = await while_connected(request, service.generate("hicodit", Ticket(crops, seed)))
        await asyncio.to_thread(write_wav, folder / "speech.wav", speech.wave, speech.rate)
        return FileResponse(folder / "speech.wav", media_type="audio/wav")

    @app.websocket("/hicodit/stream")
    async def hicodit_stream(socket: WebSocket) -> None:
        await socket.accept()
        status, begin = 200, time.monotonic()
        try:
            with service.admitted("streams"):
                await _follow(socket, service.find(HICODIT))
        except WebSocketDisconnect:
            status = 499
        except Exception as error:
            status, message = explain(error)
            with contextlib.suppress(Exception):
                await socket.send_json({"error": message, "status": status})
        finally:
            service.count("/hicodit/stream", status, begin)
            with contextlib.suppress(Exception):
                await socket.close()

    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    status, message = explain(error)
    body = openai_error(status, message) if request.url.path.startswith("/v1/") else {"error": message}
    return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)


async def _follow(socket: WebSocket, model: HiCoDiTPipeline) -> None:
    """Receive {"lookahead": seconds, "seed": number}, then pictures (JPEG or PNG), 25 a second, then a text.

    Send the rate, then sound (16-bit samples) in hops of 160 ms.
    """
    first, example = await _receive(socket), '{"lookahead": 0.4, "seed": 0}'
    fields = parse_object(first.get("text") or "", "the first message", ("lookahead", "seed"), example)
    check_seed(seed := fields.pop("seed", 0))
    stream, sent, frames = SpeechStream(model, StreamSettings(**fields), seed), 0, 0
    await socket.send_json({"rate": model.codec.sample_rate, "format": "s16le"})
    while True:
        picture = (await _receive(socket)).get("bytes")
        if picture is not None:
            frames += 1
            if frames > FPS * LIMITS.seconds:
                raise UserError(f"a stream of more than {LIMITS.seconds:g} s")
            chunk = await asyncio.to_thread(_push, stream, picture)
        elif frames:
            chunk = await asyncio.to_thread(stream.finish)
        else:
            raise UserError("no picture came before the end")
        if chunk is not None and len(chunk.wave):
            await socket.send_bytes(samples(torch.from_numpy(chunk.wave)[None, None]))
            sent += len(chunk.wave)
        if picture is None:
            await socket.send_json({"done": True, "seconds": sent / model.codec.sample_rate})
            return


async def _receive(socket: WebSocket) -> dict[str, Any]:
    """Return the next message, or raise WebSocketDisconnect."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect
    return message


def _push(stream: SpeechStream, data: bytes) -> SpeechChunk | None:
    if len(data) > MAX_PICTURE:
        raise UserError(f"a picture of {len(data):,} bytes: {MAX_PICTURE:,} at most")
    if not data.startswith(PICTURES):
        raise UserError("a message that is no picture: send JPEG or PNG, and a text at the end")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise UserError("a damaged picture")
    if picture.shape[0] * picture.shape[1] > LIMITS.pixels:
        raise UserError(f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels: {LIMITS.pixels:,} at most")
    return stream.push(picture)


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

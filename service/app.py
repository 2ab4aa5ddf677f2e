"""Routes of the web service `scripts/serve.py`: HTTP for whole clips, WebSockets for streams."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from fastapi import FastAPI, Query, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from engine.errors import UserError
from engine.faces.track import read_face
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.seeding import check_seed
from engine.settings import FACE, LIMITS
from engine.untrusted import parse_object
from hicodit.conditions.types import FPS
from hicodit.streaming import SpeechChunk, SpeechStream, StreamSettings
from service.admission import HICODIT, TALKER, ClientLeft, Service, counted, explain
from service.limits import MAX_PICTURE
from service.openai import FIRST, check_text, openai_error, openai_routes
from service.sound import samples
from service.speaking import parts_of, request_folder, speak
from service.workers import Ticket
from talker_t2av.jobs import PreparedJob
from talker_t2av.pipeline import Job
from talker_t2av.settings import with_demo

TALK_FIELDS = {"mode", "text", "seed", "min_seconds", "max_seconds", "voice", "face"}
PICTURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}


def make_app(service: Service) -> FastAPI:
    """Make the app: /hicodit, /talker, their WebSockets, OpenAI's interface under /v1, /health and /metrics."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for worker in service.workers.values():
            worker.start()
        yield
        service.closing = True
        for worker in service.workers.values():
            worker.stop()

    app = FastAPI(title="speaking-faces", lifespan=lifespan)
    app.state.service = service

    app.add_middleware(counted, service=service)
    for kind in (UserError, RequestValidationError, HTTPException, ClientLeft, OSError, Exception):
        app.exception_handler(kind)(_answer_error)
    app.include_router(openai_routes(service))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        alive = {name: worker.is_alive() for name, worker in service.workers.items()}
        if service.closing or not all(alive.values()):
            raise HTTPException(503, "not ready")
        return {"status": "ok", "models": sorted(alive)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics), media_type=CONTENT_TYPE_LATEST)

    @app.post("/hicodit")
    async def hicodit(
        request: Request, seed: int = 0, face: Annotated[str, Query(description=FACE)] = FIRST
    ) -> Response:
        """Return the speech of a silent video, which is the body, as WAV."""
        model = service.find(HICODIT)
        check_seed(seed)
        if (chosen := read_face(face)) == "all":
            raise UserError("face=all makes a file for each face: use /v1/videos")
        with service.admitted(), request_folder() as folder:
            clip = folder / "clip.mp4"
            clip.write_bytes(await _body(request))
            crops = await service.in_thread(model.crops, clip, chosen)
            speech = await service.generate("hicodit", Ticket(crops, seed), request.is_disconnected)
            return Response(await service.in_thread(_wav, folder, speech.wave, speech.rate), media_type="audio/wav")

    @app.post("/talker")
    async def talker(request: Request) -> Response:
        """Return WAV (mode tts) or MP4 (t2av) for a JSON object, see `_prepare`."""
        model = service.find(TALKER)
        with service.admitted(), request_folder() as folder:
            prepared = await service.in_thread(_prepare, service, await _body(request), folder)
            tickets = (Ticket(part) for part in parts_of(prepared))
            results = [await service.generate("talker_t2av", ticket, request.is_disconnected) for ticket in tickets]
            talk = await service.in_thread(model.complete, prepared, *results)
            if talk.frames is None:
                return Response(await service.in_thread(_wav, folder, talk.wave, model.rate), media_type="audio/wav")
            await service.in_thread(write_video, folder / "talk.mp4", talk.frames, model.fps, talk.wave, model.rate)
            return Response((folder / "talk.mp4").read_bytes(), media_type="video/mp4")

    @app.websocket("/talker/stream")
    @_streaming(service, "/talker/stream")
    async def talker_stream(socket: WebSocket, folder: Path) -> None:
        """Receive the JSON object of a tts job; send the rate, then sound (16-bit samples) patch by patch."""
        model = service.find(TALKER)
        prepared = await service.in_thread(_prepare, service, (await socket.receive_text()).encode(), folder)
        if prepared.job.mode != "tts":
            raise UserError(f"mode={prepared.job.mode} cannot be streamed: use tts")
        await socket.send_json({"rate": model.rate, "format": "s16le"})
        closed = asyncio.ensure_future(socket.receive())  # no other message is expected

        async def disconnected() -> bool:
            return closed.done()

        try:
            sent = [await _send_wave(socket, wave) async for wave in speak(service, prepared, disconnected)]
            await socket.send_json({"done": True, "seconds": sum(sent) / model.rate})
        finally:
            closed.cancel()

    @app.websocket("/hicodit/stream")
    @_streaming(service, "/hicodit/stream")
    async def hicodit_stream(socket: WebSocket, _: Path) -> None:
        """Receive {"lookahead": seconds, "seed": number}, then pictures (JPEG or PNG), 25 a second, then a text.

        Send the rate, then sound (16-bit samples) in hops of 160 ms.
        """
        model = service.find(HICODIT)
        example, text = '{"lookahead": 0.4, "seed": 0}', await socket.receive_text()
        fields = parse_object(text, "the first message", ("lookahead", "seed"), example)
        check_seed(seed := fields.pop("seed", 0))
        stream, samples, frames = SpeechStream(model, StreamSettings(**fields), seed), 0, 0
        await socket.send_json({"rate": model.codec.sample_rate, "format": "s16le"})
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect
            data = message.get("bytes")
            chunk = await service.in_thread(_push, stream, data) if data else None
            frames += data is not None
            if frames > FPS * LIMITS.seconds:
                raise UserError(f"a stream of more than {LIMITS.seconds:g} s")
            if data is None:
                if not frames:
                    raise UserError("no picture came before the end")
                chunk = await service.in_thread(stream.finish)
            samples += await _send_wave(socket, chunk and torch.from_numpy(chunk.wave)[None, None])
            if data is None:
                await socket.send_json({"done": True, "seconds": samples / model.codec.sample_rate})
                return

    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    status, message = explain(error)
    body = openai_error(status, message) if request.url.path.startswith("/v1/") else {"error": message}
    return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)


async def _body(request: Request) -> bytes:
    if not (body := await request.body()):
        raise UserError("the body is empty")
    return body


def _prepare(service: Service, body: bytes, folder: Path) -> PreparedJob:
    """Prepare the job of a JSON object with `TALK_FIELDS`: mode tts or t2av; voice and face are files in base64."""
    fields = {"mode": "tts"} | parse_object(body, "the body", TALK_FIELDS, '{"mode": "tts", "text": "hello"}')
    if fields["mode"] not in ("tts", "t2av"):
        raise UserError(f"mode={str(fields['mode'])[:40]} is unknown; choose tts, t2av")
    check_text(service, str(fields.get("text", "")))
    for name, setting, suffix in (("voice", "reference_audio", ".wav"), ("face", "reference_video", ".mp4")):
        if name in fields:
            data = _decoded(name, fields.pop(name))
            path = folder / f"{name}{next((s for magic, s in PICTURES.items() if data.startswith(magic)), suffix)}"
            path.write_bytes(data)
            fields[setting] = str(path)
    return service.talker.prepare(Job(**(with_demo(fields) if service.demo else fields)))


def _decoded(name: str, value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise UserError(f"{name} must be a file encoded as base64") from error


def _wav(folder: Path, wave: np.ndarray, rate: int) -> bytes:
    write_wav(folder / "sound.wav", wave, rate)
    return (folder / "sound.wav").read_bytes()


def _push(stream: SpeechStream, data: bytes) -> SpeechChunk | None:
    if len(data) > MAX_PICTURE:
        raise UserError(f"a picture of {len(data):,} bytes: {MAX_PICTURE:,} at most")
    if not data.startswith(tuple(PICTURES)):
        raise UserError("a message that is no picture: send JPEG or PNG, and a text at the end")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise UserError("a damaged picture")
    if picture.shape[0] * picture.shape[1] > LIMITS.pixels:
        raise UserError(f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels: {LIMITS.pixels:,} at most")
    return stream.push(picture)


async def _send_wave(socket: WebSocket, wave: torch.Tensor | None) -> int:
    """Send a wave (1, 1, N), if there is one; return N."""
    if wave is None or not wave.numel():
        return 0
    await socket.send_bytes(samples(wave))
    return wave.shape[-1]


def _streaming(service: Service, path: str) -> Callable:
    """Make a WebSocket route of a function (socket, folder): admission, at most one error message, metrics."""

    def decorate(stream: Callable) -> Callable:
        async def route(socket: WebSocket) -> None:
            await socket.accept()
            status, begin = 200, time.monotonic()
            try:
                with service.admitted(stream=True), request_folder() as folder:
                    await stream(socket, folder)
            except (WebSocketDisconnect, ClientLeft):
                status = 499
            except Exception as error:
                is_binary = isinstance(error, KeyError)  # of Starlette's receive_text
                status, message = explain(UserError("begin with a text message") if is_binary else error)
                with contextlib.suppress(Exception):
                    await socket.send_json({"error": message, "status": status})
            finally:
                service.count(path, status, begin)
                with contextlib.suppress(Exception):
                    await socket.close()

        route.__doc__ = stream.__doc__
        return route

    return decorate

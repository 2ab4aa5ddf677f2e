"""OpenAI-compatible API of the service: models and speech under /v1, for use with OpenAI's client.

Requests, responses and errors follow OpenAI's API reference; `OurFields` are extensions. Unsupported fields are
rejected instead of ignored. Videos are in service/videos.py.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Send

from engine.errors import UserError, require
from engine.settings import SEEDS
from service.service import TALKER, Service, request_folder, while_connected, without_folders
from service.sound import FORMATS, collect, encode, encode_whole, speak
from service.voices import DEFAULT
from service.workers import WorkerEnded
from talker_t2av.pipeline import Job

Folder = Annotated[Path, Depends(request_folder)]


class OurFields(BaseModel):
    """Extension fields of requests for speech and videos. The limits of length only apply to Talker-T2AV."""

    model_config = ConfigDict(extra="forbid")

    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] = 0
    min_seconds: float = Job.min_seconds
    max_seconds: float | None = Job.max_seconds

    def job(self, service: Service, mode: str, text: str, voice: Path, face: Path | None = None) -> Job:
        """Return the job for a text, which must not exceed the limit of the service."""
        if not text.strip():
            raise UserError("the text is empty")
        if len(text) > service.limits.characters:
            raise UserError(f"the text has {len(text)} characters: at most {service.limits.characters} are allowed")
        return Job(
            mode, text, str(voice), face and str(face),
            min_seconds=self.min_seconds, max_seconds=self.max_seconds, seed=self.seed,
        )  # fmt: skip


class SpeechRequest(OurFields):
    """Body of POST /v1/audio/speech."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": TALKER, "voice": DEFAULT, "input": "How was your trip to the lake?"}}
    )

    model: str
    input: str
    voice: str | dict[Literal["id"], str] = DEFAULT
    reference_audio: Annotated[str | None, Field(description="recording as base64, in place of `voice`")] = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: Annotated[float, Field(ge=0.25, le=4.0, allow_inf_nan=False)] = 1.0
    stream_format: Literal["audio"] | None = None
    timestamp_granularities: Annotated[list[Literal["word"]], Field(max_length=1)] = []

    @property
    def voice_name(self) -> str:
        """Name of the voice, which OpenAI's clients send as a string or as {"id": name}."""
        return self.voice if isinstance(self.voice, str) else self.voice.get("id", "")


def openai_error(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error in OpenAI's format."""
    kind = {429: "rate_limit_error", 404: "not_found_error"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class SoundStream(StreamingResponse):
    """Response with audio that is sent while it is generated."""

    async def stream_response(self, send: Send) -> None:
        """Send the chunks. If the worker fails, the connection is closed, so that the client notices."""
        try:
            await super().stream_response(send)
        except WorkerEnded as error:
            print(f"a stream was not finished: {error}", flush=True)


def openai_routes(service: Service) -> APIRouter:
    """Return the routes of models and speech."""
    router = APIRouter(prefix="/v1")
    started = int(time.time())

    def model_json(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "speaking-faces"}

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [model_json(name) for name in service.served]}

    @router.get("/models/{name}")
    async def get_model(name: str) -> dict[str, Any]:
        """Describe a model."""
        service.find(name)
        return model_json(name)

    @router.post("/audio/speech", dependencies=[Depends(service.place)], responses={200: {"content": {"audio/*": {}}}})
    async def speech(body: SpeechRequest, request: Request, folder: Folder) -> Response:
        """Generate speech for a text.

        The response is a complete file, or with stream_format=audio the file in chunks while it is generated. The
        header X-Remarks has one-line remarks about the input. With timestamp_granularities ["word"], the response is
        JSON: `audio` (base64) and `words`, each with its start and end in seconds.
        """
        if service.find(body.model) is not service.talker:
            raise UserError(f"model={body.model} does not support text to speech: use {TALKER}")
        timed = bool(body.timestamp_granularities)
        if timed and body.stream_format is not None:
            raise UserError("timestamp_granularities requires the complete speech: omit stream_format")
        if timed:
            require("pocketsphinx", "pocketsphinx")
        if body.reference_audio is None:
            voice = service.voices.find(body.voice_name)
        else:
            voice = save_recording(body.reference_audio, folder)
        prepared = await asyncio.to_thread(service.talker.prepare, body.job(service, "tts", body.input, voice))
        remarks = [without_folders(remark) for remark in prepared.remarks]
        if body.reference_audio is None:
            remarks += service.voices.remarks(body.voice_name)
        header = "; ".join(remarks).encode("latin-1", "replace").decode("latin-1")
        headers = {"X-Remarks": header} if remarks else {}
        media_type = FORMATS[body.response_format][0]
        rate = service.talker.rate
        waves = speak(service, prepared, stream=body.stream_format is not None)

        if body.stream_format is not None:
            parts = encode(waves, rate, body.response_format, body.speed)
            # Errors before the first audio still have their status.
            first = await while_connected(request, anext(parts))

            async def chunks() -> AsyncIterator[bytes]:
                yield first
                async for part in parts:
                    yield part

            return SoundStream(chunks(), media_type=media_type, headers=headers)

        whole = await while_connected(request, collect(waves))
        content = await encode_whole(whole, rate, body.response_format, body.speed)
        if not timed:
            return Response(content, media_type=media_type, headers=headers)
        answer = {
            "audio": base64.b64encode(content).decode(),
            "format": body.response_format,
            "duration": round(len(whole) / rate / body.speed, 3),
            "words": await word_times(body.input, whole, body.speed),
            "remarks": remarks,
        }
        return JSONResponse(answer, headers=headers)

    async def word_times(text: str, wave: np.ndarray, speed: float) -> list[dict[str, Any]]:
        """Return the words of speech (N,) with their times in seconds after the change of speed."""
        align = partial(service.word_times.align, text, wave, service.talker.rate)
        words = await asyncio.get_running_loop().run_in_executor(service.words_pool, align)
        return [
            {"word": word.text, "start": round(word.begin / speed, 3), "end": round(word.end / speed, 3)}
            for word in words
        ]

    return router


def save_recording(encoded: str, folder: Path) -> Path:
    """Write a recording that is sent as base64 to a file and return its path."""
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        raise UserError("reference_audio must be a file encoded as base64") from error
    return write_upload(content, folder / "reference_audio")


def write_upload(content: bytes, path: Path) -> Path:
    """Write the content of a file that a client sent to `path`, and return it."""
    if not content:
        raise UserError(f"{path.name} is an empty file")
    path.write_bytes(content)
    return path

"""OpenAI's interface to the service: models, speech and voices under /v1, for programs that speak it already.

Fields, answers and errors have the shape of OpenAI's API reference; `OurFields` are beyond it. A field that cannot be
kept is refused, not ignored. Videos are in service/videos.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Depends, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from engine.errors import UserError, require
from engine.settings import SEEDS
from service.service import TALKER, Service, request_folder, while_connected
from service.sound import FORMATS, encode, encode_whole, speak
from service.voices import DEFAULT
from talker_t2av.pipeline import Job

Folder = Annotated[Path, Depends(request_folder)]


class OurFields(BaseModel):
    """Fields of requests for speech and videos that OpenAI's have not; those of length are Talker-T2AV's."""

    model_config = ConfigDict(extra="forbid")

    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] = 0
    min_seconds: float = Job.min_seconds
    max_seconds: float | None = Job.max_seconds

    def job(self, service: Service, mode: str, text: str, voice: Path, face: Path | None = None) -> Job:
        """Return the job of a text, which must not be too long for the service."""
        if not text.strip():
            raise UserError("the text is empty: give words to say")
        if len(text) > service.limits.characters:
            raise UserError(f"text of {len(text)} characters: {service.limits.characters} at most")
        return Job(
            mode, text, str(voice), face and str(face),
            min_seconds=self.min_seconds, max_seconds=self.max_seconds, seed=self.seed,
        )  # fmt: skip


class SpeechRequest(OurFields):
    """Body of POST /v1/audio/speech."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": TALKER, "voice": DEFAULT, "input": "How was your trip to the lake?"}}
    )

    model: Literal["talker-t2av"]
    input: str
    voice: str | dict[Literal["id"], str] = DEFAULT
    reference_audio: Annotated[str | None, Field(description="recording as base64, in place of `voice`")] = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: Annotated[float, Field(ge=0.25, le=4.0)] = 1.0
    stream_format: Literal["audio", "sse"] | None = None
    timestamp_granularities: Annotated[list[Literal["word"]], Field(max_length=1)] = []


def openai_error(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error in OpenAI's shape."""
    kind = {429: "rate_limit_error", 404: "not_found_error"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def openai_routes(service: Service) -> APIRouter:
    """Return the routes of models, speech and voices."""
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
        """Say a text.

        The answer is a whole file; with stream_format=audio the file in chunks as it is generated, with sse events
        speech.audio.delta (base64) and speech.audio.done. The header X-Warning says what was done about an input. With
        timestamp_granularities ["word"] the answer is JSON: `audio` (base64) and `words`, each with its start and end
        in seconds; of events, the last one has the words.
        """
        service.find(body.model)
        timed = bool(body.timestamp_granularities)
        if timed and body.stream_format == "audio":
            raise UserError("timestamp_granularities with stream_format=audio has no place for words: use sse")
        if timed:
            require("pocketsphinx", "pocketsphinx")
        if body.reference_audio is not None:
            voice = folder / "reference_audio"
            try:
                voice.write_bytes(base64.b64decode(body.reference_audio, validate=True))
            except ValueError as error:
                raise UserError("reference_audio must be a file encoded as base64") from error
        else:
            voice = service.voices.find(body.voice if isinstance(body.voice, str) else body.voice.get("id", ""))
        prepared = await asyncio.to_thread(service.talker.prepare, body.job(service, "tts", body.input, voice))
        remark = prepared.remark.replace("\n", " ")
        headers = {"X-Warning": remark.encode("latin-1", "replace").decode("latin-1")} if remark else {}
        media, rate, whole = FORMATS[body.response_format][0], service.talker.rate, list[torch.Tensor]()

        async def waves() -> AsyncIterator[torch.Tensor]:
            async for wave in speak(service, prepared, body.stream_format is not None):
                whole.append(wave)
                yield wave

        async def words() -> dict[str, Any]:
            if not timed:
                return {}
            wave = torch.cat(whole, -1)[0, 0].numpy()
            align = partial(service.word_times.align, body.input, wave, rate)
            found = await asyncio.get_running_loop().run_in_executor(service.words_pool, align)
            times = [(word.text, word.begin / body.speed, word.end / body.speed) for word in found]
            return {"words": [{"word": w, "start": round(start, 3), "end": round(end, 3)} for w, start, end in times]}

        if body.stream_format is None:
            whole_file = encode_whole(waves(), rate, body.response_format, body.speed)
            content = await while_connected(request, whole_file)
            if not timed:
                return Response(content, media_type=media, headers=headers)
            seconds = sum(wave.shape[-1] for wave in whole) / rate / body.speed
            audio = {"audio": base64.b64encode(content).decode(), "format": body.response_format}
            answer = audio | {"duration": round(seconds, 3)} | await words() | {"warning": prepared.remark or None}
            return JSONResponse(answer, headers=headers)

        parts = encode(waves(), rate, body.response_format, body.speed)
        first = await while_connected(request, anext(parts))  # errors before the first sound still have their status

        async def chunks() -> AsyncIterator[bytes]:
            yield first
            async for part in parts:
                yield part

        async def events() -> AsyncIterator[str]:
            async for part in chunks():
                yield event({"type": "speech.audio.delta", "audio": base64.b64encode(part).decode()})
            tokens = sum(len(request.prompt) for request in prepared.requests)
            usage = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
            done = {"type": "speech.audio.done", "usage": usage, "warning": prepared.remark or None}
            yield event(done | await words())

        if body.stream_format == "sse":
            return StreamingResponse(events(), media_type="text/event-stream")
        return StreamingResponse(chunks(), media_type=media, headers=headers)

    @router.get("/audio/voices")
    async def list_voices() -> dict[str, Any]:
        """List the voices."""
        names = sorted(service.voices.files) if service.voices else []
        return {"object": "list", "data": [{"id": name, "name": name, "object": "audio.voice"} for name in names]}

    @router.post("/audio/voices", dependencies=[Depends(service.place)])
    async def add_voice(name: Annotated[str, Form()], audio_sample: UploadFile, folder: Folder) -> dict[str, Any]:
        """Save the voice of a recording under a name; the recording itself is not kept."""
        service.find(TALKER)
        await save_upload(audio_sample, folder / "sample")
        await asyncio.to_thread(service.voices.add, name, folder / "sample")
        return {"id": name, "name": name, "object": "audio.voice", "created_at": int(time.time())}

    @router.delete("/audio/voices/{name}")
    def delete_voice(name: str) -> dict[str, Any]:  # in a thread, as it may wait for an upload
        """Delete an uploaded voice."""
        service.find(TALKER)
        if name not in service.voices.files:
            raise HTTPException(404, f"voice {name[:80]!r} is unknown")
        service.voices.remove(name)
        return {"id": name, "object": "audio.voice.deleted", "deleted": True}

    return router


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


async def save_upload(upload: UploadFile, path: Path) -> Path:
    """Write an uploaded file to `path` and return it."""
    content = await upload.read()
    if not content:
        raise UserError("the uploaded file is empty")
    path.write_bytes(content)
    return path

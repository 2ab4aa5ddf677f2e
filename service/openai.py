"""OpenAI's interface to the service: speech, models, voices and videos under /v1, for programs that speak it already.

Fields, answers and errors have the shape of OpenAI's API reference. A field that cannot be kept is refused, not
ignored. Talking faces and lip-to-speech are jobs of /v1/videos: made, asked for, and fetched when they are complete.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from pydantic import Field as Bounded

from engine.errors import UserError, require
from engine.faces.track import read_face
from engine.media.video import mux_audio, write_video
from engine.seeding import check_seed
from engine.settings import FACE
from service.admission import TALKER, Service, explain
from service.sound import FORMATS, encode, encode_whole
from service.speaking import always, noting, parts_of, request_folder, speak
from service.voices import DEFAULT
from service.workers import Ticket
from talker_t2av.jobs import PreparedJob
from talker_t2av.pipeline import Job

KEPT_SECONDS = 3600.0  # after which a finished video is deleted
SPEEDS = (0.25, 4.0)
FIRST = "largest"  # of several faces


class SpeechRequest(BaseModel):
    """Body of POST /v1/audio/speech."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"model": TALKER, "voice": DEFAULT, "input": "How was your trip to the lake?"}},
    )

    model: Literal["talker-t2av"]
    input: str
    voice: str | dict[Literal["id"], str] = DEFAULT
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: Annotated[float, Bounded(ge=SPEEDS[0], le=SPEEDS[1])] = 1.0
    stream_format: Literal["audio", "sse"] | None = None
    timestamp_granularities: Annotated[list[Literal["word"]], Bounded(max_length=1)] = []
    seed: int = 0


@dataclass
class VideoJob:
    """A video that is being made, or is kept for its client.

    status: queued, in_progress, completed or failed. faces: number of videos of a completed job, one a face; the folder
    has them as video1.mp4, ...
    """

    model: str
    prompt: str
    folder: Path
    id: str = field(default_factory=lambda: f"video_{uuid.uuid4().hex}")
    created: float = field(default_factory=time.time)
    status: str = "queued"
    progress: int = 0
    finished: float | None = None
    error: str | None = None
    warning: str | None = None
    faces: int = 1
    task: asyncio.Task | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "video", "model": self.model, "prompt": self.prompt, "status": self.status,
            "progress": self.progress, "created_at": int(self.created),
            "completed_at": self.finished and int(self.finished),
            "expires_at": self.finished and int(self.finished + KEPT_SECONDS),
            "error": self.error and {"code": "failed", "message": self.error}, "warning": self.warning,
            "faces": self.faces,
        }  # fmt: skip


Make = Callable[[VideoJob, Path], Awaitable[None]]  # of a job and its upload


class HeldResponse(StreamingResponse):
    """A streamed answer that closes `resources` when it ends, also when the client leaves before it begins."""

    def __init__(self, body: AsyncIterator[bytes], resources: contextlib.ExitStack, **how: Any) -> None:
        super().__init__(body, **how)
        self.resources = resources

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.resources:
            await super().__call__(scope, receive, send)


def openai_error(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error in OpenAI's shape."""
    kind = {429: "rate_limit_error", 404: "not_found_error"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def openai_routes(service: Service) -> APIRouter:
    """Return the routes of /v1."""
    router = APIRouter(prefix="/v1")
    videos = Videos(service)
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

    @router.post("/audio/speech", responses={200: {"content": {"audio/*": {}}}})
    async def speech(body: SpeechRequest, request: Request) -> Response:
        """Say a text.

        The answer is a whole file; with stream_format=audio the file in chunks as it is generated, with sse events
        speech.audio.delta (base64) and speech.audio.done. The header X-Warning says what was done about an input. With
        timestamp_granularities ["word"] the answer is JSON: `audio` (base64) and `words`, each with its start and end
        in seconds; of events, the last one has the words.
        """
        service.find(body.model)
        check_text(service, body.input)
        check_seed(body.seed)
        timed = bool(body.timestamp_granularities)
        if timed and body.stream_format == "audio":
            raise UserError("timestamp_granularities with stream_format=audio has no place for words: use sse")
        if timed:
            require("pocketsphinx", "pocketsphinx")
        voice = service.voices.find(body.voice if isinstance(body.voice, str) else body.voice.get("id", ""))
        media, rate = FORMATS[body.response_format][0], service.talker.rate
        with contextlib.ExitStack() as resources:
            resources.enter_context(service.admitted())
            job = Job("tts", body.input, str(voice), seed=body.seed)
            prepared = await service.in_thread(service.talker.prepare, job)
            remark = prepared.remark.replace("\n", " ")
            headers = {"X-Warning": remark.encode("latin-1", "replace").decode("latin-1")} if remark else {}
            waves, whole = speak(service, prepared, request.is_disconnected), list[torch.Tensor]()

            def words() -> Awaitable[list[dict[str, Any]]]:
                return service.place_words(body.input, torch.cat(whole, -1), rate, body.speed)

            if timed:
                waves = noting(waves, whole)
            if body.stream_format is None:
                content = await encode_whole(waves, rate, body.response_format, body.speed)
                if not timed:
                    return Response(content, media_type=media, headers=headers)
                seconds = sum(wave.shape[-1] for wave in whole) / rate / body.speed
                audio = {"audio": base64.b64encode(content).decode(), "format": body.response_format}
                answer = audio | {"duration": round(seconds, 3), "words": await words()}
                return JSONResponse(answer | {"warning": prepared.remark or None}, headers=headers)
            parts = encode(waves, rate, body.response_format, body.speed)
            first = await anext(parts)  # errors before the first sound still have their status
            if body.stream_format == "sse":
                sent = events(always(first, parts), prepared, words if timed else None)
                return HeldResponse(sent, resources.pop_all(), media_type="text/event-stream")
            return HeldResponse(always(first, parts), resources.pop_all(), media_type=media, headers=headers)

    @router.get("/audio/voices")
    async def list_voices() -> dict[str, Any]:
        """List the voices."""
        names = sorted(service.voices.files) if service.voices else []
        return {"object": "list", "data": [{"id": name, "name": name, "object": "audio.voice"} for name in names]}

    @router.post("/audio/voices")
    async def add_voice(name: Annotated[str, Form()], audio_sample: Annotated[UploadFile, File()]) -> dict[str, Any]:
        """Save the voice of a recording under a name; the recording itself is not kept."""
        service.find(TALKER)
        with service.admitted(), request_folder() as folder:
            await save_upload(audio_sample, folder / "sample")
            await service.in_thread(service.voices.add, name, folder / "sample")
        return {"id": name, "name": name, "object": "audio.voice", "created_at": int(time.time())}

    @router.delete("/audio/voices/{name}")
    async def delete_voice(name: str) -> dict[str, Any]:
        """Delete an uploaded voice."""
        service.find(TALKER)
        if name not in service.voices.files:
            raise HTTPException(404, f"voice {name[:80]!r} is unknown")
        await service.in_thread(service.voices.remove, name)  # it may wait for an upload
        return {"id": name, "object": "audio.voice.deleted", "deleted": True}

    @router.post("/videos")
    async def make_video(
        input_reference: Annotated[UploadFile, File(description="talker-t2av: the face; hicodit: the silent clip")],
        model: Annotated[Literal["talker-t2av", "hicodit"], Form()] = TALKER,
        prompt: Annotated[str, Form(description="talker-t2av: the text to say; hicodit: not used")] = "",
        voice: Annotated[str, Form(description="talker-t2av: one of /v1/audio/voices")] = DEFAULT,
        seed: Annotated[int, Form()] = 0,
        face: Annotated[str, Form(description=f"hicodit: {FACE}; all: a video for each, see `faces`")] = FIRST,
        seconds: Annotated[str | None, Form(description="cannot be set: it follows the text or the clip")] = None,
        size: Annotated[str | None, Form(description="cannot be set: it is the model's")] = None,
    ) -> dict[str, Any]:
        """Begin to make a talking face from a text (talker-t2av), or a clip with speech from a silent one (hicodit)."""
        service.find(model)
        check_seed(seed)
        for name, value in (("seconds", seconds), ("size", size)):
            if value is not None:
                raise UserError(f"{name}={value[:20]} cannot be set: leave it out")
        if model == TALKER:
            check_text(service, prompt)
            service.voices.find(voice)
            if face != FIRST:
                raise UserError(f"face={face[:20]} is for hicodit: leave it out")
            make = partial(videos.talk, voice=voice, seed=seed)
        else:
            make = partial(videos.dub, seed=seed, face=read_face(face))
        return (await videos.start(model, prompt, input_reference, make)).as_json()

    @router.get("/videos")
    async def list_videos() -> dict[str, Any]:
        """List the videos, the newest first."""
        return {"object": "list", "data": [job.as_json() for job in reversed(videos.jobs.values())], "has_more": False}

    @router.get("/videos/{name}")
    async def get_video(name: str) -> dict[str, Any]:
        """Say how far a video is."""
        return videos.find(name).as_json()

    @router.delete("/videos/{name}")
    async def delete_video(name: str) -> dict[str, Any]:
        """Delete a video, or give it up."""
        videos.delete(videos.find(name))
        return {"id": name, "object": "video.deleted", "deleted": True}

    @router.get("/videos/{name}/content", response_class=FileResponse)
    async def video_content(
        name: str, variant: Literal["video"] = "video", face: Annotated[int, Query(description="of face=all")] = 1
    ) -> Response:
        """Fetch a completed video as MP4."""
        job = videos.find(name)
        if job.status != "completed":
            raise HTTPException(409, f"{name} is {job.status}" + (f": {job.error}" if job.error else ""))
        if not 1 <= face <= job.faces:
            raise HTTPException(404, f"{name} has no face {face}: give 1 to {job.faces}")
        return FileResponse(job.folder / f"video{face}.mp4", media_type="video/mp4")

    return router


class Videos:
    """The jobs of /v1/videos, by id, in the order in which they came."""

    def __init__(self, service: Service) -> None:
        self.service, self.jobs = service, dict[str, VideoJob]()

    async def start(self, model: str, prompt: str, upload: UploadFile, make: Make) -> VideoJob:
        """Save the upload and begin a job in the background; it holds a place of the service until it ends."""
        self.forget()
        with contextlib.ExitStack() as resources:
            resources.enter_context(self.service.admitted())
            job = VideoJob(model, prompt, Path(tempfile.mkdtemp(prefix="serve-")))
            resources.callback(lambda: job.status == "completed" or shutil.rmtree(job.folder, ignore_errors=True))
            reference = job.folder / f"input_reference{Path(upload.filename or '').suffix.lower()[:8]}"
            await save_upload(upload, reference)
            self.jobs[job.id] = job
            job.task = asyncio.ensure_future(self.run(job, reference, make, resources.pop_all()))
            return job

    def find(self, name: str) -> VideoJob:
        self.forget()
        if name not in self.jobs:
            raise HTTPException(404, f"video {name[:80]!r} is unknown, or was deleted")
        return self.jobs[name]

    def delete(self, job: VideoJob) -> None:
        del self.jobs[job.id]
        job.task.cancel()
        shutil.rmtree(job.folder, ignore_errors=True)

    def forget(self) -> None:
        """Delete videos that are too old, or too many."""
        finished = [job for job in self.jobs.values() if job.finished]
        surplus = len(finished) - self.service.limits.videos
        for number, job in enumerate(finished):
            if number < surplus or time.time() > job.finished + KEPT_SECONDS:
                self.delete(job)

    async def run(self, job: VideoJob, reference: Path, make: Make, resources: contextlib.ExitStack) -> None:
        """Make the video of a job; what goes wrong becomes its error."""
        with resources:
            try:
                job.status = "in_progress"
                await make(job, reference)
                job.status, job.progress = "completed", 100
            except Exception as error:
                job.status, job.error = "failed", explain(error)[1].replace(f"{job.folder}/", "")
            job.finished = time.time()

    async def talk(self, job: VideoJob, reference: Path, voice: str, seed: int) -> None:
        service = self.service
        wanted = Job("t2av", job.prompt, str(service.voices.find(voice)), str(reference), seed=seed)
        prepared = await service.in_thread(service.talker.prepare, wanted)
        job.warning = prepared.remark or None
        most = sum(request.max_patches for request in prepared.requests)
        patches = 0

        def count(_: torch.Tensor) -> None:
            nonlocal patches
            patches += 1
            job.progress = min(90, 90 * patches // most)

        tickets = [Ticket(part, on_patch=count) for part in parts_of(prepared)]
        results = [await service.generate("talker_t2av", ticket) for ticket in tickets]
        talk = await service.in_thread(service.talker.complete, prepared, *results)
        path = job.folder / "video1.mp4"
        await service.in_thread(write_video, path, talk.frames, service.talker.fps, talk.wave, service.talker.rate)

    async def dub(self, job: VideoJob, reference: Path, seed: int, face: str | int) -> None:
        service = self.service
        crops = await service.in_thread(lambda: list(service.hicodit.all_crops(reference, face)))
        tickets = [service.generate("hicodit", Ticket(part, seed)) for part in crops]
        speeches = await asyncio.gather(*tickets)
        job.progress = 90
        for number, speech in enumerate(speeches, 1):
            path = job.folder / f"video{number}.mp4"
            await service.in_thread(mux_audio, reference, speech.wave, speech.rate, path)
        job.faces = len(speeches)


def check_text(service: Service, text: str) -> None:
    if not text.strip():
        raise UserError("text= is empty: give words to say")
    if len(text) > service.limits.characters:
        raise UserError(f"text of {len(text)} characters: {service.limits.characters} at most")


async def events(
    parts: AsyncIterator[bytes], prepared: PreparedJob, words: Callable[[], Awaitable[list[dict[str, Any]]]] | None
) -> AsyncIterator[bytes]:
    """Yield server-sent events of encoded sound; `words` gives the words with their times for the last one."""
    async for part in parts:
        yield event({"type": "speech.audio.delta", "audio": base64.b64encode(part).decode()})
    tokens = sum(len(request.prompt) for request in prepared.requests)
    usage = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
    done = {"type": "speech.audio.done", "usage": usage, "warning": prepared.remark or None}
    yield event(done if words is None else done | {"words": await words()})


def event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


async def save_upload(upload: UploadFile, path: Path) -> None:
    """Write an uploaded file."""
    content = await upload.read()
    if not content:
        raise UserError("the uploaded file is empty")
    path.write_bytes(content)

"""The API /v1/videos: talking faces from texts and speech for silent clips, as jobs that are created, polled and
fetched.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Form, HTTPException, Query, UploadFile
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field, PrivateAttr

from engine.errors import UserError
from engine.faces.track import read_face
from engine.media.video import mux_audio
from engine.settings import WHICH_FACE
from hicodit.pipeline import GENERATED
from service.openai import OurFields, write_upload
from service.service import FOLDER, HICODIT, TALKER, Service, explain, without_folders
from service.sound import parts_of
from service.voices import DEFAULT
from service.workers import Ticket
from talker_t2av.pipeline import Job

KEPT_SECONDS = 3600  # after which a finished video is deleted
FIRST = "largest"  # of several faces


class VideoRequest(OurFields):
    """Form of POST /v1/videos."""

    input_reference: Annotated[UploadFile, Field(description="talker-t2av: video or image of a face; hicodit: video")]
    model: Literal["talker-t2av", "hicodit"] = TALKER
    prompt: Annotated[str, Field(description="talker-t2av: the text to say; hicodit: not used")] = ""
    voice: Annotated[str, Field(description="talker-t2av: a voice of the service")] = DEFAULT
    reference_audio: Annotated[
        UploadFile | None, Field(description="recording of a voice, used instead of `voice`")
    ] = None
    face: Annotated[str, Field(description=f"hicodit: {WHICH_FACE}; all: a video for each, see `faces`")] = FIRST


class Video(BaseModel):
    """A video that is being generated, or is stored for its client.

    Attributes:
        remarks: one-line notes about the input and the result.
        faces: number of videos of a completed job, one per face; the folder has them as video1.mp4, ...
    """

    id: str = Field(default_factory=lambda: f"video_{uuid.uuid4().hex}")
    object: Literal["video"] = "video"
    model: str
    prompt: str
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    created_at: int = Field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None
    expires_at: int | None = None
    error: dict[str, str] | None = None
    remarks: list[str] = []
    faces: int = 1
    _folder: TemporaryDirectory = PrivateAttr(
        default_factory=lambda: TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True)
    )
    _task: asyncio.Task | None = None

    def path(self, name: str) -> Path:
        """Return the path of a file in the video's folder."""
        return Path(self._folder.name, name)


def video_routes(service: Service) -> APIRouter:
    """Return the routes of /v1/videos."""
    router = APIRouter(prefix="/v1/videos")
    videos: dict[str, Video] = {}  # by id, in the order in which they came

    def forget() -> None:
        """Delete videos that are too old or exceed the maximum number."""
        finished = [video for video in videos.values() if video.completed_at]
        surplus = len(finished) - service.limits.videos
        for number, video in enumerate(finished):
            if number < surplus or time.time() > video.expires_at:
                delete(video)

    def delete(video: Video) -> None:
        del videos[video.id]
        video._task.cancel()
        video._folder.cleanup()

    def find(name: str) -> Video:
        forget()
        if name not in videos:
            raise HTTPException(404, f"video {name[:80]!r} is unknown, or was deleted")
        return videos[name]

    @router.post("")
    async def make_video(body: Annotated[VideoRequest, Form(media_type="multipart/form-data")]) -> Video:
        """Start generating a talking face from a text (talker-t2av), or speech for a silent clip (hicodit)."""
        service.find(body.model)
        forget()
        with contextlib.ExitStack() as place:  # is kept until the video is created
            place.enter_context(service.admitted())
            video = Video(model=body.model, prompt=body.prompt)
            place.callback(lambda: video.status == "completed" or video._folder.cleanup())
            reference = write_upload(await body.input_reference.read(), video.path("input_reference"))
            if body.model == TALKER:
                if body.face != FIRST:
                    raise UserError(f"face={body.face[:20]} only applies to model hicodit: omit it")
                if body.reference_audio is None:
                    voice = service.voices.find(body.voice)
                    video.remarks = service.voices.remarks(body.voice)
                else:
                    voice = write_upload(await body.reference_audio.read(), video.path("reference_audio"))
                work = _talk(service, video, body.job(service, "t2av", body.prompt, voice, reference))
            elif given := body.model_fields_set & {"voice", "reference_audio", "min_seconds", "max_seconds"}:
                raise UserError(f"{', '.join(sorted(given))} only applies to model talker-t2av: omit it")
            else:
                work = _dub(service, video, reference, read_face(body.face), body.seed)
            videos[video.id] = video
            video._task = asyncio.create_task(_finish(video, work, place.pop_all()))
            return video

    @router.get("")
    async def list_videos(
        limit: Annotated[int, Query(ge=0, le=100)] = 100,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        """List the videos behind the video `after`, the newest first, or with order=asc the oldest."""
        forget()
        found = list(videos.values()) if order == "asc" else list(reversed(videos.values()))
        if after is not None:
            found = found[found.index(find(after)) + 1 :]
        page = found[:limit]
        ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {"first_id": None, "last_id": None}
        return {"object": "list", "data": page, "has_more": len(found) > limit, **ends}

    @router.get("/{name}")
    async def get_video(name: str) -> Video:
        """Return the status of a video."""
        return find(name)

    @router.delete("/{name}")
    async def delete_video(name: str) -> dict[str, Any]:
        """Delete a video, or cancel its generation."""
        delete(find(name))
        return {"id": name, "object": "video.deleted", "deleted": True}

    @router.get("/{name}/content")
    async def video_content(
        name: str, variant: Literal["video"] = "video", face: Annotated[int, Query(description="of face=all")] = 1
    ) -> FileResponse:
        """Return a completed video as MP4."""
        video = find(name)
        if video.status != "completed":
            raise HTTPException(409, f"{name} is {video.status}: {video.error['message'] if video.error else 'wait'}")
        if not 1 <= face <= video.faces:
            raise HTTPException(404, f"{name} has no face {face}: choose 1 to {video.faces}")
        return FileResponse(video.path(f"video{face}.mp4"), media_type="video/mp4")

    return router


async def _finish(video: Video, work: Coroutine, place: contextlib.ExitStack) -> None:
    """Generate a video. Exceptions are stored as its error."""
    with place:
        try:
            video.status = "in_progress"
            await work
            video.status = "completed"
            video.progress = 100
        except Exception as error:
            video.status = "failed"
            video.error = {"code": "failed", "message": explain(error)[1]}
        video.completed_at = int(time.time())
        video.expires_at = video.completed_at + KEPT_SECONDS


async def _talk(service: Service, video: Video, job: Job) -> None:
    """Generate a talking face."""
    talker = service.talker
    prepared = await asyncio.to_thread(talker.prepare, job)
    max_patches = sum(request.max_patches for request in prepared.requests)
    patches = 0

    def count(_: torch.Tensor) -> None:
        nonlocal patches
        patches += 1
        video.progress = min(90, 90 * patches // max_patches)

    tickets = [Ticket(part, on_patch=count) for part in parts_of(prepared)]
    results = [await service.generate(TALKER, ticket) for ticket in tickets]
    talk = await asyncio.to_thread(talker.decode, prepared, *results)
    video.remarks += [without_folders(remark) for remark in talk.remarks]
    await asyncio.to_thread(talk.save, video.path("video1.mp4"))


async def _dub(service: Service, video: Video, clip: Path, face: str | int, seed: int) -> None:
    """Generate speech for a clip, or for each of its faces."""
    pipeline = await asyncio.to_thread(service.hicodit.for_clip, clip)
    crops = await asyncio.to_thread(lambda: list(pipeline.all_crops(clip, face)))
    tickets = [Ticket(part, seed, pipeline=pipeline) for part in crops]
    try:
        speeches = await asyncio.gather(*(service.generate(HICODIT, ticket) for ticket in tickets))
    finally:
        for ticket in tickets:  # where one fails, the others are not needed; a finished ticket stays as it is
            ticket.cancel()
    video.progress = 90
    for number, speech in enumerate(speeches, 1):
        target = video.path(f"video{number}.mp4")
        await asyncio.to_thread(mux_audio, clip, speech.wave, speech.rate, target, GENERATED)
        video.remarks += [without_folders(remark) for remark in speech.remarks]
    video.faces = len(speeches)

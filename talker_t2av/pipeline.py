"""Text, voices and faces in, speech and talking faces out.

    pipeline = TalkerPipeline.from_pretrained()
    talk = pipeline.t2av("set red in hotel three again", reference_audio="voice.wav", reference_video="face.mp4")
    for chunk in pipeline.stream(Job("tts", "hello", reference_audio="voice.wav")): play(chunk.wave)

Axes: N samples at 24 kHz, F frames at 25 a second, S picture side, Dm motion channels, Ds speech channels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.media.pictures import to_bytes
from talker_t2av.generation import PatchLoop, Result, Step
from talker_t2av.jobs import Job, PreparedJob, prepare_job
from talker_t2av.model import FPS, HOP, RATE
from talker_t2av.request import Sampling
from talker_t2av.system import BUNDLED, TalkerSystem

__all__ = ["Chunk", "Job", "Talk", "TalkerPipeline"]


@dataclass(frozen=True)
class Talk:
    """The result of one job.

    Attributes:
        wave: (N,) float32 in [-1, 1] at 24 kHz; in a2v the given sound.
        frames: (F, S, S, 3) uint8 at 25 frames a second; None where no face is drawn (tts, v2a).
        speech: (F, Ds) new latents, motion: (F, Dm) new motion, not normalised; None where given or absent.
        stopped: the stop head ended it; False: it ran to the limit, or a given stream set its length.
    """

    wave: np.ndarray
    frames: np.ndarray | None
    speech: Tensor | None
    motion: Tensor | None
    stopped: bool


@dataclass(frozen=True)
class Chunk:
    """A part of the result: wave (n,) at 24 kHz and frames (f, S, S, 3) or None. Sound may lag behind the picture."""

    wave: np.ndarray
    frames: np.ndarray | None


class TalkerPipeline:
    """Generation from files.

    Args:
        system: the networks.
        sampling: settings of the diffusion heads; by default those of the release. The attribute may be replaced.

    Attributes:
        seconds: wall time of each stage, summed over all jobs so far.
    """

    rate = RATE
    fps = FPS

    def __init__(self, system: TalkerSystem, sampling: Sampling | None = None) -> None:
        self.system = system
        self.sampling = sampling or system.sampling
        self.seconds = dict.fromkeys(("files", "patches", "sound", "pictures"), 0.0)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path = BUNDLED,
        device: torch.device | str = "cpu",
        codecs: Mapping[str, str | Path] | None = None,
    ) -> TalkerPipeline:
        """Load a release folder of ours, or a folder with the released files; see `TalkerSystem.load`."""
        return cls(TalkerSystem.load(folder, codecs, device))

    def t2av(self, text: str, reference_audio: str | None, reference_video: str, **more: Any) -> Talk:
        """Say a text with a voice and a face; `more` are fields of `Job`. The voice may be the video's sound."""
        return self(Job("t2av", text, reference_audio, reference_video, **more))

    def tts(self, text: str, reference_audio: str, **more: Any) -> Talk:
        """Say a text with a voice."""
        return self(Job("tts", text, reference_audio, **more))

    def a2v(self, audio: str, reference_video: str, text: str = "", **more: Any) -> Talk:
        """Let a face say a given sound; `text` is what the sound says."""
        return self(Job("a2v", text, reference_video=reference_video, audio=audio, **more))

    def v2a(self, video: str, reference_audio: str | None = None, text: str = "", **more: Any) -> Talk:
        """Give a clip a voice; `text` is what its lips say."""
        return self(Job("v2a", text, reference_audio, video=video, **more))

    def __call__(self, job: Job) -> Talk:
        return self.run([job])[0]

    def run(self, jobs: Sequence[Job]) -> list[Talk]:
        """Several jobs; those of one mode are one batch."""
        return list(self.finish([self.prepare(job) for job in jobs]))

    def prepare(self, job: Job) -> PreparedJob:
        """Read and encode a job's files. Raises UserError, as `prepare_job` does."""
        with self._clock("files"):
            return prepare_job(job, self.system)

    def finish(
        self, prepared: Sequence[PreparedJob], on_step: Callable[[Step], None] = lambda step: None
    ) -> list[Talk]:
        """Generate prepared jobs, those of one mode as a batch; the results in the given order."""
        order = sorted(range(len(prepared)), key=lambda i: (prepared[i].job.mode, prepared[i].job.compat))
        talks: dict[int, Talk] = {}
        for _, group in groupby(order, key=lambda i: (prepared[i].job.mode, prepared[i].job.compat)):
            rows = list(group)
            batch = [prepared[i] for i in rows]
            with self._clock("patches"):
                loop = self._loop(batch)
                for step in loop:
                    on_step(step)
                results = loop.results()
            talks |= {i: self._talk(p, result) for i, p, result in zip(rows, batch, results)}
        return [talks[i] for i in range(len(prepared))]

    @torch.no_grad()
    def stream(self, job: Job, on_step: Callable[[Step], None] = lambda step: None) -> Iterator[Chunk]:
        """One job, piece by piece as patches arrive; `on_step` is called after each patch.

        The concatenated chunks equal the result of `run`: samples to 1e-4, pictures to one level of 255. The sound of a
        frame comes as soon as the later frames that the decoder needs for it are there.
        """
        prepared = prepare_job(job, self.system)
        fresh: list[Tensor] = []  # motion (P, Dm) that is not rendered yet
        face = Face(self.system, prepared)
        limit = (prepared.frames or 0) * HOP or None
        done = 0
        for wave in self._waves(prepared, fresh, on_step):
            wave = wave[: limit - done] if limit is not None else wave
            done += len(wave)
            frames = face.show(fresh)
            fresh.clear()
            if len(wave) or frames is not None:
                yield Chunk(wave, frames)

    def _loop(self, batch: Sequence[PreparedJob], check_every: int | None = None) -> PatchLoop:
        requests, first = [p.request for p in batch], batch[0]
        model = self.system.model
        return PatchLoop(model, requests, first.mode, self.sampling, first.rules, check_every=check_every)

    def _waves(
        self, prepared: PreparedJob, fresh: list[Tensor], on_step: Callable[[Step], None]
    ) -> Iterator[np.ndarray]:
        """Sound (n,) as patches arrive; appends their motion to `fresh`."""
        size = self.system.model.config.patch_size
        loop = self._loop([prepared], check_every=1)
        if prepared.wave is not None:
            position = 0
            for step in loop:
                on_step(step)
                if step.motion is not None:
                    fresh.append(step.motion[0])
                    yield prepared.wave[position : position + size * HOP]
                    position += size * HOP
            return
        waiting: deque[Tensor] = deque()  # speech whose motion is yet to come

        def latents() -> Iterator[Tensor]:
            if len(prepared.prefix_speech):
                yield prepared.prefix_speech[None].to(self.system.device)
            for step in loop:
                on_step(step)
                waiting.append(step.speech)
                if step.motion is not None:
                    fresh.append(step.motion[0])
                if step.motion is not None or prepared.mode.motion != "generated":
                    yield waiting.popleft()
            if not prepared.rules.trim:
                yield from waiting

        skip = 0 if prepared.job.keeps_prefix else len(prepared.prefix_speech) * HOP
        for piece in self.system.speech.decode_stream(latents()):
            wave = _samples(piece)
            yield wave[skip:]
            skip = max(0, skip - len(wave))
        if fresh:
            yield np.zeros(0, np.float32)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - begin

    @torch.no_grad()
    def _talk(self, prepared: PreparedJob, result: Result) -> Talk:
        motion = None
        if result.motion is not None:
            motion = self.system.stats.restore(result.motion.cpu())
        wave = prepared.wave
        if wave is None:
            before = prepared.prefix_speech.to(self.system.device)
            with self._clock("sound"):
                wave = _samples(self.system.speech.decode(torch.cat([before, result.speech])[None]))
            wave = wave if prepared.job.keeps_prefix else wave[len(before) * HOP :]
            wave = wave[: prepared.frames * HOP] if prepared.frames else wave
        with self._clock("pictures"):
            frames = Face(self.system, prepared).show([] if result.motion is None else [result.motion])
        speech = None if result.speech is None else result.speech.cpu()
        return Talk(np.asarray(wave), frames, speech, motion, result.stopped)


class Face:
    """Renders the face of a job, part by part."""

    def __init__(self, system: TalkerSystem, prepared: PreparedJob) -> None:
        self.system = system
        self.left = prepared.frames  # to be rendered, if the length is known
        self.identity = None
        if prepared.picture is not None:
            self.identity = system.motion.identity(prepared.picture.to(system.device))
        self.before = prepared.prefix_motion if prepared.job.keeps_prefix else prepared.prefix_motion[:0]

    def show(self, patches: list[Tensor]) -> np.ndarray | None:
        """Frames (F, S, S, 3) of new normalised motion, each (f, Dm); None if there is nothing to render.

        The first call also renders the prefix if it belongs to the result. Frames after the end of a given sound are
        left out.
        """
        if self.identity is None or not patches:
            return None
        motion = torch.cat([self.before, self.system.stats.restore(torch.cat(patches).cpu())])
        self.before = self.before[:0]
        if self.left is not None:
            motion = motion[: self.left]
            self.left -= len(motion)
        if not len(motion):
            return None
        codec = self.system.motion
        # A minute of float frames takes 4.7 GB at 512 pixels.
        return np.concatenate([to_bytes(codec.decode(part, self.identity)) for part in motion.split(64)])


def _samples(wave: Tensor) -> np.ndarray:
    return wave[0, 0].clamp(-1, 1).cpu().numpy()

"""Pipelines from text, voices and faces to speech and talking faces.

    pipeline = TalkerPipeline.from_pretrained()
    talk = pipeline.t2av("set red in hotel three again", reference_audio="voice.wav", reference_video="face.mp4")
    talk.save("talk.mp4")
    one, other = pipeline([Job("tts", "one", "voice.wav"), Job("tts", "other", "voice.wav", seed=1)])  # one batch
    for chunk in pipeline.stream(Job("tts", "hello", reference_audio="voice.wav")): play(chunk.wave)

Axes: N samples at 24 kHz, F frames at 25 per second, P frames of a patch, S image side, Dm motion channels, Ds speech
channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.device import as_device, to_device
from engine.errors import UserError
from engine.media.audio import generated_comment, write_wav
from engine.media.pictures import to_bytes
from engine.media.video import write_video
from engine.precision import pick_dtype, prepare_inference, uses_int8
from engine.progress import stage
from engine.settings import nearest
from talker_t2av.faces import Surroundings
from talker_t2av.fused import fuse_layers
from talker_t2av.generation import BatchedDecoder, Result
from talker_t2av.jobs import Job, PreparedJob, prepare_job
from talker_t2av.model import FPS, HOP, MAX_FRAMES, RATE
from talker_t2av.prompt import step_limit
from talker_t2av.reference import Reference, save_voice
from talker_t2av.request import Mode, Request, Sampling, tokens_per_patch
from talker_t2av.system import BUNDLED, TalkerSystem

__all__ = ["Chunk", "Job", "Talk", "TalkerPipeline"]


TRUNCATED = "truncated at the maximum length: see max_seconds, or split the text"  # a remark about the result
TEMPLATE_TOKENS = 32  # tokens of a prompt in addition to its text
PAUSE_FRAMES = 5  # pause between two parts of a long text in frames
MAX_BATCH = 8  # requests of a single job that are generated at once
MAX_IDLE_DECODERS = 2  # idle decoders that are kept for later jobs, with their memory and graphs


@dataclass(frozen=True, repr=False)
class Talk:
    """Result of a job.

    Attributes:
        wave: (N,) float32 in [-1, 1] at 24 kHz. For a2v, the given audio.
        frames: (F, S, S, 3) uint8 at 25 frames per second; None if no face is generated (tts, v2a).
        speech: (F, Ds) generated latents, without pauses between the parts of a long text. Padding is silence.
        motion: (F, Dm) generated motion, not normalised. None if given or absent.
        stopped: True if the stop head or padding ended it, False if it reached the limit or a given stream determined
            the length.
        remarks: one-line notes about inputs and result, which are shown with it.
        surroundings: image into which the face is pasted when saved. None: only the face is saved.
    """

    wave: np.ndarray
    frames: np.ndarray | None
    speech: Tensor | None
    motion: Tensor | None
    stopped: bool
    remarks: tuple[str, ...] = ()
    surroundings: Surroundings | None = None

    def __repr__(self) -> str:
        """Return a summary without the arrays."""
        remarks = f", remarks={list(self.remarks)}" if self.remarks else ""
        return f"Talk({_facts(self.wave, self.frames)}, stopped={self.stopped}{remarks})"

    @property
    def comment(self) -> str:
        """Metadata comment for files of this result."""
        made = {"speech": self.speech, "face": self.motion}
        return generated_comment("Talker-T2AV", " and ".join(name for name in made if made[name] is not None))

    def pictures(self) -> Iterable[np.ndarray]:
        """Return the frames (H, W, 3) to save, pasted into their surroundings if there are any."""
        return self.frames if self.surroundings is None else self.surroundings.paste(self.frames)

    def save(self, path: str | Path) -> None:
        """Write the video with its audio (.mp4, .mov or .mkv), or only the audio (.wav), atomically.

        Raises:
            UserError: If the suffix is not supported, a video is requested without a face (tts, v2a), or the file
                cannot be written.
        """
        if Path(path).suffix.lower() == ".wav":
            write_wav(path, self.wave, RATE, comment="" if self.speech is None else self.comment)
        elif self.frames is None:
            raise UserError(f"cannot write {path}: tts and v2a generate no frames; save the audio as .wav")
        else:
            write_video(path, self.pictures(), FPS, self.wave, RATE, comment=self.comment)


def _facts(wave: np.ndarray, frames: np.ndarray | None) -> str:
    """Describe audio (N,) and frames (F, H, W, 3)."""
    sound = f"{len(wave) / RATE:.2f} s at {RATE} Hz"
    if frames is None:
        return sound
    count, height, width, _ = frames.shape
    return f"{sound}, {count} frames of {width} x {height}"


@dataclass(frozen=True, repr=False)
class Chunk:
    """A chunk of the result: waveform (n,) at 24 kHz and frames (f, S, S, 3) or None. The audio may lag behind the
    frames.
    """

    wave: np.ndarray
    frames: np.ndarray | None

    def __repr__(self) -> str:
        """Return a summary without the arrays."""
        return f"Chunk({_facts(self.wave, self.frames)})"


class TalkerPipeline:
    """Pipeline that generates speech and talking faces from files.

    Args:
        system: the loaded networks.
        sampling: settings of the diffusion heads. Default: those of the release. The attribute may be reassigned.
        compile: compile the steps with `torch.compile`.
    """

    rate = RATE
    fps = FPS

    def __init__(self, system: TalkerSystem, sampling: Sampling | None = None, compile: bool = False) -> None:
        self.system = system
        self.compile = compile
        self.sampling = sampling or system.sampling
        self._idle: dict[Any, BatchedDecoder] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path = BUNDLED,
        device: torch.device | str = "cpu",
        codecs: Mapping[str, str | Path] | None = None,
        precision: str = "auto",
        compile: bool = False,
    ) -> TalkerPipeline:
        """Load a release folder, or a folder with the released files; see `TalkerSystem`.

        Args:
            precision: precision of the model and of rendering: auto, fp32, bf16 or int8; see `engine.precision`. With
                int8, faces are rendered as with auto. Speech is decoded in float32.
            compile: compile the steps with `torch.compile`, which takes minutes when they first run.
        """
        device = as_device(device)
        dtype = pick_dtype(precision, device)
        int8 = uses_int8(precision, device, compile)
        system = TalkerSystem(folder, codecs, device)
        fuse_layers(system.model.to_precision(dtype))
        prepare_inference(system.model, int8, device, compile)
        if int8:
            system.picture_dtype = pick_dtype("auto", device)
        return cls(system, compile=compile)

    def push_to_hub(self, repository: str, license: str | None = None, private: bool = False) -> str:
        """Publish the loaded release with its codecs on the Hugging Face hub. Return its URL.

        Args:
            repository: OWNER/NAME.
            license: licence of the weights, such as apache-2.0. None: the licence in the model card.
        """
        from engine.publish import publish

        folder = self.system.folder if self.system.part_names else None
        return publish(folder, self.system.codec_folders, repository, license, private)

    def t2av(self, text: str, reference_audio: str | None, reference_video: str, **more: Any) -> Talk:
        """Generate a talking face that speaks a text. `more` are fields of `Job`. The default voice is the audio of the
        reference video.
        """
        return self(_job("t2av", text, reference_audio=reference_audio, reference_video=reference_video, **more))

    def tts(self, text: str, reference_audio: str, **more: Any) -> Talk:
        """Generate speech for a text with a voice."""
        return self(_job("tts", text, reference_audio=reference_audio, **more))

    def a2v(self, audio: str, reference_video: str, text: str = "", **more: Any) -> Talk:
        """Animate a face with given audio. `text` is the transcript of the audio."""
        return self(_job("a2v", text, reference_video=reference_video, audio=audio, **more))

    def v2a(self, video: str, reference_audio: str | None = None, text: str = "", **more: Any) -> Talk:
        """Generate speech for a silent clip. `text` is what the lips say."""
        return self(_job("v2a", text, reference_audio=reference_audio, video=video, **more))

    def __call__(self, job: Job | Sequence[Job]) -> Talk | list[Talk]:
        """Run a job, or a list of jobs, of which those of the same mode form a batch."""
        return self.run([job])[0] if isinstance(job, Job) else self.run(job)

    def run(self, jobs: Sequence[Job]) -> list[Talk]:
        """Run several jobs. Those of the same mode form a batch."""
        return list(self.generate([self.prepare(job) for job in jobs]))

    @property
    def longest_part(self) -> int:
        """Maximum number of cached tokens for a part of a text, where each byte may be a token."""
        c = self.system.model.config
        patches = -(-MAX_FRAMES // c.patch_size)
        tokens = TEMPLATE_TOKENS + self.sampling.text_bytes + tokens_per_patch(c.order, has_motion=True) * patches
        return min(tokens, self.system.model.llm.config.max_position_embeddings)

    def save_voice(self, recording: str | Path, path: str | Path) -> None:
        """Save the voice of a recording to a file for `reference_audio` (NAME.safetensors).

        Raises:
            UserError: If the recording cannot be read, or contains no audio.
        """
        speaker = Reference(Job("tts", "-", str(recording)), self.system).speaker()
        save_voice(path, speaker, self.system.voice_digest)

    def prepare(self, job: Job) -> PreparedJob:
        """Read and encode the files of a job. Raises UserError, see `prepare_job`."""
        with stage("reading and encoding the files", unit="frames"):
            return prepare_job(job, self.system, self.sampling.text_bytes)

    @contextmanager
    def decoder(self, mode: Mode, max_requests: int, single: bool = False) -> Iterator[BatchedDecoder]:
        """Yield a decoder for exclusive use, which is reused for later jobs of the same kind.

        Args:
            mode: mode of the requests.
            max_requests: maximum number of concurrent requests.
            single: generate a single candidate, even if `sampling.particles` is larger.
        """
        decoder_class = BatchedDecoder
        if mode.motion == "given" and self.sampling.particles > 1 and not single:
            from talker_t2av.particles import Particles

            decoder_class = Particles
        key = decoder_class, mode, self.sampling, max_requests, self.system.model
        decoder = self._idle.pop(key, None)
        if decoder is None:
            decoder = decoder_class(self.system.model, mode, self.sampling, max_requests, compile=self.compile)
        try:
            yield decoder
        finally:
            decoder.active.clear()
            self._idle[key] = decoder
            for other in [*self._idle][:-MAX_IDLE_DECODERS]:
                self._idle.pop(other, None)

    def generate(self, prepared: Sequence[PreparedJob]) -> list[Talk]:
        """Generate the results of prepared jobs in order. Jobs of the same mode form a batch."""
        groups: dict[tuple[str, str], list[int]] = {}
        for index, each in enumerate(prepared):
            groups.setdefault((each.job.mode, each.job.compat), []).append(index)
        model = self.system.model
        talks: dict[int, Talk] = {}
        for indices in groups.values():
            mode = prepared[indices[0]].mode
            requests = [request for index in indices for request in prepared[index].requests]
            max_steps = sum(step_limit(model, request, mode) for request in requests)
            seconds = max_steps * model.config.patch_size / FPS
            max_requests = min(len(requests), max(len(indices), MAX_BATCH))
            with (
                stage(f"sampling at most {seconds:.1f} s", max_steps, "patches") as count,
                self.decoder(mode, max_requests) as decoder,
            ):
                results = iter(decoder.generate(requests, count))
            for index in indices:
                parts = islice(results, len(prepared[index].requests))
                talks[index] = self.decode(prepared[index], *parts)
        return [talks[index] for index in range(len(prepared))]

    @torch.no_grad()
    def stream(self, job: Job) -> Iterator[Chunk]:
        """Run a job and yield its result in chunks as patches are generated.

        The concatenated chunks equal the result of `run`: samples up to 1e-4, frames up to one level of 255. The audio
        of a frame is yielded as soon as the later frames that the decoder needs are available. V2A is streamed with a
        single candidate, regardless of `sampling.particles`, as audio that was already played cannot be revised.

        Raises:
            UserError: See `prepare_job`.
        """
        prepared = self.prepare(job)
        new_motion: list[Tensor] = []  # motion (P, Dm) that is not rendered yet
        face = FaceRenderer(self.system, prepared)
        limit = (prepared.frames or 0) * HOP or None
        done = 0
        last = None
        with self.decoder(prepared.mode, 1, single=True) as decoder:
            for number, request in enumerate(prepared.requests):
                sound_begins = number > 0  # after a pause
                motion_begins = number > 0
                for wave in self._waves(decoder, prepared, request, new_motion):
                    wave = wave[: limit - done] if limit is not None else wave
                    if sound_begins and len(wave):
                        wave = np.concatenate([np.zeros(PAUSE_FRAMES * HOP, np.float32), wave])
                        sound_begins = False
                    if motion_begins and new_motion:
                        new_motion.insert(0, interpolate_pause(last, new_motion[0][0]))
                        motion_begins = False
                    done += len(wave)
                    last = new_motion[-1][-1] if new_motion else last
                    frames = face.render(new_motion)
                    new_motion.clear()
                    if frames is not None and prepared.surroundings is not None:
                        frames = np.stack([*prepared.surroundings.paste(frames)])
                    if len(wave) or frames is not None:
                        yield Chunk(wave, frames)

    def _waves(
        self, decoder: BatchedDecoder, prepared: PreparedJob, request: Request, new_motion: list[Tensor]
    ) -> Iterator[np.ndarray]:
        """Yield audio (n,) as patches are generated, and append their motion to `new_motion`.

        Args:
            decoder: a decoder without running rows.
            prepared: the job.
            request: one of its requests.
            new_motion: list to which the motion (P, Dm) of each patch is appended before its audio is yielded; the
                caller empties it.
        """
        size = self.system.model.config.patch_size
        steps = decoder.stream(request)
        if prepared.wave is not None:
            position = 0
            for step in steps:
                if step.motion is not None:
                    new_motion.append(step.motion[0])
                    yield prepared.wave[position : position + size * HOP]
                    position += size * HOP
            return
        waiting: deque[Tensor] = deque()  # speech whose motion is still pending

        def latents() -> Iterator[Tensor]:
            if len(request.speech):
                yield to_device(request.speech[None], self.system.device)
            for step in steps:
                waiting.append(self.without_padding(prepared, step.speech))
                if step.motion is not None:
                    new_motion.append(step.motion[0])
                if step.motion is not None or prepared.mode.motion != "generated":
                    yield waiting.popleft()
            if not request.rules.trim:
                yield from waiting

        skip = 0 if prepared.job.keeps_prefix else len(request.speech) * HOP
        for piece in self.system.speech.decode_stream(latents()):
            wave = piece[0, 0].clamp(-1, 1).cpu().numpy()
            yield wave[skip:]
            skip = max(0, skip - len(wave))
        if new_motion:
            yield np.zeros(0, np.float32)

    @torch.no_grad()
    def decode(self, prepared: PreparedJob, *results: Result) -> Talk:
        """Decode the results of the requests of a job.

        The parts of a long text are separated by pauses, during which the motion is interpolated.
        """
        assert len(results) == len(prepared.requests), (len(results), len(prepared.requests))
        results = tuple(replace(each, speech=self.without_padding(prepared, each.speech)) for each in results)
        motions = join_motion(results)
        with stage("decoding"):
            wave = self.decode_speech(prepared, results) if prepared.wave is None else prepared.wave
            frames = FaceRenderer(self.system, prepared).render(motions)
        motion = self.system.stats.restore(torch.cat(motions)).cpu() if motions else None
        speech = None if results[0].speech is None else torch.cat([result.speech for result in results]).cpu()
        stopped = all(result.stopped for result in results)
        remarks = prepared.remarks
        if prepared.mode.open_ended and not stopped:
            remarks += (TRUNCATED,)
        return Talk(np.asarray(wave), frames, speech, motion, stopped, remarks, prepared.surroundings)

    def without_padding(self, prepared: PreparedJob, speech: Tensor | None) -> Tensor | None:
        """Replace padding in generated latents (..., F, Ds) with silence, except in the official routines."""
        if speech is None or not prepared.requests[0].rules.padding_ends:
            return speech
        return self.system.silence_padding(speech)

    def decode_speech(self, prepared: PreparedJob, results: Sequence[Result]) -> np.ndarray:
        """Decode the generated speech of a job (N,), with a pause between the parts of a long text.

        Args:
            prepared: the job, which sets the length of the speech if its motion is given.
            results: results of its requests, with speech.
        """
        # All parts have the same prefix, which the decoder of the speech codec needs.
        before = to_device(prepared.requests[0].speech, self.system.device)
        begin = 0 if prepared.job.keeps_prefix else len(before) * HOP
        end = begin + prepared.frames * HOP if prepared.frames else None
        pause = torch.zeros(PAUSE_FRAMES * HOP, device=self.system.device)
        waves: list[Tensor] = []
        for result in results:
            if waves:
                waves.append(pause)
            decoded = self.system.speech.decode(torch.cat([before, result.speech])[None])[0, 0]
            waves.append(decoded.clamp(-1, 1)[begin:end])
        return torch.cat(waves).cpu().numpy()


def _job(mode: str, text: str, **more: Any) -> Job:
    """Create a job from the arguments of a method. Paths may be `Path` objects."""
    names = {field.name for field in fields(Job)}
    for name in more:
        if name not in names:
            raise UserError(f"unknown argument {name[:80]!r}; {nearest(name, names)}")
    return Job(mode, text, **{name: str(value) if isinstance(value, Path) else value for name, value in more.items()})


def join_motion(results: Sequence[Result]) -> list[Tensor]:
    """Return the normalised motion chunks (f, Dm) of the results, with interpolated pauses between them.

    The list is empty if no motion was generated.
    """
    chunks: list[Tensor] = []
    for result in results:
        if result.motion is None:
            continue
        if chunks:
            chunks.append(interpolate_pause(chunks[-1][-1], result.motion[0]))
        chunks.append(result.motion)
    return chunks


def interpolate_pause(start: Tensor, end: Tensor) -> Tensor:
    """Interpolate the motion of a pause (PAUSE_FRAMES, Dm) linearly between the frames before and after it (Dm,)."""
    weight = torch.arange(1, PAUSE_FRAMES + 1, device=start.device)[:, None] / (PAUSE_FRAMES + 1)
    return start + weight * (end - start)


class FaceRenderer:
    """Renders the face of a job in chunks.

    Args:
        system: the networks.
        prepared: the job. If it generates no face, nothing is rendered.
    """

    def __init__(self, system: TalkerSystem, prepared: PreparedJob) -> None:
        self.system = system
        self.remaining = prepared.frames  # number of frames to render, if known
        self.identity = None
        if prepared.picture is not None:
            self.identity = system.motion.identity(to_device(prepared.picture, system.device))
        self.before = prepared.prefix_motion if prepared.job.keeps_prefix else prepared.prefix_motion[:0]

    def render(self, chunks: list[Tensor]) -> np.ndarray | None:
        """Render frames (F, S, S, 3) of new normalised motion chunks (f, Dm). Return None if there is nothing to
        render.

        The first call also renders the prefix if it belongs to the result. Frames after the end of given audio are
        skipped.
        """
        if self.identity is None or not chunks:
            return None
        new = self.system.stats.restore(torch.cat(chunks))
        motion = torch.cat([to_device(self.before, new.device), new])
        self.before = self.before[:0]
        if self.remaining is not None:
            motion = motion[: self.remaining]
            self.remaining -= len(motion)
        if not len(motion):
            return None
        codec = self.system.motion
        # A minute of float frames takes 4.7 GB at 512 pixels.
        return np.concatenate([to_bytes(codec.decode(part, self.identity)) for part in motion.split(64)])

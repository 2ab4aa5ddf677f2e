"""Speech while the face is still talking: frames in, hops of 160 ms of audio out, after a bounded look-ahead.

At each hop the network sees the last `window` seconds of pictures and the settled tokens. All other tokens up to the
newest picture are sampled, and those further than the margin from it are settled. Audio is decoded from
settled tokens alone, once there are as many after it as the codec's `reach`, or as the look-ahead allows. A long enough
look-ahead gives the audio of offline decoding of the same tokens; with a shorter one each hop is faded into the next.

Axes: n frames of a block, H height, W width, T video frames (25 per second), K token levels, L token frames (50 per
second), N samples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.codec import StreamDecoder
from engine.errors import UserError
from engine.faces.detectors import HaarDetector, with_points
from engine.faces.landmarks import add_landmarks
from engine.faces.track import DETECT_EVERY, FaceError, FaceTrack, follow_faces
from hicodit.conditions.types import FPS, MIN_FRAMES, Crops
from hicodit.generation import guided_posterior, pad_for_graphs, pad_prompts
from hicodit.model import TOKENS_PER_FRAME
from hicodit.samplers import sample
from hicodit.settings import StreamSettings, with_preset

HOP = 4  # video frames: 160 ms
MIN_MARGIN = 5  # video frames between the newest picture and a settled token, where the look-ahead has room for them


@dataclass(frozen=True, repr=False)
class SpeechChunk:
    """A part of the audio: wave (N,) float32 at `rate` Hz, and when it came.

    needed: video frames that had to be there for it. compute: seconds between the last of them and the audio.
    tokens: (K, L) that were settled since the chunk before; they run ahead of the audio.
    """

    wave: np.ndarray
    rate: int
    needed: int
    compute: float
    tokens: np.ndarray

    def __repr__(self) -> str:
        """Return the facts without the arrays."""
        return f"SpeechChunk({len(self.wave) / self.rate:.2f} s at {self.rate} Hz, computed in {self.compute:.3f} s)"


class SpeechStream:
    """One talking face: `push` its frames, take its audio. Memory does not grow with the length.

    Args:
        pipeline: a `HiCoDiTPipeline`, whose file imports this one.
        identity: (256,) GE2E vector of a voice; None: the face's, as it is seen before the first audio.
    """

    def __init__(
        self, pipeline: Any, settings: StreamSettings, seed: int = 0, identity: np.ndarray | None = None
    ) -> None:
        self.pipeline = pipeline
        self.settings = settings
        sampler, self.guidance = with_preset("fast", pipeline.sampler, pipeline.guidance)
        self.sampler = replace(sampler, steps=settings.steps)
        self.identity = None if identity is None else torch.as_tensor(identity, dtype=torch.float32)
        self.generator = torch.Generator(pipeline.device).manual_seed(seed)
        self.detector = pipeline.face_source.detector or HaarDetector()
        lookahead = max(1, round(settings.lookahead * FPS))
        reach = -(-pipeline.codec.reach[1] // TOKENS_PER_FRAME)
        after = reach if lookahead - reach >= MIN_MARGIN else lookahead // 2
        self.lookahead = lookahead
        self.margin = lookahead - after
        self.sound = StreamDecoder(pipeline.codec, 2, TOKENS_PER_FRAME * after)
        self.frames: list[np.ndarray] = []  # the last ones, from frame `first` on
        self.faces: dict[int, np.ndarray] = {}  # those detected in every fifth of them, by number of the frame
        self.first = self.received = 0  # `received`: number of frames so far
        self.settled = 0  # video frames whose tokens are settled
        self.tokens = torch.zeros(pipeline.codec.levels, 0, dtype=torch.long)  # (K, L) settled, from frame `first` on
        self.track: FaceTrack | None = None
        self._moved = 0  # frames that were forgotten since the face was followed last

    def push(self, frame: np.ndarray) -> SpeechChunk | None:
        """Add a frame (H, W, 3) uint8 RGB; return audio after every fourth, as soon as the look-ahead is filled."""
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            raise UserError(f"a frame of shape {frame.shape} and type {frame.dtype}: give (H, W, 3) uint8 RGB")
        if self.frames and frame.shape != self.frames[0].shape:
            raise UserError(f"a frame of shape {frame.shape} after frames of {self.frames[0].shape}: keep one size")
        self.frames.append(frame.copy())  # a camera may use its buffer again
        self.received += 1
        due = self.settled + HOP + self.margin
        return self._advance(last=False) if self.received >= due else None

    def finish(self) -> SpeechChunk | None:
        """Return the rest of the audio; None if there was no frame."""
        if not self.received:
            return None
        if self.received < MIN_FRAMES:
            raise UserError(f"{self.received / FPS:.2f} s of video; at least {MIN_FRAMES / FPS:.1f} s is needed")
        return self._advance(last=True)

    @torch.inference_mode()
    def _advance(self, last: bool) -> SpeechChunk:
        begin = time.perf_counter()
        new = self.tokens[:, :0]
        settle = self.received if last else self.settled + HOP
        if settle > self.settled:
            new = self._sample()[:, : TOKENS_PER_FRAME * (settle - self.settled)]
            self.tokens = torch.cat([self.tokens, new], 1)
            self.settled = settle
            self._forget()
        sound = self.sound.push(new[None], last)
        wave = np.zeros(0, np.float32) if sound is None else sound[0, 0].clamp(-1, 1).cpu().numpy()
        compute = time.perf_counter() - begin
        return SpeechChunk(wave, self.pipeline.codec.sample_rate, self.received, compute, new.numpy())

    def _sample(self) -> Tensor:
        """Sample the tokens (K, L) of all frames from the first unsettled one on."""
        pipeline = self.pipeline
        length = TOKENS_PER_FRAME * len(self.frames)
        conditions = pipeline.conditions([self._crops()], None if self.identity is None else self.identity.numpy())
        if self.identity is None:
            self.identity = conditions.identity[0].float().cpu()
        model = pipeline.system.model
        before = self.tokens.shape[1]
        prompt = F.pad(self.tokens, (0, length - before), value=model.mask_id)[None]
        if pipeline.graphs.backend is not None:
            conditions = pad_for_graphs(conditions)
            prompt = pad_prompts(prompt, conditions, model.mask_id)
        tokens = sample(
            guided_posterior(model, conditions, self.guidance), prompt, torch.tensor([length]), model.mask_id,
            self.sampler, [self.generator], device=pipeline.device, graphs=pipeline.graphs,
        )  # fmt: skip
        return tokens[0, :, before:length].cpu()

    def _crops(self) -> Crops:
        """Cut mouth and faces out of the last frames; the face is followed from its last position."""
        height, width = self.frames[0].shape[:2]
        face: Any = "largest"
        if self.track is not None:
            x, y, w, h = self.track.boxes[-1]
            face = (float((x + w / 2) / width), float((y + h / 2) / height))
        for i, frame in enumerate(self.frames, self.first):
            if i % DETECT_EVERY == 0 and i not in self.faces:
                self.faces[i] = with_points(self.detector(frame))
        faces = [(i - self.first, self.faces[i]) for i in sorted(self.faces)]
        try:
            (self.track,) = follow_faces(faces, len(self.frames), (width, height), FPS, face)
        except FaceError:
            if self.track is None:
                raise
            # Out of sight: it is taken to stay where it was.
            self.track = self.track[np.minimum(np.arange(len(self.frames)) + self._moved, len(self.track) - 1)]
        self._moved = 0
        frames = np.stack(self.frames)
        landmarks = self.pipeline.face_source.landmarks
        track = add_landmarks([frames], self.track, landmarks) if callable(landmarks) else self.track
        return self.pipeline.cut([frames], track)

    def _forget(self) -> None:
        """Remove the frames before the window, in whole seconds: half seconds of expression stay aligned."""
        second = int(FPS)
        drop = (self.received - self.first - second * self.settings.window) // second * second
        drop = min(drop, (self.settled - self.first) // second * second)
        if drop > 0:
            self.frames = self.frames[drop:]
            self.first = self.first + drop
            self._moved = drop
            self.faces = {i: faces for i, faces in self.faces.items() if i >= self.first}
            self.tokens = self.tokens[:, TOKENS_PER_FRAME * drop :]

"""Streaming speech generation: frames in, hops of 160 ms of audio out, with a bounded look-ahead.

At each hop the network receives the last `window` seconds of frames and the final tokens. All other tokens up to the
newest frame are sampled, and those at a distance of more than the margin from it become final. Audio is only decoded
from final tokens, once as many tokens follow as the codec's `reach`, or as the look-ahead allows. With a sufficient
look-ahead, the audio equals offline decoding of the same tokens; otherwise consecutive hops are cross-faded.

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
from engine.faces.track import DETECT_EVERY, FaceError, FaceTrack, add_landmarks, follow_faces
from engine.settings import check_seed
from hicodit.conditions.types import FPS, MIN_FRAMES, Crops, check_identity
from hicodit.generation import sampler_input
from hicodit.model import TOKENS_PER_FRAME
from hicodit.samplers import SAMPLERS
from hicodit.settings import StreamSettings, with_preset

HOP = 4  # video frames: 160 ms
# Minimum distance in video frames between the newest frame and a final token, if the look-ahead allows it.
MIN_MARGIN = 5


@dataclass(frozen=True, repr=False)
class SpeechChunk:
    """A chunk of generated audio: waveform `wave` (N,) float32 at `rate` Hz, and its timing.

    Attributes:
        needed: number of video frames required for it.
        compute: seconds between the last of them and the audio.
        tokens: (K, L) that became final since the previous chunk; they are ahead of the audio.
    """

    wave: np.ndarray
    rate: int
    needed: int
    compute: float
    tokens: np.ndarray

    def __repr__(self) -> str:
        """Return a summary without the arrays."""
        return f"SpeechChunk({len(self.wave) / self.rate:.2f} s at {self.rate} Hz, computed in {self.compute:.3f} s)"


class SpeechStream:
    """Speech stream of one talking face: `push` frames to obtain audio. Memory does not grow with the length.

    Args:
        pipeline: a `HiCoDiTPipeline`.
        settings: look-ahead, window and sampling steps.
        seed: seed of the random numbers.
        identity: (256,) GE2E embedding of a voice. None: predicted from the face before the first audio.
    """

    def __init__(
        self, pipeline: Any, settings: StreamSettings, seed: int = 0, identity: np.ndarray | None = None
    ) -> None:
        check_seed(seed)
        check_identity(identity)
        self.pipeline = pipeline
        self.settings = settings
        sampler, self.guidance = with_preset("fast", pipeline.sampler, pipeline.guidance)
        self.sampler = replace(sampler, steps=settings.steps)
        self.identity = None if identity is None else torch.as_tensor(identity, dtype=torch.float32)
        self.generator = torch.Generator(pipeline.device).manual_seed(int(seed))
        self.detector = pipeline.face_source.detector or HaarDetector()
        lookahead = max(1, round(settings.lookahead * FPS))
        reach = -(-pipeline.codec.reach[1] // TOKENS_PER_FRAME)
        after = reach if lookahead - reach >= MIN_MARGIN else lookahead // 2
        self.lookahead = lookahead
        self.margin = lookahead - after
        self.decoder = StreamDecoder(pipeline.codec, 2, TOKENS_PER_FRAME * after)
        self.frames: list[np.ndarray] = []  # recent frames, starting at frame `first`
        self.faces: dict[int, np.ndarray] = {}  # faces detected in every fifth frame, by frame index
        self.first = 0  # index of the first recent frame
        self.received = 0  # number of frames so far
        self.settled = 0  # number of video frames with final tokens
        # Final tokens (K, L), from frame `first` on.
        self.tokens = torch.zeros(pipeline.codec.levels, 0, dtype=torch.long)
        self.unreported: list[Tensor] = []  # final tokens (K, L) of hops without audio
        self.track: FaceTrack | None = None
        self._moved = 0  # number of frames dropped since the face was last tracked

    def push(self, frame: np.ndarray) -> SpeechChunk | None:
        """Add a frame (H, W, 3) uint8 RGB. Return audio after every fourth frame once the look-ahead is filled."""
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            raise UserError(f"a frame of shape {frame.shape} and type {frame.dtype}: expected (H, W, 3) uint8 RGB")
        if self.frames and frame.shape != self.frames[0].shape:
            raise UserError(
                f"a frame of shape {frame.shape} after frames of {self.frames[0].shape}: keep the same size"
            )
        self.frames.append(frame.copy())  # a camera may reuse its buffer
        self.received += 1
        is_hop_complete = self.received >= self.settled + HOP + self.margin
        return self._advance(last=False) if is_hop_complete else None

    def finish(self) -> SpeechChunk | None:
        """Return the remaining audio, or None if there were no frames."""
        if not self.received:
            return None
        if self.received < MIN_FRAMES:
            raise UserError(f"{self.received / FPS:.2f} s of video; at least {MIN_FRAMES / FPS:.1f} s is needed")
        return self._advance(last=True)

    @torch.inference_mode()
    def _advance(self, last: bool) -> SpeechChunk | None:
        """Make the tokens of a hop final and decode the audio that they allow. `last`: of all remaining frames."""
        begin = time.perf_counter()
        new = self.tokens[:, :0]
        settle = self.received if last else self.settled + HOP
        if settle > self.settled:
            new = self._sample()[:, : TOKENS_PER_FRAME * (settle - self.settled)]
            self.tokens = torch.cat([self.tokens, new], 1)
            self.settled = settle
            self._forget()
        self.unreported.append(new)
        decoded = self.decoder.push(new[None], last)
        if decoded is None:
            return None
        wave = decoded[0, 0].clamp(-1, 1).cpu().numpy()
        compute = time.perf_counter() - begin
        tokens = torch.cat(self.unreported, 1).numpy()
        self.unreported = []
        return SpeechChunk(wave, self.pipeline.codec.sample_rate, self.received, compute, tokens)

    def _sample(self) -> Tensor:
        """Sample the tokens (K, L) of all frames starting at the first one without final tokens."""
        pipeline = self.pipeline
        length = TOKENS_PER_FRAME * len(self.frames)
        conditions = pipeline.conditions([self._crops()], None if self.identity is None else self.identity.numpy())
        if self.identity is None:
            self.identity = conditions.identity[0].float().cpu()
        model = pipeline.system.model
        before = self.tokens.shape[1]
        prompt = F.pad(self.tokens, (0, length - before), value=model.mask_id)[None]
        inputs = sampler_input(
            model, conditions, prompt, self.sampler, self.guidance, [self.generator], graphs=pipeline.graphs
        )
        tokens = SAMPLERS[self.sampler.method](inputs)
        return tokens[0, :, before:length].cpu()

    def _crops(self) -> Crops:
        """Crop mouth and face of the recent frames. The face is tracked from its last position."""
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
            # The face is not visible: keep its last position.
            self.track = self.track[np.minimum(np.arange(len(self.frames)) + self._moved, len(self.track) - 1)]
        self._moved = 0
        frames = np.stack(self.frames)
        landmarks = self.pipeline.face_source.landmarks
        track = add_landmarks([frames], self.track, landmarks) if callable(landmarks) else self.track
        return self.pipeline.crop_track([frames], track)

    def _forget(self) -> None:
        """Drop the frames before the window, in whole seconds, to stay aligned with expression windows."""
        second = int(FPS)
        drop = (self.received - self.first - second * self.settings.window) // second * second
        drop = min(drop, (self.settled - self.first) // second * second)
        if drop > 0:
            self.frames = self.frames[drop:]
            self.first = self.first + drop
            self._moved = drop
            self.faces = {i: faces for i, faces in self.faces.items() if i >= self.first}
            self.tokens = self.tokens[:, TOKENS_PER_FRAME * drop :]

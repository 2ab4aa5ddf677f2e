"""A clip during preparation.

Axes: T video frames (25 per second), H height, W width, N samples at 24 kHz, N16 at 16 kHz, Dm motion
channels.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.faces.clip import ClipFrames
from engine.faces.track import FaceTrack
from engine.release import weights_digest
from hicodit.conditions import EncoderConfig

FPS = 25
RATE = 24_000
RATE16 = 16_000
HOP = RATE // FPS
HOP16 = RATE16 // FPS
LONGEST_KEY = 80


class MachineFault(UserError):
    """A clip failed for a reason that may be due to the machine. If this happens repeatedly, the job stops."""


@dataclass(frozen=True)
class SourceClip:
    """Description of a clip by its source, before its files are opened. Paths are relative to the source's root.

    Attributes:
        key: unique key of the sample in the split: letters, digits, _ and -.
        video: video file, None if there is none.
        audio: audio file, None if the video contains it.
        text: transcript, None if unknown.
        text_file: file with the transcript: JSON with the key `text`, lines of which one begins with `Text:`, or plain
            text.
        expression: expression of the whole clip, or a list with one per half second.
        phonemes: [symbol, start, end], times in seconds.
        motion: a torch file (T, Dm) of motion codes.
        span: start and end of the clip within the files in seconds. None: the whole files.
        lag: seconds by which the audio is late against the video; the stage `decode` moves it to an earlier time.
        face: (x, y, height), position of the face in pixels of a frame with this height, or for height 0 as fractions
            of width and height. None: selected by the stage `face`.
        packed: (tar file, offset, size) of paths that are within tar files.
    """

    key: str
    video: str | None = None
    audio: str | None = None
    text: str | None = None
    text_file: str | None = None
    speaker: str | None = None
    language: str | None = None
    expression: str | None = None
    phonemes: list | None = None
    motion: str | None = None
    span: tuple[float, float] | None = None
    lag: float = 0.0
    face: tuple[float, float, int] | None = None
    packed: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Name of the clip in messages and records: its file, and its time span if it is a part of it."""
        name = self.video or self.audio or self.motion or self.key
        return name if self.span is None else f"{name} {self.span[0]:g}-{self.span[1]:g} s"


@dataclass(frozen=True)
class Outcome:
    """Outcome of a clip.

    Attributes:
        stage, reason: stage that rejected the clip, and the reason; "" if its sample was written.
        machine_fault: whether the machine may be the cause instead of the clip.
        seconds: wall-clock and CPU time by stage.
        frames: number of frames of the clip at 25 per second.
    """

    stage: str = ""
    reason: str = ""
    machine_fault: bool = False
    seconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    frames: int = 0


@dataclass
class WorkItem:
    """State of a clip during preparation.

    Attributes:
        info: description by the source.
        root: folder of its paths.
        work: folder in which the samples of its shard are collected.
        shard, members: an earlier shard with its sample; (offset, size) of KEY.json and KEY.safetensors in it.
        unchanged: stages whose results are copied from that shard.
        frames: (T, H, W, 3) uint8 RGB, None without video.
        wave: (N,) float32, N = T * 960.
        wave16: (N16,), T * 640.
        all_frames: (T', H, W, 3) with those after the end of the audio.
        scaled_down: whether these are smaller than the frames of the video.
        track: face track of `frames`.
        face_frames, face_track: frames from which mouth and face are cropped, and the track in their pixels, as in
            inference.
        transcripts: transcripts by recogniser.
        facts: entries of KEY.json.
        earlier_facts: entries copied from an earlier shard.
        tensors: entries of KEY.safetensors.
        length: T.
        seconds: as in `Outcome`.
    """

    info: SourceClip
    root: Path
    work: Path | None = None
    shard: Path | None = None
    members: Sequence[Sequence[int]] = ()
    unchanged: frozenset[str] = frozenset()
    frames: np.ndarray | None = None
    all_frames: np.ndarray | None = None
    scaled_down: bool = False
    wave: np.ndarray | None = None
    wave16: np.ndarray | None = None
    track: FaceTrack | None = None
    face_frames: ClipFrames | None = None
    face_track: FaceTrack | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    earlier_facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    transcripts: dict[str, Any] = field(default_factory=dict)
    length: int = 0
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    unpacked: tempfile.TemporaryDirectory | None = None

    def crop_mouth(self, encoders: EncoderConfig) -> Tensor:
        """Return greyscale mouth crops (T, S, S) uint8, with the alignment and side S that `encoders` require."""
        pictures = []
        start = 0
        for block in self._face_blocks():
            pictures.append(encoders.crop_mouth(block, self.face_track, start))
            start += len(block)
        return torch.from_numpy(np.concatenate(pictures))

    def crop_faces(self, encoders: EncoderConfig, at: Sequence[int]) -> Tensor:
        """Crop the face (F, S', S', 3) uint8 RGB of the frames `at`, in ascending order."""
        pictures = []
        start = 0
        at = np.asarray(at)
        for block in self._face_blocks():
            chosen = at[(start <= at) & (at < start + len(block))]
            if len(chosen):
                pictures.append(encoders.crop_faces(block[chosen - start], self.face_track[chosen]))
            start += len(block)
        return torch.from_numpy(np.concatenate(pictures))

    def _face_blocks(self) -> Iterator[np.ndarray]:
        """Yield blocks (n, H, W, 3) of `face_frames`, `length` frames in all."""
        assert self.face_frames is not None, "the stage `face` comes first"
        remaining = self.length
        for block in self.face_frames:
            yield block[:remaining]
            remaining -= len(block)
            if remaining <= 0:
                return

    def path(self, name: str) -> Path:
        """Return the path of a file of the source. Members of tar files are extracted until `close`."""
        if name not in self.info.packed:
            return self.root / name
        if self.unpacked is None:
            self.unpacked = tempfile.TemporaryDirectory()
        path = Path(self.unpacked.name) / name
        if not path.exists():
            tar, offset, size = self.info.packed[name]
            with (self.root / tar).open("rb") as file:
                file.seek(offset)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read(size))
        return path

    def close(self) -> None:
        """Delete the files that `path` extracted."""
        if self.unpacked is not None:
            self.unpacked.cleanup()
            self.unpacked = None


class Stage:
    """A preparation stage, which modifies the clip, or raises a UserError with the reason for rejecting it.

    Attributes:
        needs: "frames" for a stage that skips clips without video, "face" for one that also reads the tracked face,
            else "".
        reusable: False for a stage that always runs because it modifies frames or audio for later stages.
        tensors, facts: names of the tensors and JSON values that the stage adds to a sample.
    """

    needs: ClassVar[str] = ""
    reusable: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[tuple[str, ...]] = ()

    def digests(self) -> dict[str, str]:
        """Return the digest of the weights that compute each feature."""
        return {}

    def __call__(self, clip: WorkItem) -> None:
        raise NotImplementedError


class Encoder(Stage):
    """A stage that computes features with a network.

    Attributes:
        network: the network, whose weights are part of the digests.
    """

    network: torch.nn.Module

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def digests(self) -> dict[str, str]:
        return {self.tensors[0]: weights_digest(self.network)}


def make_key(path: str) -> str:
    """Derive a key from a relative path: separators and special characters become -, and long keys are truncated with a
    digest.
    """
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", path).strip("-") or "clip"
    return key if len(key) <= LONGEST_KEY else with_digest(key, path)


def with_digest(key: str, path: str) -> str:
    """Truncate a key and append a digest of the path, so that keys differ if paths do."""
    return f"{key[: LONGEST_KEY - 9]}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"

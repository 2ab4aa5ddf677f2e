"""One clip on its way through the steps.

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
    """A clip failed for a reason that may lie in the machine; when many do so in a row, the job stops."""


@dataclass(frozen=True)
class SourceClip:
    """The description of a clip by its source, before its files are opened. Paths are relative to the source's root.

    Attributes:
        key: of the sample: letters, digits, _ and -; unique in the split.
        video: its pictures, None if there are none. audio: its audio, None if the video carries it.
        text: the spoken words, None if unknown. text_file: a file that holds them: a JSON with the key `text`, lines of
            which one begins with `Text:`, or plain text.
        expression: one of the whole clip, or one of each half second.
        phonemes: [symbol, start, end], times in seconds.
        motion: a torch file (T, Dm) of motion codes.
        span: seconds from and to which the files are the clip; None: whole.
        face: (x, y, height), the place in the picture where the clip's face is: pixels of a picture of that height,
            or for height 0 fractions of width and height. None: the step `face` chooses.
        packed: (tar file, offset, size) of those of its paths that lie in tar files.
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
    face: tuple[float, float, int] | None = None
    packed: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        name = self.video or self.audio or self.motion or self.key
        return name if self.span is None else f"{name} {self.span[0]:g}-{self.span[1]:g} s"


@dataclass(frozen=True)
class Outcome:
    """What became of a clip.

    Attributes:
        stage, reason: the step that rejected it, and why; "" if its sample was written.
        machine_fault: the reason may lie in the machine rather than in the clip.
        seconds: by step, wall-clock and processor time. frames: of the clip, at 25 per second.
    """

    stage: str = ""
    reason: str = ""
    machine_fault: bool = False
    seconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    frames: int = 0


@dataclass
class WorkItem:
    """A clip on its way through the steps, with what they have made so far.

    Attributes:
        info: of the source. root: folder of its paths. work: work folder of its shard.
        shard, places: an earlier shard that holds its sample: offset and size of KEY.json, and of KEY.safetensors.
        unchanged: steps whose results are copied from there.
        frames: (T, H, W, 3) uint8 RGB, None without pictures. wave: (N,) float32, N = T * 960; wave16: (N16,), T * 640.
        all_frames: (T', H, W, 3) with those after the end of the audio. scaled_down: they are smaller than the video.
        track: of the face in `frames`.
        face_frames, face_track: the frames that mouth and face are cut from, and the track in their pixels: those that
            inference uses, so that the crops are the same.
        transcripts: by recogniser.
        facts: for KEY.json; earlier_facts: those copied. tensors: for KEY.safetensors. length: T.
        seconds: as in `Outcome`.
    """

    info: SourceClip
    root: Path
    work: Path | None = None
    shard: Path | None = None
    places: Sequence[Sequence[int]] = ()
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

    def cut_mouth(self, encoders: EncoderConfig) -> Tensor:
        """Cut mouth crops (T, S, S) uint8 grey, as `encoders` needs them."""
        pictures = []
        start = 0
        for block in self._face_blocks():
            pictures.append(encoders.cut_mouth(block, self.face_track, start))
            start += len(block)
        return torch.from_numpy(np.concatenate(pictures))

    def cut_faces(self, encoders: EncoderConfig, at: Sequence[int]) -> Tensor:
        """Cut face crops (F, S', S', 3) uint8 RGB of the frames `at`, which are in ascending order."""
        pictures = []
        start = 0
        at = np.asarray(at)
        for block in self._face_blocks():
            chosen = at[(start <= at) & (at < start + len(block))]
            if len(chosen):
                pictures.append(encoders.cut_faces(block[chosen - start], self.face_track[chosen]))
            start += len(block)
        return torch.from_numpy(np.concatenate(pictures))

    def _face_blocks(self) -> Iterator[np.ndarray]:
        """Yield blocks (n, H, W, 3) of `face_frames`, `length` frames in all."""
        assert self.face_frames is not None, "the step face comes first"
        remaining = self.length
        for block in self.face_frames:
            yield block[:remaining]
            remaining -= len(block)
            if remaining <= 0:
                return

    def path(self, name: str) -> Path:
        """Return where one of the source's files is; what lies in a tar file is taken out first, until `close`."""
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
        if self.unpacked is not None:
            self.unpacked.cleanup()
            self.unpacked = None


class Step:
    """One step of the preparation: changes the clip, or raises a UserError that says why the clip is rejected.

    Attributes:
        needs: "frames" for a step that skips clips without pictures, else "".
        reusable: false for a step that always runs, as one that changes the pictures or the audio for later steps.
        tensors, facts: names of the tensors and of the JSON's values that the step adds to a sample.
    """

    needs: ClassVar[str] = ""
    reusable: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[tuple[str, ...]] = ()

    def digests(self) -> dict[str, str]:
        """Return by feature the digest of the weights that make it."""
        return {}

    def __call__(self, clip: WorkItem) -> None:
        raise NotImplementedError


class Encoder(Step):
    """A step whose network computes features.

    Attributes:
        network: its weights are part of the digests.
    """

    network: torch.nn.Module

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def digests(self) -> dict[str, str]:
        return {self.tensors[0]: weights_digest(self.network)}


def make_key(path: str) -> str:
    """Return a key from a relative path: folders and odd characters become -, a long one is cut and gets a digest."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", path).strip("-") or "clip"
    return key if len(key) <= LONGEST_KEY else with_digest(key, path)


def with_digest(key: str, path: str) -> str:
    return f"{key[: LONGEST_KEY - 9]}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"

"""Stages that decode clips, reject them by length, track the face, and store the audio.

Axes: T video frames (25 per second), N samples at 24 kHz, N16 at 16 kHz, Dm motion channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from corpora.preparation.clip import FPS, HOP, HOP16, RATE, RATE16, MachineFault, Stage, WorkItem
from engine.errors import UserError
from engine.evaluation.clips import words_of
from engine.faces.clip import MAX_SIDE, ArrayFrames, ClipFrames, find_faces, place_landmarks
from engine.faces.landmarks import read_landmarks
from engine.faces.source import FaceSource
from engine.faces.track import add_landmarks, read_face
from engine.media.audio import read_audio
from engine.media.video import iter_video
from engine.settings import require_range
from engine.torch_files import read_matrix
from engine.untrusted import parse_json
from hicodit.data import FACE_DETECTOR


class Decode(Stage):
    """Decodes a clip: frames at 25 per second, audio at 24 and 16 kHz, both trimmed to the shorter; and its text.

    Args:
        min_seconds, max_seconds: allowed length of clips in seconds.
        max_side: maximum longer side of frames in pixels; larger ones are scaled down, as all frames are kept in
            memory.
        max_mismatch: maximum difference in length between audio and video in seconds.
    """

    reusable = False

    def __init__(
        self,
        min_seconds: float = 0.5,
        max_seconds: float = 60.0,
        max_side: int = 1280,
        max_mismatch: float = 0.2,
    ) -> None:
        require_range("stages.decode.min_seconds", min_seconds, 0.0, 3600.0)
        require_range("stages.decode.max_seconds", max_seconds, min_seconds, 3600.0)
        require_range("stages.decode.max_mismatch", max_mismatch, 0.0, 3600.0)
        require_range("stages.decode.max_side", max_side, 16, 16384)
        self.min_seconds = min_seconds
        self.max_seconds = max_seconds
        self.max_side = max_side
        self.max_mismatch = max_mismatch

    def __call__(self, clip: WorkItem) -> None:
        info = clip.info
        for name in (info.video, info.audio, info.motion, info.text_file):
            if name is not None and not clip.path(name).exists():
                raise MachineFault(f"no such file: {name}")
        text = info.text if info.text_file is None else read_text(clip.path(info.text_file))
        if info.video is not None:
            clip.frames = clip.all_frames = self._frames(clip.path(info.video), info.span)
            clip.scaled_down = max(clip.frames.shape[1:3]) >= self.max_side
        sound = clip.path(info.audio or info.video)
        clip.wave = advance(read_audio(sound, RATE, info.span), info.lag, RATE)
        motion = read_matrix(clip.path(info.motion)).half().contiguous() if info.motion else None
        clip.length = length = self._common_length(clip, motion)
        wave16 = advance(read_audio(sound, RATE16, info.span), info.lag, RATE16)[: length * HOP16]
        clip.wave16 = np.pad(wave16, (0, length * HOP16 - len(wave16)))
        clip.wave = clip.wave[: length * HOP]
        if clip.frames is not None:
            clip.frames = clip.frames[:length]
        if motion is not None:
            clip.tensors["motion"] = motion[:length]
        clip.facts |= {"text": text, "speaker": info.speaker, "language": info.language, "expression": info.expression}
        clip.facts |= {"frames": length, "seconds": length / FPS, "source": info.source}
        if info.phonemes is not None:
            clip.facts["phonemes"] = info.phonemes

    def _frames(self, path: Path, span: tuple[float, float] | None) -> np.ndarray:
        """Read all frames. Reading stops when the clip becomes too long, to bound memory."""
        frames = None
        max_frames = int((self.max_seconds + self.max_mismatch) * FPS)
        for block in iter_video(path, FPS, self.max_side, span=span):
            if frames is None:
                frames = np.empty((0, *block.shape[1:]), np.uint8)
            count = len(frames)
            if count + len(block) > max_frames:
                raise UserError(f"longer than {self.max_seconds:g} s")
            frames.resize((count + len(block), *block.shape[1:]), refcheck=False)  # large arrays grow without a copy
            frames[count:] = block
        return frames

    def _common_length(self, clip: WorkItem, motion: torch.Tensor | None) -> int:
        """Return the number of frames that all parts of a clip have. `motion` (T, Dm) is None without a file of it.

        Raises:
            UserError: If the lengths differ too much, or are not allowed.
        """
        lengths = {"audio": len(clip.wave) // HOP}
        if clip.frames is not None:
            lengths["video"] = len(clip.frames)
        if motion is not None:
            lengths["motion"] = len(motion)
        if clip.info.span is not None:
            start, end = clip.info.span
            lengths["the list"] = round((end - start) * FPS)
        shortest = min(lengths.values())
        text = ", ".join(f"{count / FPS:.2f} s of {what}" for what, count in lengths.items())
        if max(lengths.values()) - shortest > self.max_mismatch * FPS:
            raise UserError(f"{text}: the lengths must agree")
        if not self.min_seconds <= shortest / FPS <= self.max_seconds:
            raise UserError(f"{text}: must be {self.min_seconds:g} to {self.max_seconds:g} s")
        return shortest


def advance(wave: np.ndarray, seconds: float, rate: int) -> np.ndarray:
    """Move audio (N,) to an earlier time, negative: to a later one.

    What leaves at one end enters at the other, as clips begin and end with the same background noise. `seconds` is the
    shift, `rate` the sample rate in Hz.
    """
    return np.roll(wave, -round(seconds * rate))


class Face(Stage):
    """Tracks a face. Clips in which it is not visible for long enough are rejected.

    Args:
        detector: see `FaceSource.from_settings`.
        face: selection among several faces: speaking (whose mouth correlates with the audio), largest, central, left,
            right, or a number by size from 1. If the source states a position, the face nearest to it is used.
        face_landmarks: see `FaceSource.from_settings`. A folder of landmark files has the layout of the source.
    """

    needs = "frames"
    reusable = False

    def __init__(
        self, detector: str | None = None, face: str | int = "speaking", face_landmarks: str | None = None
    ) -> None:
        self.source = FaceSource.from_settings(detector, face_landmarks)
        self.face = read_face(face)
        if face == "all":
            raise UserError("stages.face.face=all: a sample has a single face; use speaking, or another value")

    def digests(self) -> dict[str, str]:
        return {FACE_DETECTOR: self.source.name}

    def __call__(self, clip: WorkItem) -> None:
        frames = self._frames(clip)
        landmarks = self.source.landmarks
        if isinstance(landmarks, Path):
            if clip.info.span is not None:
                raise UserError("landmarks of whole videos cannot be used for parts of them: omit face_landmarks")
            track = place_landmarks(frames, *read_landmarks(landmarks, clip.info.video), FPS)
        else:
            track = find_faces(frames, FPS, self._which(clip), self.source.detector, clip.wave16)[0]
        clip.track = track.scaled(clip.frames.shape[2] / frames.size[1])[: clip.length]
        clip.face_frames, clip.face_track = frames.sharper(track)
        if callable(landmarks):
            clip.face_track = add_landmarks(clip.face_frames, clip.face_track, landmarks)

    @staticmethod
    def _frames(clip: WorkItem) -> ClipFrames:
        """Return the frames in which inference would detect the face.

        They include frames after the end of the audio. If the decoded frames have another size, the video is read
        again.
        """
        if not clip.scaled_down and max(clip.all_frames.shape[1:3]) <= MAX_SIDE:
            return ArrayFrames(clip.all_frames)
        return ClipFrames(clip.path(clip.info.video), FPS, span=clip.info.span)

    def _which(self, clip: WorkItem) -> str | int | tuple[float, float]:
        """Return the face position given by the source as fractions of the frame, else the setting."""
        if clip.info.face is None:
            return self.face
        x, y, lines = clip.info.face
        height, width = clip.frames.shape[1:3]
        return (x * height / lines / width, y / lines) if lines else (x, y)


class Wave(Stage):
    """Stores the audio (N,) int16 at 24 kHz, for training speech codecs."""

    tensors = ("wave",)

    def digests(self) -> dict[str, str]:
        return {"wave": "16 bits"}

    def __call__(self, clip: WorkItem) -> None:
        clip.tensors["wave"] = torch.from_numpy(np.round(clip.wave.clip(-1, 1) * 32767).astype(np.int16))


def read_text(path: Path) -> str:
    """Return the transcript: `text` of a .json file, the line `Text:` of a .txt file, or its whole contents."""
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return " ".join(str(parse_json(content, path).get("text") or "").split())
    except (OSError, UnicodeDecodeError, ValueError, AttributeError) as error:
        raise UserError(f"the text {path} cannot be read ({error})") from error
    return words_of(content)

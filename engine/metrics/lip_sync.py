"""LSE-C and LSE-D, called Sync-C and Sync-D elsewhere: agreement of lips and audio by SyncNet.

Chung & Zisserman 2016, "Out of time: automated lip sync in the wild"; scores of Wav2Lip (Prajwal et al. 2020,
arXiv:2008.10010). Weights: `syncnet_v2.model` of joonson/syncnet_python (code MIT; no separate licence is stated for
the weights). 25 frames per second, 31 shifts. The face is cropped as in SyncNet's program, with a margin of 0.4 around
the tracked box, but detected by OpenCV's cascade instead of S3FD, so scores may differ from those of that program.

Axes: B batch, T video frames (25 per second), W windows of five frames, N samples at 16 kHz, F MFCC frames (100 per
second), S = 31 shifts, D = 1024 embedding. Images are (T, height, width, 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from engine.errors import UserError
from engine.faces.clip import find_faces
from engine.faces.detectors import middle_of
from engine.media.video import read_video
from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.release import build_with
from engine.torch_files import read_checkpoint

RATE = 16_000
SIDE = 224
WINDOW = 5  # video frames
STEPS = 20  # corresponding MFCC frames
SHIFT = 15  # maximum shift of the published scores, in video frames
BATCH = 20
FPS = 25.0
MARGIN = 0.4
SMOOTH = 13
MAX_SIDE = 1280  # longer side of the frame for face detection, in pixels


# --- MFCC ---


@lru_cache(maxsize=2)
def _mel_filters(count: int, size: int) -> np.ndarray:
    """Return triangles (count, size / 2 + 1) between FFT bins evenly spaced in mels (2595 log10(1 + f / 700))."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, count + 2) / 2595) - 1)
    bins = np.floor((size + 1) * edges / RATE)
    at = np.arange(size // 2 + 1)
    filters = np.zeros((count, len(at)))
    for row, (low, middle, high) in zip(filters, zip(bins, bins[1:], bins[2:])):
        rising = (at >= low) & (at < middle)
        falling = (at >= middle) & (at < high)
        row[rising] = (at[rising] - low) / (middle - low)
        row[falling] = (high - at[falling]) / (high - middle)
    return filters


def mfcc(wave: np.ndarray, coefficients: int = 13) -> np.ndarray:
    """Compute MFCCs (coefficients, F) float64 of 16-bit samples (N,) at 16 kHz, with the defaults of
    python_speech_features.

    Frames have 25 ms, a hop of 10 ms and a rectangular window; the last one is zero-padded. The pre-emphasis is 0.97,
    and the first coefficient is replaced by the log energy of the frame. F = 1 + ceil((N - 400) / 160).
    """
    width = RATE // 40
    step = RATE // 100
    size = 512
    filters = 26
    lifter = 22
    signal = np.asarray(wave, dtype=np.float64)
    signal = np.append(signal[:1], signal[1:] - 0.97 * signal[:-1])
    frames = 1 + max(0, -(-(len(signal) - width) // step))
    signal = np.pad(signal, (0, (frames - 1) * step + width - len(signal)))
    windows = sliding_window_view(signal, width)[::step]
    power = np.abs(np.fft.rfft(windows, size)) ** 2 / size
    energy = power.sum(1)
    bands = power @ _mel_filters(filters, size).T
    tiny = np.finfo(float).eps
    levels = np.log(np.where(bands == 0, tiny, bands))
    n = np.arange(filters)
    k = np.arange(coefficients)
    cosines = np.cos(np.pi * k[:, None] * (2 * n + 1) / (2 * filters)) * np.sqrt(2 / filters)
    cosines[0] /= np.sqrt(2)
    result = levels @ cosines.T * (1 + lifter / 2 * np.sin(np.pi * k / lifter))
    result[:, 0] = np.log(np.where(energy == 0, tiny, energy))
    return result.T


# --- the networks ---


def _conv(dims: int, inputs: int, outputs: int, kernel, stride=1, padding=0) -> list[nn.Module]:
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    return [conv(inputs, outputs, kernel, stride, padding), norm(outputs), nn.ReLU()]


def _project() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """Embeds five frames of a face and the corresponding 0.2 s of audio into a common space."""

    def __init__(self):
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_conv(2, 1, 64, 3, 1, 1),
            nn.MaxPool2d(1, 1),
            *_conv(2, 64, 192, 3, 1, 1),
            nn.MaxPool2d(3, (1, 2)),
            *_conv(2, 192, 384, 3, 1, 1),
            *_conv(2, 384, 256, 3, 1, 1),
            *_conv(2, 256, 256, 3, 1, 1),
            nn.MaxPool2d(3, 2),
            *_conv(2, 256, 512, (5, 4)),
        )
        self.netcnnlip = nn.Sequential(
            *_conv(3, 3, 96, (5, 7, 7), (1, 2, 2)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv(3, 96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_conv(3, 256, 256, (1, 3, 3), 1, (0, 1, 1)),
            *_conv(3, 256, 256, (1, 3, 3), 1, (0, 1, 1)),
            *_conv(3, 256, 256, (1, 3, 3), 1, (0, 1, 1)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv(3, 256, 512, (1, 6, 6)),
        )
        self.netfcaud = _project()
        self.netfclip = _project()

    def audio(self, mfccs: Tensor) -> Tensor:
        """Embed MFCC windows (B, 1, 13, 20): (B, D)."""
        return self.netfcaud(self.netcnnaud(mfccs).flatten(1))

    def lip_features(self, frames: Tensor) -> Tensor:
        """Compute features (B, 512) of faces (B, 3, 5, 224, 224), BGR in 0..255, before the final layers."""
        return self.netcnnlip(frames).flatten(1)

    def lip(self, frames: Tensor) -> Tensor:
        """Embed faces (B, 3, 5, 224, 224), BGR in 0..255: (B, D)."""
        return self.netfclip(self.lip_features(frames))

    @torch.no_grad()
    def embed(self, frames: np.ndarray, wave: np.ndarray) -> tuple[Tensor, Tensor]:
        """Embed a clip: lip (W, D) and audio (W, D), where W = min(T, floor(N / 640)) - 5.

        Args:
            frames: (T, H, W, 3) uint8 RGB at 25 fps, cropped to the face; resized to 224 x 224.
            wave: (N,) in [-1, 1] at 16 kHz.

        Raises:
            UserError: If the frames or the audio are too short for one window.
        """
        windows = min(len(frames), len(wave) // (RATE // 25)) - WINDOW
        if windows < 1:
            raise UserError(
                f"clip of {len(frames)} frames and {len(wave)} samples: SyncNet needs more than {WINDOW} frames of both"
            )
        pixels = np.stack([cv2.resize(frame, (SIDE, SIDE))[..., ::-1] for frame in frames[: windows + WINDOW]])
        pixels = torch.from_numpy(pixels).permute(3, 0, 1, 2)  # (3, T, 224, 224)
        sound = torch.from_numpy(mfcc(np.round(np.clip(wave, -1, 1) * 32767))).float()
        device = next(self.parameters()).device
        lips = []
        sounds = []
        for at in torch.arange(windows).split(BATCH):
            lips.append(self.lip(torch.stack([pixels[:, i : i + WINDOW] for i in at]).to(device).float()))
            sounds.append(self.audio(torch.stack([sound[None, :, 4 * i : 4 * i + STEPS] for i in at]).to(device)))
        return torch.cat(lips), torch.cat(sounds)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SyncNet:
        """Load the released `syncnet_v2.model`. Nothing in the file is executed."""
        return build_with(cls, read_checkpoint(Path(path)), path)


# --- the scores ---


@dataclass(frozen=True)
class SyncScore:
    """Synchronisation scores of lips and audio."""

    confidence: float  # LSE-C: median minus minimum over shifts of the mean distance; higher is better
    distance: float  # LSE-D: minimum mean distance; lower is better
    offset: int  # video frames by which the audio leads at the best shift
    distances: Tensor  # (W, S) distance of each lip window to the audio at each shift


def sync_score(lip: Tensor, audio: Tensor, shift: int = SHIFT) -> SyncScore:
    """Score embeddings (W, D) of lips and audio over shifts of -shift..shift windows.

    The audio is zero-padded at both ends.
    """
    padded = nn.functional.pad(audio, (0, 0, shift, shift)).unfold(0, 2 * shift + 1, 1)  # (W, D, S)
    distances = (lip[..., None] - padded + 1e-6).norm(dim=1)
    mean = distances.mean(0)
    least, at = mean.min(0)
    return SyncScore(float(mean.median() - least), float(least), shift - int(at), distances)


# --- the metric ---


def face_squares(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Crop frames (T, H, W, 3) by boxes (T, 4) of x, y, w, h to (T, 224, 224, 3), with grey outside the image.

    If h is half of the longer side of a box, the crop extends from h above its centre to 1.8 h below, and 1.4 h to
    either side. Centre and h are smoothed by a median over 13 frames.
    """
    values = np.concatenate([middle_of(boxes), boxes[:, 2:].max(1, keepdims=True) / 2], 1)
    edge = SMOOTH // 2
    values = np.median(sliding_window_view(np.pad(values, ((edge, edge), (0, 0)), "edge"), SMOOTH, 0), -1)
    out = np.empty((len(frames), SIDE, SIDE, 3), np.uint8)
    for i, (frame, (x, y, half)) in enumerate(zip(frames, values)):
        left = x - half * (1 + MARGIN)
        top = y - half
        side = half * 2 * (1 + MARGIN)
        scale = SIDE / side
        matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
        mode = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        out[i] = cv2.warpAffine(frame, matrix, (SIDE, SIDE), flags=mode, borderValue=(110, 110, 110))
    return out


@lru_cache(2)
def face_video(path: Path | None) -> np.ndarray:
    """Crop the largest face of a video at 25 frames per second: (T, 224, 224, 3) uint8."""
    if path is None:
        raise UserError("the clip has no video")
    frames = read_video(path, FPS, MAX_SIDE)
    return face_squares(frames, find_faces([frames], FPS)[0].boxes)


class LipSync(Metric):
    figures: ClassVar = {
        "lse_c": Figure("LSE-C", 1, meaning="confidence of lip synchronisation"),
        "lse_d": Figure("LSE-D", -1, meaning="distance between lip and audio embeddings at the best shift"),
    }
    weight_files = ("syncnet_v2.model",)
    inputs = ("audio", "video", "source")

    def load(self) -> None:
        self.network = SyncNet.from_pretrained(*self.files).to(self.device)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        score = sync_score(*self.network.embed(face_video(take.video or take.source), wave_of(take.audio, RATE)))
        return {"lse_c": (score.confidence, 1), "lse_d": (score.distance, 1), "offset": score.offset}

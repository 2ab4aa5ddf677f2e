"""Conversions between uint8 images and the [-1, 1] range of a portrait codec, spectrogram images, and sizes of image
files.

Axes: T frames, H height, W width, S side of the codec's square, N samples.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine.media.audio import mel_picture


def picture_size(file: Path | BinaryIO) -> tuple[float, float]:
    """Return width and height of an image in pixels from its header, without decoding it.

    Both are infinite if the image is so large that Pillow refuses it.

    Raises:
        ValueError: If the file is not an image.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as header:
            return header.size
    except Image.DecompressionBombError:
        return math.inf, math.inf
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from error


def video_to_tensor(frames: np.ndarray, size: int) -> Tensor:
    """Convert frames (T, H, W, 3) uint8 RGB to (T, 3, S, S) in [-1, 1], resized bilinearly with anti-aliasing and
    without preserving the aspect ratio.

    This matches the preprocessing of driving videos in LIA-X's tools. Crop to a square around the face first.
    """
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if video.shape[-2:] != (size, size):
        video = F.interpolate(video, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return video


def fit_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize frames (T, H, W, 3) uint8 like `video_to_tensor` to (T, S, S, 3) uint8, rounded."""
    return to_bytes(video_to_tensor(frames, size) + 0.5 / 127.5)  # `to_bytes` truncates


def identity_to_tensor(frame: np.ndarray, size: int) -> Tensor:
    """Convert an image (H, W, 3) uint8 RGB to (3, S, S) in [-1, 1], resized by area averaging like Talker-T2AV's
    renderer.
    """
    frame = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 127.5 - 1


def spectrogram(wave: np.ndarray, rate: int) -> np.ndarray:
    """Render a waveform (N,) as a log-mel spectrogram with 80 dB range, low bands at the bottom: (80, T, 3)
    uint8 RGB.
    """
    mel = mel_picture(wave, rate)[::-1]
    grey = (255 * np.clip((mel - mel.max()) / 80 + 1, 0, 1)).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB)


def to_bytes(pictures: Tensor) -> np.ndarray:
    """Convert images (T, 3, S, S) to uint8 (T, S, S, 3): clamp to [-1, 1], scale (x + 1) / 2 * 255, truncate."""
    scaled = (pictures.clamp(-1, 1) + 1) / 2 * 255
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

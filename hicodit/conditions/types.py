"""The typed conditions of HiCoDiT.

Axes: B batch, T video frames (25 per second), J expression windows (2 a second), E lip feature width, S, S' side of
mouth and face crops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.faces.track import FaceTrack

EXPRESSIONS = ("neutral", "happy", "sad", "surprised", "fearful", "disgusted", "angry")
NO_EXPRESSION = len(EXPRESSIONS)  # class of a half second whose expression is not known; in training only
FPS = 25.0  # video frames per second
MIN_FRAMES = 5  # 0.2 s: of the shortest clip that is used, in training as at inference
WINDOW_SECONDS = 0.5  # that share one class of expression


def windows_of(frames: int) -> int:
    """Return the number J of expression windows, of 12.5 video frames each; a last partial one counts."""
    return -(-2 * frames // 25)


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch of clips.

    lip: (B, T, E) lip features, 25 per second.
    identity: (B, 256) unit vectors in the GE2E voice space.
    expression: (B, J) class of each half second, an index into `EXPRESSIONS`; J = `windows_of(T)`.
    frames: (B,) valid video frames of each clip, on the host; the rest of T is padding.
    """

    lip: Tensor
    identity: Tensor
    expression: Tensor
    frames: Tensor


def window_expressions(probabilities: Tensor) -> Tensor:
    """Reduce class probabilities of frames (T, classes), 25 per second, to one class per half second (J,), J =
    `windows_of(T)`.

    The most frequent class among the frames that begin in a window wins, ties go to the larger summed probability. A
    window at the end that only the second half of a frame reaches takes the class before it.
    """
    window = 2 * torch.arange(len(probabilities), device=probabilities.device) // 25
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).to(probabilities.dtype)
    size = (2 * (len(probabilities) - 1) // 25 + 1, probabilities.shape[-1])
    counts = torch.zeros(size, dtype=probabilities.dtype, device=probabilities.device).index_add_(0, window, votes)
    mass = torch.zeros_like(counts).index_add_(0, window, probabilities)
    classes = (counts + mass / (mass.sum(-1, keepdim=True) + 1e-9) * 0.5).argmax(-1)  # a tie-break stays under one vote
    return torch.cat([classes, classes[-1:]])[: windows_of(len(probabilities))]


@dataclass(frozen=True)
class Crops:
    """What is kept of the pictures of one clip.

    mouth: (T, S, S) uint8 grey.
    voices: (4, S', S', 3) uint8 RGB, the face crops that the voice is predicted from.
    expression: (J,) class of each half second, read while the face was cut out; on the model's device.
    track: where they were cut.
    """

    mouth: np.ndarray
    voices: np.ndarray
    expression: Tensor
    track: FaceTrack | None = None

    def __len__(self) -> int:
        return len(self.mouth)

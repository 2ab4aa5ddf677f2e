"""Types of HiCoDiT's conditions.

Axes: B batch, T video frames (25 per second), J expression windows (2 per second), E lip feature width, S, S' side of
mouth and face crops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.faces.track import FaceTrack

EXPRESSIONS = ("neutral", "happy", "sad", "surprised", "fearful", "disgusted", "angry")
NO_EXPRESSION = len(EXPRESSIONS)  # class of a window with unknown expression; in training only
FPS = 25.0  # video frames per second
IDENTITY_DIM = 256  # of a GE2E embedding
MIN_FRAMES = 5  # minimum length of a clip in frames (0.2 s), in training and inference
WINDOW_SECONDS = 0.5  # duration of an expression window


def num_expression_windows(frames: int) -> int:
    """Return the number J of expression windows of 12.5 video frames each, including a last partial window."""
    return -(-2 * frames // 25)


def check_identity(identity: np.ndarray | Tensor | None) -> None:
    """Raise UserError unless `identity` is None or a GE2E embedding: `IDENTITY_DIM` finite numbers."""
    if identity is None:
        return
    try:
        vector = torch.as_tensor(identity)
    except (TypeError, ValueError, RuntimeError):
        vector = torch.empty(0)
    if (
        vector.shape not in ((IDENTITY_DIM,), (1, IDENTITY_DIM))
        or not vector.is_floating_point()
        or not vector.isfinite().all()
    ):
        raise UserError(f"identity={str(identity)[:40]}: expected a GE2E embedding, {IDENTITY_DIM} finite numbers")


@dataclass(frozen=True)
class Conditions:
    """Conditions of a batch of clips.

    Attributes:
        lip: (B, T, E) lip features, 25 per second.
        identity: (B, IDENTITY_DIM) unit vectors in the GE2E voice space.
        expression: (B, J) expression class of each half-second window, an index into `EXPRESSIONS`; J =
            `num_expression_windows(T)`.
        frames: (B,) number of valid video frames of each clip, on the host. The rest of T is padding.
    """

    lip: Tensor
    identity: Tensor
    expression: Tensor
    frames: Tensor


def majority_expressions(probabilities: Tensor) -> Tensor:
    """Reduce class probabilities of frames (T, classes), 25 per second, to one class per half second (J,), where J =
    `num_expression_windows(T)`.

    The class of a window is the most frequent one among the frames that start in it. Ties are broken by the summed
    probability. A last window in which no frame starts has the class of the previous window.
    """
    window = 2 * torch.arange(len(probabilities), device=probabilities.device) // 25
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).to(probabilities.dtype)
    size = (2 * (len(probabilities) - 1) // 25 + 1, probabilities.shape[-1])
    counts = torch.zeros(size, dtype=probabilities.dtype, device=probabilities.device).index_add_(0, window, votes)
    mass = torch.zeros_like(counts).index_add_(0, window, probabilities)
    # The tie-break is smaller than one vote.
    classes = (counts + mass / (mass.sum(-1, keepdim=True) + 1e-9) * 0.5).argmax(-1)
    return torch.cat([classes, classes[-1:]])[: num_expression_windows(len(probabilities))]


@dataclass(frozen=True)
class Crops:
    """Crops of one clip that generation needs.

    Attributes:
        mouth: (T, S, S) uint8 grey.
        voice_faces: (4, S', S', 3) uint8 RGB, face crops from which the voice is predicted.
        expression: (J,) expression class of each half-second window, on the model's device.
        track: face track of the crops.
    """

    mouth: np.ndarray
    voice_faces: np.ndarray
    expression: Tensor
    track: FaceTrack | None = None

    def __len__(self) -> int:
        return len(self.mouth)

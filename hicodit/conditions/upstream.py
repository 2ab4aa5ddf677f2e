"""The condition encoders of the paper with their released weights: AV-HuBERT Large, ArcFace, POSTER V2.

Axes: B batch, T video frames (25 per second), F face crops of a clip, n images or frames, H height, W width,
S image side, E feature width.

Their licences (see each class) are limited to research, so they are not part of this project or its releases. A model
that uses them refers to a folder of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.faces.detectors import five_points
from engine.faces.track import FaceTrack
from engine.release import weights_digest
from engine.settings import Group, setting
from hicodit.conditions.align import ARCFACE_SIDE, MOUTH_SIDE, WINDOW, avhubert_mouth, face_picture, mouth_poses
from hicodit.conditions.arcface import IRESNET100, ArcFace
from hicodit.conditions.avhubert import VIEW, AVHubert, AVHubertConfig
from hicodit.conditions.encoders import encode_in_windows
from hicodit.conditions.poster2 import POSTER2

WINDOW_FRAMES = 500  # window of AV-HuBERT in frames
CONTEXT_FRAMES = 50  # context frames at each inner boundary, whose features are discarded
BATCH = 16  # images per batch of POSTER V2
NETWORKS = {"lip": AVHubert, "identity": ArcFace, "expression": POSTER2}


@dataclass(frozen=True)
class UpstreamEncoderConfig(Group, prefix="encoders."):
    """Config of the upstream encoders and their checkpoints.

    Attributes:
        folder: folder of the three checkpoints. None creates networks with random weights, to measure time and memory.
        lip_file, identity_file, expression_file: file names in that folder.
        picture_every: video frames per face crop. The paper classifies every frame; the class of a half second changes
            little with fewer crops, and POSTER V2 is the slowest encoder.
        lip, identity_blocks: config of the networks with random weights.
    """

    kind: str = "upstream"
    folder: str | None = None
    lip_file: str = "large_vox_iter5.pt"
    identity_file: str = "arcface_r100.pth"
    expression_file: str = "affectnet-7-model_best.pth"
    picture_every: int = setting(5, 1, 2**10)
    lip: dict[str, Any] = field(default_factory=dict)
    identity_blocks: tuple[int, ...] = setting(IRESNET100, 1, 256)
    face_dim: int = setting(512, 1, 2**14)
    face_size: int = setting(224, ARCFACE_SIDE, 2**12)  # twice the size of ArcFace's pose, for POSTER V2
    mouth_size: int = setting(MOUTH_SIDE, VIEW, 2**12)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.face_size % ARCFACE_SIDE:
            raise UserError(f"encoders.face_size={self.face_size}: ArcFace needs a multiple of {ARCFACE_SIDE} pixels")

    @property
    def lip_dim(self) -> int:
        return AVHubertConfig(**self.lip).width

    def crop_mouth(self, frames: np.ndarray, track: FaceTrack, start: int = 0) -> np.ndarray:
        """Crop the mouth (n, 96, 96) uint8 grey from frames (n, H, W, 3), which start at frame `start` of the track."""
        first = max(0, min(start, len(track) - WINDOW))  # a pose depends on the landmarks of the following frames
        stop = start + len(frames)
        poses = mouth_poses(track.best_points[first : stop + WINDOW - 1])
        return avhubert_mouth(frames, poses[start - first : stop - first])

    def crop_faces(self, frames: np.ndarray, track: FaceTrack) -> np.ndarray:
        """Crop the face (T, 224, 224, 3) uint8 RGB from frames (T, H, W, 3)."""
        pairs = zip(frames, five_points(track.best_points), strict=True)
        return np.stack([face_picture(frame, points, self.face_size) for frame, points in pairs])


class UpstreamEncoders:
    """The three upstream encoders, loaded on first use. They are not trained, saved, or part of the model's state."""

    learns = False

    def __init__(self, config: UpstreamEncoderConfig) -> None:
        self.config = config
        self.expected: dict[str, str] = {}  # digest of the weights that the model was trained with, by feature
        self._networks: dict[str, nn.Module] = {}

    def __deepcopy__(self, memo: dict) -> UpstreamEncoders:
        return self

    def network(self, name: str, device: torch.device) -> nn.Module:
        """Return the encoder "lip", "identity" or "expression" on a device."""
        if name not in self._networks:
            network = self._read(name).eval().requires_grad_(False)
            expected = self.expected.get("face_identity" if name == "identity" else name)
            if expected is not None and (digest := weights_digest(network)) != expected:
                raise UserError(
                    f"{getattr(self.config, f'{name}_file')} computes other features ({digest}) than the model was "
                    f"trained on ({expected}): use the file that prepared its shards"
                )
            self._networks[name] = network
        return self._networks[name].to(device)

    def _read(self, name: str) -> nn.Module:
        c = self.config
        file = getattr(self.config, f"{name}_file")
        if c.folder is None:
            if name == "lip":
                return AVHubert(AVHubertConfig(**c.lip))
            return ArcFace(c.identity_blocks) if name == "identity" else POSTER2()
        if not Path(c.folder).is_dir():
            raise UserError(
                f"encoders.folder={c.folder} is not a folder: set it to that of the downloaded encoder checkpoints"
            )
        network = NETWORKS[name].from_pretrained(Path(c.folder) / file)
        if name == "lip" and network.config.width != c.lip_dim:
            raise UserError(
                f"{file} has lip features of width {network.config.width}, the model requires {c.lip_dim}: "
                "use the checkpoint that the model was trained with"
            )
        return network

    @torch.no_grad()
    def lip(self, mouth: Tensor, frames: Tensor) -> Tensor:
        """Map mouth crops (B, T, S, S), in [0, 1] or uint8, to lip features (B, T, E), long clips in windows."""
        return encode_in_windows(self.network("lip", mouth.device), mouth, frames, WINDOW_FRAMES, CONTEXT_FRAMES)

    @torch.no_grad()
    def identity(self, faces: Tensor) -> Tensor:
        """Map face crops (B, F, 3, S, S) in [0, 1] to (B, 512)."""
        return self.network("identity", faces.device)(faces)

    @torch.no_grad()
    def expression(self, faces: Tensor) -> Tensor:
        """Map face crops (n, 3, S, S) in [0, 1] to expression logits (n, 7)."""
        network = self.network("expression", faces.device)
        return torch.cat([network(part) for part in faces.split(BATCH)])

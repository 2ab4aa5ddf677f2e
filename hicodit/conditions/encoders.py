"""Condition encoders, which map face images to lip features, a face embedding and expression probabilities.

Axes: B batch, T video frames (25 per second), F face crops, n images, H = W image side (S of mouth, S' of face crops),
E feature width.

The tiny encoders in this module are trained together with the model. The upstream encoders (AV-HuBERT, ArcFace, POSTER
V2; see `hicodit.conditions.upstream`) have the same interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device import to_device
from engine.errors import UserError
from engine.faces.crops import crop_face, crop_mouth
from engine.faces.track import FaceTrack
from engine.settings import Group, require_range, setting
from hicodit.conditions.types import EXPRESSIONS
from hicodit.layers import AdaLNBlock, modulation_layer, rotary_table


def to_unit_range(pictures: Tensor) -> Tensor:
    """Convert uint8 images of any shape to floats in [0, 1]. Floats are returned unchanged."""
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures


def encode_in_windows(encoder: nn.Module, mouth: Tensor, frames: Tensor, window: int, context: int) -> Tensor:
    """Encode mouth crops of any length, long clips in overlapping windows, which bounds memory.

    A clip of up to `window` frames is encoded at once, without the padding of its batch, so that its features do not
    depend on the batch.

    Args:
        encoder: maps mouth crops (b, t, H, W) in [0, 1] and their numbers of valid frames (b,) to features (b, t, E).
        mouth: (B, T, H, W) in [0, 1], or uint8, which is converted window by window.
        frames: (B,) number of valid frames of each clip, on the host.
        window: maximum number of frames that are encoded at once.
        context: extra frames of a window at each inner boundary, whose features are discarded.

    Returns:
        Lip features (B, T, E).
    """
    whole = frames <= window
    if bool(whole.all()):
        return encoder(to_unit_range(mouth), frames)
    if bool(whole.any()):
        longest = int(frames[whole].max())
        short = to_device(whole.nonzero()[:, 0], mouth.device)
        long = to_device((~whole).nonzero()[:, 0], mouth.device)
        encoded = encoder(to_unit_range(mouth[short, :longest]), frames[whole])
        out = mouth.new_zeros(*mouth.shape[:2], encoded.shape[-1], dtype=encoded.dtype)
        out[short, :longest] = encoded
        out[long] = encode_in_windows(encoder, mouth[long], frames[~whole], window, context)
        return out
    parts = []
    keep = window - 2 * context
    for start in range(0, mouth.shape[1], keep):
        first = max(start - context, 0)
        part = mouth[:, first : start + keep + context]
        remaining = (frames - first).clamp(1, part.shape[1])  # a clip that has ended still needs one frame to attend to
        parts.append(encoder(to_unit_range(part), remaining)[:, start - first :][:, :keep])
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class TinyEncoderConfig(Group, prefix="encoders."):
    """Config of the tiny encoders. Sides are in pixels.

    Attributes:
        picture_every: video frames per face crop.
        kind: key of `hicodit.conditions.ENCODERS`.
        mouth_size, face_size: S and S', sides of the crops, at least 16 for strided convolutions.
        lip_dim, face_dim: widths of the lip features and of the face embedding.
        lip_width, face_width: channels of the first convolution of the image networks.
        lip_blocks, lip_heads: number of transformer blocks over time, and of their attention heads.
        lip_front: front end for mouth crops: "strided" convolutions of single frames, sufficient for cartoon faces, or
            "residual" blocks over five frames, for real faces.
        phonemes: number of classes of the auxiliary frame-wise phoneme loss (0: no such head).
    """

    picture_every: ClassVar[int] = 1

    kind: str = "tiny"
    mouth_size: int = setting(48, 8, 2**10)
    face_size: int = setting(64, 16, 2**10)
    lip_dim: int = setting(192, 1, 2**14)
    lip_front: str = setting("strided", choices=("strided", "residual"))
    lip_width: int = setting(24, 1, 2**12)
    lip_blocks: int = setting(1, 1, 256)
    lip_heads: int = setting(6, 1, 256)
    face_dim: int = setting(128, 1, 2**14)
    face_width: int = setting(24, 1, 2**12)
    phonemes: int = setting(0, 0, 2**10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lip_front == "strided":
            require_range("encoders.mouth_size", self.mouth_size, 16, 2**10)
        if self.lip_dim % (2 * self.lip_heads):
            raise UserError(
                f"encoders.lip_dim={self.lip_dim} must be a multiple of 2 x encoders.lip_heads={self.lip_heads}"
            )
        if self.lip_front == "residual" and self.lip_width % ResidualBlock.GROUPS:
            raise UserError(
                f"encoders.lip_width={self.lip_width} must be a multiple of {ResidualBlock.GROUPS} for "
                "encoders.lip_front=residual"
            )

    def crop_mouth(self, frames: np.ndarray, track: FaceTrack, start: int = 0) -> np.ndarray:
        """Crop the mouth (n, S, S) uint8 grey from frames (n, H, W, 3), which start at frame `start` of the track."""
        return crop_mouth(frames, track[start : start + len(frames)], self.mouth_size)

    def crop_faces(self, frames: np.ndarray, track: FaceTrack) -> np.ndarray:
        """Crop the face (T, S', S', 3) uint8 RGB from frames (T, H, W, 3)."""
        return crop_face(frames, track, self.face_size)


WINDOW_FRAMES = 100  # window of the tiny lip encoder in frames; it is trained on clips of up to 80 frames
CONTEXT_FRAMES = 20


def _trunk(channels: int, *widths: int) -> list[nn.Module]:
    """Return strided convolutions that map images (n, C, H, W) to features (n, C' * H / 16 * W / 16)."""
    layers = []
    sizes = ((6, 4), (4, 2), (4, 2))  # kernel and stride
    for width, (kernel, stride) in zip(widths, sizes, strict=True):
        layers += [nn.Conv2d(channels, width, kernel, stride, padding=1), nn.GELU()]
        channels = width
    return [*layers, nn.Flatten()]


class StridedFront(nn.Sequential):
    """Front end that maps normalised mouth crops (B, T, S, S) to features (B, T, C), with three strided convolutions
    per frame.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__(*_trunk(1, width, 2 * width, 4 * width))
        self.out = 4 * width * (size // 16) ** 2

    def forward(self, mouth: Tensor) -> Tensor:
        pictures = mouth.flatten(0, 1)[:, None]
        return super().forward(pictures).unflatten(0, mouth.shape[:2])


class ResidualBlock(nn.Module):
    """ResNet block with two 3 x 3 convolutions and group norm: (n, C, H, W) to (n, C2, H2, W2)."""

    GROUPS = 4

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(self.GROUPS, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(self.GROUPS, out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return F.gelu(h + self.shortcut(x))


class ResidualFront(nn.Module):
    """Front end that maps normalised mouth crops (B, T, S, S) to features (B, T, C), with a convolution over five
    frames and residual blocks.

    A small version of the front end for lip reading of Stafylakis and Tzimiropoulos (arXiv 1703.04105).
    """

    SPAN = 5  # frames in the receptive field of the first convolution

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        # A spatio-temporal convolution, implemented as a spatial one with the neighbouring frames as channels.
        self.stem = nn.Conv2d(self.SPAN, width, 5, stride=2, padding=2, bias=False)
        self.norm = nn.GroupNorm(ResidualBlock.GROUPS, width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
        )
        side = -(-size // 16)  # stem, pooling and two blocks halve the size, rounded up
        self.out = 4 * width * side**2

    def forward(self, mouth: Tensor) -> Tensor:
        reach = self.SPAN // 2
        neighbours = F.pad(mouth, (0, 0, 0, 0, reach, reach)).unfold(1, self.SPAN, 1)  # (B, T, S, S, SPAN)
        x = neighbours.permute(0, 1, 4, 2, 3).flatten(0, 1)
        x = self.pool(F.gelu(self.norm(self.stem(x))))
        return self.blocks(x).flatten(1).unflatten(0, mouth.shape[:2])


FRONTS = {"strided": StridedFront, "residual": ResidualFront}


class TinyLipEncoder(nn.Module):
    """Maps grey mouth crops (B, T, H, W) to lip features (B, T, E). Long clips are encoded in windows.

    It consists of an image front end, a convolution over five frames, and temporal attention.
    """

    def __init__(self, config: TinyEncoderConfig) -> None:
        super().__init__()
        c = config
        self.frame = FRONTS[c.lip_front](c.mouth_size, c.lip_width)
        self.project = nn.Linear(self.frame.out, c.lip_dim)
        self.norm = nn.LayerNorm(c.lip_dim)
        self.context = nn.Conv1d(c.lip_dim, c.lip_dim, 5, padding=2, groups=c.lip_heads)
        self.blocks = nn.ModuleList(AdaLNBlock(c.lip_dim, c.lip_heads) for _ in range(c.lip_blocks))
        self.modulation = modulation_layer(1, c.lip_dim, c.lip_blocks, norms=0)  # embedding of a constant condition
        self.modulation.bias.data.view(-1, AdaLNBlock.PARTS, c.lip_dim)[:, [2, 5]] = 1.0  # the gates are open initially
        self.phoneme_head = nn.Linear(c.lip_dim, c.phonemes) if c.phonemes else None

    def forward(self, mouth: Tensor, frames: Tensor) -> Tensor:
        """Map mouth crops (B, T, H, W) to lip features (B, T, E).

        Args:
            mouth: crops in [0, 1], or uint8 in evaluation mode.
            frames: (B,) number of valid frames of each clip, on the host.
        """
        if self.training:  # no windows: all FSDP ranks must run the blocks equally often
            return self._encode(mouth, frames)
        return encode_in_windows(self._encode, mouth, frames, WINDOW_FRAMES, CONTEXT_FRAMES)

    def _encode(self, mouth: Tensor, frames: Tensor) -> Tensor:
        batch, time = mouth.shape[:2]
        mean = mouth.mean((-1, -2), keepdim=True)  # normalise brightness and contrast per image
        mouth = (mouth - mean) / (mouth.std((-1, -2), keepdim=True) + 0.05)
        valid = torch.arange(time, device=frames.device) < frames[:, None]  # (B, T)
        whole = bool(valid.all())  # on the host
        valid = to_device(valid, mouth.device)
        mouth = mouth * valid[..., None, None]
        h = self.norm(self.project(self.frame(mouth))) * valid[..., None]
        h = h + F.gelu(self.context(h.transpose(1, 2))).transpose(1, 2)
        rotary = rotary_table(time, h.shape[-1] // self.blocks[0].heads, h.device)
        mask = None if whole else valid[:, None, None]
        modulation = self.modulation(h.new_ones(batch, 1)).chunk(len(self.blocks), -1)
        for block, part in zip(self.blocks, modulation):
            h = block(h, part, rotary, mask)
        return h


class TinyFaceEncoder(nn.Module):
    """Maps face crops (n, 3, H, W) in [0, 1] to features (n, E)."""

    def __init__(self, config: TinyEncoderConfig, out: int) -> None:
        super().__init__()
        w = config.face_width
        side = config.face_size // 16
        self.layers = nn.Sequential(*_trunk(3, w, 2 * w, 2 * w), nn.Linear(2 * w * side * side, out))

    def forward(self, faces: Tensor) -> Tensor:
        return self.layers(2 * faces - 1)


class TinyIdentityEncoder(TinyFaceEncoder):
    """Maps face crops (B, F, 3, H, W) in [0, 1] to one embedding per clip (B, E), the mean of unit vectors."""

    def forward(self, faces: Tensor) -> Tensor:
        each = super().forward(faces.flatten(0, 1)).unflatten(0, faces.shape[:2])
        return F.normalize(each, dim=-1).mean(1) * each.shape[-1] ** 0.5


class ConditionEncoders(nn.Module):
    """The three condition encoders of a model, which are trained with it.

    Attributes:
        learns: whether the encoders are trained with the model and part of its state, see `encoders_learn`.
        lip: maps mouth crops (B, T, S, S), in [0, 1] in training and uint8 in inference, and their numbers of valid
            frames (B,), on the host, to features (B, T, lip_dim). `to_unit_range` converts either. Its `phoneme_head`
            is None, or maps the features to phoneme logits for the auxiliary loss.
        identity: maps face crops (B, F, 3, S', S') in [0, 1] to embeddings (B, face_dim).
        expression: maps face crops (n, 3, S', S') in [0, 1] to logits of `EXPRESSIONS` (n, 7).
    """

    learns = True

    def __init__(self, config: TinyEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.lip = TinyLipEncoder(config)
        self.identity = TinyIdentityEncoder(config, config.face_dim)
        self.expression = TinyFaceEncoder(config, len(EXPRESSIONS))

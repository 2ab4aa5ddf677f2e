"""LIA-X: a portrait video as one identity image and a short motion code per frame (Wang et al., 2025).

Axes: B images, T frames, S side of the square image, C channels, D style, M motion. Images are RGB in [-1, 1], (3, S,
S); videos (T, 3, S, S); motion codes (T, M).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.codec import PortraitCodec
from engine.device import to_device
from engine.errors import UserError
from engine.precision import half_precision
from engine.release import weights_digest
from engine.settings import Group, require_range, setting
from lia_x.networks import Decoder, Encoder


@dataclass(frozen=True)
class LiaXConfig(Group):
    """Config of `LiaX`. The defaults are the released network.

    Attributes:
        style_dim: width of the style code before `scale`.
        motion_dim: M, number of motion directions.
        scale: multiplies every width.
        size: S; 2^levels times a base of 2, 3 or 4 (512 = 4 * 2^7, 96 = 3 * 2^5).
        width: channels at full size before `scale`; they double with each halving of the side.
        max_width: maximum number of channels before `scale`.
        depth: residual blocks in each of the two branches of a level.
    """

    style_dim: int = setting(512, 1, 2**14)
    motion_dim: int = setting(40, 1, 2**12)
    scale: int = setting(2, 1, 64)
    size: int = setting(512, 4, 2**13)
    width: int = setting(64, 1, 2**12)
    max_width: int = setting(512, 1, 2**14)
    depth: int = setting(4, 1, 64)

    def __post_init__(self):
        super().__post_init__()
        if self.motion_dim > self.style_dim * self.scale:
            raise UserError(
                f"motion_dim={self.motion_dim} exceeds the style's {self.style_dim * self.scale} dimensions: "
                "that many orthogonal directions do not exist; reduce motion_dim"
            )
        if self.base > 4 or self.base == self.size:
            raise UserError(f"size={self.size} must be 2, 3 or 4 times a power of two, such as 96, 128, 256 or 512")

    @property
    def base(self) -> int:
        """Side of the coarsest feature map."""
        base = self.size
        while base > 4 and base % 2 == 0:
            base //= 2
        return base

    @property
    def widths(self) -> list[int]:
        """Channels per level, from side 2 * base to side `size`."""
        halvings = range((self.size // self.base).bit_length() - 2, -1, -1)
        return [min(self.max_width, self.width << n) * self.scale for n in halvings]


@dataclass(frozen=True)
class Identity:
    """Encoded identity image, the input of rendering.

    Attributes:
        style: (1, D), before adding motion.
        maps: feature maps (1, C, side, side), coarsest first.
    """

    style: Tensor
    maps: list[Tensor]


class LiaX(PortraitCodec):
    """Portrait codec with encoder, motion directions and decoder.

    Inference methods run without gradients on the module's device, in chunks over time. Training uses `encoder` and
    `decoder` (or `forward`) directly.
    """

    kind = "lia_x"
    Config = LiaXConfig
    sample_rate = 25

    def __init__(self, config: LiaXConfig):
        super().__init__(config)
        self.size = config.size
        self.channels = config.motion_dim
        style_dim = config.style_dim * config.scale
        self.encoder = Encoder(config.widths, config.base, style_dim, config.motion_dim)
        self.decoder = Decoder(config.widths, config.base, style_dim, config.motion_dim, config.depth)

    @staticmethod
    def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        from lia_x.upstream import read_official

        return read_official(path)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> LiaX:
        """Create a network with random weights. `arguments` are the fields of `LiaXConfig`.

        A release may also have `keeps`, the digest of an earlier codec whose motion codes it also decodes for cartoon
        faces.
        """
        return cls(LiaXConfig(**{name: value for name, value in arguments.items() if name != "keeps"}))

    # Inference ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def identity(self, picture: Tensor) -> Identity:
        """Encode an identity image (3, S, S) for rendering."""
        picture = picture[None] if picture.ndim == 3 else picture
        self._check(picture, "picture", one=True)
        return Identity(*self.encoder(self._placed(picture)))

    @torch.no_grad()
    def encode(self, video: Tensor, chunk: int = 8) -> Tensor:
        """Encode frames (T, 3, S, S) to absolute motion codes (T, M)."""
        self._check(video, "video")
        require_range("chunk", chunk, 1, 2**20)
        return torch.cat([self.encoder.motion(self._placed(part)) for part in video.split(chunk)])

    @torch.no_grad()
    def decode(self, motion: Tensor, identity: Tensor | Identity, chunk: int = 8) -> Tensor:
        """Decode absolute motion codes (T, M) with an identity, or its image (3, S, S), to frames (T, 3, S, S), not
        clamped.
        """
        identity = identity if isinstance(identity, Identity) else self.identity(identity)
        if motion.ndim != 2 or motion.shape[1] != self.config.motion_dim or not len(motion):
            raise UserError(f"motion of shape {tuple(motion.shape)}: expected (frames, {self.config.motion_dim})")
        require_range("chunk", chunk, 1, 2**20)
        codes = to_device(motion.float(), self._device())
        styles = [self.decoder.navigate(identity.style, part) for part in codes.split(chunk)]
        with half_precision(self._device(), self.dtype):
            return torch.cat([self.decoder(style, identity.maps) for style in styles])

    def _device(self) -> torch.device:
        return self.decoder.constant.device

    def _placed(self, pictures: Tensor) -> Tensor:
        """Return images on the device and in the dtype of the weights."""
        return to_device(pictures, self._device()).to(self.decoder.constant.dtype)

    def _check(self, pictures: Tensor, what: str, one: bool = False) -> None:
        """Raise UserError unless the input has images of this model's size: any number of them, or exactly `one`."""
        if not isinstance(pictures, Tensor):
            raise UserError(f"{what} of type {type(pictures).__name__}: expected a tensor of RGB images")
        side = self.config.size
        fits = pictures.ndim == 4 and pictures.shape[1:] == (3, side, side) and len(pictures) > 0
        if not fits or (one and len(pictures) > 1):
            raise UserError(
                f"{what} of shape {tuple(pictures.shape)}: this model takes {'one' if one else 'one or more'} RGB "
                f"images of {side} x {side} (engine.media.pictures resizes them)"
            )
        if not pictures.is_floating_point():
            raise UserError(
                f"{what} of {pictures.dtype}: expected floats in [-1, 1] (engine.media.pictures converts bytes)"
            )

    def digest(self) -> str:
        return weights_digest(self.encoder)

"""The MaskGCT acoustic codec: wave <-> residual codes at 24 kHz, 50 frames a second (Wang et al., 2024).

Axes: B batch, N samples, C latent channels, Q levels, L frames. Waves (B, 1, N) in [-1, 1], codes (B, Q, L) int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.codec import Codec
from engine.device import send
from engine.errors import UserError
from engine.nn.dac import DACDecoder, DACEncoder
from engine.release import load_strict, weights_digest
from engine.settings import Group, setting
from rvq_codec.quantizer import Quantized, ResidualQuantizer
from rvq_codec.released import read_official
from rvq_codec.vocos import VocosDecoder


@dataclass(frozen=True)
class RVQCodecConfig(Group):
    """Constructor arguments of `RVQCodec`; the defaults are the released MaskGCT codec.

    Attributes:
        encoder_width, ratios, encoder_tanh: of the DAC encoder; the product of the ratios is the hop.
        latent_channels: C.
        levels, codebook_size, codebook_dim, normalize: of the residual quantiser.
        quantizer_dropout, commitment, codebook: its training settings.
        decoder: "vocos" (released) or "conv" (a DAC decoder with `conv_width` and `conv_ratios`).
        vocos_dim, vocos_intermediate, vocos_layers, n_fft, hop: of the Vocos decoder.
    """

    sample_rate: int = setting(24_000, 1, 2**20)
    encoder_width: int = setting(96, 1, 2**14)
    ratios: tuple[int, ...] = setting((3, 4, 5, 8), 1, 2**10)
    encoder_tanh: bool = False
    latent_channels: int = setting(256, 1, 2**14)
    levels: int = setting(12, 1, 256)
    codebook_size: int = setting(1024, 1, 2**16)
    codebook_dim: int = setting(8, 1, 2**12)
    normalize: bool = True
    quantizer_dropout: float = setting(0.5, 0.0, 1.0)
    commitment: float = setting(0.25, 0.0, 1e6)
    codebook: float = setting(1.0, 0.0, 1e6)
    decoder: str = setting("vocos", choices=("vocos", "conv"))
    vocos_dim: int = setting(512, 1, 2**14)
    vocos_intermediate: int = setting(4096, 1, 2**16)
    vocos_layers: int = setting(30, 1, 256)
    n_fft: int = setting(1920, 2, 2**16)
    hop: int = setting(480, 1, 2**16)
    conv_width: int = setting(1536, 1, 2**16)
    conv_ratios: tuple[int, ...] = setting((8, 5, 4, 3), 1, 2**10)

    @property
    def decoder_hop(self) -> int:
        return self.hop if self.decoder == "vocos" else math.prod(self.conv_ratios)


def build_encoder(config: RVQCodecConfig) -> DACEncoder:
    return DACEncoder(config.encoder_width, config.ratios, config.latent_channels, config.encoder_tanh)


def build_quantizer(config: RVQCodecConfig) -> ResidualQuantizer:
    return ResidualQuantizer(
        config.latent_channels,
        config.levels,
        config.codebook_size,
        config.codebook_dim,
        config.normalize,
        config.quantizer_dropout,
        config.commitment,
        config.codebook,
    )


def build_decoder(config: RVQCodecConfig) -> VocosDecoder | DACDecoder:
    if config.decoder == "conv":
        return DACDecoder(config.latent_channels, config.conv_width, config.conv_ratios)
    return VocosDecoder(
        config.latent_channels,
        config.vocos_dim,
        config.vocos_intermediate,
        config.vocos_layers,
        config.n_fft,
        config.hop,
    )


class RVQCodec(Codec):
    """Encoder, residual quantiser and decoder."""

    kind = "rvq_codec"
    Config = RVQCodecConfig
    read_official = staticmethod(read_official)

    def __init__(self, config: RVQCodecConfig):
        super().__init__(config)
        if math.prod(config.ratios) != config.decoder_hop:
            raise UserError(
                f"ratios {list(config.ratios)} make a hop of {math.prod(config.ratios)}, but the decoder's hop is "
                f"{config.decoder_hop}: they must be equal"
            )
        self.encoder = build_encoder(config)
        self.quantizer = build_quantizer(config)
        self.decoder = build_decoder(config)
        self.hop, self.sample_rate = config.decoder_hop, config.sample_rate
        self.levels, self.codes = config.levels, config.codebook_size
        if config.decoder == "vocos":
            self.reach = self.decoder.reach, self.decoder.reach

    def frames(self, samples: int) -> int:
        """Frames of a wave of `samples` samples: floor((N + 13) / 480) for the released ratios."""
        return self.encoder.frames(samples)

    def forward(self, wave: Tensor, quantize: bool = True) -> tuple[Tensor, Tensor, Quantized | None]:
        """Training pass: (B, 1, N) -> wave (B, 1, hop * frames(N)), latent (B, C, L), what the quantiser made.

        Without `quantize` the decoder gets the latent as it is, and the last result is None.
        """
        z = self.encoder(wave)
        quantized = self.quantizer(z) if quantize else None
        return self.decoder(z if quantized is None else quantized.latent), z, quantized

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Wave (B, 1, N) -> codes (B, Q, frames(N)) int64.

        Raises:
            UserError: the wave has another shape or is too short for one frame.
        """
        self.checked_frames(wave)
        return self.quantizer.quantize(self.encoder(wave))

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Codes (B, Q, L) -> wave (B, 1, hop * L), from the first `levels` levels (all that are given by default).

        Codes on the host are checked there and sent to the codec's device; of others the host waits for the range.

        Raises:
            UserError: the codes have another rank, too few or too many levels, no frame, or a value outside the books.
        """
        if codes.ndim != 3 or codes.shape[-1] < 1:
            raise UserError(f"codes of shape {tuple(codes.shape)}: give (batch, levels, frames) with a frame or more")
        low, high = torch.stack(codes.aminmax()).tolist()
        if low < 0 or high >= self.codes:
            raise UserError(f"codes from {low} to {high}: this codec's codes are 0..{self.codes - 1}")
        device = next(self.quantizer.parameters()).device
        return self.decoder(self.quantizer.embed(send(codes, device), levels))

    def digest(self) -> str:
        return weights_digest(self.encoder, self.quantizer)

    @classmethod
    def from_tensors(cls, sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> RVQCodec:
        codec = cls(RVQCodecConfig(**sizes))  # on no meta device, as its window is no tensor of the state
        load_strict(codec, state, source)
        return codec.eval()

"""The MaskGCT acoustic codec: wave <-> residual codes at 24 kHz, 50 frames per second (Wang et al., 2024).

Axes: B batch, N samples, C latent channels, Q levels, L frames. Waves (B, 1, N) in [-1, 1], codes (B, Q, L) int64.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.codec import Codec
from engine.device import to_device
from engine.errors import UserError
from engine.nn.dac import DACDecoder, DACEncoder
from engine.nn.vocos import VocosDecoder
from engine.release import load_strict, weights_digest
from rvq_codec.config import RVQCodecConfig
from rvq_codec.quantizer import Quantized, ResidualQuantizer
from rvq_codec.upstream import read_official


def build_decoder(config: RVQCodecConfig) -> VocosDecoder | DACDecoder:
    if config.decoder == "conv":
        return DACDecoder(config.latent_channels, config.conv_width, config.conv_ratios)
    blocks = config.vocos_dim, config.vocos_intermediate, config.vocos_layers
    return VocosDecoder(config.latent_channels, *blocks, config.n_fft, config.hop)


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
        self.encoder = DACEncoder(config.encoder_width, config.ratios, config.latent_channels, config.encoder_tanh)
        self.quantizer = ResidualQuantizer(config)
        self.decoder = build_decoder(config)
        self.hop = config.decoder_hop
        self.sample_rate = config.sample_rate
        self.levels = config.levels
        self.codes = config.codebook_size
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
        return self.decoder(self.quantizer.embed(to_device(codes, device), levels))

    def digest(self) -> str:
        return weights_digest(self.encoder, self.quantizer)

    @classmethod
    def from_tensors(cls, sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> RVQCodec:
        codec = cls(RVQCodecConfig(**sizes))  # on no meta device, as its window is no tensor of the state
        load_strict(codec, state, source)
        return codec.eval()

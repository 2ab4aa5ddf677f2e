"""The MaskGCT acoustic codec: residual codes at 24 kHz, 50 frames per second (Wang et al., 2024).

Axes: B batch, N samples, C latent channels, Q levels, L frames. Waveforms (B, 1, N) in [-1, 1], codes (B, Q, L) int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from engine.settings import Group, setting
from rvq_codec.quantizer import Quantized, ResidualQuantizer


@dataclass(frozen=True)
class RVQCodecConfig(Group):
    """Config of `RVQCodec`. The defaults are the released MaskGCT codec.

    Attributes:
        encoder_width, ratios, encoder_tanh: arguments of the DAC encoder; the product of the ratios is the hop.
        latent_channels: C.
        levels, codebook_size, codebook_dim, normalize: arguments of the residual quantiser.
        quantizer_dropout, commitment, codebook: training settings of the quantiser.
        decoder: "vocos" (released) or "conv" (a DAC decoder with `conv_width` and `conv_ratios`).
        vocos_dim, vocos_intermediate, vocos_layers, n_fft, hop: arguments of the Vocos decoder.
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
    conv_ratios: tuple[int, ...] = setting((8, 5, 4, 3), 2, 2**10)

    @property
    def decoder_hop(self) -> int:
        return self.hop if self.decoder == "vocos" else math.prod(self.conv_ratios)


def build_quantizer(config: RVQCodecConfig) -> ResidualQuantizer:
    """Create the residual quantiser of a config, with random weights."""
    return ResidualQuantizer(
        config.levels,
        config.latent_channels,
        config.codebook_size,
        config.codebook_dim,
        config.normalize,
        config.quantizer_dropout,
        config.commitment,
        config.codebook,
    )


def build_decoder(config: RVQCodecConfig) -> VocosDecoder | DACDecoder:
    """Create the decoder of a config, with random weights."""
    if config.decoder == "conv":
        return DACDecoder(config.latent_channels, config.conv_width, config.conv_ratios)
    blocks = config.vocos_dim, config.vocos_intermediate, config.vocos_layers
    return VocosDecoder(config.latent_channels, *blocks, config.n_fft, config.hop)


class RVQCodec(Codec):
    """Audio codec with encoder, residual quantiser and decoder."""

    kind = "rvq_codec"
    Config = RVQCodecConfig

    def __init__(self, config: RVQCodecConfig):
        super().__init__(config)
        if math.prod(config.ratios) != config.decoder_hop:
            raise UserError(
                f"ratios {list(config.ratios)} result in a hop of {math.prod(config.ratios)}, but the decoder's hop is "
                f"{config.decoder_hop}: they must be equal"
            )
        self.encoder = DACEncoder(config.encoder_width, config.ratios, config.latent_channels, config.encoder_tanh)
        self.quantizer = build_quantizer(config)
        self.decoder = build_decoder(config)
        self.hop = config.decoder_hop
        self.sample_rate = config.sample_rate
        self.levels = config.levels
        self.codes = config.codebook_size
        if config.decoder == "vocos":
            self.reach = self.decoder.reach, self.decoder.reach

    def frames(self, samples: int) -> int:
        """Return the number of frames of a waveform of `samples` samples: floor((N + 13) / 480) for the released
        ratios.
        """
        return self.encoder.frames(samples)

    def forward(self, wave: Tensor, quantize: bool = True) -> tuple[Tensor, Tensor, Quantized | None]:
        """Run the training pass on waveforms (B, 1, N).

        Returns:
            The waveform (B, 1, hop * frames(N)), the latent (B, C, L), and the output of the quantiser. Without
            `quantize`, the decoder receives the unquantised latent, and the last output is None.
        """
        z = self.encoder(wave)
        quantized = self.quantizer(z) if quantize else None
        return self.decoder(z if quantized is None else quantized.latent), z, quantized

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Encode a waveform (B, 1, N) to codes (B, Q, frames(N)) int64.

        Raises:
            UserError: If the waveform has another shape or is too short for one frame.
        """
        self.checked_frames(wave)
        return self.quantizer.quantize(self.encoder(wave))

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Decode codes (B, Q, L) to a waveform (B, 1, hop * L), using the first `levels` levels (all by default).

        Codes on the host are validated there and moved to the codec's device; validating other codes requires a
        device sync.

        Raises:
            UserError: If the codes have the wrong rank, number of levels or values, or no frames.
        """
        if codes.ndim != 3 or not codes.numel() or codes.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"{codes.dtype} codes of shape {tuple(codes.shape)}: expected int64 of shape (batch, levels, frames) "
                "with at least one frame"
            )
        low, high = torch.stack(codes.aminmax()).tolist()
        if low < 0 or high >= self.codes:
            raise UserError(f"codes from {low} to {high}: this codec's codes are 0..{self.codes - 1}")
        device = next(self.quantizer.parameters()).device
        return self.decoder(self.quantizer.embed(to_device(codes, device), levels))

    def digest(self) -> str:
        return weights_digest(self.encoder, self.quantizer)

    @staticmethod
    def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        from rvq_codec.upstream import read_official

        return read_official(path)

    @classmethod
    def from_tensors(cls, sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> RVQCodec:
        codec = cls(RVQCodecConfig(**sizes))  # not on the meta device, as its window is not in the state dict
        load_strict(codec, state, source)
        return codec.eval()

"""Config of the RVQ codec."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.settings import Group, setting


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
    conv_ratios: tuple[int, ...] = setting((8, 5, 4, 3), 1, 2**10)

    @property
    def decoder_hop(self) -> int:
        return self.hop if self.decoder == "vocos" else math.prod(self.conv_ratios)

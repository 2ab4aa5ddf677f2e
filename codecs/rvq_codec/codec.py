"""The MaskGCT acoustic codec: wave <-> residual codes at 24 kHz, 50 frames a second (Wang et al., 2024).

Axes: B batch, N samples, C latent channels, Q levels, L frames. Waves (B, 1, N) in [-1, 1], codes (B, Q, L) int64.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import UserError
from engine.hub import release_folder
from engine.nn.dac import DACDecoder, DACEncoder
from engine.release import half, load_release, load_strict, save_release
from rvq_codec.quantizer import Quantized, ResidualQuantizer
from rvq_codec.vocos import VocosDecoder

KIND = "rvq_codec"


@dataclass(frozen=True)
class RVQCodecConfig:
    """Constructor arguments of `RVQCodec`; the defaults are the released MaskGCT codec.

    Attributes:
        encoder_width, ratios, encoder_tanh: of the DAC encoder; the product of the ratios is the hop.
        latent_channels: C.
        levels, codebook_size, codebook_dim, normalize: of the residual quantiser.
        quantizer_dropout, commitment, codebook: its training settings.
        decoder: "vocos" (released) or "conv" (a DAC decoder with `conv_width` and `conv_ratios`).
        vocos_dim, vocos_intermediate, vocos_layers, n_fft, hop: of the Vocos decoder.
    """

    sample_rate: int = 24_000
    encoder_width: int = 96
    ratios: tuple[int, ...] = (3, 4, 5, 8)
    encoder_tanh: bool = False
    latent_channels: int = 256
    levels: int = 12
    codebook_size: int = 1024
    codebook_dim: int = 8
    normalize: bool = True
    quantizer_dropout: float = 0.5
    commitment: float = 0.25
    codebook: float = 1.0
    decoder: str = "vocos"
    vocos_dim: int = 512
    vocos_intermediate: int = 4096
    vocos_layers: int = 30
    n_fft: int = 1920
    hop: int = 480
    conv_width: int = 1536
    conv_ratios: tuple[int, ...] = (8, 5, 4, 3)

    def __post_init__(self):
        object.__setattr__(self, "ratios", tuple(self.ratios))
        object.__setattr__(self, "conv_ratios", tuple(self.conv_ratios))
        if self.decoder not in ("vocos", "conv"):
            raise UserError(f"decoder={self.decoder!r}: choose vocos or conv")

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


class RVQCodec(nn.Module):
    """Encoder, residual quantiser and decoder.

    Attributes:
        hop: samples of a frame.
        sample_rate: in Hz.
        levels, codebook_size: of the codes.
    """

    def __init__(self, config: RVQCodecConfig):
        super().__init__()
        if math.prod(config.ratios) != config.decoder_hop:
            raise UserError(
                f"ratios {list(config.ratios)} make a hop of {math.prod(config.ratios)}, but the decoder's hop is "
                f"{config.decoder_hop}: they must be equal"
            )
        self.config = config
        self.encoder = build_encoder(config)
        self.quantizer = build_quantizer(config)
        self.decoder = build_decoder(config)
        self.hop, self.sample_rate = config.decoder_hop, config.sample_rate
        self.levels, self.codebook_size = config.levels, config.codebook_size

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
    def encode(self, wave: Tensor, levels: int | None = None) -> Tensor:
        """Wave (B, 1, N) -> codes (B, levels, frames(N)) int64; all levels by default.

        Raises:
            UserError: the wave has another shape or is too short for one frame.
        """
        if wave.ndim != 3 or wave.shape[1] != 1:
            raise UserError(f"wave of shape {tuple(wave.shape)}: give mono waves of shape (batch, 1, samples)")
        if self.frames(wave.shape[-1]) < 1:
            raise UserError(f"wave of {wave.shape[-1]} samples is too short: give {self.encoder.min_samples} or more")
        return self.quantizer.quantize(self.encoder(wave), levels)

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Codes (B, Q, L) -> wave (B, 1, hop * L), from the first `levels` levels (all that are given by default).

        Raises:
            UserError: the codes have another rank, too few or too many levels, no frame, or a value outside the books.
        """
        if codes.ndim != 3 or codes.shape[-1] < 1:
            raise UserError(f"codes of shape {tuple(codes.shape)}: give (batch, levels, frames) with a frame or more")
        low, high = codes.min().item(), codes.max().item()
        if low < 0 or high >= self.codebook_size:
            raise UserError(f"codes from {low} to {high}: this codec's codes are 0..{self.codebook_size - 1}")
        return self.decoder(self.quantizer.embed(codes, levels))

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: RVQCodecConfig | None = None) -> RVQCodec:
        """Load a release folder of this project, or a folder with MaskGCT's released `acoustic_codec` files.

        Args:
            folder: with `config.yaml` and `model.safetensors`; or with `acoustic_codec/model.safetensors` (encoder) and
                `acoustic_codec/model_1.safetensors` (quantiser and decoder), which may also lie in `folder` itself.
            config: of the released-name files, if they are not of the published size.

        Raises:
            UserError: the folder or a file is missing or damaged, or keys or shapes do not fit.
        """
        folder = release_folder(folder)
        for place in (folder / "acoustic_codec", folder):
            if (place / "model_1.safetensors").is_file():
                codec = cls(config or RVQCodecConfig())
                load_strict(codec, read_released(place, codec.config), place)
                return codec.eval()
        return load_release(folder, KIND, lambda arguments: cls(RVQCodecConfig(**arguments)))

    def save(self, folder: str | Path, card: str) -> Path:
        """Write a release folder in half precision, with `card` as its README."""
        config: dict[str, Any] = asdict(self.config)
        config.update(ratios=list(self.config.ratios), conv_ratios=list(self.config.conv_ratios))
        return save_release(folder, KIND, config, half(self.state_dict()), card)


def released_config(config: dict[str, Any], base: RVQCodecConfig | None = None) -> RVQCodecConfig:
    """`RVQCodecConfig` from the released constructor arguments of the encoder or of the decoder.

    Keys that the chosen branch ignores (`in_channel`, `kmeans_*`, `decay`, ...) are ignored here too. An encoder's
    arguments have `d_model`.
    """
    base = base or RVQCodecConfig()
    if "d_model" in config:
        names = {"d_model": "encoder_width", "up_ratios": "ratios", "out_channels": "latent_channels"}
        names["use_tanh"] = "encoder_tanh"
    else:
        names = {
            "in_channels": "latent_channels",
            "num_quantizers": "levels",
            "codebook_size": "codebook_size",
            "codebook_dim": "codebook_dim",
            "use_l2_normlize": "normalize",
            "quantizer_dropout": "quantizer_dropout",
            "commitment": "commitment",
            "codebook_loss_weight": "codebook",
            "vocos_dim": "vocos_dim",
            "vocos_intermediate_dim": "vocos_intermediate",
            "vocos_num_layers": "vocos_layers",
            "n_fft": "n_fft",
            "hop_size": "hop",
            "upsample_initial_channel": "conv_width",
            "up_ratios": "conv_ratios",
        }
        base = replace(base, decoder="vocos" if config.get("use_vocos", False) else "conv")
    return replace(base, **{ours: config[theirs] for theirs, ours in names.items() if theirs in config})


def encoder_from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the released encoder file, as they stand in `RVQCodec`: `block.*` -> `encoder.block.*`."""
    return {f"encoder.{key}": value for key, value in state.items()}


def decoder_from_released(state: dict[str, Tensor], config: RVQCodecConfig) -> dict[str, Tensor]:
    """Keys of the released quantiser and decoder file, as they stand in `RVQCodec`.

    `model.*` becomes `decoder.*` (Vocos) or `decoder.model.*` (convolutional); the stored ISTFT window is dropped
    because the module computes it.
    """
    prefix = "decoder." if config.decoder == "vocos" else "decoder.model."
    renamed = {}
    for key, value in state.items():
        if key != "model.head.istft.window":
            renamed[prefix + key.removeprefix("model.") if key.startswith("model.") else key] = value
    return renamed


def read_released(folder: Path, config: RVQCodecConfig) -> dict[str, Tensor]:
    """The state dict of `RVQCodec` from MaskGCT's two released files in `folder`."""
    states = []
    for name in ("model.safetensors", "model_1.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: download both files of MaskGCT's acoustic_codec folder")
        try:
            states.append(load_file(folder / name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is damaged ({error}); download it again") from error
    return {**encoder_from_released(states[0]), **decoder_from_released(states[1], config)}

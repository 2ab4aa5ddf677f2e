"""WhisperX-VAE: 24-kHz speech as 25 Gaussian latents per second, from acoustic features and Whisper's hidden states.

Axes: B batch, N samples at 24 kHz, T latent frames, C hidden channels, Z latent channels, M mel bands, F mel frames.
Waveforms (B, 1, N) in [-1, 1], latents (B, T, Z). One latent frame is `hop` samples, two Whisper frames, four mel
frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from engine.codec import Codec
from engine.errors import UserError
from engine.media.audio import resample
from engine.nn.dac import DACDecoder, DACEncoder, WNConv1d
from engine.nn.mel import HOP, RATE, log_mel, pad_or_trim
from engine.nn.vocos import VocosDecoder
from engine.release import weights_digest
from engine.settings import Group, setting

POSITIONS = "whisper.embed_positions.weight"


@dataclass(frozen=True)
class WhisperXVAEConfig(Group):
    """Config of `WhisperXVAE`. The defaults are the released network (`encoder_width` as far as known).

    Attributes:
        sample_rate: sampling rate of waveforms in Hz.
        encoder_width, encoder_ratios: arguments of the DAC encoder; the product of the ratios is the hop.
        hidden: C, width of the encoder's output and of the Whisper states.
        latent_dim: Z.
        decoder: "dac" (released), or "vocos", which is faster on a CPU.
        decoder_width, decoder_ratios: arguments of the DAC decoder.
        vocos_channels, vocos_dim, vocos_intermediate, vocos_layers, vocos_hop, n_fft: arguments of the Vocos decoder,
            whose frames have `vocos_hop` samples.
        mel_bands: M.
        whisper_context: Whisper frames (50 per second) of its fixed window, which has twice as many mel frames.
        whisper_heads, whisper_layers: arguments of the Whisper encoder.
    """

    sample_rate: int = setting(24_000, 1, 2**20)
    encoder_width: int = setting(64, 1, 2**14)
    encoder_ratios: tuple[int, ...] = setting((2, 4, 10, 12), 1, 2**10)
    hidden: int = setting(1280, 1, 2**14)
    latent_dim: int = setting(32, 1, 2**14)
    decoder: str = setting("dac", choices=("dac", "vocos"))
    decoder_width: int = setting(1536, 1, 2**16)
    decoder_ratios: tuple[int, ...] = setting((12, 10, 4, 2), 2, 2**10)
    vocos_channels: int = setting(128, 1, 2**14)
    vocos_dim: int = setting(256, 1, 2**14)
    vocos_intermediate: int = setting(768, 1, 2**16)
    vocos_layers: int = setting(8, 1, 256)
    vocos_hop: int = setting(480, 1, 2**16)
    n_fft: int = setting(720, 2, 2**16)
    mel_bands: int = setting(128, 1, 2**10)
    whisper_context: int = setting(1500, 1, 2**16)
    whisper_heads: int = setting(20, 1, 256)
    whisper_layers: int = setting(32, 1, 256)

    def __post_init__(self):
        super().__post_init__()
        if self.hidden % (2 * self.whisper_heads):
            raise UserError(f"hidden={self.hidden} must be an even multiple of whisper_heads={self.whisper_heads}")
        if self.decoder == "vocos":
            if self.hop % self.vocos_hop or self.hop == self.vocos_hop:
                raise UserError(f"vocos_hop={self.vocos_hop} must divide the hop of {self.hop} and be smaller")
            return
        if math.prod(self.encoder_ratios) != math.prod(self.decoder_ratios):
            raise UserError(
                f"encoder_ratios={list(self.encoder_ratios)} and decoder_ratios={list(self.decoder_ratios)} have "
                "different products: they must result in the same hop"
            )
        if self.decoder_width % 2 ** len(self.decoder_ratios):
            raise UserError(
                f"decoder_width={self.decoder_width} cannot be halved {len(self.decoder_ratios)} times, "
                f"once for each of decoder_ratios={list(self.decoder_ratios)}"
            )

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_ratios)

    @property
    def max_frames(self) -> int:
        """Maximum number of latent frames in Whisper's window."""
        return self.whisper_context // 2


class UpsampledVocos(VocosDecoder):
    """Vocos decoder with several frames per latent frame: (B, C, T) -> (B, 1, hop T)."""

    def __init__(self, config: WhisperXVAEConfig):
        channels = config.vocos_channels
        blocks = (config.vocos_dim, config.vocos_intermediate, config.vocos_layers)
        super().__init__(channels, *blocks, config.n_fft, config.vocos_hop)
        ratio = config.hop // config.vocos_hop
        steps = {"stride": ratio, "padding": math.ceil(ratio / 2), "output_padding": ratio % 2}
        self.up = nn.ConvTranspose1d(config.hidden, channels, 2 * ratio, **steps)
        self.reach = math.ceil(self.reach / ratio) + 1  # in latent frames

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.up(x))


class WhisperXVAE(Codec):
    """Audio codec with acoustic encoder, Whisper encoder, Gaussian bottleneck and acoustic decoder."""

    kind = "whisperx_vae"
    Config = WhisperXVAEConfig

    def __init__(self, config: WhisperXVAEConfig):
        super().__init__(config)
        self.sample_rate = config.sample_rate
        self.hop = config.hop
        self.channels = config.latent_dim
        self.encoder = DACEncoder(config.encoder_width, config.encoder_ratios, config.hidden)
        whisper = WhisperConfig(
            num_mel_bins=config.mel_bands,
            max_source_positions=config.whisper_context,
            d_model=config.hidden,
            encoder_attention_heads=config.whisper_heads,
            encoder_layers=config.whisper_layers,
            encoder_ffn_dim=4 * config.hidden,
            dropout=0.0,
            encoder_layerdrop=0.0,
        )
        self.whisper = WhisperEncoder(whisper)  # mel (B, M, 2 * context) -> states (B, context, C)
        self.in_proj = WNConv1d(config.hidden, 2 * config.latent_dim, 1)
        self.out_proj = WNConv1d(config.latent_dim, config.hidden, 1)
        if config.decoder == "vocos":
            self.decoder = UpsampledVocos(config)
            self.reach = self.decoder.reach, self.decoder.reach
        else:
            self.decoder = DACDecoder(config.hidden, config.decoder_width, config.decoder_ratios)
            self.reach = self.decoder.reach

    def frames(self, samples: int) -> int:
        """Return the number of latent frames of a waveform of `samples` samples: floor((N + 12) / 960) for the released
        ratios.
        """
        return self.encoder.frames(samples)

    def mel(self, wave16: Tensor) -> Tensor:
        """Compute the mel spectrogram (B, M, 2 * context) of 16-kHz waveforms (B, N16), trimmed or padded to Whisper's
        window.
        """
        window = 2 * self.config.whisper_context * HOP
        return log_mel(pad_or_trim(wave16, window), self.config.mel_bands)

    def semantic(self, mel: Tensor) -> Tensor:
        """Map a mel spectrogram (B, M, 2 * context) to Whisper's last hidden states (B, context, C), 50 per second."""
        expected = (self.config.mel_bands, 2 * self.config.whisper_context)
        if mel.ndim != 3 or mel.shape[1:] != expected:
            raise UserError(f"mel of shape {tuple(mel.shape)}: expected (batch, {expected[0]}, {expected[1]})")
        return self.whisper(mel).last_hidden_state

    def pooled_states(self, mel: Tensor, frames: int) -> Tensor:
        """Map a mel spectrogram (B, M, 2 * context) to the first `frames` averages of two Whisper states, (B, C, T)."""
        return F.avg_pool1d(self.semantic(mel)[:, : 2 * frames].transpose(1, 2), 2)

    def posterior(self, wave: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveform (B, 1, N) and mel spectrogram (B, M, 2 * context) to mean and raw scale, both (B, Z, T).

        The waveform is not cropped to a multiple of the hop: all samples affect the last frames.
        """
        return self.project(wave, self.pooled_states(mel, self.frames_in_window(wave)))

    def frames_in_window(self, wave: Tensor) -> int:
        """Return T of a waveform (B, 1, N), which must not be longer than Whisper's window."""
        frames = self.checked_frames(wave)
        if frames > self.config.max_frames:
            raise UserError(
                f"wave of {wave.shape[-1]} samples is longer than Whisper's window: expected at most "
                f"{self.config.max_frames * self.hop}"
            )
        return frames

    def project(self, wave: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveform (B, 1, N) and pooled Whisper states (B, C, T) to mean and raw scale, both (B, Z, T)."""
        mean, scale = self.in_proj(self.encoder(wave) + states).chunk(2, dim=1)
        return mean, scale

    @torch.no_grad()
    def encode_window(self, wave: Tensor, mel: Tensor) -> Tensor:
        """Encode a waveform (B, 1, N) at 24 kHz within Whisper's window, and its mel spectrogram, to means (B,
        T, Z).
        """
        return self.posterior(wave, mel)[0].transpose(1, 2)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Encode waveforms (B, 1, N) at 24 kHz of any length to posterior means (B, N // hop, Z) on the model's device.

        Longer waveforms are encoded in windows that overlap by a quarter. Each frame is taken from a window in which
        its distance to an inner boundary is at least an eighth of the window.

        Raises:
            UserError: If the waveform has another shape or is shorter than one frame.
        """
        self.checked_frames(wave)
        frames = wave.shape[-1] // self.hop
        if frames < 1:
            raise UserError(f"wave of {wave.shape[-1]} samples: expected at least {self.hop}")
        max_frames = self.config.max_frames
        wave = wave.to(self.in_proj.weight_g.device)
        wave16 = resample(wave[:, 0], self.sample_rate, RATE)
        if frames <= max_frames:
            return self.encode_window(wave[..., : frames * self.hop], self.mel(wave16))
        latents = wave.new_empty(len(wave), frames, self.channels)
        margin = max_frames // 8
        starts = [*range(0, frames - max_frames, max_frames - 2 * margin), frames - max_frames]
        for start in starts:
            piece = wave[..., start * self.hop : (start + max_frames) * self.hop]
            first = start * self.hop * RATE // self.sample_rate
            found = self.encode_window(piece, self.mel(wave16[:, first:]))
            skipped = margin if start else 0
            latents[:, start + skipped : start + max_frames] = found[:, skipped:]
        return latents

    @torch.no_grad()
    def encode_beginning(self, wave: Tensor, frames: int) -> Tensor:
        """Return posterior means (B, frames, Z). Whisper receives the whole waveform, as for prefixes in the official
        program.
        """
        wave = wave.to(self.in_proj.weight_g.device)
        mel = self.mel(resample(wave[:, 0], self.sample_rate, RATE))
        return self.encode_window(wave[..., : frames * self.hop], mel)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, T, Z) to waveforms (B, 1, hop * T); those of a DAC decoder are in (-1, 1).

        Raises:
            UserError: If the latents have another shape or no frames.
        """
        if latents.ndim != 3 or latents.shape[2] != self.channels or not latents.shape[1]:
            raise UserError(f"latents of shape {tuple(latents.shape)}: expected (batch, frames >= 1, {self.channels})")
        return self.decoder(self.out_proj(latents.transpose(1, 2)))

    def digest(self) -> str:
        return weights_digest(self.encoder, self.whisper, self.in_proj)

    @staticmethod
    def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        from whisperx_vae.upstream import read_official

        return read_official(path)

    @classmethod
    def from_tensors(cls, sizes: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> WhisperXVAE:
        config = WhisperXVAEConfig(**sizes)
        positions = {POSITIONS: sinusoids(config.whisper_context, config.hidden)}  # older files do not store them
        return super().from_tensors(sizes, positions | state, source)

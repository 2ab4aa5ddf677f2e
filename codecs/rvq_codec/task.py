"""Training task of the RVQ codec: mel, adversarial and feature matching losses.

Axes: B batch, N samples, L frames, C latent channels, Q levels, K codes per codebook, M pooled latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.codec import load_like
from engine.errors import UserError
from engine.nn.audio_losses import (
    CompressedSpectrumLoss,
    DisturbanceLoss,
    MultiResolutionSTFTLoss,
    MultiScaleMelLoss,
)
from engine.nn.dac import DownBlock, UpBlock
from engine.nn.discriminators import WaveDiscriminators
from engine.nn.vocos import ConvNeXtBlock
from engine.settings import require_range
from engine.training import distributed
from engine.training.gan import GANTask
from engine.training.task import ReleaseInfo
from rvq_codec.codebooks import count_codes, perplexity, restart_dead_codes, warm_start
from rvq_codec.codec import RVQCodec, RVQCodecConfig
from rvq_codec.latent_targets import SpeechFeatures

# Fields that do not affect the network's shapes.
SETTINGS = (
    "quantizer_dropout",
    "commitment",
    "codebook",
)
DECODER = ("decoder", "conv_width", "conv_ratios", "vocos_dim", "vocos_intermediate", "vocos_layers", "n_fft")


def _load(folder: str, config: RVQCodecConfig, decoder_only: bool) -> RVQCodec:
    """Load the codec of a release with the training settings of `config`, whose network must be the same.

    With `decoder_only`, the decoder may differ and is then initialised randomly.
    """
    old = load_like(RVQCodec, folder, config, SETTINGS + DECODER * decoder_only)
    codec = RVQCodec(config)
    codec.encoder.load_state_dict(old.encoder.state_dict())
    codec.quantizer.load_state_dict(old.quantizer.state_dict())
    if all(getattr(old.config, name) == getattr(config, name) for name in DECODER):
        codec.decoder.load_state_dict(old.decoder.state_dict())
    return codec


def _perplexity(counts: list[Tensor]) -> list[float]:
    return [round(x, 1) for x in perplexity(sum(counts)).tolist()]


def _used(counts: list[Tensor]) -> list[float]:
    return [round(x, 3) for x in (sum(counts) > 0).double().mean(-1).tolist()]


def _distance(z: Tensor, features: Tensor) -> Tensor:
    """Return the mean squared error between latent and features over the common frames."""
    length = min(z.shape[-1], features.shape[-1])
    return (z[..., :length] - features[..., :length]).square().mean()


class RVQCodecTask(GANTask):
    """Losses, schedule of stages, validation and release of an `RVQCodec`.

    Training has several stages. With `features`, until step `until` the encoder regresses speech features while the
    decoder is trained on these features. Then an autoencoder is trained until `quantizer_start`, where the codebooks
    are initialised by k-means. Adversarial training starts at `gan_start`.

    Args:
        codec: fields of `RVQCodecConfig`.
        mel: `n_mels` and `windows` of the mel loss.
        weights: weights of the losses `mel`, `stft`, `spectrum` (compressed complex spectra), `disturbance` (of
            loudness, modelled on PESQ), `feature` and `adversarial`; commitment and codebook weights are in the codec
            config.
        period, spectrogram: arguments of the multi-period and multi-resolution discriminators.
        features: `mel_bands` and `low_samples` (together the latent's channels), `until`, and what is kept afterwards:
            the first `envelope_levels` levels only encode the mel bands, which are still regressed with weight `keep`.
            The first levels then encode content and timbre, and glottal pulses, which faces do not predict, are in
            later levels. None: no such stage.
        quantizer_start, gan_start: see above. None disables the discriminators.
        decoder_only: freeze encoder and quantiser of `init`, so that codes do not change. A decoder of another size is
            initialised randomly.
        restart_every: steps between restarts of dead codes.
        pool: M, number of stored latents for k-means and restarts.
        init: initial release instead of random weights. Its codebooks are used from the first step, so that `features`
            and `quantizer_start` are ignored.
        validation: `root`, `splits` and `clips` (per split). None disables it.
    """

    figures: ClassVar = {"perplexity": _perplexity, "used": _used}

    def __init__(
        self,
        codec: Mapping[str, Any],
        mel: Mapping[str, Any],
        weights: Mapping[str, float],
        period: Mapping[str, Any],
        spectrogram: Mapping[str, Any],
        features: Mapping[str, int] | None = None,
        quantizer_start: int = 0,
        gan_start: int | None = 0,
        decoder_only: bool = False,
        restart_every: int = 100,
        pool: int = 16_384,
        init: str | None = None,
        validation: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        config = RVQCodecConfig(**codec)
        require_range("task.restart_every", restart_every, 1, 10**9)
        require_range("task.pool", pool, 1, 10**8)
        self.codec = _load(init, config, decoder_only) if init else RVQCodec(config)
        self.discriminator = WaveDiscriminators(period, spectrogram)
        self.mel_loss = MultiScaleMelLoss(config.sample_rate, **mel)
        kinds = {
            "stft": MultiResolutionSTFTLoss,
            "spectrum": CompressedSpectrumLoss,
            "disturbance": lambda: DisturbanceLoss(config.sample_rate),
        }
        self.wave_losses = nn.ModuleDict({name: make() for name, make in kinds.items() if weights.get(name)})
        self.weights = dict(weights)
        if decoder_only:
            if not init:
                raise UserError("task.decoder_only=true needs task.init, the release whose codes are preserved")
            self.codec.encoder.requires_grad_(False)
            self.codec.quantizer.requires_grad_(False)
        self.decoder_only = decoder_only
        if init:
            features = None
            quantizer_start = 0
        self.features = None
        self.features_until = 0
        self.envelope_levels = 0
        self.keep = 0.0
        if features:
            bands = features["mel_bands"]
            low = features["low_samples"]
            if bands + low != config.latent_channels or config.hop % low:
                raise UserError(
                    f"features: {bands} mel bands and {low} low-band samples must add up to the "
                    f"{config.latent_channels} latent channels, and {low} must divide the hop of {config.hop}"
                )
            self.features = SpeechFeatures(bands, low, config.sample_rate, config.hop)
            self.features_until = features["until"]
            self.envelope_levels = features["envelope_levels"]
            self.keep = features.get("keep", 0.0)
        self.quantizer_start = quantizer_start
        self.gan_start = gan_start
        self.restart_every = restart_every
        self.warm_started = bool(init)
        self.validation = validation
        self.register_buffer("pooled", torch.zeros(pool, config.latent_channels))
        self.register_buffer("counts", torch.zeros(config.levels, config.codebook_size, dtype=torch.int64))

    def parts(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "generator": self.codec}

    def blocks(self) -> list[nn.Module]:
        return [m for m in self.codec.modules() if isinstance(m, (DownBlock, UpBlock, ConvNeXtBlock))]

    def unsharded_modules(self) -> list[nn.Module]:
        """Return the quantiser, whose codebooks are initialised and restarted in place."""
        return [self.codec.quantizer]

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """See `GANTask.forward`. batch["wave"] is (B, 1, N).

        Latents are stored in the pool, and codes are counted, to maintain the codebooks.
        """
        losses = super().forward(batch, part)
        if part == "discriminator" and self.training and not self.decoder_only:
            vectors = batch["_run"]["latent"].detach().transpose(1, 2).flatten(0, 1).float()[: len(self.pooled)]
            self.pooled.copy_(torch.cat([self.pooled[len(vectors) :], vectors]))  # replacing the oldest
            if (quantized := batch["_run"]["quantized"]) is not None:
                self.counts += distributed.all_reduce(count_codes(quantized.codes, self.codec.codes))
        return losses

    def begin_step(self, step: int) -> None:
        """Initialise codebooks at `quantizer_start`, restart dead codes later, and restrict the first levels to the mel
        bands.

        The main process updates the codebooks and broadcasts them, as sums on different GPUs differ by rounding.
        """
        super().begin_step(step)
        since = step - self.quantizer_start
        if self.decoder_only or since < 0:
            return
        if self.keep and since > 0:
            with torch.no_grad():
                for level in self.codec.quantizer.quantizers[: self.envelope_levels]:
                    level.in_project.weight_v[:, self.features.mel_bands :] = 0
        if since > 0 and since % self.restart_every == 0:
            if distributed.is_main():
                restart_dead_codes(self.codec.quantizer, self.pooled, self.counts, step)
        elif since == 0 and not self.warm_started:
            self._warm_start(step)
        else:
            return
        self.counts.zero_()
        distributed.broadcast(p.detach() for p in self.codec.quantizer.parameters())

    def _warm_start(self, step: int) -> None:
        """Initialise the codebooks from the pooled latents, if any. Synchronises once per run."""
        latents = self.pooled[self.pooled.abs().sum(1) > 0]
        if len(latents) and distributed.is_main():
            bands = self.features.mel_bands if self.features else 0
            generator = torch.Generator().manual_seed(step)
            warm_start(self.codec.quantizer, latents, generator, self.envelope_levels, bands)

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        wave = batch["wave"]
        codec = self.codec
        features_first = self.step < self.features_until
        if features_first or self.keep:
            with torch.no_grad(), torch.autocast(wave.device.type, enabled=False):
                features = self.features(wave.float())  # (B, C, L)
        quantized = regression = None
        if features_first:
            z = codec.encoder(wave)
            regression = _distance(z, features)
            # The decoder will receive latents that are less accurate than the features.
            noise = 0.3 * torch.rand(len(features), 1, 1, device=z.device) * torch.randn_like(features)
            fake = codec.decoder(features + noise)
        else:
            fake, z, quantized = codec(wave, quantize=self.step >= self.quantizer_start)
            if self.keep:
                bands = self.features.mel_bands
                regression = self.keep * _distance(z[:, :bands], features[:, :bands])
        length = min(fake.shape[-1], wave.shape[-1])
        waves = {"fake": fake[..., :length], "real": wave[..., :length]}
        return waves | {"quantized": quantized, "regression": regression, "latent": z}

    def reconstruction_losses(self, run: dict[str, Any]) -> dict[str, Tensor]:
        losses = {"mel": self.mel_loss(run["fake"], run["real"])}
        losses |= {name: loss(run["fake"], run["real"]) for name, loss in self.wave_losses.items()}
        if run["regression"] is not None:
            losses["features"] = run["regression"]
        if run["quantized"] is not None and not self.decoder_only:
            losses["commitment"] = run["quantized"].commitment.sum()
            losses["codebook"] = run["quantized"].codebook.sum()
        return losses

    def code_facts(self, code: Tensor) -> Tensor:
        """Count the codes of each level."""
        return count_codes(code.cpu(), self.codec.codes)

    def release_info(self) -> ReleaseInfo:
        return self.release_of(
            "codec",
            title="RVQ codec",
            about="A 24-kHz wave to discrete tokens, and back.",
            usage="from rvq_codec import RVQCodec\n\n"
            'codes = RVQCodec.from_pretrained("FOLDER").encode(wave)  # (B, 1, N) at 24 kHz',
        )

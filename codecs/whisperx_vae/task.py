"""Training task of WhisperX-VAE: mel, adversarial, feature-matching, KL and semantic losses.

The paper's training code is not published. The losses are those of X-Codec-2.0, with a Gaussian bottleneck instead of
the quantiser.

Axes: B batch, N samples, T latent frames, C hidden channels, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.codec import load_like
from engine.errors import UserError
from engine.hub import check_release
from engine.media.audio import resample
from engine.nn.audio_losses import CompressedSpectrumLoss, DisturbanceLoss, MultiScaleMelLoss
from engine.nn.dac import DownBlock, UpBlock
from engine.nn.discriminators import WaveDiscriminators
from engine.nn.mel import RATE
from engine.nn.vocos import ConvNeXtBlock
from engine.shards.recordings import load_waves
from engine.training.gan import GANTask
from engine.training.task import ReleaseInfo
from whisperx_vae.codec import WhisperXVAE, WhisperXVAEConfig
from whisperx_vae.latent_targets import LatentTargets

INITIAL_SCALE = -1.5  # softplus of it is 0.2: the initial posterior is narrower than the prior


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """Return mean^2 + std^2 - log std^2 - 1, summed over channels and averaged over batch and time, both (B, Z, T).

    This is twice the KL divergence of N(mean, std) from N(0, 1).
    """
    return (mean.square() + std.square() - 2 * std.log() - 1).sum(1).mean()


def semantic_head(width: int) -> nn.Sequential:
    """Return the head that predicts Whisper's states (B, C, T) from the decoder's input (B, C, T).

    Two layers C -> C -> C with GELU (arXiv 2604.23586, appendix B). The paper attaches it "to the decoder output",
    which is a wave with one channel; the only tensor with 1,280 channels is the latent that is projected back, which
    the wave decoder reads. X-Codec2, which the paper follows, has its semantic decoder in the same place.
    """
    return nn.Sequential(nn.Conv1d(width, width, 1), nn.GELU(), nn.Conv1d(width, width, 1))


def semantic_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error plus one minus the cosine similarity of frames; both (B, C, T)."""
    return F.mse_loss(found, wanted) + (1 - F.cosine_similarity(found, wanted, dim=1)).mean()


def _largest_mean(latents: list[Tensor]) -> float:
    """Return the maximum absolute channel mean of latents (T, Z) over all clips."""
    return torch.cat(latents).mean(0).abs().max().item()


def _deviation(latents: list[Tensor]) -> float:
    return torch.cat(latents).std(0).mean().item()


def _speed(latents: list[Tensor]) -> float:
    """Return the RMS frame-to-frame change of a channel relative to its standard deviation, averaged over channels."""
    steps = torch.cat([z.diff(dim=0) for z in latents])
    deviation = torch.cat(latents).std(0)
    return (steps.square().mean(0).sqrt() / deviation.clamp_min(1e-6)).mean().item()


class WhisperXVAETask(GANTask):
    """Losses, stages, validation and release of a `WhisperXVAE`.

    With `targets`, the posterior means regress speech features (`whisperx_vae.latent_targets`). Until step `until` the
    decoder is trained on these features, then on samples of the posterior. Adversarial training starts at `gan_start`.

    The semantic branch is a frozen, pre-trained Whisper encoder with `whisper`, as in the paper. Otherwise, as in the
    tiny model, it is trained jointly from random weights. Its input is the log-mel spectrogram, from which content is
    easier to extract than from the waveform. The semantic loss then prevents the bottleneck from losing the features of
    this branch, but does not train the branch itself.

    Args:
        codec: fields of `WhisperXVAEConfig`.
        mel: `n_mels`, `windows`, `clamp` of the mel loss.
        weights: weights of the losses `mel`, `spectrum` (of compressed complex spectra), `disturbance` (of loudness,
            modelled on PESQ), `adversarial`, `feature`, `kl`, `semantic` and, with `targets`, `targets`. Waveform
            losses without a weight are not computed.
        period, spectrogram: arguments of the multi-period and multi-resolution discriminators.
        targets: `root`, `split` and `clips` from which the statistics of the features are estimated, `until`, and
            `noise`: maximum standard deviation of the noise on features for the decoder. None: no features.
        gan_start: see above. None: no discriminators.
        decoder_only: train only the decoder, on samples of the posterior, so that the latents of `init` do not change.
        whisper: folder or hub name of a transformers Whisper model.
        init: initial release instead of random weights. The decoder is then not trained on features.
        validation: `root`, `splits` and `clips` (per split). None disables it.
    """

    figures: ClassVar = {"latent_mean": _largest_mean, "latent_std": _deviation, "latent_speed": _speed}

    def __init__(
        self,
        codec: Mapping[str, Any],
        mel: Mapping[str, Any],
        weights: Mapping[str, float],
        period: Mapping[str, Any],
        spectrogram: Mapping[str, Any],
        targets: Mapping[str, Any] | None = None,
        gan_start: int | None = 0,
        decoder_only: bool = False,
        whisper: str | None = None,
        init: str | None = None,
        validation: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        config = WhisperXVAEConfig(**codec)
        self.codec = load_like(WhisperXVAE, init, config) if init else WhisperXVAE(config)
        if not init:
            with torch.no_grad():
                self.codec.in_proj.bias[config.latent_dim :] = INITIAL_SCALE
        self.frozen_whisper = whisper is not None
        self.decoder_only = decoder_only
        if self.frozen_whisper:
            _load_whisper(self.codec, whisper)
        self.semantic_head = semantic_head(config.hidden)
        if decoder_only:
            if not init or targets:
                raise UserError(
                    "task.decoder_only=true needs task.init, the release to continue from, and targets=null"
                )
            for module in (self.codec.encoder, self.codec.whisper, self.codec.in_proj, self.semantic_head):
                module.requires_grad_(False)
        self.discriminator = WaveDiscriminators(period, spectrogram)
        self.mel_loss = MultiScaleMelLoss(config.sample_rate, **mel)
        kinds = {"spectrum": CompressedSpectrumLoss, "disturbance": lambda: DisturbanceLoss(config.sample_rate)}
        self.wave_losses = nn.ModuleDict({name: make() for name, make in kinds.items() if weights.get(name)})
        self.weights = dict(weights)
        self.gan_start = gan_start
        self.validation = validation
        self.targets = None
        self.targets_until = 0
        self.noise = 0.0
        if targets:
            waves = load_waves(targets["root"], targets["split"], targets["clips"], config.sample_rate)
            self.targets = LatentTargets(config.latent_dim, config.sample_rate, self.codec.hop)
            self.targets.fit([torch.from_numpy(wave) for wave in waves])
            self.targets_until = 0 if init else targets["until"]
            self.noise = targets["noise"]

    def parts(self) -> dict[str, nn.Module]:
        generator = nn.ModuleDict({"codec": self.codec, "semantic_head": self.semantic_head})
        return {"discriminator": self.discriminator, "generator": generator}

    def blocks(self) -> list[nn.Module]:
        units = [m for m in self.codec.modules() if isinstance(m, (DownBlock, UpBlock, ConvNeXtBlock))]
        return [*units, *self.codec.whisper.layers]

    def train(self, mode: bool = True) -> WhisperXVAETask:
        super().train(mode)
        if self.frozen_whisper:
            self.codec.whisper.eval()
        return self

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """See `GANTask.forward`. batch["wave"] is (B, 1, N) within Whisper's window. `std` is also logged."""
        losses = super().forward(batch, part)
        run = batch["_run"]
        if part == "generator":
            losses["std"] = run["std"].mean().detach()
            if run["from_targets"]:  # every parameter has a gradient in every step
                losses["loss"] = losses["loss"] + 0.0 * (run["std"].sum() + run["mean"].sum())
        return losses

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        codec = self.codec
        codec.frames_in_window(batch["wave"])  # checks the length
        frames = batch["wave"].shape[-1] // codec.hop
        wave = batch["wave"][..., : frames * codec.hop]
        with torch.autocast(wave.device.type, enabled=False):
            mel = codec.mel(resample(wave[:, 0].float(), codec.sample_rate, RATE))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.frozen_whisper or self.decoder_only)):
            states = codec.pooled_states(mel, frames)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            mean, scale = codec.project(wave, states)
            mean = mean.float()
            scale = scale.float()
        std = F.softplus(scale) + 1e-4
        targets = self.targets(wave) if self.targets else None
        from_targets = self.step < self.targets_until
        if from_targets:  # the decoder will receive latents that are less accurate than the features
            width = self.noise * torch.rand(len(wave), 1, 1, device=wave.device)
            latent = targets + width * torch.randn_like(targets)
        else:
            latent = mean + std * torch.randn_like(std)
        hidden = codec.out_proj(latent)
        run = {"real": wave, "fake": codec.decoder(hidden), "mean": mean, "std": std, "targets": targets}
        # If the branch is trained, detach its states, which are the targets.
        return run | {"states": states.detach(), "semantic": self.semantic_head(hidden), "from_targets": from_targets}

    def reconstruction_losses(self, run: dict[str, Any]) -> dict[str, Tensor]:
        losses = {"mel": self.mel_loss(run["fake"], run["real"])}
        losses |= {name: loss(run["fake"], run["real"]) for name, loss in self.wave_losses.items()}
        if not self.decoder_only:
            losses["semantic"] = semantic_loss(run["semantic"].float(), run["states"].float())
            if run["targets"] is not None:
                losses["targets"] = (run["mean"] - run["targets"]).square().mean()
            if not run["from_targets"]:
                losses["kl"] = kl_divergence(run["mean"], run["std"])
        return losses

    def code_facts(self, code: Tensor) -> Tensor:
        """Return the latents (T, Z)."""
        return code[0].cpu()

    def release_info(self) -> ReleaseInfo:
        return self.release_of(
            "codec",
            title="WhisperX-VAE",
            about="A 24-kHz wave to latents, 25 per second, and back.",
            usage="from whisperx_vae import WhisperXVAE\n\n"
            'latents = WhisperXVAE.from_pretrained("FOLDER").encode(wave)  # (B, 1, N) at 24 kHz',
        )


def _load_whisper(codec: WhisperXVAE, name: str) -> None:
    """Replace the encoder of `codec` by that of a transformers Whisper model, frozen."""
    from transformers import WhisperModel

    check_release("task.whisper", name)
    try:
        encoder = WhisperModel.from_pretrained(name).encoder
    except OSError as error:
        raise UserError(f"task.whisper={name} is not a folder or hub name of a Whisper model") from error
    found = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
    if found != {k: tuple(v.shape) for k, v in codec.whisper.state_dict().items()}:
        raise UserError(
            f"task.whisper={name} has other sizes than task.codec: adapt hidden, whisper_* and mel_bands of task.codec"
        )
    codec.whisper.load_state_dict(encoder.state_dict())
    codec.whisper.requires_grad_(False)

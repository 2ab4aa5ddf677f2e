"""Training task of LIA-X: a frame of a clip is reconstructed from another frame and its own motion code.

Axes: B pairs, S side, M motion, L ground-truth movements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.codec import load_like
from engine.errors import UserError
from engine.evaluation.resynthesis import rebuild
from engine.evaluation.validation import ByClip, Share
from engine.media.pictures import fit_frames
from engine.metrics.picture import reconstruction
from engine.settings import require_range
from engine.training.task import ReleaseInfo, Task
from lia_x.codec import LiaX, LiaXConfig
from lia_x.data import held_out_frames
from lia_x.losses import Discriminator, Perceptual, pyramid_l1, region_weights, structural, unexplained

WIDTHS = ("style_dim", "scale", "width", "max_width", "depth")  # fields that do not affect what a motion code is
MOTION_GAIN = 4.0  # scale of the initial motion codes, relative to equalised weights


def _start(config: LiaXConfig) -> LiaX:
    """Create a codec with random weights, but without initial flow and with larger motion codes."""
    codec = LiaX(config)
    # Random flows would displace the whole image and would have to be unlearnt first.
    for level in codec.decoder.levels:
        nn.init.zeros_(level.to_flow.conv.weight)
    # If codes are small relative to the styles, the decoder learns to ignore them.
    with torch.no_grad():
        codec.encoder.to_motion.weight.mul_(MOTION_GAIN)
    return codec


def _pictures(frames: Tensor) -> Tensor:
    """Convert pairs (B, 2, S, S, 3) uint8 to images (2 B, 3, S, S) in [-1, 1], with pairs interleaved."""
    return frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1


class Run(NamedTuple):
    """Inputs and outputs of the codec in a step, for pairs that are interleaved.

    Attributes:
        real: ground-truth images (2 B, 3, S, S), of the size of the reconstructions.
        fake: reconstructions (2 B, 3, S, S), each from its partner.
        still: the partners' own reconstructions (2 B, 3, S, S), or None without the loss `movement`.
        motion: encoded motion codes (2 B, M).
        taught: with `keep` the codes (2 B, M) to preserve, and a mask (2 B, 1) of the frames to which they apply.
    """

    real: Tensor
    fake: Tensor
    still: Tensor | None
    motion: Tensor
    taught: tuple[Tensor, Tensor] | None


class LiaXTask(Task):
    """Losses, validation and release of a `LiaX`.

    Each frame of a pair is reconstructed from style and feature maps of the other frame and its own motion code
    (absolute motion), so that each frame is encoded only once.

    Args:
        codec: fields of `LiaXConfig`.
        weights: weights of the losses: `l1` (over `pyramid` sizes), `structural` (1 - SSIM), `perceptual` (VGG-19;
            needs `vgg`), `adversarial` (non-saturating), `sparsity` (mean absolute motion code), `movement`
            (`unexplained`; the decoder runs twice). 0 disables a loss; with adversarial 0 there is no discriminator.
        pyramid: number of resolutions of the L1 loss, each half of the previous one.
        regions: image regions with larger weights in L1 and structural losses; see `region_weights`.
        growth: progressive growing: the finest `levels` are omitted until step `until`, as they are the most expensive.
            None: all levels from the start.
        guide: `weight` of a loss that regresses motion codes on the batch's "tracks" (movements, NaN where unknown)
            until step `until`. `codes`: indices of these codes, one per movement (default: the first ones). Other
            codes are not supervised. None: no such loss.
        motion_noise: standard deviation of Gaussian noise on the motion codes for the decoder. It makes the decoder
            smooth, and prevents the sparsity loss from merely shrinking the codes.
        init: initial release instead of random weights. `growth` is then ignored.
        decoder_only: freeze the encoder of `init`, so that motion codes do not change. `guide` is then ignored.
        keep: `release`, a codec whose motion codes of cartoon faces, with `people` also of real ones, are preserved,
            and the `weight` of the squared distance to them. Requires batches with the flag "drawn". These faces are
            reconstructed from the preserved codes, so that models of these codes can use the new decoder. None:
            disabled.
        discriminator: `width` and `max_width` of the discriminator.
        vgg: file with torchvision's vgg19 weights.
        validation: `root`, `splits` and `clips` (per split), and with `others` splits of other roots, {split: root};
            None: no validation.
    """

    def __init__(
        self,
        codec: Mapping[str, Any],
        weights: Mapping[str, float],
        pyramid: int = 4,
        regions: Sequence[Mapping[str, float]] = (),
        growth: Mapping[str, int] | None = None,
        guide: Mapping[str, Any] | None = None,
        motion_noise: float = 0.0,
        init: str | None = None,
        decoder_only: bool = False,
        keep: Mapping[str, Any] | None = None,
        discriminator: Mapping[str, int] | None = None,
        vgg: str | None = None,
        validation: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.codec = load_like(LiaX, init, LiaXConfig(**codec)) if init else _start(LiaXConfig(**codec))
        require_range("task.pyramid", pyramid, 1, 8)
        growth = None if init else growth
        if growth:
            require_range("task.growth.levels", growth["levels"], 1, len(self.codec.decoder.levels) - 1)
            # Omitted levels add nothing to the upsampled image, and are then faded in.
            for level in self.codec.decoder.levels[-growth["levels"] :]:
                nn.init.zeros_(level.to_rgb.conv.weight)
        self.decoder_only = decoder_only
        if decoder_only:
            if not init:
                raise UserError("task.decoder_only=true needs task.init, the release whose codes are preserved")
            self.codec.encoder.requires_grad_(False)
        self.keep = keep
        self.teacher = None
        self.teacher_digest = None
        if keep:
            teacher = load_like(LiaX, keep["release"], LiaXConfig(**codec), WIDTHS)
            self.teacher_digest = teacher.digest()
            self.teacher = teacher.encoder.requires_grad_(False)
        self.weights = dict(weights)
        self.pyramid = pyramid
        self.motion_noise = motion_noise
        self.growth = growth
        self.guide = None if decoder_only else guide
        codes = guide.get("codes") if guide else None
        if codes is not None:
            if not isinstance(codes, Sequence) or not 0 < len(codes) == len(set(codes)):
                raise UserError(f"task.guide.codes={codes}: list different motion codes, such as [0, 11]")
            for code in codes:
                require_range("task.guide.codes", code, 0, self.codec.config.motion_dim - 1)
        self.validation = validation
        self.register_buffer("region", region_weights(self.codec.config.size, regions), persistent=False)
        self.discriminator = self.perceptual = None
        if weights["adversarial"]:
            if growth:
                raise UserError(
                    "task.growth does not support an adversarial loss, as the discriminator requires images of one "
                    "size: set task.growth=null or task.weights.adversarial=0"
                )
            if not discriminator:
                raise UserError(
                    f"task.weights.adversarial={weights['adversarial']} requires task.discriminator, such as "
                    "+task.discriminator={width: 16, max_width: 128}"
                )
            self.discriminator = Discriminator(self.codec.config.size, **discriminator)
        if weights["perceptual"]:
            if not vgg:
                raise UserError(
                    f"task.weights.perceptual={weights['perceptual']} requires task.vgg, the file of VGG-19"
                )
            self.perceptual = Perceptual(vgg)

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"generator": self.codec}
        return {"discriminator": self.discriminator, **parts} if self.discriminator else parts

    def blocks(self) -> list[nn.Module]:
        return [*self.codec.encoder.blocks, *self.codec.decoder.levels]

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Return the number of frames of a batch."""
        return 2 * len(batch["frames"])

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Return the losses of a part; batch["frames"] is (B, 2, S, S, 3) bytes, batch["tracks"] (B, 2, L).

        The codec runs once per step, for both parts.
        """
        if "_run" not in batch:
            batch["_run"] = self._run(batch)
        run: Run = batch["_run"]
        if part == "discriminator":
            self.discriminator.requires_grad_(True)
            of_real = F.softplus(-self.discriminator(run.real)).mean()
            of_fake = F.softplus(self.discriminator(run.fake.detach())).mean()
            return {"loss": of_real + of_fake, "real": of_real.detach(), "fake": of_fake.detach()}
        real = run.real.float()
        fake = run.fake.float()
        motion = run.motion
        region = batch["weights"].repeat_interleave(2, 0)[:, None] if "weights" in batch else self.region
        region = F.interpolate(region, real.shape[-2:], mode="area")
        losses = {"l1": pyramid_l1(fake, real, region, self.pyramid), "sparsity": motion.abs().mean()}
        if self.weights["structural"]:
            losses["structural"] = structural(fake, real, region)
        if run.still is not None:
            partner = torch.arange(len(real), device=real.device) ^ 1
            losses["movement"] = unexplained(fake - run.still.float(), real - real[partner], region)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(fake, real)
        if self.discriminator is not None:
            # The discriminator has been updated: only gradients of the image are needed.
            self.discriminator.requires_grad_(False)
            losses["adversarial"] = F.softplus(-self.discriminator(fake)).mean()
        total = sum(self.weights[name] * value for name, value in losses.items())
        if self.guide and self.step < self.guide["until"]:
            if "tracks" not in batch:
                raise UserError("task.guide needs the movements of data.train: set its tracks, or task.guide=null")
            known = batch["tracks"].flatten(0, 1)
            codes = self.guide.get("codes") or range(known.shape[1])
            if len(codes) != known.shape[1]:
                raise UserError(f"task.guide.codes={list(codes)}: the data has {known.shape[1]} movements")
            # stack, as an index tensor would be copied to the device in each step
            guided = torch.stack([motion[:, code].float() for code in codes], 1)
            error = torch.where(known.isnan(), 0, guided - known)
            losses["guide"] = error.square().sum() / known.isfinite().sum().clamp(min=1)
            total = total + self.guide["weight"] * losses["guide"]
        if self.keep:
            codes, applies = run.taught
            distance = (motion - codes).float().square().mean(1, keepdim=True)
            losses["keep"] = (distance * applies).sum() / applies.sum().clamp(min=1)
            total = total + self.keep["weight"] * losses["keep"]
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def _run(self, batch: dict[str, Any]) -> Run:
        """Run the codec, and with `keep` the encoder whose codes are preserved."""
        frames = _pictures(batch["frames"])
        # Other colours teach the encoder to ignore them; a frozen one would only get noisier codes.
        recoloured = "views" in batch and not self.decoder_only
        views = _pictures(batch["views"]) if recoloured else None
        taught = None
        if self.teacher is not None:
            if "drawn" not in batch:
                raise UserError("task.keep needs data with real and cartoon faces (lia_x.data.RealAndDrawn)")
            applies = torch.ones_like(batch["drawn"]) if self.keep.get("people") else batch["drawn"]
            with torch.no_grad():
                taught = self.teacher.motion(frames if views is None else views), applies.repeat_interleave(2)[:, None]
        fake, still, motion = self._rebuild(frames, views, taught)
        return Run(F.interpolate(frames, fake.shape[-2:], mode="area"), fake, still, motion, taught)

    def _rebuild(
        self, frames: Tensor, views: Tensor | None = None, taught: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Reconstruct frames (2 B, 3, S, S), with pairs interleaved, each from its partner.

        Args:
            views: images (2 B, 3, S, S) from which motion is encoded. None: the frames.
            taught: codes (2 B, M), and a mask (2 B, 1) of the frames to reconstruct from them.

        Returns:
            Images (2 B, 3, S, S), smaller while levels are omitted; the partners' own reconstructions of the same
            shape, or None without the loss `movement`; and the encoded motion codes (2 B, M).
        """
        codec = self.codec
        style, maps = codec.encoder(frames)
        motion = codec.encoder.to_motion(style) if views is None else codec.encoder.motion(views)
        if self.growth and self.step < self.growth["until"]:
            maps = maps[: -self.growth["levels"]]
        partner = torch.arange(len(frames), device=frames.device) ^ 1
        codes = motion if taught is None else torch.where(taught[1], taught[0].to(motion.dtype), motion)
        noisy = codes + self.motion_noise * torch.randn_like(codes)
        fake = codec.decoder(codec.decoder.navigate(style[partner], noisy), [level[partner] for level in maps])
        still = None
        if self.weights.get("movement"):
            still = codec.decoder(codec.decoder.navigate(style, noisy), maps)[partner]
        return fake, still, motion

    def measure(self, folder: Path, share: Share) -> dict[str, float | ByClip]:
        """Measure the reconstruction of held-out clips, each from its first frame and its motion."""
        if self.validation is None:
            return {}
        count = self.validation["clips"]
        size = self.codec.size
        results: dict[str, float | ByClip] = {}
        places = [(self.validation["root"], split) for split in self.validation["splits"]]
        places += [(root, split) for split, root in self.validation.get("others", {}).items()]
        for root, split in places:
            figures: dict[str, dict[int, float]] = defaultdict(dict)
            for number, frames in held_out_frames(root, split, count, size, share):
                for name, value in reconstruction(fit_frames(frames, size), rebuild(self.codec, frames)).items():
                    figures[name][number] = value
            results |= {f"{split}/{name}": ByClip(values, np.mean) for name, values in figures.items()}
        return results

    def release_info(self) -> ReleaseInfo:
        return self.release_of(
            "codec",
            title="LIA-X",
            about="Portrait video to motion codes, one per frame, and back to video with a source image.",
            usage='from lia_x import LiaX\n\ncodec = LiaX.from_pretrained("FOLDER")',
            extra={"keeps": self.teacher_digest} if self.teacher_digest else None,
        )

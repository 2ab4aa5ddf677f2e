"""Training of LIA-X: one frame of a clip is rebuilt from another frame and its own motion code.

Axes: B pairs, S side, M motion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.task import Task
from lia_x.evaluation import evaluate, strip
from lia_x.lia_x import LiaX, LiaXConfig
from lia_x.losses import Discriminator, Perceptual, pyramid_l1, region_weights, structural


class LiaXTask(Task):
    """Losses, validation and release of a `LiaX`.

    Each of a pair's two frames is rebuilt from the other one's style and maps and its own motion code (absolute
    motion), so that the encoder runs once on a frame and serves both ways.

    Args:
        codec: fields of `LiaXConfig`.
        weights: of the losses: `l1` (over `pyramid` sizes), `structural` (1 - SSIM), `perceptual` (VGG-19; needs
            `vgg`), `adversarial` (non-saturating), `sparsity` (mean absolute motion code). 0 leaves a loss out; with
            adversarial 0 there is no discriminator.
        pyramid: sizes of the L1 loss, each half the one before.
        regions: parts of the picture that count more in L1 and structural losses; see `region_weights`.
        motion_noise: deviation of the Gaussian noise on the motion codes that the decoder gets. It makes neighbouring
            codes mean neighbouring pictures, and the sparsity loss from merely shrinking the codes.
        discriminator: `width` and `max_width`.
        vgg: file of torchvision's vgg19 weights.
        validation: `root`, `splits`, `clips` (per split) and `mouth` (a box as in `regions`) of validation; None
            turns it off.
    """

    def __init__(
        self,
        codec: Mapping[str, Any],
        weights: Mapping[str, float],
        pyramid: int = 4,
        regions: Sequence[Mapping[str, float]] = (),
        motion_noise: float = 0.0,
        discriminator: Mapping[str, int] | None = None,
        vgg: str | None = None,
        validation: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.codec = LiaX(LiaXConfig(**codec))
        # Random flows would first have to be unlearnt: displacements of the whole picture are in their reach.
        for level in self.codec.decoder.levels:
            nn.init.zeros_(level.to_flow.conv.weight)
        self.weights, self.pyramid, self.motion_noise, self.validation = (
            dict(weights),
            pyramid,
            motion_noise,
            validation,
        )
        self.register_buffer("region", region_weights(self.codec.config.size, regions), persistent=False)
        self.discriminator = self.perceptual = None
        if weights["adversarial"]:
            self.discriminator = Discriminator(self.codec.config.size, **discriminator)
        if weights["perceptual"]:
            self.perceptual = Perceptual(vgg)

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"generator": self.codec}
        return {"discriminator": self.discriminator, **parts} if self.discriminator else parts

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Frames of a batch."""
        return 2 * len(batch["frames"])

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Losses of a part; batch["frames"] is (B, 2, S, S, 3) bytes. The codec runs once a step, for both parts."""
        if "_run" not in batch:
            frames = batch["frames"].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
            batch["_run"] = frames, *self._rebuild(frames)
        real, fake, motion = batch["_run"]
        if part == "discriminator":
            return self._discriminator_losses(real, fake.detach())
        return self._generator_losses(real, fake, motion)

    def _rebuild(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (2 B, 3, S, S), pairs side by side -> each from its partner, and the motion codes (2 B, M)."""
        codec = self.codec
        style, maps = codec.encoder(frames)
        motion = codec.encoder.to_motion(style)
        partner = torch.arange(len(frames), device=frames.device) ^ 1
        noisy = motion + self.motion_noise * torch.randn_like(motion)
        style = codec.decoder.navigate(style[partner], noisy)
        return codec.decoder(style, [level[partner] for level in maps]), motion

    def _discriminator_losses(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        self.discriminator.requires_grad_(True)
        of_real, of_fake = (F.softplus(sign * self.discriminator(x)).mean() for sign, x in ((-1, real), (1, fake)))
        return {"loss": of_real + of_fake, "real": of_real.detach(), "fake": of_fake.detach()}

    def _generator_losses(self, real: Tensor, fake: Tensor, motion: Tensor) -> dict[str, Tensor]:
        real, fake = real.float(), fake.float()
        losses = {"l1": pyramid_l1(fake, real, self.region, self.pyramid), "sparsity": motion.abs().mean()}
        if self.weights["structural"]:
            losses["structural"] = structural(fake, real, self.region)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(fake, real)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # its own update is over: only the way to the picture is needed
            losses["adversarial"] = F.softplus(-self.discriminator(fake)).mean()
        total = sum(self.weights[name] * value for name, value in losses.items())
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Figures of merit on the first held-out clips of each split; writes strips of true and rebuilt frames."""
        if self.validation is None:
            return {}
        results: dict[str, float] = {}
        for split in self.validation["splits"]:
            found, clips = evaluate(
                self.codec, self.validation["root"], split, self.validation["clips"], self.validation["mouth"]
            )
            results |= {f"{split}/{name}": value for name, value in found.items()}
            picture = strip(clips[:4])
            cv2.imwrite(str(folder / f"{split}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        return results

    def release(self, folder: Path, results: dict) -> None:
        """Write the codec as a release folder."""
        lines = "\n".join(f"- {name}: {value:.4g}" for name, value in sorted(results.items()))
        self.codec.save(folder, f"# LIA-X\n\nMeasured on held-out clips:\n\n{lines}\n")

"""The training step of a wave codec with discriminators, whose update comes before the generator's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engine.nn.discriminators import WaveDiscriminators
from engine.training.task import Task


class GANTask(Task):
    """A codec that learns from its own losses and, from `gan_start` on, from discriminators.

    Attributes:
        discriminator: of waves (B, 1, N).
        weights: of the losses by name; a loss that is not in it counts once.
        gan_start: step from which the discriminators are trained and heard; None: never.
    """

    discriminator: WaveDiscriminators
    weights: dict[str, float]
    gan_start: int | None

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the codec: waves `real` and `fake` (B, 1, N), and whatever `reconstruction_losses` needs."""
        raise NotImplementedError

    def reconstruction_losses(self, run: dict[str, Any]) -> dict[str, Tensor]:
        """Return the generator's losses () that need no discriminator, without their weights."""
        raise NotImplementedError

    def adversarial(self) -> bool:
        """Return whether the discriminators take part in this step."""
        return self.gan_start is not None and self.step >= self.gan_start

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Return the losses of the part `discriminator` or `generator`; the codec runs once a step, for both."""
        if "_run" not in batch:
            batch["_run"] = self.run(batch)
        real, fake = batch["_run"]["real"], batch["_run"]["fake"]
        if part == "discriminator":
            return self.discriminator.own_losses(real, fake, self.adversarial())
        losses = self.reconstruction_losses(batch["_run"])
        if self.adversarial():
            losses |= self.discriminator.generator_losses(real, fake)
        total = sum(self.weights.get(name, 1.0) * value for name, value in losses.items())
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

"""Training of waveform codecs with discriminators, which are updated before the generator in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.codec import Codec
from engine.evaluation.resynthesis import decode_wave
from engine.evaluation.validation import ByClip, Share
from engine.media.audio import write_wav
from engine.nn.audio_losses import MultiScaleMelLoss
from engine.nn.discriminators import WaveDiscriminators
from engine.shards.recordings import load_waves
from engine.training.task import Task


class GANTask(Task):
    """Base class of tasks that train a codec with reconstruction losses and, from step `gan_start`, adversarial losses.

    Attributes:
        discriminator: discriminator of waveforms (B, 1, N).
        weights: loss weights by name. Default: 1.
        gan_start: first step of adversarial training. None: never.
        validation: `root` of a corpus, `splits`, and number of `clips` of each. None: no validation.
        figures: metrics of the codes of all validation clips, computed from the results of `code_facts`.
    """

    codec: Codec
    discriminator: WaveDiscriminators
    weights: dict[str, float]
    gan_start: int | None
    mel_loss: MultiScaleMelLoss
    validation: Mapping[str, Any] | None
    figures: ClassVar[Mapping[str, Callable[[list[Any]], Any]]]

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the codec. Return waveforms `real` and `fake` (B, 1, N), and further inputs of
        `reconstruction_losses`.
        """
        raise NotImplementedError

    def reconstruction_losses(self, run: dict[str, Any]) -> dict[str, Tensor]:
        """Return the unweighted generator losses (), except for adversarial ones, from the result of `run`."""
        raise NotImplementedError

    def code_facts(self, code: Tensor) -> Tensor:
        """Return the statistics of the code of one clip that `figures` needs, on the CPU."""
        raise NotImplementedError

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Return the number of code frames of a batch."""
        return batch["wave"].shape[0] * self.codec.frames(batch["wave"].shape[-1])

    @torch.no_grad()
    def measure(self, folder: Path, share: Share) -> dict[str, float | ByClip]:
        """Measure the mel loss and codes of held-out clips. Write the first clip of each split, original and
        decoded.
        """
        results: dict[str, float | ByClip] = {}
        rate = self.codec.sample_rate
        device = next(self.codec.parameters()).device
        settings = self.validation
        for split in settings["splits"] if settings else ():
            waves = load_waves(settings["root"], split, settings["clips"], rate)
            mel = {}
            facts = {}
            for number in share.range(len(waves)):
                wave = torch.from_numpy(waves[number])[None, None].to(device)
                code = self.codec.encode(wave)
                decoded = decode_wave(self.codec, code, wave.shape[-1])
                mel[number] = self.mel_loss(torch.from_numpy(decoded)[None, None].to(device), wave).item()
                facts[number] = self.code_facts(code)
                if number == 0:
                    write_wav(folder / f"{split}-original.wav", waves[number], rate)
                    write_wav(folder / f"{split}-decoded.wav", decoded, rate)
            if facts:
                results[f"{split}/mel"] = ByClip(mel)
                results |= {f"{split}/{name}": ByClip(facts, figure) for name, figure in self.figures.items()}
        return results

    def adversarial(self) -> bool:
        """Return whether adversarial training is active in this step."""
        return self.gan_start is not None and self.step >= self.gan_start

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Return the losses of the part `discriminator` or `generator`. The codec runs only once per step."""
        if "_run" not in batch:
            batch["_run"] = self.run(batch)
        real = batch["_run"]["real"]
        fake = batch["_run"]["fake"]
        if part == "discriminator":
            return self.discriminator.own_losses(real, fake, self.adversarial())
        losses = self.reconstruction_losses(batch["_run"])
        if self.adversarial():
            losses |= self.discriminator.generator_losses(real, fake)
        total = sum(self.weights.get(name, 1.0) * value for name, value in losses.items())
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

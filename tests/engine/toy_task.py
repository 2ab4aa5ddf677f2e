"""Tasks and datasets of a few hundred parameters that exercise the trainer."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from engine.evaluation.validation import ByClip
from engine.training.settings import TrainerConfig
from engine.training.task import ReleaseInfo, Task

CONFIG = asdict(TrainerConfig()) | {
    "steps": 20, "batch_size": 4, "accumulate": 2, "lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.1, "warmup": 5,
    "ema_decay": 0.99, "log_every": 1, "validate_every": 7, "checkpoint_every": 5,
}  # fmt: skip


def read_lines(file: Path) -> list[dict]:
    """Return the lines of a JSONL file, such as the log of a run."""
    return [json.loads(line) for line in file.read_text().splitlines()]


class ToySet:
    """37 vectors, an odd number so that batches straddle epochs; the augmentation is noise.

    `trouble_at` / `trouble`: what happens when the sample at that call is fetched: term, usr1, crash, nan, or a
    function that is called.
    """

    def __init__(self, size: int = 37, trouble_at: int | None = None, trouble: str | Callable[[], None] = "crash"):
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
        self.calls = 0
        self.trouble_at = trouble_at
        self.trouble = trouble

    def __len__(self) -> int:
        return len(self.x)

    def load(self, index: int, generator: torch.Generator) -> torch.Tensor:
        self.calls += 1
        sample = self.x[index] + 0.1 * torch.randn(4, generator=generator)
        if self.calls == self.trouble_at:
            if self.trouble == "crash":
                raise RuntimeError("the machine died")
            if self.trouble in ("term", "usr1"):
                for _ in range(2):  # a scheduler and torchrun may both say it
                    os.kill(os.getpid(), signal.SIGTERM if self.trouble == "term" else signal.SIGUSR1)
            if callable(self.trouble):
                self.trouble()
            if self.trouble == "nan":
                return sample * float("nan")
        return sample

    def collate(self, items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack(items)}


class ToyGAN(Task):
    """A dropout autoencoder with a discriminator; the generator's result is stored for the second part."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4))
        self.discriminator = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def parts(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "generator": self.generator}

    def tokens(self, batch):
        return batch["x"].shape[0]

    def forward(self, batch, part):
        if "y" not in batch:
            batch["y"] = self.generator(batch["x"])
        if part == "discriminator":
            self.seen += len(batch["x"])
            real = self.discriminator(batch["x"])
            fake = self.discriminator(batch["y"].detach())
            return {"loss": (real - 1).square().mean() + fake.square().mean()}
        reconstruction = (batch["y"] - batch["x"]).square().mean()
        adversarial = (self.discriminator(batch["y"]) - 1).square().mean()
        return {"loss": reconstruction + 0.1 * adversarial, "reconstruction": reconstruction}

    def measure(self, folder, share):
        assert not self.training
        return {"weight": self.generator[0].weight.sum().item()}

    def release_info(self):
        return ReleaseInfo("toy", {"width": 8}, "generator", "Toy", "An autoencoder.", "load('FOLDER')")


class ToyBlock(nn.Module):
    """(B, 8) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Dropout(0.1), nn.Linear(5, 8))

    def forward(self, x):
        return x + self.net(x)


class ToyShift(nn.Module):
    """Adds a parameter that is bounded in place, as code books are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.02, 0.02)
        return x + self.weight


class ToyBlocks(ToyGAN):
    """`ToyGAN` with blocks, a frozen and a tied weight, and one that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), ToyBlock(), ToyBlock(), nn.Linear(8, 4), ToyShift())
        self.tied = nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied.weight = self.discriminator.weight

    def blocks(self):
        return [self.generator[1], self.generator[2]]

    def unsharded_modules(self):
        return [self.generator[4]]

    def separate_clip_groups(self):
        return [self.generator[2]]


class ToyMeasured(ToyBlocks):
    """Measures five clips, whose figure tells them apart and holds weights and a random draw; says who did which.

    fails: number of the process whose validation fails.
    """

    def __init__(self, fails: int | None = None) -> None:
        super().__init__()
        self.fails = fails

    def measure(self, folder, share):
        if share.rank == self.fails:
            raise RuntimeError("no such clip")
        assert not self.training
        weight = self.generator[0].weight.sum().item()
        found = {}
        for clip in share.range(5):
            found[clip] = weight + clip**2 / 7
            (folder / f"clip{clip}-{share.rank}.txt").write_text("measured")
        figures = {"weight": ByClip(found), "seen": ByClip({clip: self.seen.item() for clip in found})}
        return figures | ({"drawn": torch.rand(()).item()} if share.first else {})


class RaggedSet(ToySet):
    """Vectors of 1 to 12 tokens, padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(len(self), 12, 4, generator=torch.Generator().manual_seed(0))
        self.frames = torch.randint(1, 13, (len(self.x),), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 37

    def load(self, index, generator):
        frames = int(self.frames[index])
        return self.x[index, :frames]

    def collate(self, items):
        x = nn.utils.rnn.pad_sequence(items, batch_first=True)
        return {"x": x, "frames": torch.tensor([len(item) for item in items])}


class ToyRagged(Task):
    """A mean over tokens and a mean over clips."""

    on_host = ("frames",)

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def parts(self):
        return {"model": self.model}

    def blocks(self):
        return [self.model[0]]

    def loss_counts(self, batch):
        return {"token": int(batch["frames"].sum()), "clip": len(batch["frames"])}

    def forward(self, batch, part):
        x = batch["x"]
        frames = batch["frames"]
        valid = torch.arange(x.shape[1]) < frames[:, None]
        error = (self.model(x) - 2 * x).square().mean(-1) * valid
        losses = {"token": error.sum() / frames.sum(), "clip": (error.sum(1) / frames).sqrt().mean()}
        return losses | {"loss": losses["token"] + losses["clip"]}

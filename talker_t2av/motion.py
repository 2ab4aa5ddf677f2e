"""Motion codes are normalised by channel before the heads see them. Axes: F frames, Dm motion channels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.device import send
from engine.errors import UserError
from engine.shards.source import read_json
from talker_t2av.released import MOTION_MEAN, MOTION_STD


@dataclass(frozen=True)
class MotionStats:
    """Mean and standard deviation of each motion channel, (Dm,) both; the heads work on normalised motion (F, Dm)."""

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.ndim != 1 or not value.isfinite().all() or (name == "std" and (value < 0).any()):
                raise UserError(f"the motion statistics' {name} must be a list of finite numbers, std's not below 0")
        if len(self.mean) != len(self.std):
            raise UserError(f"motion_mean has {len(self.mean)} numbers and motion_std {len(self.std)}: give as many")

    def normalise(self, motion: Tensor) -> Tensor:
        return (motion - self.mean) / self.std.clamp_min(1e-6)

    def restore(self, motion: Tensor) -> Tensor:
        std, mean = (send(x, motion.device) for x in (self.std.clamp_min(1e-6), self.mean))
        return motion * std + mean

    @classmethod
    def read(cls, path: str | Path | None) -> MotionStats:
        """Read a JSON file, or its URL, with `motion_mean` and `motion_std`; None: those of the released model."""
        if path is None:
            return cls(torch.tensor(MOTION_MEAN), torch.tensor(MOTION_STD))
        try:
            stats = read_json(path)
            return cls(*(torch.tensor(stats[name], dtype=torch.float32) for name in ("motion_mean", "motion_std")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as motion statistics ({error!r}): make them again") from error

"""UTMOS: predicted opinion of naturalness, 1 to 5, without a reference (Saeki et al. 2022, arXiv:2204.02152).

The strong learner of utmos22, by the package utmos-pytorch (MIT), which states that it equals the original; weights
MIT. 16 kHz, one clip at a time: padding moves the score.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.optional import require
from engine.release import load_strict
from engine.safe_pickle import read_checkpoint

RATE = 16_000


class UTMOS(Metric):
    figures: ClassVar = {"utmos": Figure("UTMOS", 1, meaning="predicted opinion of naturalness, 1 to 5")}
    needs = ("utmos_pytorch",)
    names = ("utmos_state_dict.pt",)
    parallel = False

    def load(self) -> None:
        package = require("utmos_pytorch.utmos_torch", "utmos-pytorch", "metrics")
        (file,) = self.files(self.protocol, self.weights)
        with torch.device("meta"):  # the package itself passes over tensors that are missing
            load_strict(package.UTMOSModel(), dict(read_checkpoint(file)), file, assign=True)
        self.network = package.UTMOSScoreTorch(str(file), self.device)

    @torch.inference_mode()
    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        wave = torch.from_numpy(wave_of(take.audio, RATE).copy()).to(self.device)
        return {"utmos": (float(self.network.score(wave[None]).reshape(-1)[0]), 1)}

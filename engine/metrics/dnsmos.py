"""DNSMOS: predicted opinion of speech quality, 1 to 5, without a reference.

- `p808`: Reddy et al. 2021, arXiv:2010.15258 (HiCoDiT's, as its true-speech rows say). `p835`: the overall score of
  Reddy et al. 2022, arXiv:2110.01763.

The package speechmos (MIT) computes both and carries both networks, so nothing is downloaded. 16 kHz; clips under 9 s
are repeated, longer ones averaged over windows, as its authors do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.optional import require, require_librosa

RATE = 16_000


class DNSMOS(Metric):
    figures: ClassVar = {"dnsmos": Figure("DNSMOS", 1, meaning="predicted opinion of speech quality, 1 to 5")}
    needs = ("speechmos", "onnxruntime", "librosa")
    protocols = ("p808", "p835")

    def load(self) -> None:
        require_librosa()
        package = require("speechmos.dnsmos", "speechmos", "metrics")
        folder, options = Path(package.__file__).parent / "dnsmos_models", package.ort.SessionOptions()
        options.intra_op_num_threads = 1  # the package takes all cores, which other processes use, too
        self.model = package.DNSMOS.__new__(package.DNSMOS)
        self.model.onnx_sess = package.ort.InferenceSession(str(folder / "sig_bak_ovr.onnx"), options)
        self.model.p808_onnx_sess = package.ort.InferenceSession(str(folder / "model_v8.onnx"), options)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        scores = self.model(wave_of(take.audio, RATE).clip(-1, 1), RATE, False)
        return {"dnsmos": (float(scores["p808_mos" if self.protocol == "p808" else "ovrl_mos"]), 1)}

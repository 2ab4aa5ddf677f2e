"""SpkSim: cosine of the speaker embeddings of the measured and the true speech.

- `ecapa` (HiCoDiT's is an ECAPA-TDNN, taken to be this one): Desplanques et al. 2020, arXiv:2005.07143, trained on
  VoxCeleb; network and filters of the package speechbrain, weights `spkrec-ecapa-voxceleb` (both Apache-2.0).
- `wavlm`: WavLM-Large with an ECAPA-TDNN head (Chen et al. 2022, arXiv:2110.13900; weights CC BY-SA 3.0), as AlignDiT
  measures it.
- `ge2e`: the package Resemblyzer (Apache-2.0, carries its weights), as V2SFlow and SLD-L2S measure it.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from engine.config import target
from engine.metrics.metric import CACHED, Figure, Metric, Take, cosine, wave_of
from engine.metrics.speaker import GE2EEncoder
from engine.optional import require
from engine.release import load_strict
from engine.safe_pickle import read_checkpoint

RATE = 16_000
FILES = {"ecapa": "ecapa/embedding_model.ckpt", "wavlm": "wavlm_large_finetune.pth"}


class SpeakerSimilarity(Metric):
    figures: ClassVar = {"speaker_similarity": Figure("SpkSim", 1, 4, meaning="cosine with the true speech's voice")}
    protocols = ("ecapa", "wavlm", "ge2e")
    pair, parallel = True, False

    def load(self) -> None:
        kind, _, encoder = self.protocol.partition(":")
        embed: Callable[[np.ndarray], np.ndarray]
        if kind == "ge2e":
            ge2e = GE2EEncoder(self.device)
            embed = lambda wave: ge2e.embed(wave, RATE)  # noqa: E731
        elif kind == "wavlm":
            wavlm = target(encoder).from_pretrained(self.weights / FILES[kind]).to(self.device)
            embed = lambda wave: wavlm.embed(torch.from_numpy(wave).to(self.device)).float().cpu().numpy()  # noqa: E731
        else:
            embed = Ecapa(self.weights / FILES[kind], self.device).embed
        self.embed = lru_cache(CACHED)(lambda path: embed(wave_of(path, RATE).copy()))

    @classmethod
    def files(cls, protocol: str, weights: Path) -> list[Path]:
        kind = protocol.partition(":")[0]
        return [weights / FILES[kind]] if kind in FILES else []

    @classmethod
    def download(cls, protocol: str) -> str:
        return "talker_t2av" if protocol.startswith("wavlm") else "metrics"

    @classmethod
    def packages(cls, protocol: str) -> list[str]:
        return {"ecapa": ["speechbrain"], "ge2e": ["resemblyzer"]}.get(protocol.partition(":")[0], [])

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        one, two = (self.embed(path).astype(np.float64) for path in (take.audio, truth.audio))
        return {"speaker_similarity": (cosine(one, two), 1)}


class Ecapa:
    """SpeechBrain's ECAPA-TDNN with the settings of `spkrec-ecapa-voxceleb`.

    It is put together here: speechbrain's own loader would run what the downloaded YAML names.
    """

    def __init__(self, file: Path, device: str) -> None:
        lobes = require("speechbrain.lobes.models.ECAPA_TDNN", "speechbrain", "metrics")
        features = require("speechbrain.lobes.features", "speechbrain", "metrics")
        processing = require("speechbrain.processing.features", "speechbrain", "metrics")
        self.device = device
        self.bands = features.Fbank(n_mels=80).to(device)
        self.normalise = processing.InputNormalization(norm_type="sentence", std_norm=False).to(device)
        self.network = lobes.ECAPA_TDNN(
            80,
            channels=[1024, 1024, 1024, 1024, 3072],
            kernel_sizes=[5, 3, 3, 3, 1],
            dilations=[1, 2, 3, 4, 1],
            attention_channels=128,
            lin_neurons=192,
        )
        load_strict(self.network, dict(read_checkpoint(file)), file)
        self.network.to(device).eval()

    @torch.inference_mode()
    def embed(self, wave: np.ndarray) -> np.ndarray:
        """Embed a wave (N,) at 16 kHz: (192,)."""
        wave, whole = torch.from_numpy(wave)[None].to(self.device), torch.ones(1, device=self.device)
        return self.network(self.normalise(self.bands(wave), whole), whole)[0, 0].cpu().numpy()

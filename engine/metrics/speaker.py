"""Speaker similarity and speaker identification by speaker embeddings.

SpkSim is the cosine similarity between speaker embeddings of output and ground truth:
- `ecapa` (HiCoDiT's is an ECAPA-TDNN, assumed to be this one): Desplanques et al. 2020, arXiv:2005.07143, trained on
  VoxCeleb; network and filters of the package speechbrain, weights `spkrec-ecapa-voxceleb` (both Apache-2.0).
- `wavlm`: WavLM-Large with an ECAPA-TDNN head (Chen et al. 2022, arXiv:2110.13900; weights CC BY-SA 3.0), as AlignDiT
  measures it.
- `ge2e`: Wan et al. 2018, arXiv:1710.10467, by the package Resemblyzer (Apache-2.0), which includes its weights; as
  V2SFlow and SLD-L2S measure it.

Speaker identification compares a GE2E embedding with the mean embedding of each of many voices:
- `clips`: the voices of the ground-truth clips. A clip is excluded from the mean of its own voice, and is skipped if no
  other clip remains.
- `shards`: the speakers of prepared shards with `ge2e`, such as a training set.

Axes: N samples, V voices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError, require
from engine.instantiate import target
from engine.metrics.metric import CACHED, Figure, Metric, Rows, Take, cosine, wave_of
from engine.nn.ge2e import RATE, GE2EEncoder
from engine.release import load_strict
from engine.shards.recordings import read_voices
from engine.torch_files import read_checkpoint

Voices = Mapping[str, Mapping[str, np.ndarray]]  # voice -> clip -> GE2E embedding (256,)


class SpeakerSimilarity(Metric):
    figures: ClassVar = {"speaker_similarity": Figure("SpkSim", 1, 4, meaning="cosine with the ground truth")}
    protocols = ("ecapa", "wavlm", "ge2e")
    needs_truth = True
    parallel = False

    def load(self) -> None:
        if self.kind == "ge2e":
            self.encoder = GE2EEncoder(self.device)
        elif self.kind == "wavlm":
            self.encoder = target(self.argument).from_pretrained(*self.files).to(self.device)
        else:
            self.encoder = Ecapa(*self.files, self.device)
        self.embed = lru_cache(CACHED)(self._embed)

    def _embed(self, path: Path | None) -> np.ndarray:
        wave = wave_of(path, RATE).copy()
        if self.kind == "ge2e":
            return self.encoder.embed(wave, RATE).astype(np.float64)
        return self.encoder.embed(torch.from_numpy(wave).to(self.device)).float().cpu().numpy().astype(np.float64)

    @property
    def weight_files(self) -> tuple[str, ...]:
        return {"ecapa": ("ecapa/embedding_model.ckpt",), "wavlm": ("wavlm_large_finetune.pth",)}.get(self.kind, ())

    @property
    def download(self) -> str:
        return "talker_t2av" if self.kind == "wavlm" else "metrics"

    @property
    def packages(self) -> tuple[str, ...]:
        return {"ecapa": ("speechbrain",), "ge2e": ("resemblyzer",)}.get(self.kind, ())

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        return {"speaker_similarity": (cosine(self.embed(take.audio), self.embed(truth.audio)), 1)}


class Ecapa:
    """SpeechBrain's ECAPA-TDNN with the settings of `spkrec-ecapa-voxceleb`.

    The network is built here, as speechbrain's loader would execute code named in the downloaded YAML.
    """

    def __init__(self, file: Path, device: str) -> None:
        lobes = require("speechbrain.lobes.models.ECAPA_TDNN", "speechbrain", "metrics")
        features = require("speechbrain.lobes.features", "speechbrain", "metrics")
        processing = require("speechbrain.processing.features", "speechbrain", "metrics")
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
    def embed(self, wave: Tensor) -> Tensor:
        """Embed a waveform (N,) at 16 kHz: (192,)."""
        whole = torch.ones(1, device=wave.device)
        return self.network(self.normalise(self.bands(wave[None]), whole), whole)[0, 0]


class OwnVoice(Metric):
    figures: ClassVar = {
        "own_voice_first": Figure(
            "speaker ID accuracy %", 1, 1, 100, "clips whose nearest voice is that of the correct speaker"
        ),
        "voice_similarity": Figure(
            "voice cosine", 1, 3, meaning="cosine with the mean of the other clips of the same speaker"
        ),
    }
    packages = ("resemblyzer",)
    protocols = ("clips", "shards")

    def load(self) -> None:
        self.encoder = GE2EEncoder(self.device)

    def check(self) -> None:
        super().check()
        if self.kind == "shards" and not (Path(self.argument) / "index.json").is_file():
            raise UserError(f"voices={self.argument} has no prepared shards (python scripts/prepare_data.py)")

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        try:
            return {"vector": self.encoder.embed(wave_of(take.audio, 24_000), 24_000).tolist()}
        except UserError:  # no speech found, so no voice matches
            return {"vector": [0.0] * 256}

    def finish(self, rows: Rows, true: Rows, truths: Mapping[str, Take]) -> Rows:
        known: dict[str, dict[str, np.ndarray]] = {}
        for clip, row in true.items():
            if (speaker := truths[clip].speaker) is not None:
                known.setdefault(speaker, {})[clip] = np.array(row["vector"], np.float32)
        found = nearest(rows, truths, known if self.kind == "clips" else embeddings_by_voice(self.argument))
        return {clip: {**row, **found.get(clip, {})} for clip, row in rows.items()}


def nearest(rows: Rows, truths: Mapping[str, Take], known: Voices) -> dict[str, dict[str, tuple[float, float]]]:
    """Return by clip whether the nearest of the `known` voices is the correct one, and the cosine with the mean of the
    correct voice.
    """
    names = sorted(known)
    found = {}
    sums = np.array([np.sum([*known[name].values()], 0) for name in names])  # (V, 256)
    for clip, row in rows.items():
        voice = truths[clip].speaker
        vector = np.array(row["vector"], np.float32)
        if voice not in known:
            continue
        own = names.index(voice)
        means = sums.copy()
        means[own] -= known[voice].get(clip, 0)
        if not means[own].any():
            continue
        cosines = means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-9) @ vector
        first = vector.any() and cosines.argmax() == own
        found[clip] = {"own_voice_first": (float(first), 1), "voice_similarity": (float(cosines[own]), 1)}
    return found


@lru_cache(2)
def embeddings_by_voice(shards: str | Path) -> Voices:
    """Read the GE2E embedding (256,) of every clip of a prepared split, by voice."""
    voices = {}
    for key, speaker, embedding in read_voices(shards):
        voices.setdefault(speaker, {})[key] = embedding.numpy()
    return voices

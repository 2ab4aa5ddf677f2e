"""EmoAcc and EMO-SIM by emotion2vec+ large (Ma et al. 2024, arXiv:2312.15185), run by the package funasr (MIT).

EmoAcc: fraction of clips whose class equals that of the ground truth. EMO-SIM: cosine of the utterances' embeddings.
The weights are under FunASR's model licence.

Axes: D embedding.
"""

from __future__ import annotations

import contextlib
import io
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.errors import require
from engine.metrics.metric import CACHED, Figure, Metric, Take, cosine, wave_of

RATE = 16_000
FOLDER = "emotion2vec_plus_large"


class Emotion(Metric):
    figures: ClassVar = {
        "emotion_accuracy": Figure("EmoAcc %", 1, 2, 100, "clips with the same recognised emotion as the ground truth"),
        "emotion_similarity": Figure("EMO-SIM", 1, 4, meaning="cosine of emotion embeddings with the ground truth"),
    }
    packages = ("funasr",)
    weight_files = (f"{FOLDER}/model.pt", f"{FOLDER}/config.yaml")
    needs_truth = True
    parallel = False

    def load(self) -> None:
        self.model = load_emotion2vec(str(self.weights / FOLDER), self.device, "metrics")
        self.read = lru_cache(CACHED)(self._read)

    def _read(self, path: Path | None) -> tuple[str, np.ndarray]:
        """Return (class, embedding (D,)) of the speech in a file."""
        with contextlib.redirect_stdout(io.StringIO()):
            (row,) = self.model.generate(wave_of(path, RATE), granularity="utterance", extract_embedding=True)
        return row["labels"][int(np.argmax(row["scores"]))], np.asarray(row["feats"], np.float64)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        label, one = self.read(take.audio)
        true, two = self.read(truth.audio)
        same = (float(label == true), 1)
        near = (cosine(one, two), 1)
        return {"emotion_accuracy": same, "emotion_similarity": near, "emotion": label}


def load_emotion2vec(name: str, device: str, extra: str) -> Any:
    """Load FunASR's model from a folder or the Hugging Face hub. `extra` is the extra that installs FunASR."""
    with contextlib.redirect_stdout(io.StringIO()):
        package = require("funasr", "funasr", extra)
        return package.AutoModel(model=name, hub="hf", device=device, disable_update=True, disable_pbar=True)

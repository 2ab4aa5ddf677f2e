"""Whose voice an output has: GE2E vectors (Wan et al. 2018, arXiv:1710.10467; package Resemblyzer, Apache-2.0) against
the mean vector of each of many voices.

- `clips`: the voices are those of the true clips. A clip is left out of the mean of its own voice, and does not count
  if nothing is left.
- `shards`: the voices are the speakers of prepared shards that hold `ge2e`, such as those of a training set.

Axes: V voices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.errors import UserError
from engine.metrics.metric import Figure, Metric, Rows, Take, Unavailable, wave_of
from engine.metrics.speaker import GE2EEncoder
from engine.shards.reader import ShardSplit

RATE = 24_000
Voices = Mapping[str, Mapping[str, np.ndarray]]  # voice -> clip -> GE2E vector (256,)


class OwnVoice(Metric):
    figures: ClassVar = {
        "own_voice_first": Figure("own voice first %", 1, 1, 100, "the nearest of the known voices is the clip's own"),
        "voice_similarity": Figure("voice cosine", 1, 3, meaning="cosine with the mean of the own voice's other clips"),
    }
    needs = ("resemblyzer",)
    protocols = ("clips", "shards")

    def load(self) -> None:
        self.encoder = GE2EEncoder(self.device)

    @classmethod
    def files(cls, protocol: str, weights: Path) -> list[Path]:
        kind, _, shards = protocol.partition(":")
        if kind == "shards" and not (Path(shards) / "index.json").is_file():
            raise Unavailable(f"voices={shards} has no prepared shards (python scripts/prepare_data.py)")
        return []

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        try:
            return {"vector": self.encoder.embed(wave_of(take.audio, RATE), RATE).tolist()}
        except UserError:  # no speech: nobody's voice
            return {"vector": [0.0] * 256}

    @classmethod
    def finish(cls, rows: Rows, true: Rows, truths: Mapping[str, Take], protocol: str) -> Rows:
        kind, _, shards = protocol.partition(":")
        known: dict[str, dict[str, np.ndarray]] = {}
        for clip, row in true.items() if kind == "clips" else ():
            known.setdefault(truths[clip].speaker, {})[clip] = np.array(row["vector"], np.float32)
        found = nearest(rows, truths, known if kind == "clips" else stored_voices(shards))
        return {clip: {**row, **found.get(clip, {})} for clip, row in rows.items()}


def nearest(rows: Rows, truths: Mapping[str, Take], known: Voices) -> dict[str, dict[str, tuple[float, float]]]:
    """Return by clip whether the nearest of the `known` voices is its own, and the cosine with the own voice's mean."""
    names, found = sorted(known), {}
    sums = np.array([np.sum([*known[name].values()], 0) for name in names])  # (V, 256)
    for clip, row in rows.items():
        voice, vector = truths[clip].speaker, np.array(row["vector"], np.float32)
        if voice not in known:
            continue
        own, means = names.index(voice), sums.copy()
        means[own] -= known[voice].get(clip, 0)
        if not means[own].any():
            continue
        cosines = means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-9) @ vector
        first = vector.any() and cosines.argmax() == own
        found[clip] = {"own_voice_first": (float(first), 1), "voice_similarity": (float(cosines[own]), 1)}
    return found


@lru_cache(2)
def stored_voices(shards: str | Path) -> Voices:
    """Read the GE2E vector (256,) of every clip of a prepared split, by voice."""
    split, voices = ShardSplit(shards), {}
    for index in range(len(split)):
        info, tensors = split.read_complete(index, ("ge2e",))
        voices.setdefault(str(info["speaker"]), {})[info["key"]] = tensors["ge2e"].numpy()
    return voices

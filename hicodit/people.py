"""How unlike the people of the training clips a face is: a remark for whoever reads the result, never a refusal.

A release may hold people.json: means over the clips of each person of random projections of the face crop, their
spread within a person, and the distance from which a face counts as unlike. No picture can be made from so few numbers.

Axes: n face crops, S' their side, D = 24 features, P people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from engine.files import write_json
from engine.untrusted import read_json

FILE = "people.json"
SIDE = 16
FEATURES = 24
LIMIT = 2.4  # on GRID, new sentences of known people are at most 2.1, other people at least 2.8


@cache
def projection() -> np.ndarray:
    """Return the matrix (256, D) of a random projection, the same on all machines."""
    return np.random.default_rng(0).normal(size=(SIDE**2, FEATURES)) / np.sqrt(FEATURES)


def face_features(faces: np.ndarray) -> np.ndarray:
    """Return features (D,) of the face crops (n, S', S', 3) of a clip, at equal brightness and contrast."""
    small = [cv2.resize(face.mean(-1), (SIDE, SIDE), interpolation=cv2.INTER_AREA) for face in faces.astype(np.float32)]
    mean = np.mean(small, axis=0).ravel()
    return (mean - mean.mean()) / (mean.std() + 1e-6) @ projection()


@dataclass(frozen=True)
class KnownPeople:
    """Means (P, D) and spread (D,) of the features of the people that a model was trained on."""

    means: np.ndarray
    scale: np.ndarray
    limit: float = LIMIT

    @classmethod
    def of_clips(cls, features: Sequence[np.ndarray], speakers: Sequence[str]) -> KnownPeople:
        """Describe the people of clips with these features (D,)."""
        rows = np.stack(features)
        names = np.array(speakers)
        people = sorted(set(speakers))
        means = np.stack([rows[names == name].mean(0) for name in people])
        spread = rows - means[np.searchsorted(people, names)]
        return cls(means, spread.std(0) + 1e-3)

    @classmethod
    def from_release(cls, folder: Path) -> KnownPeople | None:
        """Read people.json of a release folder; None: it has none."""
        if not (folder / FILE).is_file():
            return None
        stored: Mapping[str, Any] = read_json(folder / FILE)
        return cls(np.array(stored["means"], float), np.array(stored["scale"], float), float(stored["limit"]))

    def save(self, folder: Path) -> None:
        """Write people.json into a release folder."""
        rounded = {"means": self.means.round(3).tolist(), "scale": self.scale.round(3).tolist(), "limit": self.limit}
        write_json(folder / FILE, rounded)

    def distance(self, faces: np.ndarray) -> float:
        """Return the distance of a clip's face crops from the nearest person; about 1 for a known one."""
        steps = (face_features(faces) - self.means) / self.scale
        return float(np.sqrt(np.square(steps).mean(1)).min())

    def remark(self, faces: np.ndarray) -> str:
        """Return one line if the face is unlike those of the training clips, else ""."""
        distance = self.distance(faces)
        if distance <= self.limit:
            return ""
        how = f"{distance:.1f}, limit {self.limit:g}"
        return f"the face is unlike those of the training clips ({how}): words may be wrong"

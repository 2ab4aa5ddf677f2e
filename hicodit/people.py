"""Detection of faces unlike those of the training clips, which causes a remark to the user but no error.

A release may contain people.json: random projections of face crops, averaged over the clips of each person, their
standard deviation within a person, and the distance above which a face counts as unknown. Faces cannot be reconstructed
from so few values.

Axes: n face crops, S' their side, D = 24 features, P people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from engine.errors import UserError
from engine.files import write_json
from engine.untrusted import read_json

FILE = "people.json"
SIDE = 16
FEATURES = 24
LIMIT = 2.4  # on GRID, distances of known people are at most 2.1, of other people at least 2.8


@cache
def projection() -> np.ndarray:
    """Return the matrix (256, D) of a random projection, which is the same on all machines."""
    return np.random.default_rng(0).normal(size=(SIDE**2, FEATURES)) / np.sqrt(FEATURES)


def face_features(faces: np.ndarray) -> np.ndarray:
    """Return features (D,) of the face crops (n, S', S', 3) of a clip, with normalised brightness and contrast."""
    small = [cv2.resize(face.mean(-1), (SIDE, SIDE), interpolation=cv2.INTER_AREA) for face in faces.astype(np.float32)]
    mean = np.mean(small, axis=0).ravel()
    return (mean - mean.mean()) / (mean.std() + 1e-6) @ projection()


@dataclass(frozen=True)
class KnownPeople:
    """Means (P, D) and standard deviation (D,) of the face features of the people in the training data."""

    means: np.ndarray
    scale: np.ndarray
    limit: float = LIMIT

    @classmethod
    def from_clips(cls, features: Sequence[np.ndarray], speakers: Sequence[str]) -> KnownPeople:
        """Estimate the statistics from clips with these features (D,) and speakers."""
        rows = np.stack(features)
        names = np.array(speakers)
        people = sorted(set(speakers))
        means = np.stack([rows[names == name].mean(0) for name in people])
        spread = rows - means[np.searchsorted(people, names)]
        return cls(means, spread.std(0) + 1e-3)

    @classmethod
    def from_release(cls, folder: Path) -> KnownPeople | None:
        """Read people.json of a release folder. Return None if it does not exist.

        Raises:
            UserError: If the file does not contain these statistics.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        stored = read_json(path)
        try:
            means = np.array(stored["means"], float)
            scale = np.array(stored["scale"], float)
            limit = float(stored["limit"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error!r}): download the release again") from error
        is_valid = means.shape == (len(means), FEATURES) and len(means) > 0 and scale.shape == (FEATURES,)
        if not is_valid or not np.isfinite(means).all() or not (scale > 0).all():
            raise UserError(f"{path} is damaged (shapes {means.shape} and {scale.shape}): download the release again")
        return cls(means, scale, limit)

    def save(self, folder: Path) -> None:
        """Write people.json to a release folder."""
        rounded = {"means": self.means.round(3).tolist(), "scale": self.scale.round(3).tolist(), "limit": self.limit}
        write_json(folder / FILE, rounded)

    def distance(self, faces: np.ndarray) -> float:
        """Return the distance of a clip's face crops to the nearest person, about 1 for a known person."""
        steps = (face_features(faces) - self.means) / self.scale
        return float(np.sqrt(np.square(steps).mean(1)).min())

    def remark(self, faces: np.ndarray) -> str:
        """Return a remark if the face is unlike those of the training clips, else ""."""
        distance = self.distance(faces)
        if distance <= self.limit:
            return ""
        how = f"distance {distance:.1f}, limit {self.limit:g}"
        return f"the face is unlike those of the training clips ({how}): the speech may be wrong"

"""Frames of the same clip as training samples, from video files decoded once into a cache.

Axes: N clips, K frames that are kept of a clip, S side of the network's square.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import atomic_output
from engine.media.corpus import read_manifest
from engine.progress import track


def sample_frames(path: str | Path, count: int, size: int, shift: float = 0.5) -> np.ndarray:
    """`count` evenly spaced frames of a video, (count, S, S, 3) RGB bytes, resized by area averages.

    OpenCV reads them: several times as fast as a decoder process a clip, and pairs need no exact frame rate.

    Args:
        shift: where in its share of the clip each frame is taken, in [0, 1). Frames repeat in a clip of fewer frames.

    Raises:
        UserError: the file is missing or has no frames.
    """
    capture = cv2.VideoCapture(str(path))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    wanted = _positions(total, count, shift)
    frames: list[np.ndarray] = []
    for position in range(total):
        if not capture.grab():
            break
        for _ in range(int((wanted == position).sum())):
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    if not frames:
        raise UserError(f"{path}: no frames can be read from it")
    frames += frames[-1:] * (count - len(frames))  # containers may count a frame too many
    if frames[0].shape[:2] != (size, size):
        frames = [cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack(frames)


class FramePairs(torch.utils.data.Dataset):
    """Two different frames of a clip, one pair a clip and epoch.

    The first time, `frames` pictures of each clip of ROOT/SPLIT are decoded into one file in the folder `cache`
    (S x S x 3 bytes each); later they are read from there, memory-mapped.

    Args:
        root, split: the corpus folder and the split whose manifest names the clips (ID.mp4). Clips are square pictures
            of one face; others are squeezed.
        size: S.
        frames: K, at least 2.
        cache: folder for the decoded frames.
        tracks: known movements, one number a frame, that the manifest has under `mouth` or `pose`, and the factor of
            each.

    Raises:
        UserError: no manifest, a clip that cannot be read, fewer than two frames a clip, or a track that is missing.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        cache: str | Path,
        split: str = "train",
        frames: int = 12,
        tracks: Mapping[str, float] | None = None,
    ):
        if frames < 2:
            raise UserError(f"data.train.frames={frames}: a pair needs 2 or more frames of a clip")
        rows = read_manifest(root, split)
        ids = [row["id"] for row in rows]
        phases = np.random.default_rng(0).random(len(ids))  # one for all clips would miss what is periodic
        digest = hashlib.blake2b("\n".join(ids).encode(), digest_size=4).hexdigest()
        path = Path(cache) / f"frames-{split}-{size}px-{frames}-{digest}.npy"
        if not path.is_file():
            _decode([Path(root) / split / f"{name}.mp4" for name in ids], path, size, phases, frames)
        self.pictures = np.load(path, mmap_mode="r")  # (N, K, S, S, 3)
        self.tracks = None  # (N, K, L)
        if tracks:
            self.tracks = torch.stack([_tracks(row, tracks, frames, phase) for row, phase in zip(rows, phases)])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{"frames": (2, S, S, 3) bytes}, with tracks also {"tracks": (2, L)}; a function of (index, generator)."""
        chosen = torch.randperm(self.pictures.shape[1], generator=generator)[:2].tolist()
        item = {"frames": torch.from_numpy(np.stack([self.pictures[index, k] for k in chosen]))}
        return item if self.tracks is None else item | {"tracks": self.tracks[index, chosen]}

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """{"frames": (B, 2, S, S, 3) bytes} and, with tracks, {"tracks": (B, 2, L)}."""
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _positions(total: int, count: int, shift: float) -> np.ndarray:
    """Indices (count,) of evenly spaced frames out of `total`."""
    return ((np.arange(count) + shift) * total / count).astype(int)


def _tracks(row: dict, factors: Mapping[str, float], frames: int, phase: float) -> Tensor:
    """The named movements times their factors, (K, L), at the frames that `sample_frames` takes."""
    known = row.get("mouth", {}) | row.get("pose", {})
    for name in factors:
        if name not in known:
            raise UserError(f"data.train.tracks: the manifest has no track {name!r} of clip {row['id']}")
    values = torch.tensor([known[name] for name in factors]).T * torch.tensor(list(factors.values()))
    return values[_positions(len(values), frames, phase)]


def _decode(paths: list[Path], out: Path, size: int, phases: np.ndarray, frames: int) -> None:
    """Write the frames of all clips as one array (N, K, S, S, 3)."""
    with atomic_output(out) as partial:
        shape = (len(paths), frames, size, size, 3)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for i, path in track(enumerate(paths), len(paths), "clips"):
            array[i] = sample_frames(path, frames, size, float(phases[i]))
        array.flush()

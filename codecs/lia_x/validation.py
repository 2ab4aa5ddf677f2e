"""How well a LIA-X rebuilds held-out clips from their first frame and their motion codes, while it is trained.

Axes: T frames, S side, H height, W width, M motion. Frames are RGB bytes (T, S, S, 3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from engine.evaluation.resynthesis import rebuild
from engine.evaluation.validation import ALONE, ByClip, Share
from engine.media.pictures import fit_frames
from engine.media.video import read_video
from engine.metrics.picture import reconstruction
from engine.shards.reader import ShardSplit
from engine.shards.recordings import is_prepared, read_manifest
from engine.shards.source import join
from lia_x.codec import LiaX
from lia_x.data import PORTRAITS, unpack_portraits


@dataclass(frozen=True)
class RebuiltClip:
    """One held-out clip: its frames and the rebuilt ones (T, S, S, 3) bytes, and the codes (T, M)."""

    true: np.ndarray
    rebuilt: np.ndarray
    motion: Tensor


def rebuild_frames(codec: LiaX, frames: np.ndarray) -> RebuiltClip:
    """Rebuild frames (T, H, W, 3) of bytes from the first one and the motion codes of all."""
    rebuilt, motion = rebuild(codec, frames)
    return RebuiltClip(fit_frames(frames, codec.size), rebuilt, motion.cpu())


def measure_each(clips: Mapping[int, RebuiltClip], regions: Mapping[str, Mapping[str, float]]) -> dict[str, ByClip]:
    """Measure clips, by their numbers: `reconstruction`, and the `roughness` of the codes.

    It is the mean square of their second differences over their variance in time; white noise has 6.

    Args:
        regions: boxes by name, in shares of the side.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for number, clip in clips.items():
        figures = reconstruction(clip.true, clip.rebuilt, regions)
        if len(clip.motion) > 2:
            variance = clip.motion.var(0).sum().clamp_min(1e-12)
            figures["roughness"] = float(clip.motion.diff(n=2, dim=0).square().mean(0).sum() / variance)
        for name, value in figures.items():
            found[name][number] = value
    return {name: ByClip(values, np.mean) for name, values in found.items()}


def rebuild_clips(
    codec: LiaX, root: str | Path, split: str, count: int, share: Share = ALONE
) -> dict[int, RebuiltClip]:
    """Rebuild a share of the first `count` clips of ROOT/SPLIT, by their number.

    Of prepared shards, the pictures that they hold of each clip.
    """
    if is_prepared(root, split):
        shards = ShardSplit(join(root, split), least_frames=2)
        shards.check_holds("portraits")
        shards.require(*PORTRAITS)
        clips = {}
        for index in share.range(min(count, len(shards))):
            packed, starts = map(shards.read_complete(index, PORTRAITS)[1].get, PORTRAITS)
            clips[index] = rebuild_frames(codec, unpack_portraits(packed, starts, codec.size))
        return clips
    names = [row["id"] for row in read_manifest(root, split)[:count]]
    paths = {i: Path(root) / split / f"{names[i]}.mp4" for i in share.range(len(names))}
    return {i: rebuild_frames(codec, read_video(path)) for i, path in paths.items()}


def strip(clips: Sequence[RebuiltClip], columns: int = 12) -> np.ndarray:
    """Draw two rows a clip, true above rebuilt, `columns` evenly spaced frames: (2 clips S, columns S, 3) bytes."""
    rows = []
    for clip in clips:
        chosen = np.linspace(0, len(clip.true) - 1, columns).astype(int)
        rows += [np.concatenate(list(frames[chosen]), 1) for frames in (clip.true, clip.rebuilt)]
    return np.concatenate(rows)

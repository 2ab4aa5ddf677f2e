"""How well a LIA-X rebuilds held-out clips from their first frame and their motion codes.

Axes: T frames, S side, H height, W width, M motion. Frames are RGB bytes (T, S, S, 3).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.evaluation.shares import ALONE, ByClip, Share
from engine.media.pictures import identity_to_tensor, to_bytes, video_to_tensor
from engine.media.video import read_video
from engine.metrics.picture import psnr, ssim
from engine.shards.reader import ShardSplit
from engine.shards.recordings import is_prepared, read_manifest
from engine.shards.source import join
from lia_x.codec import LiaX
from lia_x.data import PORTRAITS, unpack_portraits


@dataclass(frozen=True)
class RebuiltClip:
    """One held-out clip: its name, its frames and the rebuilt ones (T, S, S, 3) bytes, and the codes (T, M)."""

    name: str
    true: np.ndarray
    rebuilt: np.ndarray
    motion: Tensor


def rebuild(codec: LiaX, path: str | Path) -> RebuiltClip:
    """A clip from its first frame and the motion codes of all its frames."""
    return rebuild_frames(codec, Path(path).stem, read_video(path))


def rebuild_frames(codec: LiaX, name: str, frames: np.ndarray) -> RebuiltClip:
    """As `rebuild`, from frames (T, H, W, 3) of bytes."""
    size = codec.config.size
    video = video_to_tensor(frames, size)
    motion = codec.encode(video)
    rebuilt = codec.decode(motion, identity_to_tensor(frames[0], size))
    return RebuiltClip(name, to_bytes(video + 0.5 / 127.5), to_bytes(rebuilt), motion.cpu())


def region(frames: np.ndarray, box: Mapping[str, float]) -> np.ndarray:
    """The part of (T, S, S, 3) inside a box given in shares of the side."""
    left, top, right, bottom = (round(box[side] * frames.shape[1]) for side in ("left", "top", "right", "bottom"))
    return frames[:, top:bottom, left:right]


def measure(clips: Sequence[RebuiltClip], regions: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over clips.

    Args:
        regions: boxes by name, in shares of the side.

    Returns:
        `psnr` (dB) and `ssim` of the whole picture; NAME`_psnr` of a region, and NAME`_movement`: the share of the
        region's variance in time that the rebuilt frames explain (1: all; 0: as good as the clip's mean picture);
        `roughness` of the codes: mean square of their second differences over their variance in time (white noise: 6).
    """
    return {name: float(value()) for name, value in measure_each(clips, regions).items()}


def measure_each(
    clips: Sequence[RebuiltClip], regions: Mapping[str, Mapping[str, float]], numbers: Sequence[int] | None = None
) -> dict[str, ByClip]:
    """As `measure`, by clip. numbers: of the clips among all clips of a validation."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for number, clip in zip(numbers or range(len(clips)), clips):
        found["psnr"][number] = psnr(_as_batch(clip.true), _as_batch(clip.rebuilt))
        found["ssim"][number] = ssim(_as_batch(clip.true), _as_batch(clip.rebuilt))
        for name, box in regions.items():
            true, rebuilt = (region(frames, box).astype(np.float64) for frames in (clip.true, clip.rebuilt))
            found[f"{name}_psnr"][number] = psnr(torch.from_numpy(true), torch.from_numpy(rebuilt))
            variance = np.square(true - true.mean(0)).sum()
            if variance > 0:
                found[f"{name}_movement"][number] = float(1 - np.square(true - rebuilt).sum() / variance)
        if len(clip.motion) > 2:
            variance = clip.motion.var(0).sum().clamp_min(1e-12)
            found["roughness"][number] = float(clip.motion.diff(n=2, dim=0).square().mean(0).sum() / variance)
    return {name: ByClip(values, np.mean) for name, values in found.items()}


def mouth_correlation(clips: Sequence[RebuiltClip], opening: Callable[[np.ndarray], np.ndarray]) -> float:
    """Mean over clips of the correlation in time of the mouth's openings in true and in rebuilt frames.

    Args:
        opening: reads how far the mouth is open: frames (T, S, S, 3) of bytes -> (T,).
    """
    pairs = [(opening(clip.true), opening(clip.rebuilt)) for clip in clips]
    return float(np.mean([np.corrcoef(true, rebuilt)[0, 1] for true, rebuilt in pairs]))


def measure_speed(codec: LiaX, clip: RebuiltClip, chunk: int) -> dict[str, float]:
    """Frames a second in batches of `chunk` frames and one by one, the best of three passes over a clip."""
    video = torch.from_numpy(clip.true).permute(0, 3, 1, 2).float() / 127.5 - 1
    identity = codec.identity(video[0])

    def rate(run: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return len(video) / min(times)

    found = {}
    for name, frames in (("batched", chunk), ("one_by_one", 1)):
        found[f"motion_{name}"] = rate(lambda frames=frames: codec.encode(video, frames))
        found[f"render_{name}"] = rate(lambda frames=frames: codec.decode(clip.motion, identity, frames))
    return found


def _as_batch(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def rebuild_clips(
    codec: LiaX, root: str | Path, split: str, count: int, share: Share = ALONE
) -> dict[int, RebuiltClip]:
    """A share of the first `count` clips of ROOT/SPLIT, rebuilt, by their number.

    Of prepared shards, the pictures that they hold of each clip.
    """
    if is_prepared(root, split):
        shards = ShardSplit(join(root, split), least_frames=2)
        shards.check_holds("portraits")
        shards.require(*PORTRAITS)
        clips = {}
        for index in share.range(min(count, len(shards))):
            info, t = shards.read_complete(index, PORTRAITS)
            frames = unpack_portraits(t["portraits"], t["portraits_at"], codec.config.size)
            clips[index] = rebuild_frames(codec, info["key"], frames)
        return clips
    rows = read_manifest(root, split)[:count]
    return {i: rebuild(codec, Path(root) / split / f"{rows[i]['id']}.mp4") for i in share.range(len(rows))}


def strip(clips: Sequence[RebuiltClip], columns: int = 12) -> np.ndarray:
    """Two rows a clip, true above rebuilt, `columns` evenly spaced frames: (2 clips S, columns S, 3) bytes."""
    rows = []
    for clip in clips:
        chosen = np.linspace(0, len(clip.true) - 1, columns).astype(int)
        rows += [np.concatenate(list(frames[chosen]), 1) for frames in (clip.true, clip.rebuilt)]
    return np.concatenate(rows)

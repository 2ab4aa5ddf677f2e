"""How well a LIA-X rebuilds held-out clips from their first frame and their motion codes.

Axes: T frames, S side, H height, W width, M motion. Frames are RGB bytes (T, S, S, 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.media.video import read_video
from engine.metrics.picture import psnr, ssim
from lia_x.data import clip_ids
from lia_x.lia_x import LiaX
from lia_x.pictures import identity_to_tensor, to_bytes, video_to_tensor


@dataclass(frozen=True)
class RebuiltClip:
    """One held-out clip: its name, its frames and the rebuilt ones (T, S, S, 3) bytes, and the codes (T, M)."""

    name: str
    true: np.ndarray
    rebuilt: np.ndarray
    motion: Tensor


def rebuild(codec: LiaX, path: str | Path) -> RebuiltClip:
    """A clip from its first frame and the motion codes of all its frames."""
    frames, size = read_video(path), codec.config.size
    video = video_to_tensor(frames, size)
    motion = codec.motion(video)
    rebuilt = codec.render(identity_to_tensor(frames[0], size), motion)
    return RebuiltClip(Path(path).stem, to_bytes(video + 0.5 / 127.5), to_bytes(rebuilt), motion.cpu())


def region(frames: np.ndarray, box: Mapping[str, float]) -> np.ndarray:
    """The part of (T, S, S, 3) inside a box given in shares of the side."""
    left, top, right, bottom = (round(box[side] * frames.shape[1]) for side in ("left", "top", "right", "bottom"))
    return frames[:, top:bottom, left:right]


def mouth_change(frames: np.ndarray, box: Mapping[str, float]) -> np.ndarray:
    """How dark the mouth is, (T,): the share of the box that is much darker than the box's median brightness.

    An open mouth shows its dark inside; teeth, tongue and lips change the figure, but alike in true and rebuilt frames.
    """
    grey = region(frames, box).mean(-1)
    return (grey < 0.6 * np.median(grey, axis=(1, 2), keepdims=True)).mean((1, 2))


def _as_batch(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def measure(clips: Sequence[RebuiltClip], mouth: Mapping[str, float]) -> dict[str, float]:
    """Means over clips.

    Returns:
        `psnr` and `ssim` of the whole picture, `mouth_psnr` of the box, `still_psnr` and `still_mouth_psnr` of a
        first frame that stands still (what motion codes have to beat), `mouth_correlation` of the mouths' darkness
        in true and rebuilt frames, `roughness`: mean square of the codes' second differences over their variance in
        time (white noise: 6).
    """
    found: dict[str, list[float]] = {}
    for clip in clips:
        still = np.broadcast_to(clip.true[:1], clip.true.shape)
        pairs = {"psnr": (clip.true, clip.rebuilt), "still_psnr": (clip.true, still)}
        for name, (a, b) in pairs.items():
            found.setdefault(name, []).append(psnr(_as_batch(a), _as_batch(b)))
            a, b = region(a, mouth), region(b, mouth)
            found.setdefault(name.replace("psnr", "mouth_psnr"), []).append(psnr(_as_batch(a), _as_batch(b)))
        found.setdefault("ssim", []).append(ssim(_as_batch(clip.true), _as_batch(clip.rebuilt)))
        a, b = mouth_change(clip.true, mouth), mouth_change(clip.rebuilt, mouth)
        if a.std() > 0:
            found.setdefault("mouth_correlation", []).append(float(np.corrcoef(a, b)[0, 1]) if b.std() > 0 else 0.0)
        variance = clip.motion.var(0).sum().clamp_min(1e-12)
        found.setdefault("roughness", []).append(float(clip.motion.diff(n=2, dim=0).square().mean(0).sum() / variance))
    return {name: float(np.mean(values)) for name, values in found.items()}


def evaluate(
    codec: LiaX, root: str | Path, split: str, count: int, mouth: Mapping[str, float]
) -> tuple[dict[str, float], list[RebuiltClip]]:
    """`measure` on the first `count` clips of ROOT/SPLIT, and those clips."""
    clips = [rebuild(codec, Path(root) / split / f"{name}.mp4") for name in clip_ids(root, split)[:count]]
    return measure(clips, mouth), clips


def strip(clips: Sequence[RebuiltClip], columns: int = 12) -> np.ndarray:
    """Two rows a clip, true above rebuilt, `columns` evenly spaced frames: (2 clips S, columns S, 3) bytes."""
    rows = []
    for clip in clips:
        chosen = np.linspace(0, len(clip.true) - 1, columns).astype(int)
        rows += [np.concatenate(list(frames[chosen]), 1) for frames in (clip.true, clip.rebuilt)]
    return np.concatenate(rows)

"""Training batches from prepared features.

Axes: B batch, T video frames, L = 2 T token frames, K token levels, S picture side.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hicodit.features import Clip, FeatureSplit, token_digest
from rvq_codec import RVQCodec

SHIFT = 3  # pixels by which a mouth crop may be off in training: the tracker's own jitter and more


def augment_mouth(mouth: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, mirror and relight mouth pictures (T, S, S) in [0, 1], the same way through the clip.

    Brightness and contrast need no change: the lip encoder takes them out of every picture.
    """
    dx, dy = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    side = mouth.shape[-1]
    padded = F.pad(mouth[:, None], (SHIFT,) * 4, mode="replicate")[:, 0]
    mouth = padded[:, SHIFT + dy : SHIFT + dy + side, SHIFT + dx : SHIFT + dx + side]
    flip, gamma = torch.rand(2, generator=generator).tolist()
    if flip < 0.5:
        mouth = mouth.flip(-1)
    return mouth ** (0.7 + 0.6 * gamma)


class HiCoDiTDataset:
    """Clips of a prepared split, for `engine.trainer`.

    Args:
        folder: features of one split.
        codec: release folder of the tokenizer whose tokens are wanted.
        augment: shift, mirror and relight the mouth pictures.
        limit: use only the first clips.
    """

    def __init__(self, folder: str | Path, codec: str | Path, augment: bool = True, limit: int | None = None) -> None:
        self.split = FeatureSplit(folder, token_digest(RVQCodec.from_pretrained(codec)))
        self.augment = augment
        self.size = min(limit or len(self.split), len(self.split))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """mouth (T, S, S) and face (3, S', S') in [0, 1], tokens (2 T, K), ge2e (256,), expression (), phoneme (T,)."""
        clip: Clip = self.split[index]
        mouth = clip.mouth.float() / 255
        if self.augment:
            mouth = augment_mouth(mouth, generator)
        picture = int(torch.randint(len(clip.faces), (1,), generator=generator))
        face = clip.faces[picture].permute(2, 0, 1).float() / 255
        if self.augment:
            face = (face * (0.85 + 0.3 * torch.rand(1, generator=generator))).clamp(0, 1)
        return {
            "mouth": mouth,
            "face": face,
            "tokens": clip.tokens,
            "ge2e": clip.ge2e,
            "expression": torch.tensor(clip.expression),
            "phoneme": clip.phoneme,
        }

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Padded: mouth (B, T, S, S), face (B, 3, S', S'), tokens (B, K, L), phoneme (B, T), frames (B,)."""
        frames = [len(item["mouth"]) for item in items]
        longest = max(frames)
        batch = {name: torch.stack([item[name] for item in items]) for name in ("face", "ge2e", "expression")}
        batch["mouth"] = torch.stack([F.pad(i["mouth"], (0, 0, 0, 0, 0, longest - n)) for i, n in zip(items, frames)])
        batch["phoneme"] = torch.stack([F.pad(i["phoneme"], (0, longest - n)) for i, n in zip(items, frames)])
        tokens = [F.pad(i["tokens"], (0, 0, 0, 2 * (longest - n))) for i, n in zip(items, frames)]
        batch["tokens"] = torch.stack(tokens).transpose(1, 2).contiguous()
        batch["frames"] = torch.tensor(frames)
        return batch

"""The data set of HiCoDiT: clips of prepared shards.

Axes: B batch, T video frames, L = 2 T token frames, K token levels, J half seconds, F face pictures, S picture side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.codec import load_codec
from engine.errors import UserError
from engine.shards.reader import Reading, ShardSplit
from hicodit.model import TOKENS_PER_FRAME
from hicodit.system import CODECS

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


def picture_frames(length: int, count: int) -> np.ndarray:
    """The video frames (F,) of a clip's stored face pictures: `count` of them, evenly spread between its ends."""
    return np.linspace(0, length - 1, count + 2).round().astype(int)[1:-1]


@dataclass(frozen=True)
class HiCoDiTSample:
    """One clip as it is stored.

    Attributes:
        mouth: (T, S, S) uint8 grey. faces: (F, S', S', 3) uint8 RGB, of the frames `picture_frames`.
        tokens: (2 T, K) int64. ge2e: (256,). expression: (J,) int64. phoneme: (T,) int64, 0 is silence.
        info: the clip's JSON.
    """

    mouth: Tensor
    faces: Tensor
    tokens: Tensor
    ge2e: Tensor
    expression: Tensor
    phoneme: Tensor
    info: dict[str, Any]


class HiCoDiTDataset:
    """Clips of one split of prepared shards, for `engine.training.trainer`.

    Args:
        source: folder of the split, or its URL.
        codec: release folder of the tokenizer that must have made the tokens.
        augment: shift, mirror and relight the mouth pictures.
        limit: use only the first clips.
        shards: fields of `engine.shards.reader.Reading`.
        packed: the model leaves padding out, so a batch's tokens are counted without it.

    Raises:
        UserError: the shards are missing or damaged, or another tokenizer made them.
    """

    TENSORS = ("mouth", "faces", "tokens", "ge2e", "expression", "phoneme")

    def __init__(
        self,
        source: str | Path,
        codec: str | Path,
        augment: bool = True,
        limit: int | None = None,
        shards: Mapping[str, Any] | None = None,
        packed: bool = False,
    ) -> None:
        tokenizer = load_codec(codec, CODECS)
        self.shards = ShardSplit(source, Reading(**(shards or {})))
        self.shards.check_made_with({"rvq": tokenizer.digest()})
        self.augment, self.levels, self.packed = augment, tokenizer.levels, packed
        self.size = min(limit or len(self.shards), len(self.shards))
        self.blocks = self.shards.blocks(self.size)

    def read(self, index: int) -> HiCoDiTSample:
        """Clip `index` as it is stored.

        Raises:
            UserError: its shard is damaged, or a tensor was not prepared.
        """
        info, tensors = self.shards.read(index, self.TENSORS)
        missing = [name for name in self.TENSORS[:5] if name not in tensors]
        if missing:
            raise UserError(f"{self.shards.source}: clip {info['key']} has no {', '.join(missing)}: prepare that too")
        tensors.setdefault("phoneme", torch.zeros(len(tensors["mouth"])))
        for name in ("tokens", "expression", "phoneme"):
            tensors[name] = tensors[name].long()
        return HiCoDiTSample(**tensors, info=info)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each clip, all levels counted, (n,)."""
        return self.shards.frames[: self.size] * TOKENS_PER_FRAME * self.levels

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Clips [first, last) come next."""
        self.shards.prefetch(spans)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Clip `index`: mouth (T, S, S) and face (3, S', S') in [0, 1], tokens (2 T, K), ge2e (256,), phoneme (T,);
        expression (J,) of each half second and face_expression () of the one that `face` is from.
        """
        clip = self.read(index)
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
            "expression": clip.expression,
            "face_expression": clip.expression[2 * picture_frames(len(mouth), len(clip.faces))[picture] // 25],
            "phoneme": clip.phoneme,
        }

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Padded: mouth (B, T, S, S), tokens (B, K, L), phoneme (B, T), expression (B, J); face (B, 3, S', S'), ge2e
        (B, 256), face_expression (B,), frames (B,).
        """
        frames = [len(item["mouth"]) for item in items]
        longest = max(frames)
        batch = {name: torch.stack([item[name] for item in items]) for name in ("face", "ge2e", "face_expression")}
        batch["expression"] = pad_sequence([item["expression"] for item in items], batch_first=True)
        batch["mouth"] = torch.stack([F.pad(i["mouth"], (0, 0, 0, 0, 0, longest - n)) for i, n in zip(items, frames)])
        batch["phoneme"] = torch.stack([F.pad(i["phoneme"], (0, longest - n)) for i, n in zip(items, frames)])
        tokens = [F.pad(i["tokens"], (0, 0, 0, 2 * (longest - n))) for i, n in zip(items, frames)]
        batch["tokens"] = torch.stack(tokens).transpose(1, 2).contiguous()
        batch["frames"] = torch.tensor(frames)
        return batch

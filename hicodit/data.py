"""Training batches from prepared features.

Axes: B batch, T video frames, L = 2 T token frames, J expression windows, K token levels, S picture side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.codec import load_codec
from engine.errors import UserError
from engine.seeding import Blocks
from engine.shards.reader import Reading, ShardSplit
from engine.shards.source import is_remote
from hicodit.conditions.types import windows_of
from hicodit.features import Clip, FeatureSplit
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


class ShardedClips:
    """Clips of a split of prepared shards (scripts/prepare_data.py), as `FeatureSplit` gives them.

    Raises:
        UserError: the shards are missing or damaged, lack pictures or tokens, or another tokenizer made them.
    """

    TENSORS = ("mouth", "faces", "tokens", "ge2e", "expression", "phoneme")

    def __init__(self, source: str | Path, digest: str, reading: Reading | None = None) -> None:
        self.shards = ShardSplit(source, reading)
        self.shards.check_made_with({"rvq": digest})
        self.frames = self.shards.frames

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Clip:
        info, tensors = self.shards.read(index, self.TENSORS)
        missing = [name for name in self.TENSORS[:5] if name not in tensors]
        if missing:
            raise UserError(f"{self.shards.source}: clip {info['key']} has no {', '.join(missing)}: prepare that too")
        expression, frames = tensors["expression"], len(tensors["mouth"])
        return Clip(
            mouth=tensors["mouth"],
            faces=tensors["faces"],
            tokens=tensors["tokens"].long(),
            ge2e=tensors["ge2e"],
            expression=int(expression.argmax() if expression.ndim else expression),
            phoneme=tensors.get("phoneme", torch.zeros(frames, dtype=torch.uint8)).long(),
            info=info | {"id": info["key"]},
        )


def open_clips(folder: str | Path, digest: str, reading: Reading | None = None) -> FeatureSplit | ShardedClips:
    """The clips of one split: shards where there is an index.json or a URL, else features of prepare_features.py."""
    if is_remote(folder) or (Path(folder) / "index.json").is_file():
        return ShardedClips(folder, digest, reading)
    return FeatureSplit(folder, digest)


class HiCoDiTDataset:
    """Clips of a prepared split, for `engine.training.trainer`.

    Args:
        folder: features or shards of one split, the latter also behind a URL.
        codec: release folder of the tokenizer whose tokens are wanted.
        augment: shift, mirror and relight the mouth pictures.
        limit: use only the first clips.
        shards: fields of `engine.shards.reader.Reading`.
        packed: the model leaves padding out, so a batch's tokens are counted without it.
    """

    def __init__(
        self,
        folder: str | Path,
        codec: str | Path,
        augment: bool = True,
        limit: int | None = None,
        shards: Mapping[str, Any] | None = None,
        packed: bool = False,
    ) -> None:
        tokenizer = load_codec(codec, CODECS)
        self.split = open_clips(folder, tokenizer.digest(), Reading(**(shards or {})))
        self.augment, self.levels, self.packed = augment, tokenizer.levels, packed
        self.size = min(limit or len(self.split), len(self.split))
        self.blocks: Blocks | None = None
        if isinstance(self.split, ShardedClips):
            self.blocks = self.split.shards.blocks(self.size)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each clip, all levels counted, (n,)."""
        return self.split.frames[: self.size] * TOKENS_PER_FRAME * self.levels

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Clips [first, last) come next."""
        self.split.shards.prefetch(spans)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """mouth (T, S, S) and face (3, S', S') in [0, 1], tokens (2 T, K), ge2e (256,), phoneme (T,); the expression of
        each half second (J,) and face_expression ().
        """
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
            "expression": torch.full((windows_of(len(mouth)),), clip.expression),
            "face_expression": torch.tensor(clip.expression),
            "phoneme": clip.phoneme,
        }

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Padded: mouth (B, T, S, S), face (B, 3, S', S'), tokens (B, K, L), expression (B, J), phoneme (B, T)."""
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

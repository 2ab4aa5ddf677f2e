"""HiCoDiT's dataset: clips of prepared shards.

Axes: B batch, T video frames, L = 2 T token frames, K token levels, J half seconds, F face crops, S image side,
E lip feature width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.codec import load_codec
from engine.errors import UserError
from engine.settings import require_range
from engine.shards.reader import Reading, ShardSplit
from hicodit.conditions import encoders_learn
from hicodit.conditions.types import FPS, MIN_FRAMES, num_expression_windows
from hicodit.model import TOKENS_PER_FRAME
from hicodit.system import CODECS

SECOND = int(FPS)  # video frames per second
CROP_TENSORS = ("mouth", "faces")  # inputs of trainable encoders
FEATURE_TENSORS = ("lip", "face_identity")  # outputs of frozen encoders, in half precision
FACE_DETECTOR = "face"  # entry of the digests with the face detector, see `engine.faces.source`
ALWAYS_REQUIRED = ("tokens", "ge2e", "expression")
EXPRESSION_TENSORS = {"heard": "heard_expression", "seen": "expression"}  # by the setting data.train.expression
SHIFT = 4  # maximum translation of a mouth crop in training in pixels, more than the jitter of the tracker
MAX_TURN = 0.12  # maximum rotation in radians
MAX_SCALE = 0.12  # maximum relative change of its size
MAX_HIDDEN = 7  # maximum number of masked frames


def augment_mouth(mouth: Tensor, generator: torch.Generator) -> Tensor:
    """Augment mouth crops (T, S, S) in [0, 1] by translation, rotation, scaling, mirroring, shading and occlusion,
    equally for all frames.

    Brightness and contrast are not augmented, as the lip encoder normalises them.
    """
    side = mouth.shape[-1]
    x, y, turn, scale, cover, gamma = (2 * torch.rand(6, generator=generator) - 1).tolist()
    angle = MAX_TURN * turn
    factor = 1 + MAX_SCALE * scale
    cos = factor * math.cos(angle)
    sin = factor * math.sin(angle)
    shift_x = 2 * SHIFT * x / side
    shift_y = 2 * SHIFT * y / side
    matrix = torch.tensor([[cos, -sin, shift_x], [sin, cos, shift_y]]).expand(1, 2, 3)
    grid = F.affine_grid(matrix, [1, 1, side, side], align_corners=False)
    mouth = F.grid_sample(mouth[None], grid, padding_mode="border", align_corners=False)[0]
    if float(torch.rand(1, generator=generator)) < 0.5:
        mouth = mouth.flip(-1)
    if cover > 0:
        size = int(side * (0.15 + 0.25 * cover))
        left, top = torch.randint(0, side - size, (2,), generator=generator).tolist()
        mouth[:, top : top + size, left : left + size] = mouth.mean()
    return mouth.clamp(0, 1) ** (1 + 0.3 * gamma)


def hide_span(mouth: Tensor, generator: torch.Generator) -> Tensor:
    """Mask a random span of mouth crops (T, S, S) by their mean, to learn context.

    This is time masking of up to `MAX_HIDDEN` frames, as used in lip reading (arXiv 2202.13084, Section 3.3).
    """
    frames = len(mouth)
    length = int(torch.randint(2, MAX_HIDDEN + 1, (), generator=generator))
    start = int(torch.randint(max(frames - length, 0) + 1, (), generator=generator))
    hidden = mouth.clone()
    hidden[start : start + length] = mouth.mean(0)
    return hidden


def picture_frames(length: int, count: int) -> np.ndarray:
    """Return the frame indices (F,) of the stored face crops of a clip: `count` indices, evenly spaced over the
    clip.
    """
    return np.linspace(0, length - 1, count + 2).round().astype(int)[1:-1]


@lru_cache
def token_layout(codec: str | Path) -> tuple[str, int]:
    """Return the digest and the number of levels of a tokenizer. Its release folder is read once per process."""
    tokenizer = load_codec(codec, CODECS)
    return tokenizer.digest(), tokenizer.levels


class HiCoDiTDataset:
    """Clips of one split of prepared shards, for `engine.training.trainer`. Clips that are too short, or without a
    required tensor, are skipped.

    Args:
        source: folder or URL of the split.
        codec: release folder of the tokenizer; the tokens must have been computed with it.
        encoders: kind of the condition encoders. Trainable ones ("tiny") use crops; for frozen ones the shards contain
            features, so that the encoders are not run in training.
        expression: expression condition in training: "heard" (from the voice, as in the paper) or "seen" (from the
            face, as in inference).
        seconds: longer clips are randomly cropped to this number of seconds. None: no cropping.
        augment: whether to augment mouth crops. Features are not augmented.
        hide: fraction of the clips with a masked span of mouth crops, if augmented.
        shards: fields of `engine.shards.reader.Reading`.
        phonemes: number of classes of the lip encoder's auxiliary phoneme loss. None or 0: no such loss.
    """

    def __init__(
        self,
        source: str | Path,
        codec: str | Path,
        encoders: str = "tiny",
        expression: str = "seen",
        seconds: int | None = None,
        augment: bool = True,
        hide: float = 0.0,
        shards: Mapping[str, Any] | None = None,
        phonemes: int | None = None,
    ) -> None:
        if expression not in EXPRESSION_TENSORS:
            raise UserError(f"data.train.expression={expression!r} must be {' or '.join(EXPRESSION_TENSORS)}")
        if not 0 <= hide <= 1:
            raise UserError(f"data.train.hide={hide} must be between 0 and 1")
        if seconds is not None:
            require_range("data.train.seconds", seconds, 1, 3600)
        digest, self.levels = token_layout(codec)
        self.shards = ShardSplit(source, Reading(**(shards or {})), MIN_FRAMES)
        self.shards.check_made_with({"rvq": digest})
        self.inputs = CROP_TENSORS if encoders_learn(encoders) else FEATURE_TENSORS
        if self.inputs == FEATURE_TENSORS and not set(FEATURE_TENSORS) <= set(self.shards.index.get("digests") or ()):
            raise UserError(
                f"{source} does not contain the features of the {encoders} encoders: add them with "
                "scripts/prepare_data.py, stages.{lip,face_identity}.use=true stages.lip.encoders.folder=ENCODERS "
                "reuse=SHARDS (docs/data.md)"
            )
        self.expression = EXPRESSION_TENSORS[expression]
        if expression == "heard" and self.expression not in (self.shards.index.get("digests") or ()):
            raise UserError(
                f"{source} has no heard expressions: add them with scripts/prepare_data.py "
                "stages.heard_expression.use=true reuse=SHARDS (docs/data.md), or set data.expression=seen"
            )
        self.required = tuple(dict.fromkeys((*self.inputs, *ALWAYS_REQUIRED, self.expression)))
        self.shards.require(*self.required)
        self.max_frames = None if seconds is None else seconds * SECOND
        spoken = len(self.shards.index.get("symbols") or ()) + 1
        if phonemes and spoken > phonemes:
            raise UserError(f"{source} has {spoken} phonemes with silence: set task.encoders.phonemes={spoken} or more")
        self.augment = augment
        self.hide = hide
        self.blocks = self.shards.blocks()

    def read(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read the JSON and the stored tensors of clip `index`.

        Returns:
            tokens (2 T, K) int64; ge2e (256,); phoneme (T,) int64, 0 for silence or unknown; expression (J,) int64,
            from the face; heard_expression (J,) int64, from the voice, if it is the condition, `NO_EXPRESSION` where
            unknown. Images: mouth (T, S, S) uint8 grey, and faces (F, S', S', 3) uint8 RGB of the frames
            `picture_frames`; or their features: lip (T, E) and face_identity (F, 512) float16.
        """
        info, tensors = self.shards.read(index, (*self.required, "phoneme"))
        tensors.setdefault("phoneme", torch.zeros(len(tensors[self.inputs[0]])))
        for name in {"tokens", "expression", "phoneme", self.expression}:
            tensors[name] = tensors[name].long()
        return info, tensors

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each clip over all levels, (n,)."""
        frames = self.shards.frames
        return (
            (frames if self.max_frames is None else frames.clamp(max=self.max_frames)) * TOKENS_PER_FRAME * self.levels
        )

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Prefetch the clips [first, last), which are read next."""
        self.shards.prefetch(spans)

    def __len__(self) -> int:
        return len(self.shards)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return clip `index`: mouth (T, S, S) and face (3, S', S') in [0, 1], or lip (T, E) and face_identity (512,);
        tokens (2 T, K), ge2e (256,), phoneme (T,), expression (J,), heard or seen, and face_expression (), the
        expression seen in the window of the face crop.
        """
        _, whole = self.read(index)
        clip = self._crop(whole, generator)
        item = {name: clip[name] for name in ("tokens", "ge2e", "phoneme")} | {"expression": clip[self.expression]}
        if self.inputs == FEATURE_TENSORS:
            count = len(clip["face_identity"])
            picture = int(torch.randint(count, (1,), generator=generator))
            item |= {"lip": clip["lip"], "face_identity": clip["face_identity"][picture]}
        else:
            mouth = clip["mouth"].float() / 255
            count = len(clip["faces"])
            if self.augment:
                mouth = augment_mouth(mouth, generator)
                if self.hide and float(torch.rand(1, generator=generator)) < self.hide:
                    mouth = hide_span(mouth, generator)
            picture = int(torch.randint(count, (1,), generator=generator))
            face = clip["faces"][picture].permute(2, 0, 1).float() / 255
            if self.augment:
                face = (face * (0.85 + 0.3 * torch.rand(1, generator=generator))).clamp(0, 1)
            item |= {"mouth": mouth, "face": face}
        frame = picture_frames(len(whole["phoneme"]), count)[picture]
        window = 2 * frame // SECOND  # two expression windows per second
        return item | {"face_expression": whole["expression"][window]}

    def _crop(self, clip: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return a random crop of a long clip. Its face crops may be from anywhere in the clip.

        Crops start at whole seconds, where an expression window starts.
        """
        spare = 0 if self.max_frames is None else len(clip["phoneme"]) - self.max_frames
        if spare <= 0:
            return clip
        start = SECOND * int(torch.randint(spare // SECOND + 1, (), generator=generator))
        frames = slice(start, start + self.max_frames)
        windows = slice(num_expression_windows(start), num_expression_windows(start + self.max_frames))
        tokens = slice(TOKENS_PER_FRAME * frames.start, TOKENS_PER_FRAME * frames.stop)
        parts = {"tokens": tokens, "expression": windows, "heard_expression": windows}
        parts |= dict.fromkeys(("phoneme", "mouth", "lip"), frames)
        return clip | {name: clip[name][part] for name, part in parts.items() if name in clip}

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad mouth (B, T, S, S) or lip (B, T, E), tokens (B, K, L), phoneme (B, T), expression (B, J); stack face
        (B, 3, S', S') or face_identity (B, 512), ge2e (B, 256), face_expression (B,); add frames (B,).
        """
        padded = {"mouth", "lip", "tokens", "phoneme", "expression"}
        batch = {
            name: pad_sequence(rows, batch_first=True) if name in padded else torch.stack(rows)
            for name, rows in ((name, [item[name] for item in items]) for name in items[0])
        }
        batch["tokens"] = batch["tokens"].transpose(1, 2).contiguous()
        return batch | {"frames": torch.tensor([len(item["phoneme"]) for item in items])}

"""Talker-T2AV's training sets, with lengths and order for the trainer: of prepared latents, or of prepared shards.

Axes: F speech frames, Fm motion frames, Ds / Dm speech / motion channels, G speaker embedding, n examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.seeding import Blocks
from engine.shards.reader import Reading, ShardSplit
from engine.shards.source import is_remote, join, read_json
from talker_t2av.data import MAX_FRAMES, MotionStats, Paired, TalkerShards, checked_task, open_layout
from talker_t2av.features import FeatureEncoders
from talker_t2av.released import MOTION_MEAN, MOTION_STD

KINDS = {"speech": "whisperx_vae", "motion": "lia_x", "speaker": "speaker"}  # stream -> what an index calls its maker


@lru_cache
def _digests(speech: str, motion: str, speaker: str) -> dict[str, str]:
    return FeatureEncoders.load(speech, motion, speaker).digests()


def digests_of(stats: str | Path) -> dict[str, str]:
    """By stream, the digest of the weights that made it, from motion statistics or from an index of shards."""
    made = read_json(stats).get("digests") or {}
    return {stream: made[kind] for stream, kind in KINDS.items() if made.get(kind)} if "lia_x" in made else made


class PreparedShards(TalkerShards):
    """Examples from shards of `scripts/prepare_data.py`, the same that `TalkerShards` gives of the same latents.

    Args:
        source: folder or URL of one split.
        codecs: folders `speech`, `motion`, `speaker` that must have made the latents; None: not checked.
        stats: JSON file or URL with the motion's statistics, as the training split's index.json; None: those of the
            released model.
        reading: how shards are read.
        task, tokenizer, patch_size, delay, limit: as in `TalkerShards`.

    Raises:
        UserError: the shards are missing or damaged, lack a stream, or other codecs made them.
    """

    def __init__(
        self,
        source: str | Path,
        codecs: Mapping[str, str] | None = None,
        stats: str | Path | None = None,
        reading: Reading | None = None,
        task: str = "t2av",
        tokenizer: str | Path | None = None,
        patch_size: int = 4,
        delay: int = 0,
        limit: int | None = None,
    ) -> None:
        self.shards = ShardSplit(source, reading)
        self.task = checked_task(task)
        self.words, self.layout = open_layout(tokenizer, patch_size, delay)
        self.needed = ["speech", "speaker", *(["motion"] if task == "t2av" else [])]
        if codecs is not None:
            made = _digests(**codecs)
            self.shards.check_made_with({KINDS[stream]: made[stream] for stream in self.needed})
        self.stats = (
            MotionStats.read(stats) if stats else MotionStats(torch.tensor(MOTION_MEAN), torch.tensor(MOTION_STD))
        )
        self.size = min(limit or len(self.shards), len(self.shards))
        self.rows = _Rows(self)

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        info, latents = self.shards.read(index, self.needed)
        missing = [name for name in self.needed if name not in latents]
        if missing:
            raise UserError(f"{self.shards.source}: clip {info['key']} has no {', '.join(missing)}: prepare that too")
        latents = {name: value.float() for name, value in latents.items()}
        latents.setdefault("motion", self.stats.mean.new_zeros(0, len(self.stats.mean)))  # unused: the task is TTS
        return info, latents

    @property
    def frames(self) -> Tensor:
        """(n,) of each clip."""
        return self.shards.frames[: self.size]

    @property
    def blocks(self) -> Blocks | None:
        return self.shards.blocks(self.size)

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Clips [first, last) come next."""
        self.shards.prefetch(spans)


class _Rows:
    """The JSON of each clip, read when it is asked for, with the `id` that a manifest's rows have."""

    def __init__(self, examples: PreparedShards) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        info = self.examples.shards.read(index, ())[0]
        return info | {"id": info["key"]}


def open_examples(
    root: str | Path,
    split: str,
    task: str = "t2av",
    codecs: Mapping[str, str] | None = None,
    stats: str | Path | None = None,
    reading: Reading | None = None,
    **layout: Any,
) -> TalkerShards:
    """The examples of one split: shards where ROOT/SPLIT has an index.json or ROOT is a URL, else prepared latents.

    Args:
        layout: tokenizer, patch_size, delay, limit.
    """
    folder = join(root, split)
    if is_remote(root) or Path(folder, "index.json").is_file():
        return PreparedShards(folder, codecs, stats, reading, task, **layout)
    return TalkerShards(root, split, task, **layout)


class Pairs(Paired):
    """`Paired` with what the trainer needs for batches by length and for shards.

    packed: the model leaves padding out.
    """

    packed = False

    @property
    def lengths(self) -> Tensor | None:
        """Patches of each pair, (n,): of both examples if packed, else twice the longer's, as both are padded to it.

        Text is not counted. None where the frames are not known.
        """
        sides = []
        for i, examples in enumerate(self.sets):
            frames = getattr(examples, "frames", None)
            if frames is None:
                return None
            at = (torch.arange(len(self)) + i * len(self) // 2) % len(examples)
            sides.append(-(-frames[at].clamp(max=MAX_FRAMES) // examples.layout.patch_size))
        return sum(sides) if self.packed else len(sides) * torch.stack(sides).amax(0)

    @property
    def blocks(self) -> Blocks | None:
        """Those of the larger set, as the numbers of its pairs."""
        side = max(range(len(self.sets)), key=lambda i: len(self.sets[i]))
        blocks = getattr(self.sets[side], "blocks", None)
        if blocks is None:
            return None
        borders = np.unique((np.cumsum(blocks.sizes) - side * len(self) // 2) % len(self))
        sizes = np.diff(borders, prepend=0, append=len(self))
        return Blocks([int(size) for size in sizes if size], blocks.window, blocks.streams)

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Pairs [first, last) come next."""
        for i, examples in enumerate(self.sets):
            if hasattr(examples, "prefetch"):
                starts = [((first + i * len(self) // 2) % len(examples), last - first) for first, last in spans]
                within = [(at, min(at + count, len(examples))) for at, count in starts]
                around = [(0, at + count - len(examples)) for at, count in starts if at + count > len(examples)]
                examples.prefetch([*within, *((first, min(last, len(examples))) for first, last in around)])


def pairs(
    root: str | Path,
    split: str = "train",
    tasks: tuple[str, ...] = ("t2av", "tts"),
    tts_root: str | Path | None = None,
    codecs: Mapping[str, str] | None = None,
    stats: str | Path | None = None,
    tokenizer: str | Path | None = None,
    patch_size: int = 4,
    delay: int = 0,
    limit: int | None = None,
    shards: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> Pairs:
    """A split of prepared latents or shards, half T2AV and half TTS in each batch.

    Args:
        root, split: folder of the splits, or its URL, and which is learned.
        tasks: t2av and tts, or tts alone.
        tts_root: of the TTS half, where it is another data set.
        codecs, stats: as in `PreparedShards`; prepared latents have their own statistics and are not checked.
        shards: fields of `engine.shards.reader.Reading`.
        packed: the model leaves padding out.
    """
    reading = Reading(**(shards or {}))
    layout = {"tokenizer": tokenizer, "patch_size": patch_size, "delay": delay, "limit": limit}
    roots = {"t2av": root, "tts": tts_root or root}
    sets = {
        task: open_examples(roots[checked_task(task)], split, task, codecs, stats, reading, **layout) for task in tasks
    }
    if "tts" not in sets:
        raise UserError(f"data.train.tasks={list(tasks)}: give [t2av, tts] or [tts]")
    both = Pairs(sets.get("t2av"), sets["tts"])
    both.packed = packed
    return both

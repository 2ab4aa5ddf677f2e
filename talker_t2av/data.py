"""Talker-T2AV's dataset: pairs of examples from prepared shards.

An example is a text with its speech latents and, for T2AV, its motion. Half of the examples of a batch are T2AV, half
TTS: an item of `TalkerPairs` is one example of each.

Axes: B batch, T tokens, F speech frames, Fm motion frames, Ds / Dm speech / motion channels, G speaker embedding, n
clips. Latents have 25 frames per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.errors import SkippedClips, UserError
from engine.settings import require_range
from engine.shards.reader import Blocks, Reading, ShardSplit
from engine.shards.source import join
from talker_t2av.alignment import align, token_classes
from talker_t2av.model import MAX_FRAMES
from talker_t2av.request import tokens_per_patch
from talker_t2av.system import MotionStats, codec_digests
from talker_t2av.text import load_tokenizer

TASKS = ("t2av", "tts")
MAX_TOKENS = 1000  # maximum length of a sequence in tokens; longer ones are truncated on the right
_codec_digests = lru_cache(codec_digests)
# Name of the digest of each stream in the index of a split
STAGES = {"speech": "whisperx_vae", "motion": "lia_x", "speaker": "speaker"}


def last_window_start(frames: int) -> int:
    """Return the last possible start of a window of at most 30 s in `frames` frames."""
    return max(0, frames - MAX_FRAMES)


@dataclass(frozen=True)
class SequenceFormat:
    """Sequence layout of a model: token ids, patch size, delay, maximum length, order."""

    speech_id: int
    tail: list[int]
    patch_size: int = 4
    delay: int = 0
    limit: int = MAX_TOKENS
    order: str = "add"

    def slots(self, speech_frames: int, motion_frames: int) -> int:
        """Return the number of placeholders of an example. motion_frames = 0 means TTS."""
        speech = -(-speech_frames // self.patch_size)
        patches = max(speech, motion_frames // self.patch_size + self.delay) if motion_frames else speech
        return patches * tokens_per_patch(self.order, motion_frames > 0)

    def example(self, prompt: list[int], speech: Tensor, speech_frames: int, motion: Tensor, speaker: Tensor) -> dict:
        """Return an item for `collate`.

        Args:
            prompt: token ids before the placeholders.
            speech: (F, Ds) latents.
            speech_frames: number of speech frames for which placeholders are added.
            motion: normalised codes (Fm, Dm); Fm = 0 for TTS.
            speaker: (G,) embedding.

        Returns:
            The token ids, truncated at `limit`, the span of the placeholders in them, which is (-1, -1) if none fits,
            and the streams with their lengths.
        """
        whole = len(motion) // self.patch_size * self.patch_size
        motion_frames = max(whole, self.patch_size) if len(motion) else 0  # at least one patch if there is motion
        motion = motion[:whole] if whole else motion
        slots = self.slots(speech_frames, motion_frames)
        start = len(prompt)
        ids = [*prompt, *[self.speech_id] * slots, *self.tail]
        end = min(start + slots, self.limit)
        return {
            "input_ids": torch.tensor(ids[: self.limit], dtype=torch.int32),
            "speech_span": torch.tensor((start, end) if end > start else (-1, -1)),
            "speech": speech,
            "speech_frames": torch.tensor(speech_frames),
            "motion": motion,
            "motion_frames": torch.tensor(motion_frames),
            "speaker": speaker,
        }


def collate(
    items: list[dict[str, Tensor]], pad_id: int, patch_size: int, classes: np.ndarray | None = None
) -> dict[str, Tensor]:
    """Collate items to a right-padded batch.

    Args:
        classes: classes of the tokens, see `token_classes`. Adds `pointer` (B, F), the token spoken in each frame.

    Returns:
        input_ids, attention_mask (B, T); speech_span (B, 2), the first placeholder and one past the last, (-1, -1) if
        there is none; speech (B, F, Ds); motion (B, Fm, Dm) normalised, Fm rounded up to whole patches, 0 if the batch
        has no motion; speech_frames, motion_frames (B,), the latter 0 in TTS rows; speaker (B, G). Other entries of the
        items, such as `phoneme` (B, F), are padded along their first axis.
    """
    batch = {}
    for name, value in items[0].items():
        parts = [item[name] for item in items]
        fill = pad_id if name == "input_ids" else 0
        same = value.ndim == 0 or name in ("speech_span", "speaker")
        batch[name] = torch.stack(parts) if same else pad_sequence(parts, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    if classes is not None:
        prompts = batch["speech_span"][:, 0].numpy()
        labels = batch["phoneme"].numpy()
        batch["pointer"] = torch.from_numpy(align(classes[batch["input_ids"][:, : prompts.max()]], prompts, labels))
    missing = -batch["motion"].shape[1] % patch_size
    batch["motion"] = torch.nn.functional.pad(batch["motion"], (0, 0, 0, missing))
    return batch


class TalkerExamples:
    """Examples of one task from one split of prepared shards.

    Args:
        source: folder or URL of the split.
        task: "t2av", or "tts" to omit the motion.
        codecs: folders `speech`, `motion`, `speaker` with which the latents must have been computed. None: not checked.
        stats: JSON file or URL with the motion statistics, such as index.json of the training split. None: those of the
            released model.
        reading: settings of reading shards.
        tokenizer: see `load_tokenizer`.
        patch_size, delay, order, phonemes: see the model.
    """

    def __init__(
        self,
        source: str | Path,
        task: str = "t2av",
        codecs: Mapping[str, str] | None = None,
        stats: str | Path | None = None,
        reading: Reading | None = None,
        tokenizer: str | Path | Mapping[str, str] | None = None,
        patch_size: int = 4,
        delay: int = 0,
        order: str = "add",
        phonemes: int = 0,
    ) -> None:
        require_range("data.train.delay", delay, 0, 256)
        self.shards = ShardSplit(source, reading, least_frames=patch_size + 1)  # a single patch yields no example
        self.task = task
        self.streams = ["speech", "speaker", *(["motion"] if task == "t2av" else [])]
        if codecs is not None:
            missing = [stream for stream in self.streams if not codecs.get(stream)]
            if missing:
                raise UserError(
                    f"task={task}: task.codecs.{missing[0]} is required: the codec that prepared the shards"
                )
            index = self.shards.index
            checked = list(self.streams)
            if "motion" in checked and index.get("motion_mean") and not (index.get("digests") or {}).get("lia_x"):
                print(f"{source}: its motion codes came with the data and are taken for those of {codecs['motion']}")
                checked.remove("motion")
            made = _codec_digests(**{stream: codecs[stream] for stream in checked})
            self.shards.check_made_with({STAGES[stream]: made[stream] for stream in checked})
        if phonemes:
            self.streams.append("phoneme")
            known = 1 + len(self.shards.index.get("symbols") or [])
            if known > phonemes:
                raise UserError(f"{source} has {known} phonemes with silence: set task.model.phonemes={known}")
        self.shards.require(*self.streams)
        self.frames = self.shards.frames  # (n,) length of each clip
        self.stats = MotionStats.read(stats)
        self.words = load_tokenizer(tokenizer)
        self.classes = token_classes(self.words, self.shards.index["symbols"]) if phonemes else None
        self.format = SequenceFormat(self.words.speech_id, self.words.tail, patch_size, delay, order=order)
        self.skipped = SkippedClips(self.shards.source, len(self.shards))  # clips whose text is unusable

    def __len__(self) -> int:
        return len(self.shards)

    def info(self, index: int) -> dict[str, Any]:
        """Return the JSON of the clip of `load(index)`: key, text, frames, ..."""
        return self._usable(index)[0]

    def _usable(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor], list[int]]:
        """Return JSON, streams and prompt of clip `index`, or of the next clip with a usable text."""
        for at in range(index, index + len(self)):
            info, latents = self.shards.read(at % len(self), self.streams)
            try:
                return info, latents, self.words.prompt(info["text"])
            except UserError as error:
                self.skipped.warn(info["key"], error)
        raise UserError(f"{self.shards.source}: no clip has a usable text, for the reasons above")

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the example of clip `index`. The window of a clip over 30 s is drawn from the generator.

        A clip whose text contains a control token is replaced by the next clip, with a message.
        """
        _, latents, prompt = self._usable(index)
        speech = latents["speech"].float()
        speaker = latents["speaker"].float()
        start = int(torch.randint(last_window_start(len(speech)) + 1, (), generator=generator))
        speech = speech[start : start + MAX_FRAMES]
        motion = self.stats.mean.new_zeros(0, len(self.stats.mean))
        if self.task == "t2av":
            motion = self.stats.normalise(latents["motion"].float())[start : start + MAX_FRAMES]
        example = self.format.example(prompt, speech, len(speech), motion, speaker)
        if "phoneme" in latents:
            example["phoneme"] = latents["phoneme"][start : start + MAX_FRAMES]
        return example

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the batch of some examples, see `collate`."""
        return collate(items, self.words.pad_id, self.format.patch_size, self.classes)


class TalkerPairs:
    """Batches of half T2AV and half TTS examples, for `engine.training.trainer`. An item is one example of each task,
    so that a batch has twice as many rows. With a single task, all examples belong to it.

    The larger set determines the length: each of its items is used once per epoch, and the items of the smaller set are
    used in turn.

    Args:
        root, split: folder or URL of the splits, and name of the training split.
        tasks: t2av and tts (as in the paper), only t2av (the released model), or only tts.
        tts_root: data set of the TTS half, if different.
        shards: fields of `engine.shards.reader.Reading`.
        examples: arguments of `TalkerExamples`: codecs, stats, tokenizer, patch_size, delay, order, phonemes.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        tasks: Sequence[str] = TASKS,
        tts_root: str | Path | None = None,
        shards: Mapping[str, Any] | None = None,
        **examples: Any,
    ) -> None:
        if sorted(tasks) not in (["t2av", "tts"], ["t2av"], ["tts"]):
            raise UserError(f"data.train.tasks={list(tasks)} must be [t2av, tts], [t2av] or [tts]")
        reading = Reading(**(shards or {}))
        roots = {"tts": tts_root or root}
        self.sets = [
            TalkerExamples(join(roots.get(task, root), split), task, reading=reading, **examples)
            for task in sorted(tasks)
        ]

    def __len__(self) -> int:
        return max(map(len, self.sets))

    def load(self, index: int, generator: torch.Generator | None = None) -> list[dict[str, Tensor]]:
        """Return one example of each task; see `TalkerExamples.load`."""
        return [
            examples.load((index + self._offset(i)) % len(examples), generator) for i, examples in enumerate(self.sets)
        ]

    def _offset(self, side: int) -> int:
        """Return the offset between both sets, so that a batch does not contain a clip twice if both have the same
        clips.
        """
        return side * len(self) // 2

    def collate(self, items: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """Collate T2AV rows, followed by as many TTS rows; see `collate`."""
        rows = [row[side] for side in range(len(self.sets)) for row in items]
        first = self.sets[0]
        return first.collate(rows)

    @property
    def lengths(self) -> Tensor:
        """Return the number of patches of each pair (n,): twice the longer one, as both examples are padded to it.

        Text tokens are not counted.
        """
        sides = []
        for i, examples in enumerate(self.sets):
            at = (torch.arange(len(self)) + self._offset(i)) % len(examples)
            patches = -(-examples.frames[at].clamp(max=MAX_FRAMES) // examples.format.patch_size)
            sides.append(patches * tokens_per_patch(examples.format.order, examples.task == "t2av"))
        return len(sides) * torch.stack(sides).amax(0)

    @property
    def blocks(self) -> Blocks | None:
        """Return the blocks of the larger set, as indices of pairs."""
        side = max(range(len(self.sets)), key=lambda i: len(self.sets[i]))
        blocks = self.sets[side].shards.blocks()
        if blocks is None:
            return None
        borders = np.unique((np.cumsum(blocks.sizes) - self._offset(side)) % len(self))
        sizes = np.diff(borders, prepend=0, append=len(self))
        return Blocks([int(size) for size in sizes if size], blocks.window, blocks.streams)

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Prefetch the pairs [first, last), which are read next."""
        for i, examples in enumerate(self.sets):
            count = len(examples)
            starts = [((first + self._offset(i)) % count, last - first) for first, last in spans]
            within = [(at, min(at + size, count)) for at, size in starts]
            around = [(0, min(at + size - count, count)) for at, size in starts if at + size > count]
            examples.shards.prefetch([*within, *around])

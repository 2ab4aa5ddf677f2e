"""Training examples from precomputed latents or from the released layouts of raw files.

An example is a text with its speech latents and, for T2AV, its motion; TTS examples have none. Batches are half and
half: an item of `Paired` is one example of each.

Axes: B batch, T tokens, F speech frames, Fm motion frames, N samples at 24 kHz, N16 at 16 kHz, Ds / Dm speech / motion
channels, P frames of a patch. Latents come 25 a second: 960 samples at 24 kHz, 640 at 16 kHz.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.errors import UserError
from engine.media.audio import read_audio
from engine.media.corpus import read_manifest
from engine.seeding import TrainingSet
from engine.shards.source import read_json
from talker_t2av.model import FPS
from talker_t2av.text import MAX_TOKENS, TalkerTokenizer, assemble, byte_tokenizer

RATE, RATE16 = 24_000, 16_000
HOP, HOP16 = RATE // FPS, RATE16 // FPS
MAX_FRAMES = 750  # 30 s, the speech encoder's window


@dataclass(frozen=True)
class MotionStats:
    """Mean and standard deviation of each motion channel, (Dm,) both; the heads work on normalised motion."""

    mean: Tensor
    std: Tensor

    def normalise(self, motion: Tensor) -> Tensor:
        return (motion - self.mean) / self.std.clamp_min(1e-6)

    def restore(self, motion: Tensor) -> Tensor:
        return motion * self.std.clamp_min(1e-6) + self.mean

    @classmethod
    def read(cls, path: str | Path) -> MotionStats:
        """From a JSON file, or its URL, with `motion_mean` and `motion_std`.

        Raises:
            UserError: the file is missing or has no such lists of one length.
        """
        try:
            stats = read_json(path)
            mean, std = (torch.tensor(stats[name], dtype=torch.float32) for name in ("motion_mean", "motion_std"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as motion statistics ({error!r}): make them again") from error
        if mean.ndim != 1 or mean.shape != std.shape:
            raise UserError(f"{path}: motion_mean {tuple(mean.shape)} and motion_std {tuple(std.shape)} do not match")
        return cls(mean, std)


# --- the layouts of the released data ---


@dataclass(frozen=True)
class Row:
    """One recording: its sound, its words and, for T2AV, its motion file (a torch tensor (Fm, Dm))."""

    wav: Path
    text: str
    motion: Path | None = None


def read_csv(path: str | Path, root: str | Path = ".") -> list[Row]:
    """T2AV rows of a CSV with columns `motion_pt_path`, `wav_path`, `text`; relative paths stand under `root`.

    Raises:
        UserError: the file is missing, has no rows, or lacks a column of paths.
    """
    with _open(path) as file:
        rows = list(csv.DictReader(file))
    for column in ("motion_pt_path", "wav_path"):
        if not rows or column not in rows[0]:
            raise UserError(f"{path} has no rows with a column {column}: it is not a Talker-T2AV CSV")
    root = Path(root)
    return [Row(root / r["wav_path"], r.get("text") or "", root / r["motion_pt_path"]) for r in rows]


def read_txt(path: str | Path, video_dir: str | Path) -> list[Row]:
    """T2AV rows of a list of motion files, one a line; the sound is VIDEO_DIR/{stem}.wav.

    The text comes from a JSON file beside the sound (key `text`) and is empty where there is none.
    """
    rows = []
    for line in _lines(path):
        motion = Path(line)
        wav = Path(video_dir) / f"{motion.stem}.wav"
        rows.append(Row(wav, _json_text(wav), motion))
    return rows


def read_tts_list(path: str | Path) -> list[Row]:
    """TTS rows of a list of WAV files, one a line; the text comes from the JSON file of the same stem, key `text`."""
    return [Row(Path(line), _json_text(Path(line))) for line in _lines(path)]


def repeated(first: Sequence[Any], second: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Both lists, the smaller one repeated round(larger / smaller) times, as the official program mixes its tasks."""
    if not first or not second:
        return list(first), list(second)
    times = max(1, round(max(len(first), len(second)) / min(len(first), len(second))))
    smaller_first = len(first) < len(second)
    return list(first) * (times if smaller_first else 1), list(second) * (1 if smaller_first else times)


def _open(path: str | Path):
    try:
        return Path(path).open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror or error}") from error


def _lines(path: str | Path) -> list[str]:
    with _open(path) as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        raise UserError(f"{path} lists no files")
    return lines


def _json_text(wav: Path) -> str:
    path = wav.with_suffix(".json")
    return str(json.loads(path.read_text()).get("text", "")) if path.is_file() else ""


# --- examples ---


def window_range(frames: int) -> int:
    """The last start of a window of at most 30 s in `frames` frames."""
    return max(0, frames - MAX_FRAMES)


@dataclass(frozen=True)
class Layout:
    """What a model's examples look like: its tokenizer's ids, patch size, delay and longest sequence."""

    speech_id: int
    tail: list[int]
    patch_size: int = 4
    delay: int = 0
    limit: int = MAX_TOKENS

    def slots(self, speech_frames: int, motion_frames: int) -> int:
        """Placeholders of an example; no motion (0 frames) is TTS."""
        speech = -(-speech_frames // self.patch_size)
        return max(speech, motion_frames // self.patch_size + self.delay) if motion_frames else speech

    def whole_patches(self, motion: Tensor) -> tuple[Tensor, int]:
        """Motion (Fm, Dm) cut to whole patches, and the length that counts: one patch at least, if there is motion."""
        if not len(motion):
            return motion, 0
        whole = len(motion) // self.patch_size * self.patch_size
        return motion[:whole] if whole else motion, max(whole, self.patch_size)

    def example(self, prompt: list[int], speech: Tensor, speech_frames: int, motion: Tensor, speaker: Tensor) -> dict:
        """An item for `collate`: speech (F, Ds), motion (Fm, Dm) normalised (Fm = 0: TTS), speaker (G,)."""
        motion, motion_frames = self.whole_patches(motion)
        slots = self.slots(speech_frames, motion_frames)
        ids, span = assemble(prompt, self.tail, self.speech_id, slots, self.limit)
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int32),
            "speech_span": torch.tensor(span),
            "speech": speech,
            "speech_frames": torch.tensor(speech_frames),
            "motion": motion,
            "motion_frames": torch.tensor(motion_frames),
            "speaker": speaker,
        }


def collate(items: list[dict[str, Tensor]], pad_id: int, patch_size: int) -> dict[str, Tensor]:
    """Right-padded batch.

    Returns:
        input_ids, attention_mask (B, T); speech_span (B, 2); speech (B, F, Ds); motion (B, Fm, Dm), Fm rounded up to
        whole patches, 0 if the batch has no motion; speech_frames, motion_frames (B,), the latter 0 in TTS rows;
        speaker (B, G). Whatever else the items hold is padded along its first axis.
    """
    batch = {}
    for name, value in items[0].items():
        parts = [item[name] for item in items]
        fill = pad_id if name == "input_ids" else 0
        same = value.ndim == 0 or name in ("speech_span", "speaker")
        batch[name] = torch.stack(parts) if same else pad_sequence(parts, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    missing = -batch["motion"].shape[1] % patch_size
    batch["motion"] = torch.nn.functional.pad(batch["motion"], (0, 0, 0, missing))
    return batch


@dataclass(frozen=True)
class Recording:
    """Sound and motion of one row after the 30 s window, and the numbers of frames that count.

    Attributes:
        wave: (N,) at 24 kHz. wave16: (N16,) at 16 kHz.
        motion: (Fm, Dm) normalised, Fm = 0 for TTS.
        speech_frames: latent frames that the sound is counted as, 1..750.
    """

    wave: Tensor
    wave16: Tensor
    motion: Tensor
    speech_frames: int


def cut_recording(wave: Tensor, wave16: Tensor, motion: Tensor, start: int = 0) -> Recording:
    """A recording's window of 30 s from motion frame `start`; the sound is cut to the motion's length.

    The motion is not yet cut to whole patches then, so that speech often has one more, partly filled, patch.
    """
    if len(motion):
        motion = motion[start : start + MAX_FRAMES]
        wave = wave[start * HOP : (start + len(motion)) * HOP]
        wave16 = wave16[start * HOP16 : (start + len(motion)) * HOP16]
    wave, wave16 = wave[: MAX_FRAMES * HOP], wave16[: MAX_FRAMES * HOP16]
    # In floating point as the official program does it: 29 frames of samples are counted as 28.
    return Recording(wave, wave16, motion, min(MAX_FRAMES, max(1, int(len(wave16) / RATE16 * FPS))))


# --- sets for the trainer ---


def open_layout(tokenizer: str | Path | None, patch_size: int, delay: int) -> tuple[TalkerTokenizer, Layout]:
    words = TalkerTokenizer.from_pretrained(tokenizer) if tokenizer else byte_tokenizer()
    return words, Layout(words.speech_id, words.tail, patch_size, delay)


class TalkerShards:
    """Precomputed latents ROOT/talker/SPLIT/ID.safetensors (scripts/prepare_talker.py); texts from ROOT/SPLIT.jsonl.

    Args:
        task: "t2av", or "tts" to leave the motion away.
        tokenizer: a folder with a tokenizer; None is the byte-level one.
        patch_size, delay: as in the model.
        limit: use only the first clips.

    Raises:
        UserError: the manifest, the statistics or a clip's file is missing or damaged.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        task: str = "t2av",
        tokenizer: str | Path | None = None,
        patch_size: int = 4,
        delay: int = 0,
        limit: int | None = None,
    ) -> None:
        self.folder = Path(root) / "talker" / split
        self.task = checked_task(task)
        self.words, self.layout = open_layout(tokenizer, patch_size, delay)
        self.stats = MotionStats.read(Path(root) / "talker" / "stats.json")
        self.rows = read_manifest(root, split)[:limit]
        known = all("frames" in row for row in self.rows)
        self.frames = torch.tensor([row["frames"] for row in self.rows]) if known else None  # (n,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The example of clip `index`; the window of a clip over 30 s is drawn from the generator."""
        row, latents = self.read(index)
        speech, motion = latents["speech"], self.stats.normalise(latents["motion"])
        start = int(torch.randint(window_range(len(speech)) + 1, (), generator=generator))
        speech = speech[start : start + MAX_FRAMES]
        motion = motion[start : start + MAX_FRAMES] if self.task == "t2av" else motion[:0]
        return self.layout.example(self.words.prompt(row["text"]), speech, len(speech), motion, latents["speaker"])

    def read(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The row of clip `index`, and its speech (F, Ds), motion (Fm, Dm) and speaker (G,), float32."""
        row = self.rows[index]
        path = self.folder / f"{row['id']}.safetensors"
        try:
            return row, {name: value.float() for name, value in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): run scripts/prepare_talker.py") from error

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See `collate`."""
        return collate(items, self.words.pad_id, self.layout.patch_size)


class TalkerFiles:
    """Raw rows, encoded when they are used. Prepare shards instead where the same rows are used more than once.

    Args:
        rows: of one of the readers above.
        stats: of the motion.
        codec: (wave at 24 kHz, wave at 16 kHz) -> latents (F, Ds), as `WhisperXVAE.encode_audio`.
        speaker: wave at 16 kHz -> (G,), as `WavLMEncoder.embed`.
        tokenizer, patch_size, delay: as in `TalkerShards`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        stats: MotionStats,
        codec: Callable[[Tensor, Tensor], Tensor],
        speaker: Callable[[Tensor], Tensor],
        tokenizer: str | Path | None = None,
        patch_size: int = 4,
        delay: int = 0,
    ) -> None:
        if not rows:
            raise UserError("the data set has no rows: check its lists")
        self.rows, self.stats, self.codec, self.speaker = rows, stats, codec, speaker
        self.words, self.layout = open_layout(tokenizer, patch_size, delay)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The example of row `index`; a row that cannot be read is replaced, once, by one drawn from the generator."""
        try:
            row = self.rows[index]
            recording = self.read(row, generator)
        except UserError as error:
            index = int(torch.randint(len(self.rows), (), generator=generator))
            print(f"{error}; row {index} is taken instead", file=sys.stderr, flush=True)
            row = self.rows[index]
            recording = self.read(row, generator)
        speech = self.codec(recording.wave, recording.wave16).cpu()
        speaker = self.speaker(recording.wave16).cpu()
        prompt = self.words.prompt(row.text)
        return self.layout.example(prompt, speech, recording.speech_frames, recording.motion, speaker)

    def read(self, row: Row, generator: torch.Generator | None = None) -> Recording:
        """The row's files, resampled to both rates, channels averaged, motion normalised, a window of 30 s."""
        wave, wave16 = (torch.from_numpy(read_audio(row.wav, rate).astype(np.float32)) for rate in (RATE, RATE16))
        motion = self.stats.mean.new_zeros(0, len(self.stats.mean))
        if row.motion is not None:
            try:
                motion = self.stats.normalise(torch.load(row.motion, map_location="cpu", weights_only=True).float())
            except Exception as error:  # torch.load raises many types for a damaged file
                raise UserError(f"{row.motion} cannot be read as a motion tensor ({error})") from error
        start = int(torch.randint(window_range(len(motion)) + 1, (), generator=generator))
        return cut_recording(wave, wave16, motion, start)

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See `collate`."""
        return collate(items, self.words.pad_id, self.layout.patch_size)


class Paired:
    """Half T2AV and half TTS in each batch: an item is one example of each set, so a batch has twice its size in rows.

    The larger set gives the length; every item of it is used once an epoch, those of the smaller one in turn. Without
    `t2av` every example is TTS.
    """

    def __init__(self, t2av: TrainingSet | None, tts: TrainingSet) -> None:
        self.sets = [tts] if t2av is None else [t2av, tts]

    def __len__(self) -> int:
        return max(map(len, self.sets))

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> list[dict[str, Tensor]]:
        # Sets lie apart from each other: where both hold the same clips, a batch does not show a clip twice.
        apart = [index + i * len(self) // 2 for i in range(len(self.sets))]
        return [examples.__getitem__(at % len(examples), generator) for examples, at in zip(self.sets, apart)]

    def collate(self, items: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """T2AV rows first, then as many TTS rows; see `collate`."""
        return self.sets[0].collate([row[side] for side in range(len(self.sets)) for row in items])


def checked_task(task: str) -> str:
    if task not in ("t2av", "tts"):
        raise UserError(f"task={task} is unknown; choose t2av or tts")
    return task

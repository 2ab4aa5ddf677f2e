"""Speech corpora for codec training: whole clips and random crops.

A corpus is a folder of recordings, ROOT/SPLIT.jsonl with ROOT/SPLIT/ID.wav, or prepared shards with waveforms
(preparation stage `wave`), ROOT/SPLIT/index.json in a folder or at a URL.

Axes: B batch, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor
from torch.utils.data import default_collate

from engine.errors import SkippedClips, UserError
from engine.media.audio import read_audio
from engine.settings import require_range
from engine.shards.reader import Reading, ShardSplit
from engine.shards.source import is_remote, join
from engine.untrusted import read_json_lines, safe_name

SPEED_STEPS = 20  # a speed step is a change of 1/20


def read_manifest(root: str | Path, split: str) -> list[dict]:
    """Return the rows of ROOT/SPLIT.jsonl."""
    path = Path(root) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(
            f"no manifest {path}: create the corpus with scripts/make_synthetic_corpus.py, or set data.root"
        )
    lines = read_json_lines(path)
    for place, row in lines:
        safe_name(row.get("id") if isinstance(row, dict) else None, f"{place}: id", folders=True)
    if not lines:
        raise UserError(f"{path} lists no clips")
    return [row for _, row in lines]


def is_prepared(root: str | Path, split: str) -> bool:
    """Return whether ROOT/SPLIT contains prepared shards (always true for a URL) instead of recordings."""
    return is_remote(root) or (Path(root) / split / "index.json").is_file()


def read_voices(source: str | Path) -> list[tuple[str, str, Tensor]]:
    """Return key, speaker and GE2E embedding (256,) of each clip of a prepared split. Clips without one are skipped."""
    split = ShardSplit(source)
    split.check_contains("ge2e")
    split.require("ge2e")
    rows = (split.read(index, ("ge2e",)) for index in range(len(split)))
    return [(info["key"], str(info["speaker"]), tensors["ge2e"]) for info, tensors in rows]


def spread(total: int, count: int) -> list[int]:
    """Return the indices of `count` of `total` clips, evenly spaced, or all indices if there are fewer."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def load_waves(root: str | Path, split: str, count: int, rate: int) -> list[np.ndarray]:
    """Read `count` evenly spaced clips (N,) of a split at `rate` Hz. Unreadable recordings are skipped."""
    if is_prepared(root, split):
        stored = StoredWaves(root, split, rate)
        return [stored.read(index).numpy() for index in spread(len(stored), count)]
    rows = read_manifest(root, split)
    names = [rows[index]["id"] for index in spread(len(rows), count)]
    waves = []
    skipped = SkippedClips(join(root, split), len(names))
    for name in names:
        try:
            waves.append(read_audio(Path(root) / split / f"{name}.wav", rate))
        except UserError as error:
            skipped.warn(name, error)
            last = error
    if not waves:
        raise last
    return waves


class WavFiles:
    """WAV files of ROOT/SPLIT that are listed in its manifest."""

    blocks = None

    def __init__(self, root: str | Path, split: str, rate: int) -> None:
        self.names = [row["id"] for row in read_manifest(root, split)]
        self.rate = rate
        self.folder = Path(root) / split
        self.skipped = SkippedClips(join(root, split), len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, most: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Return a clip (N,), or a random crop of at most `most` samples. An unreadable clip is replaced by the next
        one.
        """
        for number in range(index, index + len(self)):
            name = self.names[number % len(self)]
            path = self.folder / f"{name}.wav"
            try:
                with soundfile.SoundFile(path) as file:
                    if file.samplerate != self.rate or file.channels != 1:
                        form = f"{file.channels} channels at {file.samplerate} Hz"
                        raise UserError(f"{path} has {form}: convert it to mono at {self.rate} Hz")
                    if most is not None:
                        file.seek(draw(file.frames - most, generator))
                    return torch.from_numpy(file.read(-1 if most is None else most, dtype="float32"))
            except (UserError, soundfile.LibsndfileError, OSError) as error:
                last = error if isinstance(error, UserError) else UserError(f"{path} cannot be read ({error})")
                self.skipped.warn(name, last)
        raise last


class StoredWaves:
    """Waveforms of a split of prepared shards, 16 bits at 24 kHz."""

    rate = 24_000

    def __init__(self, root: str | Path, split: str, rate: int, shards: Mapping[str, Any] | None = None) -> None:
        self.shards = ShardSplit(join(root, split), Reading(**(shards or {})))
        self.shards.check_contains("wave")
        self.shards.require("wave")
        if rate != self.rate:
            raise UserError(
                f"{self.shards.source} contains waveforms at {self.rate} Hz, but the model requires {rate} Hz: "
                "train it from a folder of recordings"
            )
        self.blocks = self.shards.blocks()

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int, most: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """See `WavFiles.read`."""
        wave = self.shards.read(index, ("wave",))[1]["wave"].float() / 32768
        start = 0 if most is None else draw(len(wave) - most, generator)
        return wave[start : None if most is None else start + most]


class SpeechCrops:
    """Random crops of a corpus, one per clip and epoch. Unreadable recordings are skipped with a message.

    Args:
        root, split: the corpus and its split, either recordings or prepared shards; see the module docstring.
        sample_rate: required sampling rate of the recordings.
        samples: length of a crop. Shorter clips are zero-padded at the end.
        gain_db: random gains are uniform in [-gain_db, 0] dB.
        speed: maximum relative speed change, which is applied to half of the crops in steps of 1/20. It also shifts
            pitch and formants, which augments the voices.
        shards: fields of `engine.shards.reader.Reading`, for prepared shards.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        sample_rate: int = 24_000,
        samples: int = 24_000,
        gain_db: float = 6.0,
        speed: float = 0.0,
        shards: Mapping[str, Any] | None = None,
    ):
        if samples < 1:
            raise UserError(f"data.train.samples={samples} must be at least 1")
        require_range("data.train.gain_db", gain_db, 0.0, 60.0)
        require_range("data.train.speed", speed, 0.0, 0.5)
        self.samples = samples
        self.gain_db = gain_db
        self.speed = speed
        prepared = is_prepared(root, split)
        self.waves = StoredWaves(root, split, sample_rate, shards) if prepared else WavFiles(root, split, sample_rate)
        self.blocks = self.waves.blocks

    def __len__(self) -> int:
        return len(self.waves)

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Fetch clips [first, last), which are read next."""
        self.waves.shards.prefetch(spans)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"wave": (1, samples)}, which is a function of (index, generator)."""
        faster = self.draw_speed(generator)
        samples = -(-self.samples * (SPEED_STEPS + faster) // SPEED_STEPS)
        wave = at_speed(self.waves.read(index, samples, generator), faster)[: self.samples]
        gain = 10 ** (-self.gain_db * torch.rand((), generator=generator) / 20)
        return {"wave": pad(wave * gain, self.samples)[None]}

    def draw_speed(self, generator: torch.Generator | None) -> int:
        """Draw the number of speed steps, which is 0 for half of the crops."""
        most = round(self.speed * SPEED_STEPS)
        if not most or torch.rand((), generator=generator) < 0.5:
            return 0
        return int(torch.randint(-most, most + 1, (), generator=generator))

    collate = staticmethod(default_collate)  # {"wave": (B, 1, N)}


def draw(spare: int, generator: torch.Generator | None) -> int:
    """Draw a random start in 0..spare."""
    return int(torch.randint(max(0, spare) + 1, (), generator=generator))


def at_speed(wave: Tensor, faster: int) -> Tensor:
    """Resample (N,) to play `faster` speed steps faster, or slower if negative. This also shifts pitch and formants."""
    return torchaudio.functional.resample(wave, SPEED_STEPS + faster, SPEED_STEPS) if faster else wave


def pad(wave: Tensor, samples: int) -> Tensor:
    """Zero-pad (N,) at the end to `samples`."""
    return torch.nn.functional.pad(wave, (0, max(0, samples - len(wave))))

"""A speech corpus on disk: ROOT/SPLIT.jsonl names clips, ROOT/SPLIT/ID.wav holds them. Whole clips and random crops.

Axes: B batch, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from engine.errors import UserError
from engine.media.audio import read_audio
from engine.untrusted import parse_json, safe_name

SPEED_STEPS = 20  # steps of speed that make it twice as fast


@dataclass(frozen=True)
class SpeechClip:
    """One held-out clip: its name, its words, its wave (N,)."""

    name: str
    text: str
    wave: np.ndarray


def read_manifest(root: str | Path, split: str) -> list[dict]:
    """Rows of ROOT/SPLIT.jsonl.

    Raises:
        UserError: the manifest is missing, empty or not JSON lines.
    """
    path = Path(root) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"no manifest {path}: make the corpus with scripts/make_synthetic_corpus.py, or set data.root")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    rows = [parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    for number, row in enumerate(rows, 1):
        safe_name(row.get("id") if isinstance(row, dict) else None, f"{path}, clip {number}: id", folders=True)
    if not rows:
        raise UserError(f"{path} lists no clips")
    return rows


def pick_rows(root: str | Path, split: str, count: int) -> list[dict]:
    """`count` rows of a split, evenly spread over its manifest; all rows if there are fewer."""
    rows = read_manifest(root, split)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def load_clips(root: str | Path, split: str, count: int, rate: int) -> list[SpeechClip]:
    """The first `count` clips of a split, whole, at `rate` Hz."""
    rows = read_manifest(root, split)[:count]
    folder = Path(root) / split
    return [SpeechClip(r["id"], r["text"], read_audio(folder / f"{r['id']}.wav", rate)) for r in rows]


class SpeechCrops(torch.utils.data.Dataset):
    """Random crops of the WAV files of ROOT/SPLIT, one a clip and epoch.

    Args:
        root, split: the corpus folder and the split whose manifest names the clips.
        sample_rate: that the files must have.
        samples: length of a crop; shorter clips are padded with zeros at the end.
        gain_db: gains are uniform in -gain_db..0 dB.
        speed: half of the crops are played slower or faster by up to this share, in steps of a twentieth. Pitch and
            formants move along, which makes more voices than there are.

    Raises:
        UserError: no manifest; and, when a crop is taken, a file that is missing, is no audio, or is not mono at
            `sample_rate`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        sample_rate: int = 24_000,
        samples: int = 24_000,
        gain_db: float = 6.0,
        speed: float = 0.0,
    ):
        self.sample_rate, self.samples, self.gain_db, self.speed = sample_rate, samples, gain_db, speed
        folder = Path(root) / split
        self.paths = [folder / f"{row['id']}.wav" for row in read_manifest(root, split)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{"wave": (1, samples)}, a function of (index, generator)."""
        faster = self.draw_speed(generator)
        samples = -(-self.samples * (SPEED_STEPS + faster) // SPEED_STEPS)
        with self.open(index) as file:
            file.seek(draw(file.frames - samples, generator))
            wave = torch.from_numpy(file.read(samples, dtype="float32"))
        wave = at_speed(wave, faster)[: self.samples]
        gain = 10 ** (-self.gain_db * torch.rand((), generator=generator) / 20)
        return {"wave": pad(wave * gain, self.samples)[None]}

    def draw_speed(self, generator: torch.Generator | None) -> int:
        """Steps of speed, 0 for half of the crops."""
        most = round(self.speed * SPEED_STEPS)
        if not most or torch.rand((), generator=generator) < 0.5:
            return 0
        return int(torch.randint(-most, most + 1, (), generator=generator))

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Every entry stacked: {"wave": (B, 1, N)}."""
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def open(self, index: int) -> soundfile.SoundFile:
        """The WAV file of clip `index`, checked."""
        path = self.paths[index]
        try:
            file = soundfile.SoundFile(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error})") from error
        if file.samplerate != self.sample_rate or file.channels != 1:
            found = f"{file.channels} channels at {file.samplerate} Hz"
            raise UserError(f"{path} is not mono at {self.sample_rate} Hz: {found}")
        return file


def draw(spare: int, generator: torch.Generator | None) -> int:
    """A random start in 0..spare."""
    return int(torch.randint(max(0, spare) + 1, (), generator=generator))


def at_speed(wave: Tensor, faster: int) -> Tensor:
    """(N,) played `faster` steps of speed faster, or slower below 0; pitch and formants move along."""
    return torchaudio.functional.resample(wave, SPEED_STEPS + faster, SPEED_STEPS) if faster else wave


def pad(wave: Tensor, samples: int) -> Tensor:
    """Zeros at the end of (N,) up to `samples`."""
    return torch.nn.functional.pad(wave, (0, max(0, samples - len(wave))))

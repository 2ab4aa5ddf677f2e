"""Random crops of a speech corpus, and its held-out clips.

Axes: B batch, N samples, Q levels, L frames.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from engine.errors import UserError
from engine.media.audio import read_audio
from rvq_codec.codec import RVQCodec


@dataclass(frozen=True)
class Clip:
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
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON lines ({error})") from error
    if not rows:
        raise UserError(f"{path} lists no clips")
    return rows


def load_clips(root: str | Path, split: str, count: int, rate: int) -> list[Clip]:
    """The first `count` clips of a split, whole, at `rate` Hz."""
    rows = read_manifest(root, split)[:count]
    folder = Path(root) / split
    return [Clip(r["id"], r["text"], read_audio(folder / f"{r['id']}.wav", rate)) for r in rows]


class SpeechCrops(torch.utils.data.Dataset):
    """Crops of the WAV files of ROOT/SPLIT, one a clip and epoch, with a random gain.

    Args:
        root, split: the corpus folder and the split whose manifest names the clips.
        sample_rate: that the files must have.
        samples: length of a crop, a multiple of the codec's hop; shorter clips are padded with zeros at the end.
        gain_db: gains are uniform in -gain_db..0 dB.
        repeat: how often an epoch visits each clip.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        sample_rate: int = 24_000,
        samples: int = 24_000,
        gain_db: float = 6.0,
        repeat: int = 1,
    ):
        self.sample_rate, self.samples, self.gain_db, self.repeat = sample_rate, samples, gain_db, repeat
        folder = Path(root) / split
        self.paths = [folder / f"{row['id']}.wav" for row in read_manifest(root, split)]

    def __len__(self) -> int:
        return len(self.paths) * self.repeat

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """(1, samples), as a function of (index, state of `generator`)."""
        path = self.paths[index % len(self.paths)]
        try:
            with soundfile.SoundFile(path) as file:
                if file.samplerate != self.sample_rate or file.channels != 1:
                    raise UserError(
                        f"{path} is not mono at {self.sample_rate} Hz: {file.channels} channels at {file.samplerate} Hz"
                    )
                spare = max(0, file.frames - self.samples)
                file.seek(int(torch.randint(spare + 1, (), generator=generator)))
                wave = file.read(self.samples, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path} cannot be read ({error})") from error
        gain = 10 ** (-self.gain_db * torch.rand((), generator=generator) / 20)
        wave = torch.from_numpy(wave) * gain
        return torch.nn.functional.pad(wave, (0, self.samples - len(wave)))[None]

    @staticmethod
    def collate(items: list[Tensor]) -> dict[str, Tensor]:
        """{"wave": (B, 1, samples)}."""
        return {"wave": torch.stack(items)}


class CodedCrops(torch.utils.data.Dataset):
    """Crops with their codes, for training the decoder alone: a clip is encoded whole, once, when it is first used.

    Args:
        root, split: as in `SpeechCrops`.
        codec: release folder of the codec whose codes are decoded.
        frames: length of a crop; shorter clips are padded with silence at the end.
    """

    def __init__(self, root: str | Path, codec: str, split: str = "train", frames: int = 50):
        self.codec, self.frames = RVQCodec.from_pretrained(codec), frames
        folder = Path(root) / split
        self.paths = [folder / f"{row['id']}.wav" for row in read_manifest(root, split)]
        self._coded: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def _code(self, index: int) -> tuple[Tensor, Tensor]:
        """(wave (hop * L,) float16, codes (Q, L) int16) of a whole clip of at least `frames` frames."""
        hop = self.codec.hop
        wave = torch.from_numpy(read_audio(self.paths[index], self.codec.sample_rate))
        wave = torch.nn.functional.pad(wave, (0, max(0, self.frames * hop - len(wave))))
        wave = wave[: len(wave) // hop * hop]
        codes = self.codec.encode(wave[None, None])[0]
        return wave.half(), codes[:, : len(wave) // hop].short()

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{"wave": (1, frames * hop), "codes": (Q, frames)}, as a function of (index, state of `generator`)."""
        if index not in self._coded:
            self._coded[index] = self._code(index)
        wave, codes = self._coded[index]
        start = int(torch.randint(codes.shape[-1] - self.frames + 1, (), generator=generator))
        hop, stop = self.codec.hop, start + self.frames
        return {"wave": wave[None, start * hop : stop * hop].float(), "codes": codes[:, start:stop].long()}

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """{"wave": (B, 1, N), "codes": (B, Q, L)}."""
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

"""Random crops of a speech corpus together with their codes.

Axes: B batch, N samples, Q levels, L frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.shards.recordings import SpeechCrops, at_speed, draw, pad
from rvq_codec.codec import RVQCodec


class CodedCrops(SpeechCrops):
    """Crops with their codes, for training only the decoder. A clip is encoded as a whole on first use.

    Args:
        codec: release folder; None for crops without codes.
        samples: length of a crop, a multiple of the codec's hop.
        root, crops: arguments of `SpeechCrops`. With a codec, gains are not changed, and the speed of a clip is fixed.
    """

    def __init__(self, root: str | Path, codec: str | None = None, **crops: Any):
        super().__init__(root, **crops)
        self.codec = RVQCodec.from_pretrained(codec) if codec else None
        self._coded: dict[int, tuple[Tensor, Tensor]] = {}
        if self.codec and self.samples % self.codec.hop:
            raise UserError(f"samples={self.samples} must be a multiple of the codec's hop of {self.codec.hop}")

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"wave": (1, samples)}, with a codec also {"codes": (Q, samples / hop)}, as a function of (index,
        generator).
        """
        if not self.codec:
            return super().load(index, generator)
        hop = self.codec.hop
        wave, codes = self._clip(index)
        first = draw(codes.shape[-1] - self.samples // hop, generator)
        count = self.samples // hop
        crop = wave[first * hop : first * hop + self.samples].float()
        return {"wave": crop[None], "codes": codes[:, first : first + count].long()}

    def _clip(self, index: int) -> tuple[Tensor, Tensor]:
        """Return waveform (N,) and codes (Q, L) of a whole clip in compact dtypes, so that hours of speech fit in
        memory.
        """
        if index not in self._coded:
            faster = self.draw_speed(torch.Generator().manual_seed(index))
            wave = pad(at_speed(self.waves.read(index), faster), self.samples).half()
            codes = self.codec.encode(wave.float()[None, None])[0]
            self._coded[index] = wave, codes[:, : len(wave) // self.codec.hop].short()
        return self._coded[index]

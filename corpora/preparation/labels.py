"""Labels of a source as tensors: the phoneme of each frame, the expression of each half second.

Axes: T video frames (25 a second), J half seconds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from corpora.preparation.clip import FPS
from engine.errors import UserError
from hicodit.conditions.types import EXPRESSIONS


def phoneme_labels(phonemes: list, frames: int, symbols: list[str]) -> np.ndarray:
    """Return the index (T,) of the phoneme at each frame's centre, counted from 1 in `symbols`; 0 where none sounds."""
    labels = np.zeros(frames, np.uint8)
    for symbol, start, end in phonemes:
        if symbol in symbols:
            first, last = (int(np.ceil(t * FPS - 0.5)) for t in (start, end))
            labels[max(first, 0) : max(last, 0)] = symbols.index(symbol) + 1
    return labels


def expression_labels(label: str | list[str] | None, windows: int) -> Tensor | None:
    """Return classes (J,) by a source's label of the whole clip, or of each of `windows` half seconds; None without."""
    if label is None:
        return None
    labels = [label] * windows if isinstance(label, str) else label[:windows]
    unknown = [name for name in labels if name not in EXPRESSIONS]
    if unknown:
        raise UserError(f"expression {unknown[0]!r} is none of {', '.join(EXPRESSIONS)}")
    if len(labels) < windows:
        raise UserError(f"{len(labels)} expressions are given, {windows} half seconds need one each")
    return torch.tensor([EXPRESSIONS.index(name) for name in labels])

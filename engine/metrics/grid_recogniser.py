"""Recogniser for sentences of the GRID corpus (Cooke et al. 2006): verb, colour, preposition, letter, digit, adverb.

A small network predicts for each of 25 frames per second which of the 51 words is spoken, or none. The score of a
sentence is the sum over all alignments of its six words with the frames, as in CTC (Graves et al. 2006). `transcribe`
selects for each position the word with the largest posterior over all 64,000 sentences. It outputs six words for any
audio, so chance is a WER of about 80 %: report a shuffled control with each result.

Axes: B batch, N samples at 16 kHz, M mel bands, T frames (25 per second), W = 51 words, S = W + 1 with "none" first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.media.audio import resample_wave
from engine.nn.mel import RATE, log_mel
from engine.release import Pretrained
from engine.settings import Group, setting

PLACES = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    tuple("abcdefghijklmnopqrstuvxyz"),  # no w
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("again", "now", "please", "soon"),
)
WORDS = tuple(word for place in PLACES for word in place)
LETTER = 3  # position of the letter in a sentence
SIZES = tuple(len(place) for place in PLACES)
REDUCTION = 4  # mel frames (100 per second) per network frame
NEVER = -1e4  # approximate log of 0
PAUSE = RATE // 5  # zeros before and after a waveform, which a sentence may fill


def is_sentence(text: str) -> bool:
    """Return whether a text is one of the 64,000 sentences of the GRID corpus."""
    words = text.lower().split()
    return len(words) == len(PLACES) and all(word in place for word, place in zip(words, PLACES))


def word_numbers(text: str) -> list[int]:
    """Return the indices of the words of a GRID sentence, 1 to W."""
    return [WORDS.index(word) + 1 for word in text.lower().split()]


@dataclass(frozen=True)
class GridRecogniserConfig(Group):
    """Sizes of a `GridRecogniser`."""

    bands: int = setting(64, 8, 512)
    channels: int = setting(160, 8, 2**12)
    hidden: int = setting(128, 8, 2**12)


class ResidualConv(nn.Module):
    """Two convolutions with a residual connection: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, kernel, padding=kernel // 2)
        self.norm1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel, padding=kernel // 2)
        self.norm2 = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(self.dropout(y)))
        return F.relu(x + y)


class GridRecogniser(Pretrained):
    """Maps log-mel bands to log-probabilities of words, by convolutions and a bidirectional GRU."""

    kind = "grid_recogniser"
    Config = GridRecogniserConfig

    def __init__(self, config: GridRecogniserConfig) -> None:
        super().__init__(config)
        channels = config.channels
        self.first = nn.Conv1d(config.bands, channels, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm1d(channels)
        self.fine = ResidualConv(channels, 3, 0.1)
        self.second = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.coarse = ResidualConv(channels, 3, 0.2)
        self.gru = nn.GRU(channels, config.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * config.hidden, 1 + len(WORDS))

    def forward(self, mel: Tensor) -> Tensor:
        """Map `engine.nn.mel.log_mel` (B, M, 4 T) to log-probabilities (B, T, S)."""
        x = F.relu(self.norm(self.first(mel)))
        x = self.fine(x)
        x = self.coarse(F.relu(self.second(x)))
        x, _ = self.gru(self.dropout(x.transpose(1, 2)))
        return self.head(self.dropout(x)).float().log_softmax(-1)

    def transcribe(self, wave: np.ndarray, rate: int) -> str:
        """Return the six most likely words of a waveform (N,) in [-1, 1] at `rate` Hz."""
        padded = np.pad(resample_wave(wave, rate, RATE), PAUSE).astype(np.float32)
        with torch.no_grad():
            scores = self(log_mel(torch.from_numpy(padded)[None], self.config.bands))
        return sentences(scores)[0]


def sentence_scores(scores: Tensor, entry: Tensor | None = None) -> Tensor:
    """Sum the probabilities of all alignments of sentences with the frames. Return logarithms (B,).

    Args:
        scores: log-probabilities (B, T, S).
        entry: (B, W), log weight of each word, added to the sentences that contain it. None: zeros, which yields the
            sum over all 64,000 sentences.
    """
    words = scores[..., 1:]
    silence = scores[..., :1]
    entry = torch.zeros_like(words[:, 0]) if entry is None else entry
    sizes = torch.tensor(SIZES, device=scores.device)
    # Alignments that end in a word, and alignments that end in a pause before each position and after the last.
    spoken = torch.full_like(words[:, 0], NEVER)
    pauses = torch.tensor([0.0] + [NEVER] * len(SIZES), device=scores.device).expand(len(scores), -1)
    for t in range(scores.shape[1]):
        done = torch.stack([place.logsumexp(-1) for place in spoken.split(SIZES, -1)], -1)  # (B, 6)
        before = torch.logaddexp(pauses, F.pad(done, (1, 0), value=NEVER))  # (B, 7)
        entered = before[:, :-1].repeat_interleave(sizes, 1) + entry
        spoken = torch.logaddexp(spoken, entered) + words[:, t]
        pauses = before + silence[:, t]
    return torch.logaddexp(pauses[:, -1], spoken[:, -SIZES[-1] :].logsumexp(-1))


def sentences(scores: Tensor) -> list[str]:
    """Return for each item of log-probabilities (B, T, S) the most likely word at each position."""
    with torch.enable_grad():
        entry = torch.zeros(len(scores), len(WORDS), device=scores.device, requires_grad=True)
        total = sentence_scores(scores.detach(), entry).sum()
        (shares,) = torch.autograd.grad(total, entry)  # d log Z / d entry is the word's probability
    chosen = [share.argmax(-1) for share in shares.split(SIZES, -1)]
    return [" ".join(place[int(i)] for place, i in zip(PLACES, row)) for row in torch.stack(chosen, -1)]

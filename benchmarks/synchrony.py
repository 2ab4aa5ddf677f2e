"""Detection of clips in prepared shards whose audio and video are out of sync, with the lag in frames.

For each speaker, least squares predict a coarse log-mel spectrogram from the mouth's main components in seven
neighbouring frames; the speaker's clips are divided in ten parts, each predicted from the other nine. A clip's lag is
the shift of its audio at which the prediction agrees best with it. Clips with a lag of more than a frame are excluded
from the fit in two further rounds. A constant lag of all clips of a speaker cannot be seen in this way. The method is
tried on the same clips with known shifts.

Axes: n clips, T frames (25 per second), C components of a mouth, M = 20 mel bands.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.arguments import within
from engine.errors import UserError
from engine.media.audio import resample_wave
from engine.nn.mel import RATE, log_mel
from engine.shards.reader import ShardSplit

# mel frames of a video frame
BANDS = 20
PER_FRAME = 4
COMPONENTS = 16  # of a mouth
BESIDE = 3  # frames before and after
PARTS = 10
ROUNDS = 3
RIDGE = 300.0
LARGEST = 12  # lag that is looked for, in frames
CLEAR = 0.1  # by which the agreement at the best lag must exceed that without a lag
SHIFTS = -6, -3, 3, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=Path, required=True, help="prepared shards with mouths and waves")
    parser.add_argument("--rate", type=within(8000), default=24_000, help="sample rate of the waves, in Hz")
    parser.add_argument("--splits", nargs="+", default=["train", "val", "test"], help="those that are looked at")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    clips: dict[str, list[tuple[str, Tensor, Tensor]]] = defaultdict(list)
    for split in args.splits:
        source = ShardSplit(args.shards / split)
        source.check_contains("wave")
        for i in range(len(source)):
            info, tensors = source.read(i, ("mouth", "wave"))
            mouth, sound = features(tensors["mouth"], tensors["wave"], args.rate)
            clips[str(info.get("speaker"))].append((info["key"], mouth, sound))
    for speaker, rows in sorted(clips.items()):
        if len(rows) < PARTS:
            raise UserError(f"speaker {speaker} has {len(rows)} clips: {PARTS} or more are needed")
        frames = min(len(mouth) for _, mouth, _ in rows)
        mouths = torch.stack([mouth[:frames] for _, mouth, _ in rows])
        sounds = torch.stack([sound[:frames] for _, _, sound in rows])
        predicted, agreement = predict(mouths, sounds)
        lags = agreement.argmax(1) - LARGEST
        found = {
            shift: float((lags_of(predicted, torch.roll(sounds, shift, 1)) - lags == shift).float().mean())
            for shift in SHIFTS
        }
        out = [i for i in range(len(rows)) if abs(lags[i]) > 1]
        clear = [i for i in out if agreement[i].max() - agreement[i, LARGEST] > CLEAR]
        result = {
            "speaker": speaker,
            "clips": len(rows),
            "lags": {str(lag): count for lag, count in sorted(Counter(lags.tolist()).items())},
            "agreement": round(float(agreement[:, LARGEST].median()), 3),
            "out_of_step": {rows[i][0]: int(lags[i]) for i in clear},
            "undecided": {rows[i][0]: int(lags[i]) for i in out if i not in clear},
            "known_shifts_found": {str(shift): round(share, 3) for shift, share in found.items()},
        }
        far = sum(abs(lag) > 2 for lag in result["out_of_step"].values())
        line = f"{speaker}: of {len(rows)} clips {len(clear)} are out of step by two frames or more, {far} by more than"
        yield result, f"{line} two; {len(out) - len(clear)} undecided; agreement {result['agreement']}"


def features(mouth: Tensor, wave: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    """Return small mouth crops (T, P) and the log-mel spectrogram (T, M) of each frame, both with zero mean."""
    samples = wave.float() / 32768 if wave.dtype == torch.int16 else wave.float()
    mel = log_mel(torch.from_numpy(resample_wave(samples.numpy(), rate, RATE).copy()), BANDS)
    frames = min(len(mouth), mel.shape[1] // PER_FRAME)
    sound = mel[:, : PER_FRAME * frames].view(BANDS, frames, PER_FRAME).mean(2).T
    picture = F.avg_pool2d(mouth[:frames, None].float() / 255, 3).flatten(1)
    return picture - picture.mean(0), sound - sound.mean(0)


def predict(mouths: Tensor, sounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted spectrograms (n, T, M) of mouths (n, T, P), and their correlation (n, lags) with the audio."""
    count = len(mouths)
    inputs = neighbours(components(mouths))
    parts = torch.arange(count) % PARTS
    good = torch.ones(count, dtype=torch.bool)
    predicted = torch.zeros_like(sounds)
    for _ in range(ROUNDS):
        for part in range(PARTS):
            known = (parts != part) & good
            x = inputs[known].flatten(0, 1).double()
            y = sounds[known].flatten(0, 1).double()
            weights = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]).double(), x.T @ y)
            predicted[parts == part] = inputs[parts == part] @ weights.float()
        agreement = agreements(predicted, sounds)
        good = (agreement.argmax(1) - LARGEST).abs() <= 1
    return predicted, agreement


def components(mouths: Tensor) -> Tensor:
    """Return the principal components (n, T, C) of mouths (n, T, P), scaled to unit variance."""
    flat = mouths.flatten(0, 1)
    _, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    main = mouths @ vectors[:, -COMPONENTS:]
    return main / main.flatten(0, 1).std(0)


def neighbours(main: Tensor) -> Tensor:
    """Return components (n, T, C) of each frame and its neighbours, their magnitudes, and 1: (n, T, 14 C + 1)."""
    padded = F.pad(main.transpose(1, 2), (BESIDE, BESIDE), mode="replicate")
    near = padded.unfold(2, 2 * BESIDE + 1, 1).permute(0, 2, 1, 3).flatten(2)
    return torch.cat([near, near.abs(), torch.ones_like(near[..., :1])], -1)


def agreements(predicted: Tensor, sounds: Tensor) -> Tensor:
    """Correlate predictions (n, T, M) with the audio shifted by -LARGEST to LARGEST frames: (n, lags)."""
    middle = centred(predicted[:, LARGEST:-LARGEST])
    shifted = (sounds[:, LARGEST + lag : sounds.shape[1] - LARGEST + lag] for lag in range(-LARGEST, LARGEST + 1))
    return torch.stack([(middle * centred(part)).sum((1, 2)) for part in shifted], 1)


def centred(part: Tensor) -> Tensor:
    """Subtract the mean over time from (n, T, M), and scale each item to unit length."""
    part = part - part.mean(1, keepdim=True)
    return part / part.square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-9)


def lags_of(predicted: Tensor, sounds: Tensor) -> Tensor:
    """Return the best lag of each clip (n,), positive if the audio is late."""
    return agreements(predicted, sounds).argmax(1) - LARGEST

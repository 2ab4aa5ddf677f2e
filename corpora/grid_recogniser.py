"""Training of the GRID recogniser, which measures WER in `table=grid`, on recordings of the GRID corpus.

It must generalise to generated speech and unknown speakers. Clips are therefore augmented in duration, formants,
spectral tilt and noise. In half of the clips, the excitation is replaced by a pulse train or noise with the same
spectral envelope.

Axes: B batch, N samples at 16 kHz, F = 201 frequencies, M mel bands, T mel frames (100 per second).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from corpora.preparation.clip import SourceClip
from corpora.preparation.sources_grid import grid
from engine.codec import load_like
from engine.evaluation.validation import Share
from engine.media.audio import read_audio
from engine.metrics.grid_recogniser import (
    LETTER,
    REDUCTION,
    WORDS,
    GridRecogniser,
    GridRecogniserConfig,
    sentence_scores,
    word_numbers,
)
from engine.nn.mel import HOP, N_FFT, RATE, mel_filters
from engine.training.task import ReleaseInfo, Task

LENGTHS = 0.8, 1.25  # of a clip, as a factor
FORMANTS = 0.85, 1.35  # frequencies, as a factor
PITCHES = 80.0, 300.0  # pitch range of a pulse train in Hz
# dB up or down, of the clip and of the noise
COLOUR = 8.0
NOISE_COLOUR = 12.0
NOISE = -65.0, -30.0  # dB of the noise beside the loudest band of the clip
ENVELOPE = 24  # cepstral coefficients of a spectral envelope: 1.5 ms
WINDOW_POWER = 0.375 * N_FFT  # of the Hann window: white noise of unit power has this power at each frequency
UNKNOWN = -100  # label of frames without alignment


# --- recordings ---


@cache
def sound_of(path: Path) -> Tensor:
    """Return the audio (N,) of a clip. All clips are cached, 200 kB each."""
    return torch.from_numpy(read_audio(path, RATE).copy())


class GridSentences:
    """Random crops of recordings, each with a whole sentence.

    Clips of speakers with few clips are repeated up to eight times.

    Args:
        root: folder of GRID.
        split: of `source.protocol=seen`.
        speakers: speakers to use. None: all.
        seconds: length of a crop.
    """

    def __init__(
        self, root: str | Path, split: str = "train", speakers: Sequence[str] | None = None, seconds: float = 2.2
    ) -> None:
        self.root = Path(root)
        clips = grid(root, protocol="seen", speakers=speakers).clips(split)
        counts = Counter(clip.speaker for clip in clips)
        wanted = max(counts.values()) // 5
        self.clips = [clip for clip in clips for _ in range(max(1, min(8, wanted // counts[clip.speaker])))]
        self.samples = round(seconds * RATE)

    def __len__(self) -> int:
        return len(self.clips)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return wave (N,), words (6,), labels (T,): a function of (index, generator)."""
        clip = self.clips[index]
        wave = sound_of(self.root / clip.video)
        spoken = [part for part in clip.phonemes or () if part[0] in WORDS]
        seconds = self.samples / RATE
        start = max(0.0, spoken[0][1] - 0.05) if spoken else 0.5
        end = spoken[-1][2] + 0.05 if spoken else 2.7
        earliest, latest = sorted((max(0.0, end - seconds), start))
        first = round(RATE * (earliest + (latest - earliest) * float(torch.rand((), generator=generator))))
        part = wave[first : first + self.samples]
        labels = torch.full((self.samples // HOP,), 0 if spoken else UNKNOWN)
        for word, begin, stop in spoken:
            at = max(0, int(100 * begin) - first // HOP)
            after = max(0, int(100 * stop) - first // HOP)
            labels[at:after] = WORDS.index(word) + 1
        return {
            "wave": F.pad(part, (0, self.samples - len(part))),
            "words": torch.tensor(word_numbers(clip.text)),
            "labels": labels,
        }

    collate = staticmethod(default_collate)


# --- augmentation ---


def spectra(waves: Tensor) -> Tensor:
    """Return power spectra (B, F, T) as in `engine.nn.mel`."""
    window = torch.hann_window(N_FFT)
    return torch.stft(waves, N_FFT, HOP, window=window, return_complex=True)[..., :-1].abs().square()


def envelope(power: Tensor) -> Tensor:
    """Smooth power spectra (B, F, T) over frequency by their cepstra, which removes the harmonics."""
    cepstrum = torch.fft.irfft(power.clamp_min(1e-9).log(), dim=1)
    cepstrum[:, ENVELOPE + 1 : -ENVELOPE] = 0
    return torch.fft.rfft(cepstrum, dim=1).real.exp()


def uniform(ends: tuple[float, float], *shape: int) -> Tensor:
    """Draw uniform numbers between two ends."""
    low, high = ends
    return low + (high - low) * torch.rand(shape)


def log_uniform(ends: tuple[float, float], *shape: int) -> Tensor:
    """Draw numbers between two positive ends whose logarithms are uniform."""
    low, high = ends
    return low * (high / low) ** torch.rand(shape)


def pulses(count: int, samples: int) -> Tensor:
    """Return pulse trains (B, N) of unit power whose pitch varies smoothly by up to 30 % around its mean."""
    times = torch.arange(samples) / RATE
    pitch = log_uniform(PITCHES, count, 1)
    swing = torch.sin(2 * torch.pi * (uniform((0.2, 1.5), count, 1) * times + torch.rand(count, 1)))
    phase = (pitch * (1 + uniform((0, 0.3), count, 1) * swing)).cumsum(1) / RATE
    train = F.pad(phase.floor().diff(dim=1), (1, 0))
    return train * (RATE / pitch).sqrt()


def excitation(count: int, samples: int) -> Tensor:
    """Return power spectra (B, F, T) with mean about 1: pulses below a random frequency and noise above it, or only
    noise.
    """
    voiced_below = torch.rand(count, 1, 1) * RATE / 4 * (torch.rand(count, 1, 1) < 0.7)
    frequencies = torch.linspace(0, RATE / 2, N_FFT // 2 + 1)[:, None]
    power = spectra(pulses(count, samples)) / WINDOW_POWER
    return torch.where(frequencies < voiced_below, power, torch.empty_like(power).exponential_())


def colour(count: int, bands: int, decibels: float) -> Tensor:
    """Return smooth random gains (B, M, 1) of the power, within +/- `decibels` dB."""
    knots = uniform((-decibels, decibels), count, 1, 6)
    curve = F.interpolate(knots, size=bands, mode="linear", align_corners=True)
    return 10 ** (curve / 10).transpose(1, 2)


def warped_filters(bands: int, factors: Tensor) -> Tensor:
    """Return mel filters (B, F, M) with frequencies scaled by `factors` (B,)."""
    filters = mel_filters(RATE, N_FFT, bands)
    last = len(filters) - 1
    at = torch.arange(last + 1) * factors[:, None]
    left = at.long().clamp(max=last - 1)
    part = (at - left).clamp(0, 1)[..., None]
    return (filters[left] * (1 - part) + filters[left + 1] * part) * (at < last)[..., None]


def stretch(mel: Tensor, lengths: Tensor) -> Tensor:
    """Stretch (B, M, T) in time by the factors (B,): (B, M, T'), padded with the last frame to the longest one."""
    frames = mel.shape[-1]
    places = torch.arange(round(frames * LENGTHS[1])) / lengths[:, None]
    left = places.long().clamp(max=frames - 2)
    part = (places - left).clamp(0, 1)[:, None]
    left = left[:, None].expand(-1, mel.shape[1], -1)
    return mel.gather(2, left) * (1 - part) + mel.gather(2, left + 1) * part


def change(waves: Tensor, bands: int) -> tuple[Tensor, Tensor]:
    """Return log-mel spectra (B, M, T') of augmented waveforms (B, N), and the stretch factor of each (B,)."""
    count = len(waves)
    power = spectra(waves + 1e-4 * torch.randn_like(waves))
    half = (count + 1) // 2  # fraction of the clips with a replaced excitation
    power[:half] = envelope(power[:half]) * (excitation(half, waves.shape[1]) + 1e-3)
    mel = warped_filters(bands, log_uniform(FORMANTS, count)).transpose(1, 2) @ power
    mel = mel * colour(count, bands, COLOUR)
    level = mel.amax((1, 2), keepdim=True) * 10 ** (uniform(NOISE, count, 1, 1) / 10)
    mel = mel + level * colour(count, bands, NOISE_COLOUR) * torch.empty_like(mel).exponential_()
    lengths = uniform(LENGTHS, count)
    mel = stretch(mel.clamp(min=1e-10).log10(), lengths)
    return (torch.maximum(mel, mel.amax((-2, -1), keepdim=True) - 8) + 4) / 4, lengths


# --- the task ---


class GridRecogniserTask(Task):
    """Trains a `GridRecogniser`.

    The loss is the negative log posterior of the correct sentence among all sentences, plus 0.2 times the CTC loss,
    plus the cross-entropy of the aligned words, whose weight decays to a tenth in the first half of training.

    Args:
        recogniser: fields of `GridRecogniserConfig`.
        root: folder of GRID.
        speakers: training speakers. Validation also uses `new_speakers`.
        steps: number of training steps.
        recipe: description of the recipe for the model card.
        init: initial release of the same sizes instead of random weights.
    """

    def __init__(
        self,
        recogniser: Mapping[str, Any],
        root: str,
        speakers: Sequence[str],
        new_speakers: Sequence[str],
        steps: int,
        recipe: str = "",
        init: str | None = None,
    ) -> None:
        super().__init__()
        config = GridRecogniserConfig(**recogniser)
        if init:
            self.recogniser = load_like(GridRecogniser, init, config, key="task.recogniser")
        else:
            self.recogniser = GridRecogniser(config)
        self.root = Path(root)
        self.speakers = list(speakers)
        self.new_speakers = list(new_speakers)
        self.steps = steps
        self.recipe = recipe

    def parts(self) -> dict[str, nn.Module]:
        return {"recogniser": self.recogniser}

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Count the mel frames of a batch."""
        return batch["labels"].numel()

    def forward(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Return the losses of a batch of `GridSentences`.

        They are `sentence`, the negative log posterior of the spoken sentence among all sentences of the grammar,
        `ctc`, and `words`, the cross-entropy of the frames with a known word, whose weight decreases during training.
        """
        with torch.autocast("cpu", enabled=False):
            mel, lengths = change(batch["wave"], self.recogniser.config.bands)
        scores = self.recogniser(mel)
        count, frames = scores.shape[:2]
        sizes = torch.full((count,), frames), torch.full((count,), batch["words"].shape[1])
        ctc = F.ctc_loss(scores.transpose(0, 1), batch["words"], *sizes, reduction="none")
        sentence = (sentence_scores(scores) + ctc).mean()
        middles = REDUCTION * (torch.arange(frames) + 0.5) / lengths[:, None]
        labels = batch["labels"].gather(1, middles.long().clamp(max=batch["labels"].shape[1] - 1))
        words = F.nll_loss(scores.flatten(0, 1), labels.flatten(), ignore_index=UNKNOWN)
        fading = 5 * max(0.1, 1 - 2 * self.step / self.steps)
        loss = sentence + 0.2 * ctc.mean() + fading * words
        return {"loss": loss, "sentence": sentence.detach(), "ctc": ctc.mean().detach(), "words": words.detach()}

    @torch.no_grad()
    def measure(self, folder: Path, share: Share) -> dict[str, float]:
        """Return the word and letter error rates in per cent of each split and of new speakers.

        Only the first process computes them; the others return {}.
        """
        results: dict[str, float] = {}
        if not share.first:
            return results
        known = grid(self.root, protocol="seen", speakers=self.speakers)
        new = grid(self.root, protocol="seen", speakers=self.new_speakers)
        for name, clips in (
            ("val", known.clips("val")),
            ("test", known.clips("test")),
            ("new", [clip for split in new.splits for clip in new.clips(split)]),
        ):
            wrong = self.errors(clips)
            results[f"{name}/word_errors"] = 100 * wrong.mean().item()
            results[f"{name}/letter_errors"] = 100 * wrong[:, LETTER].mean().item()
        return results

    def errors(self, clips: Sequence[SourceClip]) -> Tensor:
        """Return (clips, 6), 1 for each misrecognised word."""
        rows = []
        for clip in clips:
            heard = self.recogniser.transcribe(sound_of(self.root / clip.video).numpy(), RATE)
            rows.append([float(one != two) for one, two in zip(clip.text.split(), heard.split())])
        return torch.tensor(rows)

    def release_info(self) -> ReleaseInfo:
        millions = sum(parameter.numel() for parameter in self.recogniser.parameters()) / 1e6
        speakers = ", ".join(self.speakers)
        about = f"""Speech -> a sentence of GRID: verb, colour, preposition, letter, digit, adverb. Convolutions and a
bidirectional GRU on log-mel bands, {millions:.2f} M weights. It measures WER in `table=grid` and outputs six words
for any audio: chance is a WER of about 80 %. Trained on recordings of speakers {speakers} of the
GRID corpus, M. Cooke, J. Barker, S. Cunningham, X. Shao, CC BY 4.0.

`word_errors`, `letter_errors`: in per cent, of recordings; `new` are held-out speakers."""
        return self.release_of(
            "recogniser",
            title="Recogniser of GRID's sentences",
            about=about,
            usage="from engine.metrics.grid_recogniser import GridRecogniser\n\n"
            'words = GridRecogniser.from_pretrained("FOLDER").transcribe(wave, rate)  # (N,) in [-1, 1]',
        )

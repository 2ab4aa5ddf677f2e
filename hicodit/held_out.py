"""Speech for held-out clips, and its figures clip by clip: words, voice, prosody.

A figure is a list with a pair of numbers (a, b) for each clip, None where the clip does not count. Over clips it is
sum(a) / sum(b), or, where its name ends in "correlation", Pearson's correlation of a with b. `hicodit.evaluation`,
`benchmarks.samplers` and `benchmarks.ablations` draw their tables from these pairs.

Axes: N samples, C clips, V voices, J half seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import UserError
from engine.left_out import LeftOut
from engine.media.audio import read_audio
from engine.metrics.metric import Sound, Take
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import PITCH_HOP, energy, pitch, pitch_range
from engine.metrics.words import WordErrors
from engine.progress import track
from engine.shards.reader import ShardSplit
from engine.shards.recordings import pick_rows
from hicodit.data import HiCoDiTDataset, HiCoDiTSample
from hicodit.pipeline import Crops, Features, HiCoDiTPipeline, Speech

PROSODY = ("pitch_range", "energy")
PITCHES = 1 / PITCH_HOP  # a second

Figures = dict[str, list[tuple[float, float] | None]]
Voices = Mapping[str, Mapping[str, np.ndarray]]  # voice -> clip -> GE2E vector (256,)


def synthesise(
    pipeline: HiCoDiTPipeline,
    crops: Sequence[Crops] | Sequence[Features],
    seed: int = 0,
    batch: int = 16,
    expressions: Sequence[np.ndarray] | None = None,
    first: int = 0,
) -> list[Speech]:
    """Speech of many clips, batched with clips of like length; clip i is drawn with seed + first + i.

    `expressions` (each (J,) classes of half seconds) replaces what the faces show.
    """
    order, seed = sorted(range(len(crops)), key=lambda i: len(crops[i])), seed + first
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    out: dict[int, Speech] = {}
    for group in track(groups, len(groups), "batches"):
        shown = [expressions[i] for i in group] if expressions is not None else None
        out |= zip(group, pipeline.run([crops[i] for i in group], [seed + i for i in group], expressions=shown))
    return [out[i] for i in range(len(crops))]


def stored_samples(data: HiCoDiTDataset, clips: int) -> list[HiCoDiTSample]:
    """`clips` clips, evenly spread over a prepared split; one that stands for another is there once."""
    chosen = torch.linspace(0, len(data) - 1, min(clips, len(data))).round().long().tolist()
    return list({clip.info["key"]: clip for clip in map(data.read, chosen)}.values())


def stored_crops(clip: HiCoDiTSample, every: int = 1) -> Crops | Features:
    """Crops of a prepared clip, or its features where it holds those in place of pictures.

    Each frame in `every` takes the nearest of the stored face pictures.
    """
    if clip.lip is not None:
        return Features(clip.lip.numpy(), clip.face_identity.numpy(), clip.expression.numpy())
    frames = len(clip.mouth)
    nearest = (np.arange(0, frames, every) * len(clip.faces)) // frames
    return Crops(clip.mouth.numpy(), clip.faces.numpy()[nearest])


def stored_voices(shards: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """The GE2E vector (256,) of every clip of a prepared split, by voice."""
    split, voices = ShardSplit(shards), {}
    for index in range(len(split)):
        info, tensors = split.read_complete(index, ("ge2e",))
        voices.setdefault(str(info["speaker"]), {})[info["key"]] = tensors["ge2e"].numpy()
    return voices


def mean_voices(shards: str | Path) -> Voices:
    """Mean GE2E vector (256,) of every speaker of a prepared split, each in place of the vectors of clips."""
    return {voice: {"mean": np.mean([*clips.values()], 0)} for voice, clips in stored_voices(shards).items()}


@dataclass
class HeldOut:
    """Clips of a split of a synthetic corpus, and the figures of what was made of them.

    Attributes:
        rows: (C) of the manifest. crops: (C) of the faces. rate: of all waves, in Hz.
        known: the voices that a clip's voice is looked for among; clips of other voices do not count.
        whole: prosody of whole clips is measured of the first so many.
        faceless: number of clips that were left out.
    """

    corpus: Path
    split: str
    rows: list[dict]
    crops: list[Crops] | list[Features]
    rate: int
    known: Voices = field(default_factory=dict)
    whole: int | None = None
    faceless: int = 0

    @classmethod
    def recorded(cls, pipeline: HiCoDiTPipeline, corpus: Path, split: str, clips: int, **how: Any) -> HeldOut:
        """`clips` clips, evenly spread over the split; those without a face are named and left out.

        Args:
            how: other attributes.

        Raises:
            UserError: none of them shows a face, or nothing can recognise their words.
        """
        found = cls(corpus, split, [], [], pipeline.codec.sample_rate, **how)
        _ = found.metric  # before anything is spoken
        rows = pick_rows(corpus, split, clips)
        left_out = LeftOut(corpus / split, len(rows))
        for row in rows:
            try:
                found.crops.append(pipeline.crops(corpus / split / f"{row['id']}.mp4"))
                found.rows.append(row)
            except UserError as error:
                left_out.add(row["id"], error)
        if not found.rows:
            raise UserError(f"{corpus / split}: none of {len(rows)} clips shows a face")
        found.faceless = len(left_out)
        return found

    @cached_property
    def metric(self) -> WordErrors:
        return WordErrors(f"grammar:{self.corpus / 'grammar.jsgf'}", Path())

    @cached_property
    def changing(self) -> list[int]:
        """Which of the clips change their expression."""
        return [i for i, row in enumerate(self.rows) if row.get("change") is not None]

    @cached_property
    def true(self) -> list[np.ndarray]:
        """(C) true waves (N,)."""
        return [read_audio(self.corpus / self.split / f"{row['id']}.wav", self.rate) for row in self.rows]

    @torch.inference_mode()
    def resynthesis(self, pipeline: HiCoDiTPipeline) -> list[np.ndarray]:
        """What the tokenizer makes of the true waves."""
        codec, device = pipeline.codec, pipeline.device
        made = (codec.decode(codec.encode(torch.from_numpy(wave)[None, None].to(device))) for wave in self.true)
        return [wave[0, 0].cpu().numpy() for wave in made]

    def figures(self, waves: Sequence[np.ndarray], transcripts: Sequence[str] | None = None) -> Figures:
        """All figures of waves (C), each (N,); `transcripts`: what was heard in them, if that is known already."""
        true = waves is self.true
        made, vectors = (self.truth, self.true_vectors) if true else (self.measure(waves), self.embed(waves))
        figures = self.words(transcripts or self.transcribe(waves)) | self.voices(vectors)
        return figures | correlations(self.truth["prosody"], made["prosody"]) | self.moves(made["changes"])

    def transcribe(self, waves: Iterable[np.ndarray]) -> list[str]:
        return [self.metric.transcribe(Take(Sound(w, self.rate), text=row["text"])) for row, w in zip(self.rows, waves)]

    def words(self, transcripts: Iterable[str]) -> Figures:
        """Wrong words and words, of the grammar's sentences (`wer`) and of the others (`wer_free`)."""
        found = [self.metric.count(row["text"], transcript) for row, transcript in zip(self.rows, transcripts)]
        return {name: [pairs.get(name) for pairs in found] for name in ("wer", "wer_free")}

    def embed(self, waves: Iterable[np.ndarray]) -> list[np.ndarray]:
        """GE2E vectors (256,); zeros where there is no speech, which is nobody's."""
        encoder, vectors = GE2EEncoder(), []
        for wave in waves:
            try:
                vectors.append(encoder.embed(wave, self.rate))
            except UserError:
                vectors.append(np.zeros(256, np.float32))
        return vectors

    @cached_property
    def true_vectors(self) -> list[np.ndarray]:
        """`embed` of the true clips."""
        return self.embed(self.true)

    def true_voices(self) -> Voices:
        """The voices of these clips."""
        voices: dict[str, dict[str, np.ndarray]] = {}
        for row, vector in zip(self.rows, self.true_vectors):
            voices.setdefault(str(row["voice"]), {})[row["id"]] = vector
        return voices

    def voices(self, vectors: Iterable[np.ndarray]) -> Figures:
        """Is the nearest of the `known` voices the clip's own, and the cosine of its vector with that voice's mean.

        A clip is left out of the mean of its own voice. It does not count if nothing is left.
        """
        names, figures = sorted(self.known), {"own_voice_first": [], "voice_similarity": []}
        sums = np.array([np.sum([*self.known[name].values()], 0) for name in names])  # (V, 256)
        for row, vector in zip(self.rows, vectors):
            voice, pairs = str(row["voice"]), (None, None)
            if voice in self.known:
                own, means = names.index(voice), sums.copy()
                means[own] -= self.known[voice].get(row["id"], 0)
                if means[own].any():
                    cosines = means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-9) @ vector
                    first = vector.any() and cosines.argmax() == own
                    pairs = (float(first), 1.0), (float(cosines[own]), 1.0)
            for found, pair in zip(figures.values(), pairs):
                found.append(pair)
        return figures

    @cached_property
    def truth(self) -> dict[str, list]:
        """`measure` of the true clips."""
        return self.measure(self.true)

    def measure(self, waves: Iterable[np.ndarray]) -> dict[str, list]:
        """Pitch range and energy: `prosody` of clips, `changes` of those that change, before and after the change."""
        prosody, changes = [], []
        for i, (row, wave) in enumerate(zip(track(self.rows, len(self.rows), "clips measured"), waves)):
            counts, changing = self.whole is None or i < self.whole, row.get("change") is not None
            f0 = pitch(wave, self.rate) if counts or changing else None
            if counts:
                prosody.append((pitch_range(f0), energy(wave)))
            if changing:
                changes.append(self.around_change(row, wave, f0))
        return {"prosody": prosody, "changes": changes}

    def around_change(self, row: Mapping, wave: np.ndarray, f0: np.ndarray) -> list[tuple[float, float]]:
        """Pitch range and energy before and after a clip's change, cut from its wave (N,) and its pitch (F,)."""
        found = []
        for start, end in spans_around_change(row):
            part = wave[int(start * self.rate) : int(end * self.rate)]
            found.append((pitch_range(f0[int(start * PITCHES) : int(end * PITCHES)]), energy(part)))
        return found

    def moves(self, changes: Sequence) -> Figures:
        """Do pitch range and energy, (clips that change, 2 parts, 2), move the right way at the change?

        The right way is that of the means over all true clips' parts of the two expressions.
        """
        figures: Figures = {f"{name}_right_way": [None] * len(self.rows) for name in PROSODY}
        if self.changing:
            true, shown = np.array(self.truth["changes"]), [self.rows[i]["expressions"] for i in self.changing]
            shown = np.array([(names[0], names[-1]) for names in shown])
            means = {name: true[shown == name].mean(0) for name in np.unique(shown)}
            expected = [means[second] - means[first] for first, second in shown]
            right = np.sign(np.diff(np.array(changes), axis=1)[:, 0]) == np.sign(expected)
            for i, moved in zip(self.changing, right.astype(float).tolist()):
                for pairs, value in zip(figures.values(), moved):
                    pairs[i] = value, 1.0
        return figures


def correlations(true: Sequence[Sequence[float]], made: Sequence[Sequence[float]]) -> Figures:
    """Pairs of the true and the made pitch range and energy, each (C, 2)."""
    return {
        f"{name}_correlation": [(float(a[column]), float(b[column])) for a, b in zip(true, made)]
        for column, name in enumerate(PROSODY)
    }


def spans_around_change(row: Mapping) -> list[tuple[float, float]]:
    """Seconds in which a clip speaks before and after its change of expression."""
    times = [times for _, *times in row["phonemes"]]
    parts = [[t for t in times if (t[0] >= row["change"] - 1e-6) == after] for after in (False, True)]
    return [(part[0][0], part[-1][1]) for part in parts]

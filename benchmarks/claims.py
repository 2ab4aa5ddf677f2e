"""What a trained HiCoDiT does on held-out clips, clip by clip.

Every model is measured on the same clips: the loss with the same masked tokens at the same times, speech with the same
draws. So models can be compared by paired differences (`benchmarks.paired`).

Axes: B batch, N clips, K levels, L token frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jiwer
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.paired import Pairs
from engine.errors import UserError
from engine.media.audio import read_audio
from engine.media.corpus import read_manifest
from engine.metrics.recogniser import CorpusRecogniser
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import prosody
from engine.progress import track
from engine.seeding import generator_for
from engine.shards.reader import ShardSplit
from hicodit.conditions.types import Conditions, windows_of
from hicodit.data import HiCoDiTDataset, HiCoDiTSample
from hicodit.diffusion import LogLinearNoise, masked_at, weighted_score_entropy
from hicodit.evaluation import derangement, expected_moves, prosody_around_change, stored_crops, synthesise
from hicodit.model import HiCoDiT, Requested
from hicodit.pipeline import HiCoDiTPipeline

TIMES = (0.25, 0.75)  # of the loss: the middle of each half
LOW = 2  # levels in `dse_low` of every variant, as in the paper
BATCH = 8
RATE = 24_000  # of the corpus


@dataclass(frozen=True)
class HeldOut:
    """A split: of each clip the corpus's row and what is stored; the mean voice (256,) of each of its new voices."""

    rows: list[dict]
    samples: list[HiCoDiTSample]
    corpus: Path
    voices: dict[str, np.ndarray]

    @classmethod
    def load(cls, corpus: Path, shards: Path, codec: Path, count: int) -> HeldOut:
        """`count` clips, evenly spread over the split SHARDS, which were made of the recordings CORPUS.

        New are voices that have several clips in the split; means are over all of its clips.
        """
        split, data = ShardSplit(shards), HiCoDiTDataset(shards, codec, augment=False)
        rows = {row["id"]: row for row in read_manifest(corpus, shards.name)}
        sums: dict[str, list[np.ndarray]] = {}
        for index in range(len(split)):
            info, tensors = split.read_complete(index, ("ge2e",))
            sums.setdefault(str(info["speaker"]), []).append(tensors["ge2e"].numpy())
        chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).round().long().tolist()
        samples = [data.read(i) for i in chosen]
        voices = {name: np.sum(own, 0) for name, own in sums.items() if len(own) > 1}
        return cls([rows[sample.info["key"]] for sample in samples], samples, corpus / shards.name, voices)

    def truth(self) -> dict[str, list]:
        """`prosody` of the true clips, and before and after the change of those that change."""
        waves = [read_audio(self.corpus / f"{row['id']}.wav", RATE) for row in self.rows]
        return {
            "prosody": [prosody(wave, RATE) for wave in track(waves, len(waves), "true clips")],
            "changes": [prosody_around_change(row, wave, RATE) for row, wave in zip(self.rows, waves) if changes(row)],
        }


def changes(row: Mapping) -> bool:
    return row.get("change") is not None


def measure(
    release: Path, codec: Path, clips: HeldOut, truth: Mapping[str, list], sampler: Mapping[str, Mapping]
) -> dict[str, Pairs]:
    """All figures of a release: name -> clip -> the pair, None where the figure does not count the clip."""
    exact = HiCoDiTPipeline.from_pretrained(release, "cpu", str(codec), precision="fp32")
    figures = losses(exact, clips.samples)
    pipeline = HiCoDiTPipeline.from_pretrained(release, "cpu", str(codec), precision="bf16")
    pipeline.sampler = replace(pipeline.sampler, **sampler["sampler"])
    pipeline.guidance = replace(pipeline.guidance, **sampler["guidance"])
    every = pipeline.system.encoders.config.picture_every
    spoken = synthesise(pipeline, [stored_crops(sample, every) for sample in clips.samples], batch=BATCH)
    waves, rate = [speech.wave for speech in spoken], pipeline.codec.sample_rate
    figures |= word_figures(clips, waves, rate) | voice_figures(clips, waves, rate)
    heard = [prosody(wave, rate) for wave in waves]
    changing = [i for i, row in enumerate(clips.rows) if changes(row)]
    made = np.array([prosody_around_change(clips.rows[i], waves[i], rate) for i in changing])
    expected = expected_moves([clips.rows[i] for i in changing], np.array(truth["changes"]))
    right = dict(zip(changing, np.sign(np.diff(made, axis=1)[:, 0]) == np.sign(expected)))
    for column, name in enumerate(("pitch_range", "energy")):
        pairs = [(float(true[column]), float(own[column])) for true, own in zip(truth["prosody"], heard)]
        figures[f"{name}_correlation"] = pairs
        figures[f"{name}_right_way"] = [
            (float(right[i][column]), 1.0) if i in right else None for i in range(len(waves))
        ]
    keys = [row["id"] for row in clips.rows]
    return {name: dict(zip(keys, pairs)) for name, pairs in figures.items()}


def word_figures(clips: HeldOut, waves: Sequence[np.ndarray], rate: int) -> dict[str, list]:
    """Wrong words and words, of closed and of free sentences."""
    recogniser, texts = CorpusRecogniser(clips.corpus.parent / "grammar.jsgf"), [row["text"] for row in clips.rows]
    figures: dict[str, list] = {"wer": [], "wer_free": []}
    for text, transcript in zip(texts, recogniser.transcribe_all(texts, waves, rate)):
        words = len(text.split())
        pair, free = (jiwer.wer(text.lower(), transcript) * words, float(words)), recogniser.is_free(text)
        figures["wer"].append(None if free else pair)
        figures["wer_free"].append(pair if free else None)
    return figures


def voice_figures(clips: HeldOut, waves: Sequence[np.ndarray], rate: int) -> dict[str, list]:
    """Of clips with a new voice: is the nearest of the new voices their own, and the cosine with it.

    A clip is left out of the mean of its own voice.
    """
    encoder, names = GE2EEncoder(), sorted(clips.voices)
    figures: dict[str, list] = {"own_voice_first": [], "voice_similarity": []}
    for sample, wave in zip(clips.samples, waves):
        first = similarity = None
        if (voice := str(sample.info["speaker"])) in clips.voices:
            means = np.stack([clips.voices[name] - (sample.ge2e.numpy() if name == voice else 0) for name in names])
            try:
                cosines = means / np.linalg.norm(means, axis=1, keepdims=True) @ encoder.embed(wave, rate)
            except UserError:  # no speech: nobody's voice
                cosines = np.where([name == voice for name in names], 0.0, 1e-9)
            own = names.index(voice)
            first, similarity = (float(cosines.argmax() == own), 1.0), (float(cosines[own]), 1.0)
        figures["own_voice_first"].append(first)
        figures["voice_similarity"].append(similarity)
    return figures


@torch.inference_mode()
def losses(pipeline: HiCoDiTPipeline, samples: Sequence[HiCoDiTSample]) -> dict[str, list]:
    """Score entropy per token of levels 1-2 and of the others, at `TIMES`, with conditions from pictures alone; and by
    how much it grows with the expressions, and with the face, of another clip. Every model meets the same masks.
    """
    every, model = pipeline.system.encoders.config.picture_every, pipeline.system.model
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].phoneme))
    other = derangement(len(samples), np.random.default_rng(0))
    found: dict[int, Tensor] = {}
    conditions = {}
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        own = pipeline.conditions([stored_crops(samples[i], every) for i in group])
        for row, i in enumerate(group):
            length = len(samples[i].phoneme)
            conditions[i] = own.lip[row, :length], own.identity[row], own.expression[row, : windows_of(length)]
    for start in track(range(0, len(order), BATCH), -(-len(order) // BATCH), "losses"):
        group = order[start : start + BATCH]
        frames = torch.tensor([len(samples[i].phoneme) for i in group])
        lip, identity, expression = zip(*(conditions[i] for i in group))
        far = [conditions[other[i]] for i in group]
        resized = [torch.from_numpy(np.resize(o[2].numpy(), len(e))) for o, e in zip(far, expression)]
        lip, expression, resized = (pad_sequence(parts, batch_first=True) for parts in (lip, expression, resized))
        given = Conditions(lip, torch.stack(identity), expression, frames)
        versions = given, replace(given, expression=resized)
        versions += (replace(given, identity=torch.stack([o[1] for o in far])),)
        tokens = pad_sequence([samples[i].tokens for i in group], batch_first=True).transpose(1, 2)
        keys = [samples[i].info["key"] for i in group]
        values = torch.stack([_entropy(model, version, tokens, keys) for version in versions], 1)
        found |= zip(group, values)
    table = torch.stack([found[i] for i in range(len(samples))])  # (N, 3 versions, 2 groups of levels)
    figures = {}
    for column, name in enumerate(("low", "high")):
        own, expression, identity = table[..., column].T.double()
        for kind, values in (("dse", own), ("expression_gain", expression - own), ("identity_gain", identity - own)):
            figures[f"{kind}_{name}"] = [(value, 1.0) for value in values.tolist()]
    return figures


def _entropy(model: HiCoDiT, conditions: Conditions, tokens: Tensor, keys: Sequence[str]) -> Tensor:
    """Tokens (B, K, L) of clips `keys` -> loss (B, 2) of levels 1-2 and of the others, for one token of all levels."""
    noise, prepared, out = LogLinearNoise(), model.prepare(conditions), 0
    valid = torch.arange(tokens.shape[2]) < 2 * conditions.frames[:, None]
    for number, moment in enumerate(TIMES):
        t = torch.full((len(tokens),), moment)
        drawn = [torch.rand(len(tokens[0]), int(2 * n), generator=generator_for(0, "claims", key, number))
                 for n, key in zip(conditions.frames, keys)]  # fmt: skip
        uniforms = pad_sequence([u.T for u in drawn], batch_first=True, padding_value=1.0).transpose(1, 2)
        masked = masked_at(noise.sigma(t), uniforms) & valid[:, None]
        at = Requested.of(masked, tokens.device)
        log_q = model(torch.where(masked, model.mask_id, tokens), noise.sigma(t), prepared, at)[0]
        entropy = weighted_score_entropy(log_q, tokens[at.clip, at.level, at.frame], t[at.clip], noise)
        sums = torch.zeros(len(tokens), 2).index_put((at.clip, (at.level >= LOW).long()), entropy, accumulate=True)
        out = out + sums / (valid.sum(1, keepdim=True) * len(tokens[0])) / len(TIMES)
    return out

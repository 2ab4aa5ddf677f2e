"""Synthesise held-out clips and measure the result.

Axes: J half seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.codec import load_codec
from engine.errors import UserError
from engine.evaluation.clips import Clip
from engine.evaluation.generate import generate_missing, write_facts
from engine.evaluation.shares import ALONE, ByClip, Share
from engine.evaluation.statistics import correlation, ratio
from engine.evaluation.validation import measure_clips, words_by
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.metrics.metric import wave_of
from engine.metrics.registry import metrics_of
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import pitch, prosody
from engine.settings import override
from hicodit.conditions import EXPRESSIONS
from hicodit.data import HiCoDiTDataset
from hicodit.held_out import Figures, HeldOut, Voices, correlations, stored_crops, stored_samples, synthesise
from hicodit.pipeline import BUNDLED, FPS, HiCoDiTPipeline
from hicodit.settings import GuidanceScales, SamplerConfig, with_preset
from hicodit.system import CODECS, HiCoDiTSystem

WAVES, VIDEOS = 4, 2  # that a validation keeps of each split


def write_outputs(
    clips: Sequence[Clip],
    folder: Path,
    device: str,
    weights: str | None = None,
    codec: str | None = None,
    sampler: str = "release",
    guidance: Mapping[str, float] | None = None,
    voice: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    **other: object,
) -> None:
    """Speak the pictures of clips: FOLDER/ID.wav, where it is missing. Clip i is drawn with seed + i.

    Args:
        sampler: a file of configs/sampler. guidance: scales that override its own.
        voice: speak with the voice of each clip's prompt. other: settings of other models.

    Raises:
        UserError: the weights cannot be loaded. A clip without a face is named, and the others go on.
    """
    pipeline = HiCoDiTPipeline.from_pretrained(weights or BUNDLED, device, codec)
    pipeline.sampler, scales = with_preset(sampler, pipeline.sampler, pipeline.guidance)
    pipeline.guidance = override(scales, guidance or {})
    tokens, ge2e = pipeline.codec, GE2EEncoder() if voice else None
    bits = tokens.levels * np.log2(tokens.codes) * tokens.frame_rate
    sampling = {
        "sampler": asdict(pipeline.sampler),
        "guidance": asdict(pipeline.guidance),
        "voice": voice,
        "seed": seed,
    }
    write_facts(folder, "hicodit", weights, bits_per_second=float(bits), **sampling)

    def write(batch: Sequence[tuple[int, Clip]]) -> None:
        if any(clip.truth.source is None for _, clip in batch):
            raise UserError("no picture to speak for: ID.mp4 in references=, or video in the manifest")
        crops, identity = [pipeline.crops(clip.truth.source) for _, clip in batch], None
        if ge2e is not None:  # one voice a call
            if batch[0][1].prompt.audio is None:
                raise UserError("no other clip of its speaker: give reference_audio in the manifest")
            identity = ge2e.embed(wave_of(batch[0][1].prompt.audio, 16_000).copy(), 16_000)
        for (_, clip), speech in zip(batch, pipeline.run(crops, [seed + i for i, _ in batch], identity)):
            write_wav(folder / f"{clip.id}.wav", speech.wave, speech.rate)

    def inputs(clip: Clip) -> list[Path | None]:
        return [clip.truth.source, clip.prompt.audio if voice else None]

    generate_missing(clips, folder, 1 if voice else batch_size, inputs, write)


def evaluate_clips(
    system: HiCoDiTSystem,
    codec: Path,
    shards: str | Path,
    recogniser: Path | None,
    clips: int,
    sampler: SamplerConfig,
    guidance: GuidanceScales,
    folder: Path | None,
    metrics: Sequence[str],
    share: Share = ALONE,
) -> dict[str, ByClip]:
    """Figures of a share of `clips` prepared clips, spoken from their pictures (or their features) alone.

    Four waves go to `folder`, and two videos of the mouths that they were read from where the shards hold them.

    Args:
        recogniser: for word errors, see `words_by`.
        metrics: names of `engine.metrics.registry`. The true speech is what the tokenizer makes of the true tokens.
    """
    data, tokenizer = HiCoDiTDataset(shards, codec, system.encoders.config.kind), load_codec(codec, CODECS)
    pipeline = HiCoDiTPipeline(system, tokenizer, sampler, guidance, next(system.parameters()).device)
    samples = stored_samples(data, clips)
    own, samples = share.range(len(samples)), share.pick(samples)
    if not own:
        return {}
    every = system.encoders.config.picture_every
    spoken = synthesise(pipeline, [stored_crops(clip, every) for clip in samples], first=own.start)
    if folder is not None:
        for n, clip, speech in zip(range(WAVES)[own.start :], samples, spoken):
            write_wav(folder / f"{clip.info['key']}.wav", speech.wave, speech.rate)
            if n < VIDEOS and clip.mouth is not None:
                mouth = speech.crops.mouth.repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3)
                write_video(folder / f"{clip.info['key']}.mp4", mouth, FPS, speech.wave, speech.rate)
    texts, waves = [clip.info["text"] for clip in samples], [speech.wave for speech in spoken]
    compared = any(metric.pair for metric in metrics_of(metrics))
    true = pipeline.decode_tokens([clip.tokens.T for clip in samples]) if compared else None
    device = str(pipeline.device)
    rate, words = tokenizer.sample_rate, words_by(recogniser)
    return measure_clips(metrics, texts, waves, true, rate, words, device=device, numbers=own)


def evaluate_corpus(
    pipeline: HiCoDiTPipeline,
    corpus: Path,
    split: str,
    clips: int = 200,
    expression_clips: int = 60,
    batch: int = 16,
    seed: int = 0,
    known_voices: Voices | None = None,
    words_only: bool = False,
) -> dict[str, float]:
    """Figures of speech made from the silent videos of a split of the synthetic corpus.

    Word error rates of clean speech, of the tokenizer's resynthesis, of the model, and of the model with the videos
    shuffled between clips (what is left when the lips do not fit the words); how often the output's GE2E vector is
    nearest to the true voice; correlation of pitch range and energy with the true clips, also with the expressions
    shuffled between clips; how often both move the right way where the expression changes, also with the expressions
    before and after the change exchanged.

    Args:
        expression_clips: how many clips the correlations are measured on.
        known_voices: among which the true voice is looked for. Without them, among the voices of the split's clips that
            are measured; only clips whose voice has another clip count.
        words_only: word error rates only.
    """
    start, rng = time.monotonic(), np.random.default_rng(0)
    held_out = HeldOut.recorded(pipeline, corpus, split, clips, whole=expression_clips)
    rows, crops = held_out.rows, held_out.crops
    speech = synthesise(pipeline, crops, seed, batch)
    waves, shown = [s.wave for s in speech], [s.expression for s in speech]
    heard = held_out.transcribe(waves)
    words = held_out.words(heard)
    shuffled = _shuffle_within([pair is not None for pair in words["wer_free"]], rng)
    others = held_out.words([heard[i] for i in shuffled])
    figures: dict[str, float] = {"clips": len(rows), "clips_without_face": held_out.faceless}
    figures |= overall(words) | overall(others, "shuffled_videos")
    if not words_only:
        held_out.known = known_voices or held_out.true_voices()
        figures |= overall(held_out.figures(waves, heard))
        figures |= overall(held_out.figures(held_out.resynthesis(pipeline)), "resynthesis")
        clean = overall(held_out.figures(held_out.true), "clean")
        figures |= {name: value for name, value in clean.items() if "correlation" not in name}  # with themselves
        if "voice_first" in figures:
            figures["voices"] = len(held_out.known)
        if chosen := held_out.changing:
            figures["clips_that_change"] = len(chosen)
            exchanged = [exchange(shown[i]) for i in chosen]
            turned = synthesise(pipeline, [crops[i] for i in chosen], seed, batch, exchanged)
            changes = [held_out.around_change(rows[i], s.wave, pitch(s.wave, s.rate)) for i, s in zip(chosen, turned)]
            figures |= overall(held_out.moves(changes), "expressions_exchanged")
        labels = [expressions_of(row, len(classes)) for row, classes in zip(rows, shown)]
        figures["expression_recognised"] = float(np.mean(np.concatenate(labels) == np.concatenate(shown)))
        true = held_out.truth["prosody"]
        other = derangement(len(true), rng)  # the clip whose expressions each clip gets
        swapped = synthesise(pipeline, crops[: len(true)], seed, batch, [shown[i] for i in other])
        moved = [prosody(s.wave, s.rate) for s in swapped]
        figures |= overall(correlations(true, moved), "expressions_shuffled")
        figures |= overall(correlations([true[i] for i in other], moved), "to_the_expression_shown")
    return figures | {"seconds": time.monotonic() - start}


def overall(figures: Figures, version: str = "") -> dict[str, float]:
    """{NAME_VERSION: the figure of all clips} by the names of records; what no clip has is left out."""
    found = {}
    for name, pairs in figures.items():
        name = name.replace("own_voice", "voice").replace("right_way", "changes_rightly")
        kind, free, _ = name.partition("_free")
        if counted := [pair for pair in pairs if pair is not None]:
            figure = correlation if "correlation" in name else ratio
            found["_".join(filter(None, (kind, version))) + free] = figure(*np.array(counted).T)
    return found


def expressions_of(row: Mapping, windows: int) -> np.ndarray:
    """The true class of each half second of a clip, (J,), J = `windows`."""
    names = row.get("expressions") or [row["expression"]] * windows
    return np.array([EXPRESSIONS.index(name) for name in names])


def exchange(classes: np.ndarray) -> np.ndarray:
    """Classes of half seconds (J,) with the first and the last one in each other's place."""
    first, last = classes[0], classes[-1]
    return np.where(classes == first, last, np.where(classes == last, first, classes))


def _shuffle_within(kinds: Sequence[bool], rng: np.random.Generator) -> np.ndarray:
    """A permutation that leaves nothing in place and every index among those of its kind, where there are two."""
    out = np.arange(len(kinds))
    for kind in (False, True):
        own = np.flatnonzero(np.array(kinds) == kind)
        out[own] = own[derangement(len(own), rng)] if len(own) else own
    return out


def derangement(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation that leaves nothing in place."""
    order = rng.permutation(size)
    out = np.empty(size, int)
    out[order] = np.roll(order, 1)
    return out

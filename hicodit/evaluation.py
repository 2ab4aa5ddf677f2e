"""Synthesise held-out clips and measure the result.

Axes: T video frames, N samples, J half seconds, V voices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from engine.codec import Codec, load_codec
from engine.config import CONFIGS, override
from engine.errors import UserError
from engine.evaluation.clips import Clip
from engine.evaluation.generate import generate_missing, write_facts
from engine.evaluation.shares import ALONE, ByClip, Share
from engine.evaluation.validation import measure_clips, words_by
from engine.media.audio import read_audio, write_wav
from engine.media.corpus import pick_rows
from engine.media.video import write_video
from engine.metrics.metric import wave_of
from engine.metrics.recogniser import CorpusRecogniser
from engine.metrics.registry import metrics_of
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import prosody
from engine.progress import track
from engine.shards.reader import ShardSplit
from hicodit.conditions import EXPRESSIONS
from hicodit.data import HiCoDiTDataset, HiCoDiTSample
from hicodit.pipeline import BUNDLED, FPS, Crops, Features, HiCoDiTPipeline, Speech
from hicodit.settings import GuidanceScales, SamplerConfig
from hicodit.system import CODECS, HiCoDiTSystem

WAVES, VIDEOS = 4, 2  # that a validation keeps of each split


def stored_crops(clip: HiCoDiTSample, every: int = 1) -> Crops | Features:
    """Crops of a prepared clip, or its features where it holds those in place of pictures.

    Each frame in `every` takes the nearest of the stored face pictures.
    """
    if clip.lip is not None:
        return Features(clip.lip.numpy(), clip.face_identity.numpy(), clip.expression.numpy())
    frames = len(clip.mouth)
    nearest = (np.arange(0, frames, every) * len(clip.faces)) // frames
    return Crops(clip.mouth.numpy(), clip.faces.numpy()[nearest])


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
    preset = OmegaConf.to_container(OmegaConf.load(CONFIGS / "sampler" / f"{sampler}.yaml")) or {}
    pipeline.sampler = override(pipeline.sampler, preset.get("sampler", {}))
    pipeline.guidance = override(override(pipeline.guidance, preset.get("guidance", {})), guidance or {})
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
        crops, identity = [pipeline.crops(clip.truth.source) for _, clip in batch], None
        if ge2e is not None:  # one voice a call
            identity = ge2e.embed(wave_of(batch[0][1].prompt.audio, 16_000).copy(), 16_000)
        for (_, clip), speech in zip(batch, pipeline.run(crops, [seed + i for i, _ in batch], identity)):
            write_wav(folder / f"{clip.id}.wav", speech.wave, speech.rate)

    generate_missing(clips, folder, 1 if voice else batch_size, write)


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
    chosen = torch.linspace(0, len(data) - 1, min(clips, len(data))).round().long().tolist()
    samples = list({clip.info["key"]: clip for clip in map(data.read, chosen)}.values())  # one that stands for another
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
    known_voices: Mapping[str, np.ndarray] | None = None,
    words_only: bool = False,
) -> dict[str, float]:
    """Figures of speech made from the silent videos of a split of the synthetic corpus.

    Word error rates of clean speech, of the tokenizer's resynthesis, of the model, and of the model with the videos
    shuffled between clips (what is left when the lips do not fit the words); how often the output's GE2E vector is
    nearest to the true voice; correlation of pitch range and energy with the true clips, also with the expressions
    shuffled between clips.

    Args:
        expression_clips: how many clips the correlations are measured on.
        known_voices: see `voice_figures`.
        words_only: word error rates only.
    """
    start, recogniser = time.monotonic(), CorpusRecogniser(corpus / "grammar.jsgf")
    rows, crops, faceless = [], [], 0
    for row in pick_rows(corpus, split, clips):
        try:
            crops.append(pipeline.crops(corpus / split / f"{row['id']}.mp4"))
            rows.append(row)
        except UserError:
            faceless += 1
    rate, texts = pipeline.codec.sample_rate, [row["text"] for row in rows]
    true = [read_audio(corpus / split / f"{row['id']}.wav", rate) for row in rows]
    speech = synthesise(pipeline, crops, seed, batch)
    waves, shown = [s.wave for s in speech], [s.expression for s in speech]
    transcripts = recogniser.transcribe_all(texts, waves, rate)
    rng = np.random.default_rng(0)
    shuffled = _shuffle_within([recogniser.is_free(text) for text in texts], rng)
    figures = {
        "clips": len(rows),
        "clips_without_face": faceless,
    }
    figures |= recogniser.word_errors("wer", texts, transcripts)
    figures |= recogniser.word_errors("wer_shuffled_videos", texts, [transcripts[i] for i in shuffled])
    if not words_only:
        resynthesis = [_resynthesise(pipeline.codec, wave) for wave in true]
        for name, version in (("wer_clean", true), ("wer_resynthesis", resynthesis)):
            figures |= recogniser.word_errors(name, texts, recogniser.transcribe_all(texts, version, rate))
        encoder = GE2EEncoder()
        vectors = (np.stack([encoder.embed(w, rate) for w in version]) for version in (true, waves, resynthesis))
        figures |= voice_figures(*vectors, [str(row["voice"]) for row in rows], known_voices)
        labels = [expressions_of(row, len(classes)) for row, classes in zip(rows, shown)]
        figures["expression_recognised"] = float(np.mean(np.concatenate(labels) == np.concatenate(shown)))
        few = min(expression_clips, len(rows))  # finding the pitch takes as long as the clip lasts
        other = derangement(few, rng)  # the clip whose expressions each clip gets
        swapped = synthesise(pipeline, crops[:few], seed, batch, [shown[i] for i in other])
        versions = (true[:few], waves[:few], resynthesis[:few], [s.wave for s in swapped])
        measured = [np.array([prosody(wave, rate) for wave in version]) for version in versions]
        for column, name in enumerate(("pitch_range", "energy")):
            wanted, own, coded, moved = (values[:, column] for values in measured)
            figures[f"{name}_correlation_resynthesis"] = _correlation(wanted, coded)
            figures[f"{name}_correlation"] = _correlation(wanted, own)
            figures[f"{name}_correlation_expressions_shuffled"] = _correlation(wanted, moved)
            figures[f"{name}_correlation_to_the_expression_shown"] = _correlation(wanted[other], moved)
        figures |= change_figures(rows, {"clean": true, "": waves, "resynthesis": resynthesis}, rate)
    return figures | {"seconds": time.monotonic() - start}


def expressions_of(row: Mapping, windows: int) -> np.ndarray:
    """The true class of each half second of a clip, (J,), J = `windows`."""
    names = row.get("expressions") or [row["expression"]] * windows
    return np.array([EXPRESSIONS.index(name) for name in names])


def change_figures(
    rows: Sequence[Mapping], versions: Mapping[str, Sequence[np.ndarray]], rate: int
) -> dict[str, float]:
    """Whether pitch range and energy move the right way where a clip's expression changes; {} if none changes.

    The right way is that of the means over all true clips' parts of the two expressions.

    Args:
        versions: name -> one wave (N,) for each clip, aligned with its video; "clean" are the true clips.

    Returns:
        `clips_that_change` and for each version the share of them that is right.
    """
    changing = [i for i, row in enumerate(rows) if row.get("change") is not None]
    if not changing:
        return {}
    about = [rows[i] for i in changing]
    measured = {
        name: np.array([prosody_around_change(rows[i], waves[i], rate) for i in changing])
        for name, waves in versions.items()
    }
    expected = expected_moves(about, measured["clean"])
    figures: dict[str, float] = {"clips_that_change": len(changing)}
    for version, values in measured.items():
        right = np.mean(np.sign(np.diff(values, axis=1)[:, 0]) == np.sign(expected), 0)
        for name, share in zip(("pitch_range", "energy"), right):
            figures["_".join(filter(None, (name, "changes_rightly", version)))] = float(share)
    return figures


def prosody_around_change(row: Mapping, wave: np.ndarray, rate: int) -> list[tuple[float, float]]:
    """`prosody` before and after the change of expression of a clip; its wave (N,) is aligned with its video."""
    times = [times for _, *times in row["phonemes"]]
    parts = [[t for t in times if (t[0] >= row["change"] - 1e-6) == after] for after in (False, True)]
    return [prosody(wave[int(part[0][0] * rate) : int(part[-1][1] * rate)], rate) for part in parts]


def expected_moves(rows: Sequence[Mapping], true: np.ndarray) -> np.ndarray:
    """How pitch range and energy should change (clips, 2) in clips whose expression changes.

    Args:
        true: pitch range and energy of the true clips before and after the change, (clips, 2 parts, 2 figures).

    Returns:
        The difference of the means over all parts with the clip's second and first expression.
    """
    shown = np.array([[row["expressions"][0], row["expressions"][-1]] for row in rows])
    means = {expression: true[shown == expression].mean(0) for expression in np.unique(shown)}
    return np.array([means[second] - means[first] for first, second in shown])


def _shuffle_within(kinds: Sequence[bool], rng: np.random.Generator) -> np.ndarray:
    """A permutation that leaves nothing in place and every index among those of its kind, where there are two."""
    out = np.arange(len(kinds))
    for kind in (False, True):
        own = np.flatnonzero(np.array(kinds) == kind)
        out[own] = own[derangement(len(own), rng)] if len(own) else own
    return out


def voice_figures(
    true: np.ndarray,
    made: np.ndarray,
    resynthesis: np.ndarray,
    voices: Sequence[str],
    known_voices: Mapping[str, np.ndarray] | None,
) -> dict[str, float]:
    """How often a GE2E vector is nearest to its own voice's mean among all voices, and its cosine with that mean.

    Args:
        true, made, resynthesis: (clips, 256) vectors of the true clips, the model's and the tokenizer's.
        voices: of the clips.
        known_voices: mean vector of every voice. Without them, the means of the split's true clips are taken; a clip
            is left out of its own mean, and only clips whose voice has another clip count.

    Returns:
        {} if no clip counts.
    """
    labels = np.array(voices)
    names = sorted(known_voices or set(voices))
    if known_voices:
        sums = np.stack([known_voices[name] for name in names])
    else:
        sums = np.stack([true[labels == name].sum(0) for name in names])
    target = np.array([names.index(voice) for voice in voices])
    counted = np.array([known_voices is not None or list(voices).count(voice) > 1 for voice in voices])
    if not counted.any():
        return {}

    figures: dict[str, float] = {"voices": len(names)}
    for name, vectors in {"": made, "_clean": true, "_resynthesis": resynthesis}.items():
        cosines = np.empty((len(vectors), len(names)))
        for i, vector in enumerate(vectors):
            means = sums.copy()
            if not known_voices:
                means[target[i]] -= true[i]
            means /= np.linalg.norm(means, axis=1, keepdims=True) + 1e-9
            cosines[i] = means @ vector
        own = cosines[np.arange(len(target)), target]
        figures[f"voice_first{name}"] = float(np.mean((cosines.argmax(1) == target)[counted]))
        figures[f"voice_similarity{name}"] = float(np.mean(own[counted]))
    return figures


def mean_voices(shards: str | Path) -> dict[str, np.ndarray]:
    """Mean GE2E vector (256,) of every speaker of a prepared split."""
    split, vectors = ShardSplit(shards), {}
    for index in range(len(split)):
        info, tensors = split.read_complete(index, ("ge2e",))
        vectors.setdefault(str(info["speaker"]), []).append(tensors["ge2e"].numpy())
    return {speaker: np.mean(own, 0) for speaker, own in vectors.items()}


def derangement(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation that leaves nothing in place."""
    order = rng.permutation(size)
    out = np.empty(size, int)
    out[order] = np.roll(order, 1)
    return out


@torch.inference_mode()
def _resynthesise(codec: Codec, wave: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(torch.from_numpy(wave)[None, None]))[0, 0].numpy()


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])

"""A synthetic corpus of version 2: words, audible expression, voices, and how well faces predict voices.

Clean speech is measured by speech recognisers, pYIN and GE2E. Ridge regressions estimate what a model could reach: from
the traits that a face shows to the voice, and from small pictures to those traits.

Axes: N voices or pictures; a voice has five traits.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from corpora.synthetic.expression import EXPRESSIONS, pose
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.visemes import mouth_track
from corpora.synthetic.voices import load_voices
from engine.errors import UserError
from engine.media.audio import read_audio
from engine.media.corpus import read_manifest
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import prosody

RATE = 24_000
TESTS = ("dev", "seen", "unseen")
LEAST: dict[str, float] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, required=True, help="folder of make_synthetic_corpus.py --version 2")


def run(args: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    if "traits" not in read_manifest(args.corpus, "train")[0]:
        raise UserError(f"{args.corpus} is not of version 2: make one with make_synthetic_corpus.py --version 2")
    known, clips = load(args.corpus, "train"), {split: load(args.corpus, split) for split in TESTS}
    for result in (
        {"clips": {split: len(rows) for split, rows in clips.items()} | {"train": len(known)}},
        {"words": measure_words(args.corpus, clips)},
        {"expressions": measure_expressions(clips["dev"] + clips["seen"])},
        {"voices": measure_voices(known, clips["unseen"])},
    ):
        yield result, json.dumps(result, indent=1)


def load(root: Path, split: str, count: int | None = None) -> list[tuple[dict, np.ndarray]]:
    """Manifest rows and waves of a split's first clips."""
    return [(row, read_audio(root / split / f"{row['id']}.wav", RATE)) for row in read_manifest(root, split)[:count]]


def prosody_between(wave: np.ndarray, phonemes: list, start: float, end: float) -> tuple[float, float, float]:
    """Pitch range in semitones (10th to 90th percentile), level in dB, phonemes a second between two times in s."""
    inside = [p for p in phonemes if start - 1e-6 <= p[1] and p[2] <= end + 1e-6]
    part = wave[int(inside[0][1] * RATE) : int(inside[-1][2] * RATE)]
    return *prosody(part, RATE), len(inside) * RATE / len(part)


def measure_expressions(clips: list[tuple[dict, np.ndarray]]) -> dict:
    """What pYIN and the level say of clips of one expression, and before and after a change."""
    names = ("pitch_range_semitones", "level_db", "phonemes_per_second")
    parts = []  # clip, expression, figures
    for i, (row, wave) in enumerate(clips):
        times = [t for t in (0.0, row["change"], row["seconds"]) if t is not None]
        for expression, (start, end) in zip((row["expressions"][0], row["expressions"][-1]), pairwise(times)):
            parts.append((i, expression, prosody_between(wave, row["phonemes"], start, end)))
    whole = [p for p in parts if clips[p[0]][0]["change"] is None]
    means = {e: np.mean([figures for _, x, figures in parts if x == e], 0) for e in sorted({p[1] for p in parts})}
    heard = np.array([figures for _, _, figures in whole])
    expected = np.array([means[e] for _, e, _ in whole])
    follows = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(heard.T, expected.T)]
    right = []
    for (i, first, before), (j, second, after) in pairwise(parts):
        if i == j:
            right.append(np.sign(np.subtract(after, before)) == np.sign(means[second] - means[first]))
    return {
        "clips_of_one_expression": len(whole),
        "means": {e: dict(zip(names, np.round(m, 2).tolist())) for e, m in means.items()},
        "correlation_with_mean_of_expression": dict(zip(names, np.round(follows, 3).tolist())),
        "clips_that_change": len(right),
        "right_sign_after_change": dict(zip(names, np.round(np.mean(right, 0), 3).tolist())),
    }


def measure_words(root: Path, clips: dict[str, list[tuple[dict, np.ndarray]]]) -> dict:
    """Word errors of clean speech: by the grammar, by the corpus's language model and by pocketsphinx's own."""
    ways = {"grammar": "closed", "language_model": "free", "pocketsphinx_model": "free"}
    files = {"grammar": root / "grammar.jsgf", "language_model": root / "free.arpa", "pocketsphinx_model": None}
    results: dict = {}
    for way, kind in ways.items():
        recogniser = Recogniser(files[way])
        results[way] = {}
        for split, rows in clips.items():
            chosen = [(row["text"], wave) for row, wave in rows if row["grammar"] == kind]
            chosen = chosen[:20] if way == "pocketsphinx_model" else chosen  # it is slow, and lost on such sentences
            heard = [recogniser.transcribe(wave, RATE) for _, wave in chosen]
            rate = word_error_rate([text for text, _ in chosen], heard)
            results[way][split] = {"word_errors": round(rate, 4), "clips": len(chosen)}
    return results


def measure_voices(known: list[tuple[dict, np.ndarray]], unseen: list[tuple[dict, np.ndarray]]) -> dict:
    """How well GE2E tells the unseen voices apart, and how well a ridge regression from the traits that faces show,
    fitted on training voices, picks the own voice of an unseen face among all unseen ones."""
    encoder = GE2EEncoder()
    vectors: dict[str, dict[int, list]] = {"known": defaultdict(list), "unseen": defaultdict(list)}
    traits = {}
    for group, clips in (("known", known), ("unseen", unseen)):
        for row, wave in clips:
            vectors[group][row["voice"]].append(encoder.embed(wave, RATE))
            traits[row["voice"]] = list(row["traits"].values())
    means = {group: np.stack([unit(np.mean(v, 0)) for v in voices.values()]) for group, voices in vectors.items()}
    numbers = {group: list(voices) for group, voices in vectors.items()}
    own = []
    for k, clips in enumerate(vectors["unseen"].values()):
        for i, clip in enumerate(clips):
            if len(clips) > 1:
                others = means["unseen"].copy()
                others[k] = unit(np.mean(clips[:i] + clips[i + 1 :], 0))
                own.append(int(np.argmax(others @ clip)) == k)
    x = {group: np.array([traits[number] for number in numbers[group]]) for group in numbers}
    seen, seen_error = traits_from_pictures(numbers, x)

    def own_voice_first(guess: np.ndarray) -> float:
        """Share of unseen voices that GE2E vectors made from (possibly wrong) traits put first."""
        rank = unit(ridge(polynomial(x["known"]), means["known"], polynomial(guess))) @ means["unseen"].T
        return float(np.mean(rank.argmax(1) == np.arange(len(rank))))

    rng = np.random.default_rng(0)
    oracle = {"drawn": round(own_voice_first(x["unseen"]), 3), "read from pictures": round(own_voice_first(seen), 3)}
    for noise in (0.05, 0.1, 0.15):
        first = [own_voice_first(x["unseen"] + rng.normal(0, noise, x["unseen"].shape)) for _ in range(20)]
        oracle[f"drawn, with noise of {noise}"] = round(float(np.mean(first)), 3)
    cosine = means["unseen"] @ means["unseen"].T
    apart = cosine[np.triu_indices(len(cosine), 1)]
    nearest = (means["known"] @ means["known"].T - 2 * np.eye(len(means["known"]))).max(1)
    points = (5, 50, 95, 100)
    return {
        "training_voices": len(numbers["known"]),
        "unseen_voices": len(numbers["unseen"]),
        "cosine_of_unseen_pairs": dict(zip(map(str, points), np.percentile(apart, points).round(3).tolist())),
        "cosine_of_training_voice_to_nearest": dict(
            zip(map(str, points), np.percentile(nearest, points).round(3).tolist())
        ),
        "clip_of_unseen_voice_nearest_to_own_voice": round(float(np.mean(own)), 3),
        "own_voice_first_by_ridge_from_traits": oracle,
        "error_of_traits_read_from_pictures": dict(zip(vars(load_voices(2)[0].traits), seen_error)),
    }


def traits_from_pictures(
    numbers: dict[str, list[int]], traits: dict[str, np.ndarray]
) -> tuple[np.ndarray, list[float]]:
    """Traits (N, 5) of the unseen voices by a ridge regression on pictures of 32 x 32 pixels, four of each voice with
    expressions, mouths, heads and light of their own, and its root mean square errors."""
    voices, pictures = load_voices(2), {}
    track = mouth_track([("A:", 0.1, 0.3), ("m", 0.3, 0.5), ("i:", 0.5, 0.7)], 20)[4::4]
    for group, chosen in numbers.items():
        rows = []
        for number in chosen:
            rng = np.random.default_rng(number)
            face = Face(voices[number].face, float(rng.uniform(0.93, 1.07)))
            motion = draw_motion(rng, len(track), rng.random(len(track)))
            look = [pose(str(rng.choice(EXPRESSIONS)), 0.9) for _ in track]
            rows += [cv2.resize(f, (32, 32), interpolation=cv2.INTER_AREA) for f in face.render(track, look, motion)]
        pictures[group] = np.stack(rows).reshape(len(rows), -1) / 255
    centre = pictures["known"].mean(0)
    target = np.repeat(traits["known"], len(track), 0)
    guess = ridge(pictures["known"] - centre, target, pictures["unseen"] - centre, weight=10.0)
    guess = guess.reshape(-1, len(track), guess.shape[-1]).mean(1)
    return guess, np.sqrt(np.mean((guess - traits["unseen"]) ** 2, 0)).round(3).tolist()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def polynomial(x: np.ndarray) -> np.ndarray:
    """Traits (N, 5) and their products of two, (N, 21)."""
    x = np.concatenate([np.ones((len(x), 1)), x - 0.5], 1)
    i, j = np.triu_indices(x.shape[1])
    return x[:, i] * x[:, j]


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, weight: float = 0.1) -> np.ndarray:
    centre = y.mean(0)
    return new @ np.linalg.solve(x.T @ x + weight * np.eye(x.shape[1]), x.T @ (y - centre)) + centre

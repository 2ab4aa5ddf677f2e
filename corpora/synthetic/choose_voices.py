"""Draw espeak-ng voices at random and choose those that a recogniser understands and a speaker encoder tells apart."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from corpora.synthetic import sentences
from corpora.synthetic.corpus import speak
from corpora.synthetic.face import find_face_seed
from corpora.synthetic.speech import Synthesizer
from corpora.synthetic.voices import Voice, draw_voice
from engine.errors import UserError, run_cli
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speaker import GE2EEncoder


def farthest_points(embeddings: np.ndarray, accept, count: int) -> list[int]:
    """Greedy farthest-point choice of `count` rows of unit vectors (N, D); `accept(index)` may turn a row down."""
    nearest = embeddings @ embeddings.mean(0)
    chosen: list[int] = []
    while len(chosen) < count:
        index = int(np.argmin(nearest))
        if not np.isfinite(nearest[index]):
            raise UserError(f"--candidates {len(embeddings)} leave only {len(chosen)} clear voices; draw more of them")
        if accept(index):
            cosine = embeddings @ embeddings[index]
            nearest = np.maximum(nearest, cosine) if chosen else np.where(np.isinf(nearest), np.inf, cosine)
            chosen.append(index)
        nearest[index] = np.inf
    return chosen


def select_voices(train: int, held_out: int, candidates: int, seed: int, max_error: float) -> dict:
    """Choose voices: drawn at random, understood by the recogniser, then farthest points of GE2E embeddings.

    A voice is embedded from three neutral sentences, and understood if its WER over ten neutral, four fearful and four
    sad sentences is at most `max_error` (a fraction). Every few voices in the order of choice one is held out, so that
    both groups span the same range. Returns what `voices.json` holds: arguments, the largest cosines, the voices.

    Raises:
        UserError: fewer than `train + held_out` of the candidates are understood.
    """
    drawn = [draw_voice(seed * 100_000 + i) for i in range(candidates)]
    pool = [Voice(i, False, *draw, face_seed=0) for i, draw in enumerate(drawn)]
    synthesizer = Synthesizer({voice.name: voice.lines for voice in pool})
    encoder, recogniser = GE2EEncoder(), Recogniser(sentences.grammar())
    rng = np.random.default_rng(seed)
    texts = [sentences.draw_sentence(rng, "train") for _ in range(10)]

    def waves(voice: Voice, count: int, expression: str = "neutral") -> list[np.ndarray]:
        return [
            speak(synthesizer, text, voice, expression, 1.0, np.random.default_rng(i))[0]
            for i, text in enumerate(texts[:count])
        ]

    embeddings = []
    for voice in pool:
        embeddings.append(encoder.embed(np.concatenate(waves(voice, 3)), 24000))
        if (voice.number + 1) % 50 == 0:
            print(f"embedded {voice.number + 1}/{candidates} voices", flush=True)
    vectors = np.stack(embeddings)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def clear(index: int) -> bool:
        speech = waves(pool[index], 10) + waves(pool[index], 4, "fearful") + waves(pool[index], 4, "sad")
        heard = [recogniser.transcribe(wave, 24000) for wave in speech]
        return word_error_rate(texts + texts[:4] * 2, heard) <= max_error

    chosen = farthest_points(vectors, clear, train + held_out)
    every = len(chosen) // held_out
    groups = {i: k % every == every - 1 and k // every < held_out for k, i in enumerate(chosen)}
    order = sorted(chosen, key=lambda i: groups[i])
    voices = []
    for number, i in enumerate(order):
        lines, pitch, formants = drawn[i]
        face_seed = find_face_seed(number, pitch, formants)
        voices.append(Voice(number, groups[i], lines, round(pitch, 1), round(formants, 4), face_seed))
    cosine = vectors[order] @ vectors[order].T - 2 * np.eye(len(order))
    report = {
        "largest_cosine_train": round(float(cosine[:train, :train].max()), 4),
        "largest_cosine_all": round(float(cosine.max()), 4),
    }
    arguments = {"train": train, "held_out": held_out, "candidates": candidates, "seed": seed, "max_error": max_error}
    return {"arguments": arguments, "results": report, "voices": [vars(voice) for voice in voices]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m corpora.synthetic.choose_voices",
        description="Draw espeak-ng voices and choose those that a speaker encoder tells apart.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--train", type=int, default=40, help="training voices")
    parser.add_argument("--held-out", type=int, default=8, help="voices kept out of training")
    parser.add_argument("--candidates", type=int, default=180, help="voices to draw and choose from")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other voices")
    parser.add_argument("--max-error", type=float, default=0.03, help="largest recogniser WER of a chosen voice")
    args = parser.parse_args()
    for name, least in (("train", 1), ("held_out", 1), ("candidates", args.train + args.held_out), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}; make it or choose another")
    chosen = select_voices(args.train, args.held_out, args.candidates, args.seed, args.max_error)
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(chosen, indent=1) + "\n")
    part.replace(args.out)
    print(json.dumps(chosen["results"]))


if __name__ == "__main__":
    run_cli(main)

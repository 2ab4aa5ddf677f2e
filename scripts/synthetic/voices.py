"""The corpus's voices: espeak-ng voice files drawn at random, chosen so that a speaker encoder tells them apart.

`voices.json` keeps the choice that the corpus uses. `python -m scripts.synthetic.voices --out FILE` chooses again by
the same method; the kept choice was made before espeak-ng's noise was seeded, so a new one need not equal it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import UserError, run_cli
from scripts.synthetic import sentences
from scripts.synthetic.expression import EXPRESSIONS
from scripts.synthetic.speech import Synthesizer

VOICES_FILE = Path(__file__).with_name("voices.json")


@dataclass(frozen=True)
class Voice:
    """One identity: its number, whether training may use it, its espeak-ng voice file, the traits that its face shows
    (pitch in Hz, formant scale), and the seed of the rest of its looks."""

    number: int
    held_out: bool
    lines: str
    pitch: float
    formants: float
    face_seed: int

    @property
    def name(self) -> str:
        return f"corpus{self.number:02d}"


def load_voices(path: Path = VOICES_FILE) -> list[Voice]:
    """All voices, in the order of their numbers."""
    return [Voice(**entry) for entry in json.loads(Path(path).read_text())["voices"]]


def draw_voice(seed: int) -> tuple[str, float, float]:
    """A random voice: the lines of its espeak-ng voice file, its base pitch in Hz and its overall formant scale."""
    rng = np.random.default_rng([seed, 0x5EED])
    high = rng.random() < 0.5
    pitch = rng.uniform(150, 235) if high else rng.uniform(72, 135)
    formants = rng.uniform(0.98, 1.2) if high else rng.uniform(0.84, 1.06)
    span = pitch * rng.uniform(1.2, 1.6)
    lines = [f"pitch {pitch:.0f} {span:.0f}", f"flutter {rng.integers(0, 6)}"]
    for number in range(6):
        scale = 100 * formants * rng.normal(1.0, 0.035)
        width = 100 * rng.uniform(0.75, 1.5)
        lines.append(f"formant {number} {scale:.0f} {rng.uniform(70, 140):.0f} {width:.0f}")
    if rng.random() < 0.45:
        lines.append(f"klatt {rng.integers(1, 6)}")
    if rng.random() < 0.5:
        lines.append("breath 0 " + " ".join(str(rng.integers(0, 8)) for _ in range(6)))
    if rng.random() < 0.3:
        lines.append(f"roughness {rng.integers(1, 4)}")
    lines.append(f"voicing {rng.integers(70, 125)}")
    lines.append(f"consonants {rng.integers(70, 130)} {rng.integers(70, 130)}")
    tilt = rng.normal(0, 28)
    lines.append(f"tone 600 {150 - tilt:.0f} 1200 {125:.0f} 2000 {110 + tilt:.0f} 3000 {105 + 1.3 * tilt:.0f}")
    return "\n".join(lines), float(pitch), float(formants)


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


def select_voices(train: int, held_out: int, spare: int, candidates: int, seed: int, max_error: float) -> dict:
    """Choose voices: drawn at random, understood by the recogniser, then farthest points of GE2E embeddings.
    Every few voices in the order of choice one is held out, so that both groups span the same range. `spare` training
    voices too many are chosen, and those dropped that the recogniser understands worst over all expressions."""
    from engine.metrics.recogniser import Recogniser, word_error_rate
    from engine.metrics.speaker import SpeakerEncoder
    from scripts.synthetic.corpus import speak
    from scripts.synthetic.face import find_face_seed

    drawn = [draw_voice(seed * 100_000 + i) for i in range(candidates)]
    pool = [Voice(i, False, *draw, face_seed=0) for i, draw in enumerate(drawn)]
    synthesizer = Synthesizer({voice.name: voice.lines for voice in pool})
    encoder, recogniser = SpeakerEncoder(), Recogniser(sentences.grammar())
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

    def error(index: int, key: int) -> float:
        """WER over five neutral sentences and one of each expression."""
        spoken, heard = [], []
        for k, expression in enumerate(("neutral",) * 5 + EXPRESSIONS):
            rng = np.random.default_rng([seed, key, k])
            spoken.append(sentences.draw_sentence(rng, "train"))
            wave, _ = speak(synthesizer, spoken[-1], pool[index], expression, float(rng.uniform(0.75, 1)), rng)
            heard.append(recogniser.transcribe(wave, 24000))
        return word_error_rate(spoken, heard)

    total = train + held_out + spare
    chosen = farthest_points(vectors, clear, total)
    every = total // held_out
    groups = {i: k % every == every - 1 and k // every < held_out for k, i in enumerate(chosen)}
    errors = {i: error(i, k) for k, i in enumerate(chosen) if not groups[i]}
    dropped = set(sorted(errors, key=errors.get, reverse=True)[:spare])
    order = sorted((i for i in chosen if i not in dropped), key=lambda i: groups[i])
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
    arguments = {"train": train, "held_out": held_out, "spare": spare, "candidates": candidates, "seed": seed}
    return {
        "arguments": arguments | {"max_error": max_error},
        "results": report,
        "voices": [vars(voice) for voice in voices],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=VOICES_FILE, help="the JSON file to write")
    parser.add_argument("--train", type=int, default=32, help="training voices")
    parser.add_argument("--held-out", type=int, default=8, help="voices kept out of training")
    parser.add_argument(
        "--spare", type=int, default=8, help="more training voices, of which the least clear are dropped"
    )
    parser.add_argument("--candidates", type=int, default=180, help="voices to draw and choose from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-error", type=float, default=0.03, help="largest recogniser WER of a chosen voice")
    args = parser.parse_args()
    if args.train < 1 or args.held_out < 1 or args.spare < 0:
        raise UserError(
            f"--train {args.train} --held-out {args.held_out} --spare {args.spare}: give at least 1, 1 and 0 voices"
        )
    chosen = select_voices(args.train, args.held_out, args.spare, args.candidates, args.seed, args.max_error)
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(chosen, indent=1) + "\n")
    part.replace(args.out)
    print(json.dumps(chosen["results"]))


if __name__ == "__main__":
    run_cli(main)

"""Choose the voices of version 2: seeds whose voice a recogniser understands and whose face a detector finds.

Candidates are judged in the order of their seeds. Each judgement is kept in a file beside the output, from which an
interrupted run goes on. The voices of the unseen and the dev split are those that GE2E tells apart best (farthest
points).

Axes: N voices, D embedding.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np

from corpora.synthetic import sentences
from corpora.synthetic.corpus import RATE, speak
from corpora.synthetic.expression import EXPRESSIONS, pose, prosody
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.speech import Synthesizer
from corpora.synthetic.traits import draw_traits, looks, voice_lines
from corpora.synthetic.visemes import mouth_track
from engine.errors import UserError, run_cli
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speaker import GE2EEncoder

MAX_ERRORS = 0.06  # word errors of a chosen voice: one of 18 words
_SPOKEN = ("sad", "surprised", "fearful")  # the prosodies that are hardest to understand


class Judge:
    """Says whether the voice of a seed is understood and its face found, and how it sounds to GE2E."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._texts = [sentences.draw_sentence(rng, "dev", 2) for _ in _SPOKEN]
        self._synthesizer, self._encoder = Synthesizer(), GE2EEncoder()
        self._recogniser = Recogniser(sentences.grammar())
        self._cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")

    def __call__(self, seed: int) -> dict:
        """{"seed", "words" (share of errors), and of a good one "ge2e" (256 numbers)}."""
        traits = draw_traits(seed)
        waves = [
            speak(self._synthesizer, text, voice_lines(traits), [prosody(name, 1.0, 2)], np.random.default_rng(i)).wave
            for i, (text, name) in enumerate(zip(self._texts, _SPOKEN))
        ]
        errors = word_error_rate(self._texts, [self._recogniser.transcribe(wave, RATE) for wave in waves])
        row = {"seed": seed, "words": round(errors, 4)}
        if errors <= MAX_ERRORS and self._is_found(Face(looks(traits, seed)), seed):
            ge2e = self._encoder.embed(np.concatenate(waves), RATE)
            row["ge2e"] = [round(float(value), 4) for value in ge2e]
        return row

    def _is_found(self, face: Face, seed: int) -> bool:
        rng = np.random.default_rng(seed)
        track = mouth_track([("A:", 0.1, 0.4), ("w", 0.4, 0.6)], 20)[[6, 12]]
        for name in EXPRESSIONS:
            for frame in face.render(track, pose(name, 1.0), draw_motion(rng, 2, rng.random(2))):
                if len(self._cascade.detectMultiScale(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), 1.1, 3)) != 1:
                    return False
        return True


def judge_until(count: int, work: Path) -> list[dict]:
    """Judge seeds 0, 1, ... until `count` are good; gives those. `work` keeps the judgements."""
    known = [json.loads(line) for line in work.read_text().splitlines()] if work.is_file() else []
    good = [row for row in known if "ge2e" in row]
    judge, begin, had = Judge(), time.monotonic(), len(good)
    with work.open("a") as file:
        for seed in range(len(known), 10 * count):
            if len(good) >= count:
                break
            row = judge(seed)
            print(json.dumps(row), file=file, flush=True)
            if "ge2e" in row:
                good.append(row)
            if seed % 20 == 19 and len(good) > had:
                left = (time.monotonic() - begin) / (len(good) - had) * (count - len(good))
                print(f"{len(good)} of {count} voices from {seed + 1} seeds, {left:.0f} s left", flush=True)
    if len(good) < count:
        raise UserError(f"only {len(good)} of {10 * count} seeds give a good voice; ask for fewer")
    return good[:count]


def farthest_points(vectors: np.ndarray, count: int) -> list[int]:
    """Greedy farthest-point choice of `count` rows of unit vectors (N, D)."""
    nearest, chosen = vectors @ vectors.mean(0), []
    for _ in range(count):
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest if len(chosen) > 1 else -1.0, vectors @ vectors[chosen[-1]])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m corpora.synthetic.choose_voices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    counts = {"train": 400, "dev": 20, "unseen": 40}
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count, help="voices (default: %(default)s)")
    args = parser.parse_args()
    for name in counts:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}; make it or choose another")
    rows = judge_until(args.train + args.dev + args.unseen, args.out.with_suffix(".candidates.jsonl"))
    vectors = np.array([row["ge2e"] for row in rows])
    order = farthest_points(vectors, args.unseen + args.dev)
    seeds = {"unseen": order[: args.unseen], "dev": order[args.unseen :]}
    seeds["train"] = [i for i in range(len(rows)) if i not in order]
    chosen = {name: sorted(rows[i]["seed"] for i in seeds[name]) for name in counts}
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(chosen) + "\n")
    part.replace(args.out)
    print(f"{args.out}: {len(rows)} voices of {rows[-1]['seed'] + 1} seeds")


if __name__ == "__main__":
    run_cli(main)

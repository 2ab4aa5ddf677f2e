"""How far the face that a clip shows decides the prosody of its voice: what a model of lips and faces can reach.

Pitch range and energy of held-out clips are predicted from what their faces show, by ridge regression with ten folds:
the share of the clip that each expression takes, alone and times its intensity, and the traits of the voice that can be
seen. A prediction correlates with the truth by r at most. A model that draws, as HiCoDiT does, gives one voice of all
that fit the face; its draws and the true clips, which are draws as well, correlate by r squared only.

Axes: M clips, F features.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.media.audio import read_audio
from engine.metrics.speech import energy, pitch, pitch_range
from engine.progress import track
from engine.shards.recordings import read_manifest
from hicodit.conditions.types import EXPRESSIONS

LEAST: dict[str, float] = {"clips": 20}
FOLDS, RIDGE = 10, 1.0
RATE = 24_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic_2"), help="synthetic corpus, version 2")
    parser.add_argument("--split", default="dev", help="split of the corpus")
    parser.add_argument("--clips", type=int, default=200, help="number of clips")


def run(args: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    rows = read_manifest(args.corpus, args.split)[: args.clips]
    if not all("expressions" in row and "traits" in row for row in rows):
        raise UserError(f"--corpus {args.corpus} is no corpus of version 2: make_synthetic_corpus.py --version 2")
    files = [args.corpus / args.split / f"{row['id']}.wav" for row in rows]
    waves = (read_audio(file, RATE) for file in track(files, len(files), "clips"))
    heard = np.array([(pitch_range(pitch(wave, RATE)), energy(wave)) for wave in waves])  # (M, 2)
    shares = np.array(
        [[row["expressions"].count(name) / len(row["expressions"]) for name in EXPRESSIONS] for row in rows]
    )
    strengths = shares * np.array([[row["intensity"]] for row in rows])
    traits = np.array([list(row["traits"].values()) for row in rows])
    features = {
        "expressions": shares,
        "expressions, intensity and visible traits": np.hstack([shares, strengths, traits]),
    }
    for column, figure in enumerate(("pitch_range", "energy")):
        for name, known in features.items():
            r = float(np.corrcoef(heard[:, column], predict(known, heard[:, column]))[0, 1])
            row = {"figure": figure, "known": name, "clips": len(rows), "r": round(r, 3), "r_of_draws": round(r * r, 3)}
            yield row, f"{figure} from {name}: r {r:.2f} of a prediction, {r * r:.2f} of a draw"


def predict(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of each clip the value (M,) that a ridge regression on the others' features (M, F) gives."""
    out, order = np.empty(len(values)), np.random.default_rng(0).permutation(len(values))
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        rest = np.setdiff1d(order, held)
        mean, level = features[rest].mean(0), values[rest].mean()
        known = features[rest] - mean
        weights = np.linalg.solve(known.T @ known + RIDGE * np.eye(known.shape[1]), known.T @ (values[rest] - level))
        out[held] = (features[held] - mean) @ weights + level
    return out

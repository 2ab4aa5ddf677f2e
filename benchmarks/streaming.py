"""HiCoDiT streaming on the bundled model: first sound, real-time factor, word errors by look-ahead, offline beside it.

Clips are those of a synthetic corpus (scripts/make_synthetic_corpus.py). The settings of each clip are measured one
after the other, so that whatever else runs on the machine disturbs all alike. The first sound comes after the pictures
that it waits for and the time that they took to compute; the real-time factor is given as wall and as processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.statistics import bootstrap_interval
from engine.media.corpus import pick_rows
from engine.metrics.recogniser import CorpusRecogniser
from engine.metrics.words import count_errors
from engine.progress import track
from hicodit.conditions.types import FPS
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import with_preset

LEAST = {"clips": 1, "lookahead": 0.04, "steps": 1, "window": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic"), help="folder of the corpus")
    parser.add_argument("--splits", nargs="+", default=["seen", "unseen"], help="splits of the corpus")
    parser.add_argument("--clips", type=int, default=24, help="clips of each split")
    parser.add_argument("--lookahead", nargs="+", type=float, default=[0.2, 0.4, 0.8], help="seconds")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps of a hop")
    parser.add_argument("--window", type=int, default=2, help="seconds that the network sees at each hop")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    load = partial(HiCoDiTPipeline.from_pretrained, device=args.device)
    pipeline = load(precision=args.precision)
    settings = {"steps": args.steps, "window": args.window}
    ways = {f"look-ahead {s:g} s": partial(_stream, pipeline, lookahead=s, **settings) for s in args.lookahead}
    for precision in dict.fromkeys([args.precision, "fp32"]):
        offline = load(precision=precision)
        offline.sampler, offline.guidance = with_preset("fast", offline.sampler, offline.guidance)
        ways[f"offline, sampler=fast, {precision}"] = partial(_offline, offline)
    recogniser = CorpusRecogniser(args.corpus / "grammar.jsgf")
    rows = [(args.corpus / split, row) for split in args.splits for row in pick_rows(args.corpus, split, args.clips)]
    clips: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for way in ways.values():  # warm up
        way(rows[0][0] / f"{rows[0][1]['id']}.mp4", 0)
    for i, (folder, row) in enumerate(track(rows, len(rows), "clips")):
        for name, way in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            wave, figures = way(folder / f"{row['id']}.mp4", i)
            figures |= {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
            heard = recogniser.transcribe(row["text"], wave, pipeline.codec.sample_rate)
            wrong, words = count_errors(row["text"], heard)["wer"]
            figures |= {"wrong": wrong, "words": words, "free": recogniser.is_free(row["text"])}
            clips[name].append(figures | {"seconds": len(wave) / pipeline.codec.sample_rate})
    for name, found in clips.items():
        result = _summary(name, found)
        yield result, ", ".join(f"{key} {value}" for key, value in result.items())


def _offline(pipeline: HiCoDiTPipeline, file: Path, seed: int) -> tuple[np.ndarray, dict[str, float]]:
    return pipeline(file, seed).wave, {}


def _stream(pipeline: HiCoDiTPipeline, file: Path, seed: int, **settings: Any) -> tuple[np.ndarray, dict[str, float]]:
    chunks = list(pipeline.stream(file, seed, **settings))
    first, slowest = chunks[0], max(chunk.compute for chunk in chunks[:-1])
    figures = {"first": first.needed / FPS + first.compute, "compute": first.compute, "slowest": slowest}
    return np.concatenate([chunk.wave for chunk in chunks]), figures


def _summary(name: str, clips: list[dict[str, Any]]) -> dict[str, Any]:
    seconds, result = sum(clip["seconds"] for clip in clips), {"way": name, "clips": len(clips)}
    for free, ending in ((False, ""), (True, "_free_sentences")):
        own = [clip for clip in clips if clip["free"] == free]
        if own:
            wrong, words = (np.array([clip[key] for clip in own], float) for key in ("wrong", "words"))
            interval = bootstrap_interval(wrong, words)
            result[f"word_error_percent{ending}"] = round(100 * wrong.sum() / words.sum(), 2)
            result[f"interval_95{ending}"] = interval and [round(100 * value, 2) for value in interval]
    result |= {
        "real_time_factor_wall": round(sum(clip["wall"] for clip in clips) / seconds, 3),
        "real_time_factor_processor": round(sum(clip["processor"] for clip in clips) / seconds, 3),
    }
    for key in ("first", "compute", "slowest") if "first" in clips[0] else ():
        result[f"{key}_s_median"] = round(statistics.median(clip[key] for clip in clips), 3)
    return result

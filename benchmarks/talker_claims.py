"""Talker-T2AV's claims put to the test: solver steps, prefixes, order of the tokens, training with or without TTS.

settings: one release, sampled with 2, 4, 6 and 10 solver steps, and with the first 0, 0.5 and 1 s of each clip given as
the prefix (the official program's `--gt-prefix-seconds`; the words of prefix and continuation are measured together,
synchrony of the continuation alone).
orders: models with other orders of the tokens (the paper's Table 4), or without TTS rows, trained with
`experiment=talker_synthetic` in RUNS/VARIANT-SEED, as T2AV and as A2V; what is finished is not done again. They start
from random weights, or, as the paper's model does, from one model of speech (`--overrides init=RELEASE`, trained with
`experiment=talker_synthetic_tts`). Without TTS a batch has as many rows, so twice as many with motion.

Differences to the default are paired by clip, with 95 % intervals (`benchmarks.paired.estimate`; with one model the
interval is over clips alone).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile

from benchmarks.paired import Pairs, chart, compare, line, ratio
from benchmarks.trained import make_once, measure_once, train
from corpora.synthetic.mouth_opening import MouthReader
from engine.config import compose
from engine.metrics.speech import speech_end, synchrony
from engine.metrics.words import count_errors
from engine.record import dated
from talker_t2av.evaluation import CUT, LATE, HeldOut, talk
from talker_t2av.model import FPS, HOP
from talker_t2av.pipeline import Job, Talk, TalkerPipeline

MEASURED = ("settings", "orders")
STEPS, PREFIXES = (10, 6, 4, 2), (0.0, 0.5, 1.0)  # the default first
ORDERS = {
    "add": [],
    "interleaved_av": ["task.model.order=av"],
    "interleaved_va": ["task.model.order=va"],
    "delay_1": ["task.model.delay=1"],
    "delay_3": ["task.model.delay=3"],
    "without_tts": ["data.tasks=[t2av]"],
}
FIGURES = {
    "wer": (ratio, "lower"),
    "synchrony": (ratio, "higher"),
    "ends_in_time": (ratio, "higher"),
    "length_error_s": (ratio, "lower"),
}
LEAST = {"clips": 2, "train_steps": 1, "seeds": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("measured", choices=MEASURED, help="what to measure")
    parser.add_argument("--weights", type=Path, default=Path("assets/talker_t2av_tiny"), help="release of `settings`")
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic"), help="folder of the corpus")
    parser.add_argument("--shards", type=Path, help="its prepared shards, for `orders`; default: CORPUS/shards/talker")
    parser.add_argument("--split", default="seen", help="held-out split")
    parser.add_argument("--clips", type=int, default=60, help="number of clips")
    parser.add_argument("--modes", nargs="+", choices=("t2av", "a2v"), default=["t2av", "a2v"], help="modes measured")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=[*ORDERS], help="what is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each")
    parser.add_argument("--train-steps", type=int, default=3000, help="training steps of each model")
    parser.add_argument("--runs", type=Path, default=Path("runs/talker_claims"), help="folder of the runs")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="SETTING", help="settings of train.py for all")


def record_name(args: argparse.Namespace) -> str:
    """Both measurements of one day have a record."""
    return f"talker_claims-{args.measured}"


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    clips = HeldOut(args.corpus, args.split, args.clips, MouthReader())
    voices = {row["id"]: str(row["voice"]) for row in clips.rows}
    found = measure_settings(args, clips) if args.measured == "settings" else measure_orders(args, clips)
    for mode, systems in found:
        rows = [{"mode": mode, **row} for row in compare(systems, FIGURES, voices)]
        yield from ((row, f"{mode}, {line(row)}") for row in rows)
        if len(rows) > 1:
            path = dated(args.out, f"talker_claims-{mode.replace(' ', '-')}.png")
            chart(rows, FIGURES, path)
            yield {"chart": path.name}, str(path)


Found = Iterator[tuple[str, dict[str, list[dict[str, Pairs]]]]]


def measure_settings(args: argparse.Namespace, clips: HeldOut) -> Found:
    """Solver steps and prefixes, by mode."""
    pipeline = TalkerPipeline.from_pretrained(args.weights)
    usual = pipeline.sampling
    for mode in args.modes:
        systems = {}
        for steps in STEPS:
            pipeline.sampling = replace(usual, steps=steps)
            systems[f"{steps}_steps"] = [measure(pipeline, clips, mode)]
        yield f"{mode} by solver steps", systems
    pipeline.sampling = usual
    for mode in args.modes:
        prefixes = {f"prefix_{seconds:g}_s": [measure(pipeline, clips, mode, seconds)] for seconds in PREFIXES}
        yield f"{mode} by prefix", prefixes


def measure_orders(args: argparse.Namespace, clips: HeldOut) -> Found:
    """Trains what is missing, then measures."""
    shards = args.shards or args.corpus / "shards" / "talker"
    for order in args.orders:
        for seed in args.seeds:
            folder, settings = args.runs / f"{order}-{seed}", order_settings(args, shards, order, seed)
            make_once(folder, settings, partial(train, folder, settings))
    for mode in args.modes:
        systems = {}
        for order in args.orders:
            systems[order] = [measure_release(args.runs / f"{order}-{seed}", clips, mode) for seed in args.seeds]
        yield f"{mode} by order", systems


def order_settings(args: argparse.Namespace, shards: Path, order: str, seed: int) -> list[str]:
    """Settings of train.py for one model. Each batch has the same number of rows."""
    settings = [
        "experiment=talker_synthetic", f"data.corpus={args.corpus}", f"data.root={shards}", "data.held_out=[]",
        f"trainer.seed={seed}", f"trainer.steps={args.train_steps}", *args.overrides, *ORDERS[order],
    ]  # fmt: skip
    if order == "without_tts":
        settings.append(f"trainer.batch_size={2 * compose('train', settings).trainer.batch_size}")
    return settings


def measure_release(folder: Path, clips: HeldOut, mode: str) -> dict[str, Pairs]:
    """`measure` of a run's release, from its folder if it is there."""
    path = folder / f"figures-{mode}-{len(clips.rows)}.json"
    return measure_once(path, lambda: measure(TalkerPipeline.from_pretrained(folder / "release"), clips, mode))


def measure(
    pipeline: TalkerPipeline, clips: HeldOut, mode: str, prefix: float | None = None, batch: int = 8
) -> dict[str, Pairs]:
    """Word errors, synchrony of mouth and sound, and the end of the utterance (in a2v only synchrony), by clip.

    Args:
        prefix: seconds of each clip that are given; voice and face are then the clip's own.
    """
    jobs, true, names = clips.jobs(mode, 0), clips.waves(), [row["id"] for row in clips.rows]
    size = pipeline.system.model.config.patch_size
    given = round((prefix or 0) * FPS) // size * size  # frames
    rest = [wave[given * HOP :] for wave in true]
    with TemporaryDirectory() as folder:
        if prefix is not None:
            jobs = [_continue(clips, row, job, prefix) for row, job in zip(clips.rows, jobs)]
        if mode == "a2v" and given:
            jobs = [replace(job, audio=f"{folder}/{name}.wav") for job, name in zip(jobs, names)]
            for job, wave in zip(jobs, rest):
                soundfile.write(job.audio, wave, clips.rate)
        talks = talk(pipeline, jobs, batch)
    sounds = rest if mode == "a2v" else [t.wave for t in talks]
    openings = [clips.opening(t.frames) for t in talks]
    moves = [synchrony(opening, sound, clips.rate) for opening, sound in zip(openings, sounds)]
    figures: dict[str, list] = {"synchrony": [(value, 1.0) for value in moves]}
    if mode != "a2v":
        whole = [np.concatenate([wave[: given * HOP], t.wave]) for wave, t in zip(true, talks)]
        heard = clips.recogniser.transcribe_all(clips.texts, whole, clips.rate)
        figures["wer"] = [count_errors(text.lower(), said)["wer"] for text, said in zip(clips.texts, heard)]
        figures["ends_in_time"] = [(float(in_time(t, clips.rate)), 1.0) for t in talks]
        figures["length_error_s"] = [(abs(len(wave) - len(own)) / clips.rate, 1.0) for wave, own in zip(whole, true)]
    return {name: dict(zip(names, pairs)) for name, pairs in figures.items()}


def _continue(clips: HeldOut, row: dict, job: Job, prefix: float) -> Job:
    """The job that goes on from the first `prefix` seconds of its own clip."""
    wave, video = clips.path(row, ".wav"), clips.path(row, ".mp4")
    return replace(job, reference_audio=wave, reference_video=video, prefix_seconds=prefix)


def in_time(result: Talk, rate: int) -> bool:
    """Whether the stop head ended it, and with neither too much nor too little quiet (`evaluation.endings`)."""
    quiet = len(result.wave) / rate - speech_end(result.wave, rate)
    return result.stopped and CUT <= quiet <= LATE

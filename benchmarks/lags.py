"""STOI and ESTOI of GRID's recordings with what lips do not show: the lags of the audio, and noise in the pauses.

    python scripts/measure_lags.py data/shards/hicodit_grid_cpu ../shared/grid lags.csv
    python scripts/benchmark.py lags --manifest outputs/grid/test.jsonl --corpus ../shared/grid --lags lags.csv

Each recording is compared with copies of itself: shifted, with the noise of another recording before the first and
after the last word, and with both. The last copy is what perfect speech would be without knowledge of the lag and the
noise. Axis: N samples at 16 kHz.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpora.preparation.media import advance
from corpora.preparation.sources_grid import grid
from engine.arguments import existing_folder
from engine.errors import UserError, require
from engine.media.audio import read_audio
from engine.nn.mel import RATE
from engine.progress import progress_bar
from engine.untrusted import read_json_lines

SHIFTS = (0.005, 0.01, 0.02, 0.03, 0.04)  # seconds
MARGIN = 0.05  # seconds between the words and the noise that replaces a pause
CPU_ONLY = True  # no other device is used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--manifest", type=Path, required=True, help="JSON lines with the clips' `id`, as grid.sh writes"
    )
    parser.add_argument("--corpus", type=existing_folder, required=True, help="folder of GRID")
    parser.add_argument("--lags", type=Path, required=True, help="table of scripts/measure_lags.py")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    require("pystoi", "pystoi")
    rows = [row for _, row in read_json_lines(args.manifest)]
    wanted = {row.get("id") for row in rows if isinstance(row, dict)}
    source = grid(args.corpus, protocol="seen", lags=args.lags)
    corpus = [clip for split in source.splits for clip in source.clips(split)]
    clips = [clip for clip in corpus if clip.key in wanted]
    spoken = [speech_span(clip.phonemes or [], clip.lag) for clip in clips]
    if len(clips) < 2 or len(clips) < len(rows) or None in spoken:
        raise UserError(
            f"{args.manifest} names {len(clips)} clips of {args.corpus}: two or more with alignments are required"
        )
    lags = 1000 * np.array([clip.lag for clip in corpus if clip.lag])
    usual = lags[np.abs(lags) < 80]
    late = int((np.abs(lags) >= 40).sum())
    yield (
        {"lags": len(lags), "sd_ms": lags.std(), "usual_sd_ms": usual.std(), "a_frame_or_more": late},
        f"{len(lags)} lags: standard deviation {lags.std():.1f} ms ({usual.std():.1f} without {len(lags) - len(usual)} "
        f"of 80 ms or more), {late} of 40 ms or more",
    )
    waves = [read_audio(args.corpus / clip.video, RATE) for clip in clips]
    noise = [np.concatenate(pauses(wave, times)) for wave, times in zip(waves, spoken)]
    figures: dict[str, list[tuple[float, float]]] = {}
    for i in progress_bar(range(len(clips)), len(clips), "clips"):
        replaced = with_noise(waves[i], spoken[i], noise[i - 1])
        copies = {f"shifted by {1000 * shift:g} ms": advance(waves[i], shift, RATE) for shift in SHIFTS}
        copies["shifted by its lag"] = advance(waves[i], clips[i].lag, RATE)
        copies["other noise in the pauses"] = replaced
        copies["other noise in the pauses, shifted by its lag"] = advance(replaced, clips[i].lag, RATE)
        for name, copy in copies.items():
            figures.setdefault(name, []).append(similarity(waves[i], copy))
    for name, rows in figures.items():
        stoi, estoi = np.mean(rows, 0).tolist()
        result = {"copy": name, "clips": len(rows), "stoi": stoi, "estoi": estoi}
        yield result, f"{name}: STOI {stoi:.3f}, ESTOI {estoi:.3f}"


def speech_span(phonemes: list[tuple[str, float, float]], lag: float) -> tuple[float, float] | None:
    """Return the start of the first and the end of the last word in the recording, in seconds. None: no words."""
    words = [(start, end) for word, start, end in phonemes if word not in ("sil", "sp")]
    return (words[0][0] + lag, words[-1][1] + lag) if words else None


def pauses(wave: np.ndarray, times: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the audio before the first and after the last word of (N,), without a margin around the words."""
    first, last = (round(time * RATE) for time in (max(times[0] - MARGIN, 0.0), times[1] + MARGIN))
    return wave[:first], wave[last:]


def with_noise(wave: np.ndarray, times: tuple[float, float], noise: np.ndarray) -> np.ndarray:
    """Return the audio (N,) with repeated `noise` (n,) in place of its pauses."""
    before, after = pauses(wave, times)
    filled = np.resize(noise, len(wave))
    end = len(wave) - len(after)
    filled[len(before) : end] = wave[len(before) : end]
    return filled


def similarity(wave: np.ndarray, copy: np.ndarray) -> tuple[float, float]:
    """Return STOI and ESTOI of a copy (N,) of audio (N,)."""
    stoi = require("pystoi", "pystoi").stoi
    return float(stoi(wave, copy, RATE)), float(stoi(wave, copy, RATE, extended=True))

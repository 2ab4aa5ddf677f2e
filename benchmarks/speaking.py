"""Accuracy of active speaker selection in clips with two faces, with and without audio.

Two cartoon faces of the synthetic corpus stand side by side, in sizes that differ by up to a half. One speaks a clip's
sentence. For preparation, which has the audio, the other speaks another sentence. For a silent clip, it only moves its
head and eyes. The files are read as `scripts/prepare_data.py` and `infer.py face=speaking` read them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from corpora.preparation.clip import FPS, SourceClip, WorkItem
from corpora.preparation.media import Decode, Face
from corpora.synthetic.expression import EXPRESSIONS, pose
from corpora.synthetic.face import Face as DrawnFace
from corpora.synthetic.face import draw_motion
from corpora.synthetic.visemes import mouth_track
from corpora.synthetic.voices import load_voices
from engine.arguments import within
from engine.errors import UserError
from engine.faces.clip import ClipFrames, find_faces
from engine.faces.track import FaceTrack
from engine.media.audio import read_audio
from engine.media.video import read_video, write_video
from engine.shards.recordings import read_manifest

RATE = 24_000
HEIGHT = 160
GREY = 150  # of the wall behind them
SCALES = 0.8, 1.2  # of the two heads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic_2"), help="synthetic corpus")
    parser.add_argument("--split", default="dev", help="split of the corpus")
    parser.add_argument("--clips", type=within(1), default=100, help="number of clips of each kind")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sizes, positions and movements")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    rows = read_manifest(args.corpus, args.split)
    folder = args.corpus / args.split
    if not all("face" in row for row in rows):
        raise UserError(f"--corpus {args.corpus} has no faces")
    faces = {voice.number: voice.face for voice in load_voices()}
    counts = {"sound": 0, "silent": 0}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.clips):
            rng = np.random.default_rng([args.seed, number])
            first, second = rng.choice(len(rows), 2, replace=False)
            one = rows[first]
            two = rows[second]
            speaker = read_video(folder / f"{one['id']}.mp4", FPS)
            other = read_video(folder / f"{two['id']}.mp4", FPS)
            wave = read_audio(folder / f"{one['id']}.wav", RATE)
            length = len(speaker)
            looks = pose(str(rng.choice(EXPRESSIONS)), 0.9)
            motion = draw_motion(rng, length, np.zeros(length))
            listener = DrawnFace(faces[two["voice"]]).render(mouth_track([], length), looks, motion)
            path = Path(scratch) / f"{number}.mp4"
            frames, spoken = side_by_side(speaker, np.resize(other, (length, *other.shape[1:])), rng)
            write_video(path, frames, FPS, wave, RATE)
            clip = WorkItem(SourceClip("clip", video=path.name), path.parent)
            for stage in (Decode(), Face()):
                stage(clip)
            counts["sound"] += is_within(clip.track, spoken)
            frames, spoken = side_by_side(speaker, listener, rng)
            write_video(path, frames, FPS)
            counts["silent"] += is_within(find_faces(ClipFrames(path, FPS), FPS, "speaking")[0], spoken)
    for kind, right in counts.items():
        yield {"kind": kind, "clips": args.clips, "right": right}, f"{kind}: right in {right} of {args.clips} clips"


def is_within(track: FaceTrack, columns: tuple[int, int]) -> bool:
    """Return whether the face of a track is between two columns of the frame in most frames."""
    return columns[0] < float(np.median(track.boxes[:, 0] + track.boxes[:, 2] / 2)) < columns[1]


def side_by_side(
    speaker: np.ndarray, other: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """Put two heads (T, H, W, 3) beside each other in either order; return the frames and the speaker's columns."""
    sides = [2 * round(speaker.shape[1] * scale / 2) for scale in rng.uniform(*SCALES, 2)]
    order = rng.permutation(2)
    frames = np.full((len(speaker), HEIGHT, sum(sides), 3), GREY, np.uint8)
    left = 0
    columns = (0, 0)
    for index in order:
        side = sides[index]
        top = int(rng.integers(0, HEIGHT - sides[index] + 1))
        for frame, head in zip(frames, (speaker, other)[index]):
            frame[top : top + side, left : left + side] = cv2.resize(head, (side, side), interpolation=cv2.INTER_AREA)
        if index == 0:
            columns = left, left + side
        left += side
    return frames, columns

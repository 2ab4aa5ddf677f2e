"""Damaged files against every reader: `python -m tests.hostile.fuzz --count 2000`.

Each mutation truncates a good file, flips bits, copies or removes a span, or overwrites numbers in it. Reading it must
succeed or end in a `UserError`, in less than 60 s and 4 GB, and leave nothing beside it. Prints a line for each that
does not, with the seed that repeats it, and how many did; exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.faces.landmarks import read_landmarks
from engine.media.audio import read_audio
from engine.media.video import read_video
from engine.shards.reader import Reading, ShardSplit
from engine.shards.recordings import read_manifest
from engine.torch_files import read_checkpoint, read_matrix
from engine.training import checkpoint
from rvq_codec import RVQCodec
from talker_t2av.faces import read_picture
from talker_t2av.settings import InferConfig, read_jobs
from talker_t2av.text import TalkerTokenizer
from tests.hostile.rows_files import a_run
from tests.hostile.rows_media import CLIP, VOICE, ffmpeg
from tests.shard_files import random_split

SECONDS = 60
MEMORY = 4 * 2**30
NUMBERS = (b"-1", b"1e30", b"9" * 20, b"NaN", b"null", b'"x"', b"[[]]")
ASSETS = Path(__file__).resolve().parents[2] / "assets"


def read_shards(file: Path) -> None:
    split = ShardSplit(file.parent, Reading(verify=False))
    for i in range(len(split)):
        split.read(i)


def write_media(folder: Path) -> Path:
    """Write good files of each kind that is read by itself."""
    ffmpeg("-i", CLIP, "-i", VOICE, "-c:v", "libx264", "-c:a", "aac", "-movflags", "+faststart", folder / "a.mp4")
    for name in ("a.mkv", "a.webm", "a.wav", "a.flac", "a.mp3", "a.ogg"):
        ffmpeg("-i", folder / "a.mp4", folder / name)
    ffmpeg("-i", CLIP, "-frames:v", 1, folder / "a.png")
    (folder / "jobs.jsonl").write_text('{"text": "a", "seed": 3, "reference_audio": "v.wav", "max_seconds": 2.5}\n' * 3)
    (folder / "train.jsonl").write_text('{"id": "a", "text": "b", "frames": 3}\n' * 3)
    torch.save({"state": {"w": torch.ones(9, 9), "n": torch.arange(5)}, "step": 3}, folder / "a.pt")
    torch.save(torch.ones(9, 4), folder / "m.pt")
    points = np.arange(90.0).reshape(9, 5, 2)
    np.savez(folder / "p.npz", points)
    (folder / "p.pkl").write_bytes(pickle.dumps([*points, None]))
    (folder / "p.json").write_text(json.dumps([*points.tolist(), None]))
    return folder


def targets(root: Path) -> list[tuple[Path, Callable[[Path], object]]]:
    """Write good files; return each with what reads it."""
    media = write_media(root)
    split = random_split(root / "split", 12, 6)
    step = a_run(root)
    codec, talker = (Path(shutil.copytree(ASSETS / name, root / name)) for name in ("rvq_tiny", "talker_t2av_tiny"))
    names = [  # of files, the folder that they are in, and what reads one of them
        ("a.mp4 a.mkv a.webm", media, read_video),
        ("a.mp4 a.wav a.flac a.mp3 a.ogg", media, lambda path: read_audio(path, 16_000)),
        ("a.png", media, read_picture),
        ("a.pt", media, read_checkpoint),
        ("m.pt", media, read_matrix),
        ("p.npz p.pkl p.json", media, lambda path: read_landmarks(path, "")),
        ("jobs.jsonl", media, lambda path: read_jobs(InferConfig(jobs=str(path), mode="tts"))),
        ("train.jsonl", media, lambda path: read_manifest(path.parent, "train")),
        ("model.safetensors config.yaml", codec, lambda path: RVQCodec.from_pretrained(path.parent)),
        (
            "tokenizer.json tokenizer_config.json chat_template.jinja",
            talker,
            lambda path: TalkerTokenizer.from_pretrained(path.parent),
        ),
        ("000000.tar 000000.json index.json", split, read_shards),
        (".metadata info.json __0_0.distcp", step, lambda path: checkpoint.read(path.parent, ("model.", "ema."))),
    ]
    return [(folder / name, read) for listed, folder, read in names for name in listed.split()]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Return a file with one to three changes."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data) + 1)
        size = draw.choice((1, 16, 1024))
        before = data[:at]
        span = data[at : at + size]
        after = data[at + size :]
        kind = draw.choice(("cut", "flip", "repeat", "remove", "extreme", "number"))
        if kind == "cut":
            data = before
        elif kind == "flip":
            data = before + bytes(byte ^ 1 << draw.randrange(8) for byte in span) + after
        elif kind == "repeat":
            data = before + span * draw.choice((2, 11)) + after
        elif kind == "remove":
            data = before + after
        elif kind == "extreme":
            data = before + draw.choice((b"\xff", b"\x7f", b"\0", b"\x80")) * len(span) + after
        else:
            data = before + re.sub(rb"\d", draw.choice(NUMBERS), span + after, count=1)
    return data


def attempt(read: Callable[[], object]) -> str:
    """Return what became of a reading: read, refused, or what went wrong."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        read()
        return "read"
    except UserError as error:
        return "refused" if len(str(error)) < 2000 else f"a long message: {error}"
    except Exception as error:
        return "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="mutations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation (default: %(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        (root := Path(scratch) / "good").mkdir()
        files = targets(root)
        for seed in range(args.seed, args.seed + args.count):
            draw = random.Random(seed)
            path, read = draw.choice(files)
            copy = Path(scratch) / "work" / "copy"
            shutil.copytree(path.parent, copy)
            (copy / path.name).write_bytes(mutate(path.read_bytes(), draw))
            before = sorted(copy.parent.rglob("*"))
            outcome = attempt(partial(read, copy / path.name))
            if sorted(copy.parent.rglob("*")) != before:
                outcome = "it left files"
            peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            if peak * 1024 > MEMORY:
                outcome = f"{peak / 2**20:.1f} GB"
            if outcome not in ("read", "refused"):
                print(f"seed {seed}, {path.name}: {outcome}", flush=True)
                outcome = "wrong"
            outcomes[outcome] += 1
            shutil.rmtree(copy.parent)
    print(", ".join(f"{outcome} {count}" for outcome, count in outcomes.items()))
    sys.exit(1 if outcomes["wrong"] else 0)


if __name__ == "__main__":
    main()

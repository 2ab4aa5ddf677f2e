"""Damaged files and random settings against every reader: `python -m tests.trials.fuzz --count 2000`.

Each mutation truncates a good file, flips bits, copies or removes a span, or overwrites numbers in it. Reading it must
succeed or end in a `UserError`, in less than 60 s and 4 GB, and leave nothing beside it. Prints a line for each that
does not, with the seed that repeats it, and a table; exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
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
from engine.safe_pickle import read_checkpoint, read_tensors
from engine.shards.reader import Reading, ShardSplit
from engine.shards.recordings import read_manifest
from engine.training import checkpoint
from engine.training.checkpoint import Checkpoints
from rvq_codec import RVQCodec
from talker_t2av.faces import read_picture
from talker_t2av.settings import InferConfig, read_jobs
from talker_t2av.text import TalkerTokenizer
from tests.hostile.rows_media import ffmpeg
from tests.hostile.rows_settings import SETTINGS
from tests.shard_files import random_split

SECONDS, MEMORY = 60, 4 * 2**30
ASSETS = Path(__file__).resolve().parents[2] / "assets"
Target = tuple[Path, Path, Callable[[Path], object]]  # a folder, the file in it that is changed, what reads the folder


def read_shards(folder: Path) -> None:
    split = ShardSplit(folder, Reading(verify=False))
    for i in range(len(split)):
        split.read(i)


def make_targets(root: Path) -> dict[str, Target]:
    """Good files by what they are."""
    media = root / "media"
    media.mkdir()
    clip, voice = ASSETS / "demo" / "silent.mp4", ASSETS / "demo" / "voice.wav"
    shutil.copy(voice, media / "a.wav")
    ffmpeg("-i", clip, "-i", voice, "-c:v", "libx264", "-c:a", "aac", "-movflags", "+faststart", media / "a.mp4")
    for name in ("a.mkv", "a.webm"):
        copy = ["-c", "copy"] if name == "a.mkv" else []
        ffmpeg("-i", media / "a.mp4", *copy, media / name)
    for name in ("a.flac", "a.mp3", "a.ogg"):
        ffmpeg("-i", voice, media / name)
    ffmpeg("-i", clip, "-frames:v", 1, media / "a.png")
    (media / "jobs.jsonl").write_text('{"text": "a", "seed": 3, "reference_audio": "v.wav", "max_seconds": 2.5}\n' * 3)
    (media / "train.jsonl").write_text('{"id": "a", "text": "b", "frames": 3}\n' * 3)
    torch.save({"state": {"w": torch.ones(9, 9), "n": torch.arange(5)}, "step": 3}, media / "a.pt")
    torch.save(torch.ones(9, 4), media / "m.pt")
    points = np.arange(90.0).reshape(9, 5, 2)
    np.savez(media / "p.npz", points)
    (media / "p.pkl").write_bytes(pickle.dumps([*points, None]))
    (media / "p.json").write_text(json.dumps([*points.tolist(), None]))
    for name in ("rvq_tiny", "talker_t2av_tiny"):
        shutil.copytree(ASSETS / name, root / name)
    split = random_split(root / "split", 12, 6)
    checkpoints = Checkpoints(root / "run" / "checkpoints", keep=1)
    step = checkpoints.save(1, {"model.w": torch.ones(30, 4), "ema.w": torch.ones(30, 4)}, {"config": {}})
    checkpoints.wait()

    def each(folder: Path, read: Callable[[Path], object], *names: str) -> dict[str, Target]:
        return {f"{folder.name}/{name}": (folder, folder / name, read) for name in names}

    def one(read: Callable[[Path], object], *names: str) -> dict[str, Target]:
        return {name: (media, media / name, lambda folder, n=name: read(folder / n)) for name in names}

    targets = one(read_video, "a.mp4", "a.mkv", "a.webm") | one(read_picture, "a.png")
    targets |= one(lambda path: read_audio(path, 16_000), "a.wav", "a.flac", "a.mp3", "a.ogg")
    targets["sound of a.mp4"] = (media, media / "a.mp4", lambda folder: read_audio(folder / "a.mp4", 16_000))
    targets |= one(read_checkpoint, "a.pt") | one(read_tensors, "m.pt")
    targets |= one(lambda path: read_jobs(InferConfig(jobs=str(path), mode="tts")), "jobs.jsonl")
    targets |= one(lambda path: read_manifest(path.parent, "train"), "train.jsonl")
    targets |= one(lambda path: read_landmarks(path, ""), "p.npz", "p.pkl", "p.json")
    targets |= each(root / "rvq_tiny", RVQCodec.from_pretrained, "model.safetensors", "config.yaml")
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    targets |= each(root / "talker_t2av_tiny", TalkerTokenizer.from_pretrained, *tokenizer)
    targets |= each(split, read_shards, "000000.tar", "000000.json", "index.json")
    states = ("model.", "ema.")
    data = next(step.glob("*.distcp")).name
    return targets | each(step, lambda folder: checkpoint.read(folder, states), ".metadata", "info.json", data)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to three changes of a file."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data)) if data else 0
        kind = draw.choice(("cut", "flip", "flip", "repeat", "remove", "extreme", "digits"))
        if kind == "cut":
            del data[at:]
        elif kind == "flip":
            for _ in range(draw.choice((1, 8, 64))):
                if data:
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == "repeat":
            span = data[at : at + draw.choice((1, 16, 1024))]
            data[at:at] = span * draw.choice((1, 10))
        elif kind == "remove":
            del data[at : at + draw.choice((1, 16, 1024))]
        elif kind == "extreme":
            data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\x80\0\0\0"))
        else:
            numbers = [i for i, byte in enumerate(data[:10_000]) if 48 <= byte <= 57]
            if numbers:
                at = draw.choice(numbers)
                data[at : at + 1] = draw.choice((b"-1", b"1e30", b"9" * 20, b"NaN", b"null", b'"x"', b"[[]]"))
    return bytes(data)


def settings_of(draw: random.Random) -> None:
    """A dataclass of settings with one field drawn from its bounds, which it must take."""
    kind, given = draw.choice(list(SETTINGS.items()))
    field = draw.choice([field for field in dataclasses.fields(kind) if field.metadata.get("bounds")])
    low, high = field.metadata["bounds"]
    value = draw.randint(low, high) if isinstance(low, int) and isinstance(high, int) else draw.uniform(low, high)
    kind(**{**given, field.name: (value, value) if field.name == "betas" else value})


def attempt(read: Callable[[], object]) -> str:
    """What became of a reading: read, refused, or what went wrong."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        read()
        return "read"
    except UserError as error:
        return "refused" if "\n" not in str(error).strip() or len(str(error)) < 2000 else f"a long message: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="mutations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation (default: %(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found, wrong, slowest = Counter(), 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        (root := Path(scratch) / "good").mkdir()
        targets = make_targets(root)
        for seed in range(args.seed, args.seed + args.count):
            draw = random.Random(seed)
            name, (folder, file, read) = draw.choice(list(targets.items()))
            copy = Path(scratch) / "work" / "copy"
            shutil.copytree(folder, copy)
            (copy / file.name).write_bytes(mutate(file.read_bytes(), draw))
            before, begin = sorted(path.name for path in copy.iterdir()), time.monotonic()
            settings_of(draw)
            outcome = attempt(partial(read, copy))
            slowest = max(slowest, time.monotonic() - begin)
            if sorted(path.name for path in copy.iterdir()) != before or len(list(copy.parent.iterdir())) > 1:
                outcome = "it left files"
            processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            peak = max(resource.getrusage(who).ru_maxrss for who in processes) * 1024
            if peak > MEMORY:
                outcome = f"{peak / 2**30:.1f} GB"
            if outcome not in ("read", "refused"):
                wrong += 1
                print(f"seed {seed}, {name}: {outcome}", flush=True)
            found[name, outcome if outcome in ("read", "refused") else "wrong"] += 1
            shutil.rmtree(copy.parent)
    for name in sorted({name for name, _ in found}):
        print(f"{name:32} " + "  ".join(f"{kind} {found[name, kind]:4}" for kind in ("read", "refused", "wrong")))
    print(f"{args.count} mutations: {wrong} wrong; peak {peak / 2**30:.2f} GB, slowest {slowest:.1f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""Valid files with random damage: reading them succeeds or raises a `UserError`, and leaves no other file.

`DAMAGED=500 pytest tests/hostile/test_damaged_files.py` tries 500 changes of each file.
"""

import os
import pickle
import random
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.faces.landmarks import read_landmarks
from engine.shards.reader import Reading, ShardSplit
from engine.torch_files import read_checkpoint, read_matrix
from engine.training import checkpoint
from engine.untrusted import read_lines
from rvq_codec import RVQCodec
from talker_t2av.settings import InferConfig, read_jobs
from tests.hostile.rows_files import MEMORY, a_run
from tests.hostile.rows_media import ASSETS
from tests.shard_files import random_split

COUNT = int(os.environ.get("DAMAGED", 12))
POINTS = np.arange(90.0).reshape(9, 5, 2)


def read_split(path: Path) -> None:
    split = ShardSplit(path.parent, Reading(verify=False))
    for i in range(len(split)):
        split.read(i)


READERS = {  # file name: what reads it
    "state.pt": read_checkpoint,
    "motion.pt": read_matrix,
    "points.npz": lambda path: read_landmarks(path, ""),
    "points.pkl": lambda path: read_landmarks(path, ""),
    "jobs.jsonl": lambda path: read_jobs(InferConfig(jobs=str(path), mode="tts")),
    "split/index.json": read_split,
    "split/000000.json": read_split,
    "split/000000.tar": read_split,
    "rvq_speech/config.yaml": lambda path: RVQCodec.from_pretrained(path.parent),
    "rvq_speech/model.safetensors": lambda path: RVQCodec.from_pretrained(path.parent),
    "run/checkpoints/step-00000001/.metadata": lambda path: checkpoint.read(path.parent, ("model.", "ema.")),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """Folder with a valid file for each reader."""
    folder = tmp_path_factory.mktemp("valid")
    torch.save({"state": {"w": torch.ones(9, 9), "n": torch.arange(5)}, "step": 3}, folder / "state.pt")
    torch.save(torch.ones(9, 4), folder / "motion.pt")
    np.savez(folder / "points.npz", POINTS)
    (folder / "points.pkl").write_bytes(pickle.dumps([*POINTS, None]))
    (folder / "jobs.jsonl").write_text('{"text": "a", "seed": 3, "reference_audio": "v.wav", "max_seconds": 2.5}\n' * 3)
    random_split(folder / "split", 12, 6)
    shutil.copytree(ASSETS / "rvq_speech", folder / "rvq_speech")
    a_run(folder)
    return folder


def damage(data: bytes, draw: random.Random) -> bytes:
    """Truncate the data, or flip, repeat, remove or overwrite a span of it."""
    start = draw.randrange(len(data))
    end = start + draw.choice((1, 16, 1024))
    span = data[start:end]
    flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in span)
    new = draw.choice((flipped, span * 3, b"", b"9" * len(span), b"\xff" * len(span), None))
    return data[:start] if new is None else data[:start] + new + data[end:]


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(valid, tmp_path, name):
    READERS[name](valid / name)
    for seed in range(COUNT):
        folder = tmp_path / f"{seed}"
        shutil.copytree((valid / name).parent, folder, ignore=shutil.ignore_patterns("split", "run", "rvq_speech"))
        path = folder / Path(name).name
        path.write_bytes(damage((valid / name).read_bytes(), random.Random(seed)))
        before = sorted(tmp_path.rglob("*"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with suppress(UserError):
            READERS[name](path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak < MEMORY, f"damage {seed}"
        assert sorted(tmp_path.rglob("*")) == before, f"damage {seed} left a file"
        shutil.rmtree(folder)


def test_lines_end_at_line_feeds_and_carriage_returns_alone(tmp_path):
    (tmp_path / "list.txt").write_bytes("a\r\nb\rc\u2028d\x85e\n".encode())
    assert read_lines(tmp_path / "list.txt") == ["a", "b", "c\u2028d\x85e"]

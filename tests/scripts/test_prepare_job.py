"""The preparation job with a quick stage in place of the networks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from engine.media.audio import write_wav
from engine.media.video import write_video
from scripts.preparation.job import prepare

ROOT = Path(__file__).resolve().parents[2]
FRAMES = 14
SYMBOLS = ["a", "b"]


def clip_row(name, number=0):
    phonemes = [[SYMBOLS[number % 2], 0.1, 0.3]]
    return {"id": name, "text": f"clip {number}", "voice": number, "expression": "happy", "phonemes": phonemes}


def write_clip(root, split, name, number):
    rng = np.random.default_rng(number)
    frames = np.repeat(rng.integers(0, 255, (FRAMES, 4, 4, 3), np.uint8), 8, 1).repeat(8, 2)
    write_video(root / split / f"{name}.mp4", frames, 25)
    write_wav(root / split / f"{name}.wav", rng.normal(0, 0.1, FRAMES * 960), 24_000)


def write_manifest(root, split, names):
    rows = [clip_row(name, number) for number, name in enumerate(names)]
    (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    names = [f"clip{i}" for i in range(9)]
    for number, name in enumerate(names):
        write_clip(root, "train", name, number)
    write_manifest(root, "train", names)
    return root


def settings(root, output, **changes):
    config = {
        "source": {"_target_": "scripts.preparation.sources.Synthetic", "root": str(root)},
        "output": str(output),
        "splits": ["train"],
        "clips_per_shard": 4,
        "limit": None,
        "workers": 1,
        "device": "cpu",
        "clip_timeout": 60,
        "patience": 25,
        "rank": 0,
        "world_size": 1,
        "stages": {
            "decode": {"use": True, "_target_": "scripts.preparation.media.Decode"},
            "crops": {"use": False},
            "brightness": {"use": True, "_target_": "preparation_fakes.Brightness"},
        },
    }
    return OmegaConf.merge(config, changes)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    prepare(settings(corpus, output))
    return output


def test_an_unbroken_run(whole, corpus):
    index = json.loads((whole / "train" / "index.json").read_text())
    assert index["clips"] == 9 and [s["clips"] for s in index["shards"]] == [4, 4, 1]
    assert index["seconds"] == pytest.approx(9 * FRAMES / 25) and index["symbols"] == SYMBOLS
    assert index["digests"] == {"fake": "01234567"} and len(index["motion_mean"]) == 3
    assert [stage["name"] for stage in index["stages"]] == ["decode", "brightness"]
    assert sorted(os.listdir(whole / "train")) == [
        ".plan.json",
        *(f"00000{i}.{kind}" for i in range(3) for kind in ("json", "tar")),
        "index.json",
        "quarantine.jsonl",
    ]


def launch(corpus, output, rank, pause):
    """One process of two, as a process of its own that can be killed."""
    config = settings(corpus, output, rank=rank, world_size=2, stages={"brightness": {"pause": pause}})
    program = (
        "import sys; from omegaconf import OmegaConf; from scripts.preparation.job import prepare\n"
        "if __name__ == '__main__': prepare(OmegaConf.create(sys.argv[1]))"
    )
    path = output.parent / "program.py"
    path.write_text(program)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}:{ROOT / 'tests' / 'scripts'}"}
    return subprocess.Popen([sys.executable, path, OmegaConf.to_yaml(config)], env=environment, start_new_session=True)


def clips_done(output):
    return len(list(output.rglob(".work-0*/*.tar"))) + 4 * len(list(output.rglob("0*.tar")))


def test_killed_processes_go_on_and_end_in_the_same_bytes(corpus, tmp_path):
    """Two processes of which both are killed with SIGKILL in mid-clip, then one finishes the other's shards."""
    output = tmp_path / "shards"
    processes = [launch(corpus, output, rank, 0.3) for rank in (0, 1)]
    before = time.monotonic()
    while clips_done(output) < 3 and time.monotonic() - before < 60:
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)  # its worker goes with it
        process.wait()
    broken = contents(output)
    assert 3 <= clips_done(output) < 9 and "train/index.json" not in broken
    prepare(settings(corpus, output, stages={"brightness": {"pause": 0.3}}))
    assert not [name for name in contents(output) if ".work" in name]
    expected = tmp_path / "whole"
    prepare(settings(corpus, expected, stages={"brightness": {"pause": 0.3}}))
    assert contents(output) == contents(expected)

"""The preparation job with a quick stage in place of the networks, in processes and on a Ray cluster."""

import json
import os
import threading
import time
from multiprocessing import get_context

import numpy as np
import pytest
from omegaconf import OmegaConf

from corpora.preparation.job import prepare
from engine import processes
from engine.errors import UserError
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.settings import LIMITS
from tests import forked
from tests.drawn_faces import draw_face
from tests.shard_files import contents
from tests.waiting import wait_until

FRAMES = 14
SYMBOLS = ["a", "b"]
MEAN = {"use": True, "_target_": "tests.corpora.preparation_fakes.Mean"}


def write_clip(folder, name, number, noise=False):
    rng = np.random.default_rng(number)
    if noise:
        frames = np.repeat(rng.integers(0, 255, (FRAMES, 4, 4, 3), np.uint8), 32, 1).repeat(32, 2)
    else:
        frames = np.stack([draw_face((number + i) % 5 / 5) for i in range(FRAMES)])
    write_video(folder / f"{name}.mp4", frames, 25)
    write_wav(folder / f"{name}.wav", rng.normal(0, 0.1, FRAMES * 960), 24_000)


def write_corpus(root, names):
    rows = []
    for number, name in enumerate(names):
        write_clip(root / "train", name, number, noise=name == "noface")
        row = {"id": name, "text": f"clip {number}", "voice": number, "expression": "happy", "face": {}}
        rows.append(row | {"phonemes": [[SYMBOLS[number % 2], 0.1, 0.3]]})
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), [f"clip{i}" for i in range(9)])


def settings(root, output, **changes):
    config = {
        "source": {"_target_": "corpora.preparation.sources.synthetic", "root": str(root)},
        "output": str(output), "splits": ["train"], "clips_per_shard": 4, "limit": None, "reuse": None, "workers": 0,
        "device": "cpu", "clip_timeout": 60, "patience": 25, "executor": "processes",
        "limits": {},
        "stages": {
            "decode": {"use": True, "_target_": "corpora.preparation.media.Decode"},
            "crops": {"use": False},
            "brightness": {"use": True, "_target_": "tests.corpora.preparation_fakes.Brightness"},
        },
    }  # fmt: skip
    return OmegaConf.merge(config, changes)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    prepare(settings(corpus, output))
    return output


def test_an_unbroken_run_makes_shards_and_an_index(whole, corpus):
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


def prepare_apart(text):
    """Run the job of settings in YAML, as the main program of a process."""
    processes.get_context = lambda _: get_context("fork")
    prepare(OmegaConf.create(text))


def launch(corpus, output, pause):
    """Start the job in a process that can be killed; its workers go with it."""
    config = settings(corpus, output, workers=2, stages={"brightness": {"pause": pause}})
    return forked.start(output.parent / "log.txt", {}, prepare_apart, OmegaConf.to_yaml(config))


def clips_done(output):
    return len(list(output.rglob(".work-0*/*.tar"))) + 4 * len(list(output.rglob("0*.tar")))


def test_a_killed_job_continues_and_ends_in_the_same_bytes(corpus, tmp_path):
    """The job is killed with SIGKILL in mid-clip; another one, with another number of workers, continues."""
    output = tmp_path / "shards"
    job = launch(corpus, output, 0.3)
    wait_until(lambda: clips_done(output) >= 3, 240)
    job.kill()
    job.join()
    broken = contents(output)
    assert 3 <= clips_done(output) < 9 and "train/index.json" not in broken
    prepare(settings(corpus, output, stages={"brightness": {"pause": 0.3}}))
    assert not [name for name in contents(output) if ".work" in name]
    expected = tmp_path / "whole"
    prepare(settings(corpus, expected, stages={"brightness": {"pause": 0.3}}))
    assert contents(output) == contents(expected)


def test_bad_clips_are_listed_with_their_reasons_and_the_others_prepared(tmp_path):
    """A broken and a missing file, and stages that refuse, raise, crash and hang."""
    root = tmp_path / "corpus"
    output = tmp_path / "shards"
    split = tmp_path / "corpus" / "train"
    names = ["good0", "truncated", "nan", "missing", "noface", "refuse", "segfault", "good1", "bug", "hang", "good2"]
    write_corpus(root, names)
    whole = (split / "truncated.mp4").read_bytes()
    (split / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (split / "missing.mp4").unlink()
    stages = {"face": {"use": True, "_target_": "corpora.preparation.media.Face"}, "mean": MEAN}
    config = settings(root, output, workers=2, clip_timeout=10, stages=stages)
    prepare(config)
    index = json.loads((output / "train" / "index.json").read_text())
    keys = [
        sample["key"]
        for shard in index["shards"]
        for sample in json.loads((output / "train" / f"{shard['name']}.json").read_text())["samples"]
    ]
    assert keys == [name for name in names if name.startswith("good")]
    lines = [json.loads(line) for line in (output / "train" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [name for name in names if not name.startswith("good")]
    said = {line["key"]: (line["stage"], line["reason"]) for line in lines}
    for name, (stage, words) in {
        "truncated": ("decode", "train/truncated.mp4"),
        "missing": ("decode", "train/missing.mp4"),
        "noface": ("face", "no face"),
        "refuse": ("brightness", "not wanted"),
        "segfault": ("crash", "signal 11"),
        "bug": ("brightness", "ZeroDivisionError"),
        "nan": ("mean", "not a number"),
        "hang": ("crash", "10 s"),
    }.items():
        assert said[name][0] == stage and words in said[name][1], (name, said[name])
    assert index["rejected"] == {"brightness": 2, "crash": 2, "decode": 2, "face": 1, "mean": 1}
    assert {line["source"] for line in lines} == {f"train/{line['key']}.mp4" for line in lines}


def test_faults_of_the_machine_stop_the_job(corpus, tmp_path):
    bad = tmp_path / "corpus"
    write_corpus(bad, ["bug0", "bug1", "bug2", "bug3"])
    with pytest.raises(UserError, match=r"bug2\.mp4.* in stage brightness: ZeroDivision"):
        prepare(settings(bad, tmp_path / "a", patience=3))
    assert not list((tmp_path / "a").rglob("bug*"))  # none is held to be done
    write_corpus(tmp_path / "full", ["full"])
    (tmp_path / "file").write_text("")
    missing = {"stages": {"brightness": {"_target_": "tests.corpora.preparation_fakes.Missing"}}}
    for root, output, changes, message in (
        (tmp_path / "full", "b", {}, "No space left"),
        (corpus, "c", missing, "requires nothing"),
        (corpus, "file/d", {}, "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(settings(root, tmp_path / output, **changes))


def test_limits_hold_in_the_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(LIMITS, "pixels", LIMITS.pixels)  # back to that afterwards
    prepare(settings(corpus, tmp_path / "out", workers=1, limit=1, limits={"pixels": 300}))
    assert "more than 300 pixels (limits.pixels)" in (tmp_path / "out" / "train" / "quarantine.jsonl").read_text()


def test_unchanged_tensors_are_taken_over_and_nothing_else(corpus, whole, tmp_path):
    """Two stages of which one changes: in another folder, and in place, also after the corpus has grown."""
    both = {"colour": {"use": True, "_target_": "tests.corpora.preparation_fakes.Colour", "log": str(tmp_path / "log")}}
    log = tmp_path / "log"

    def run(output, **changes):
        log.write_text("")
        prepare(settings(corpus, output, **({"stages": both} | changes)))
        return sorted(log.read_text().split())

    names = [f"clip{i}" for i in range(9)]
    assert run(tmp_path / "a") == names
    changed = {"stages": {"colour": both["colour"], "brightness": {"pause": 0.01}}}
    assert run(tmp_path / "b", reuse=str(tmp_path / "a"), **changed) == []
    assert run(tmp_path / "c", **changed) == names
    assert contents(tmp_path / "b") == contents(tmp_path / "c")

    with pytest.raises(UserError, match=r"stages\.brightness\.pause=None, not 0\.01"):
        run(tmp_path / "a", **changed)
    first = {"stages": changed["stages"], "limit": 6}
    assert run(tmp_path / "a", reuse=str(tmp_path / "a"), **first) == []
    assert run(tmp_path / "d", **first) == names[:6] and contents(tmp_path / "a") == contents(tmp_path / "d")
    assert run(tmp_path / "a", reuse=str(tmp_path / "a"), **changed) == names[6:]
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    other = {"stages": {"colour": both["colour"] | {"scale": 2.0}, "brightness": {"pause": 0.01}}}
    assert run(tmp_path / "a", reuse=str(tmp_path / "a"), **other) == names


RAY = {"address": None, "workers": 2, "gpus": 0.0}


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_writes_the_same_shards(tmp_path):
    """Six good clips and one that is refused; one of two nodes with processors goes away."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    names = [f"clip{i}" for i in range(6)]
    names[2:2] = ["refuse"]
    root = write_corpus(tmp_path / "corpus", names)
    stages = {"brightness": {"pause": 0.3}, "mean": MEAN}
    prepare(settings(root, tmp_path / "expected", stages=stages))
    small = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    output = tmp_path / "shards"

    def lose():
        while clips_done(output) < 1:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)

    loser = threading.Thread(target=lose, daemon=True)
    loser.start()
    try:
        prepare(
            settings(root, output, stages=stages, executor="ray", workers=1, ray=RAY | {"address": cluster.address})
        )
        loser.join(10)
        assert not loser.is_alive()  # the machine went while clips were to be done
    finally:
        ray.shutdown()
        cluster.shutdown()
    lines = [json.loads(line) for line in (output / "train" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["stage"]) for line in lines] == [("refuse", "brightness")]
    ours = contents(output)
    expected = contents(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    for name in ours:
        if name.endswith(".tar"):
            assert ours[name] == expected[name], name

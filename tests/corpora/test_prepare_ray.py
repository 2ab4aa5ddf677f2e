"""Preparation on a Ray cluster, and its two halves of a task without one."""

import json
import pickle
import threading
import time

import pytest
import torch

from corpora.preparation.clip import SourceClip, WorkItem
from corpora.preparation.job import chosen_stages, prepare
from corpora.preparation.sources import synthetic
from corpora.preparation.steps import Steps
from engine.config import load as load_config
from engine.errors import UserError
from tests.corpora.preparation_fakes import read_sample
from tests.corpora.test_prepare_job import FRAMES, MEAN, clips_done, contents, settings, write_corpus

RAY = {"address": None, "encoders": 1, "gpus": 0.0}


def test_a_second_half_in_another_process_makes_the_same_sample(tmp_path):
    """The bundled encoders: a first half without networks, which is sent as bytes, and a second."""
    pytest.importorskip("resemblyzer")
    root = write_corpus(tmp_path / "corpus", ["a"])
    words = [f"source.root={root}", "output=x", "device=cpu", "stages.heard_expression.use=true"]
    config, source = load_config("prepare", [*words, "stages.heard_expression.recogniser=null"], ""), synthetic(root)
    stages = chosen_stages(config, source)
    whole, front = (Steps(stages, "cpu", source.symbols, networks) for networks in (True, False))
    assert front.steps["motion"].codec is None
    clip = SourceClip("a", "train/a.mp4", "train/a.wav")  # it has no label and no text
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = whole.do(whole.cut(WorkItem(clip, root, tmp_path / "here")))
    half = pickle.dumps(front.cut(WorkItem(clip, root, tmp_path / "there")))
    there = whole.do(pickle.loads(half))
    assert len(half) < 1e6  # without the pictures
    assert here.stage == there.stage == "" and there.seconds.keys() == {*whole.steps, "write"}
    (facts, one), (_, two) = read_sample(tmp_path / "here"), read_sample(tmp_path / "there")
    assert facts["text"] == "" and facts["frames"] == FRAMES and facts["expression"] is None
    assert one.keys() >= {"expression", "motion", "tokens", "speech", "ge2e", "heard_expression"}
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_wrong_settings_of_the_executor_are_one_line(tmp_path):
    pytest.importorskip("ray")  # which is asked for first
    with pytest.raises(UserError, match="executor=ray: one process is enough"):
        prepare(settings(tmp_path, tmp_path / "a", executor="ray", workers=1, ray=RAY, world_size=2))
    root = write_corpus(tmp_path / "corpus", ["a"])
    for name, value in (("encoders", 0), ("gpus", -1.0)):
        with pytest.raises(UserError, match=rf"ray\.{name}={value} must be"):
            prepare(settings(root, tmp_path / "a", executor="ray", workers=1, ray=RAY | {name: value}))


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_makes_the_same_shards(tmp_path):
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
    ours, expected = contents(output), contents(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    for name in ours:
        if name.endswith(".tar"):
            assert ours[name] == expected[name], name

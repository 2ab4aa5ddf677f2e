"""Preparation on a Ray cluster."""

import json
import threading
import time

import pytest

from corpora.preparation.job import prepare
from tests.corpora.test_prepare_job import MEAN, clips_done, settings, write_corpus
from tests.shard_files import contents

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

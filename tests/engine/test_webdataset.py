"""Shards are webdataset's: its own reader finds every sample with its tensors."""

import json

import pytest
from safetensors.torch import load
from shard_files import random_split

from engine.shards.reader import ShardSplit

webdataset = pytest.importorskip("webdataset")


def test_the_reader_of_webdataset_opens_the_shards(tmp_path):
    folder = random_split(tmp_path / "train", 7, 3)
    dataset = webdataset.WebDataset(f"{folder}/{{000000..000002}}.tar", shardshuffle=False)
    split, samples = ShardSplit(folder), list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"k{i:02d}" for i in range(7)]
    for index, sample in enumerate(samples):
        info, tensors = split.read(index)
        assert json.loads(sample["json"])["text"] == info["text"]
        found = load(sample["safetensors"])
        assert found.keys() == tensors.keys() and all(found[name].equal(tensors[name]) for name in found)

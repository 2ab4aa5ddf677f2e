"""What shards and their index hold; tests/corpora/test_prepare_job.py interrupts and continues their preparation."""

import json
import tarfile

import pytest
import torch
from safetensors.torch import save

from engine.shards.reader import ShardSplit
from engine.shards.writer import SplitWriter, reject_sample, write_sample

KEYS = [f"clip_{i}" for i in range(7)]
GOOD = [key for key in KEYS if key != "clip_4"]


def motion_of(key):
    return torch.arange(6.0).reshape(3, 2).half() + KEYS.index(key)


def members(key):
    about = {"key": key, "frames": 3, "seconds": 0.12}
    tensors = save({"motion": motion_of(key)})
    return {"json": json.dumps(about).encode(), "safetensors": tensors, "wav": b"x" * KEYS.index(key)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a split in which one clip is rejected."""
    folder = tmp_path_factory.mktemp("whole")
    writer = SplitWriter(folder, KEYS, 3, {"stages": {}})
    for shard in writer.shards:
        work, missing = writer.begin(shard)
        for key in missing:
            if key == "clip_4":
                reject_sample(work, key, "a/4.mp4", "face", "no face")
            else:
                write_sample(work, key, members(key))
            writer.settle(work)
    writer.finish({"split": "train", "symbols": None})
    return folder


def test_shards_are_tar_files_without_dates_and_owners_that_the_reader_reads(whole):
    with tarfile.open(whole / "000000.tar") as tar:
        entries = tar.getmembers()
    suffixes = ("json", "safetensors", "wav")
    assert [entry.name for entry in entries] == [f"{key}.{suffix}" for key in KEYS[:3] for suffix in suffixes]
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries} == {(0, 0, 0, "", "")}
    split = ShardSplit(whole)
    assert split.sizes == [3, 2, 1]
    for number, key in enumerate(GOOD):
        info, tensors = split[number]
        assert info["key"] == key and torch.equal(tensors["motion"], motion_of(key))


def test_the_index_has_the_moments_of_all_frames_and_the_rejected_clips(whole):
    index = json.loads((whole / "index.json").read_text())
    motion = torch.cat([motion_of(key) for key in GOOD]).double()
    torch.testing.assert_close(torch.tensor(index["motion_mean"]), motion.mean(0), check_dtype=False)
    torch.testing.assert_close(torch.tensor(index["motion_std"]), motion.std(0), check_dtype=False)
    assert index["rejected"] == {"face": 1} and index["split"] == "train"
    line = {"key": "clip_4", "source": "a/4.mp4", "stage": "face", "reason": "no face"}
    assert [json.loads(x) for x in (whole / "quarantine.jsonl").read_text().splitlines()] == [line]

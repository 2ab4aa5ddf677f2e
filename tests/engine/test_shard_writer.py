"""Axes: T frames, D channels."""

import io
import json
import tarfile
import zlib

import pytest
import torch
from safetensors.torch import load, save

from engine.errors import UserError
from engine.shards.writer import SplitWriter, reject_sample, write_sample
from tests.shard_files import contents

KEYS = [f"clip_{i}" for i in range(7)]
PLAN = {"stages": {"decode": {"max_side": 3}}}
ABOUT = {"split": "train", "symbols": None}


def members(key):
    number = KEYS.index(key)
    motion = torch.arange(6.0).reshape(3, 2).half() + number
    about = {"key": key, "frames": 3, "seconds": 0.12}
    return {"json": json.dumps(about).encode(), "safetensors": save({"motion": motion}), "wav": b"x" * number}


def write(writer, keys=KEYS, stop_before_packing=False):
    for shard in writer.shards:
        work, missing = writer.begin(shard)
        for key in (key for key in missing if key in keys):
            if key == "clip_4":
                reject_sample(work, key, "a/4.mp4", "face", "no face")
            else:
                write_sample(work, key, members(key))
            if not stop_before_packing:
                writer.settle(work)


def make(folder, plan=PLAN):
    return SplitWriter(folder, KEYS, 3, plan)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    writer = make(folder)
    write(writer)
    writer.finish(ABOUT)
    return folder


def test_shards_are_tar_files_and_sidecars_list_the_offsets_of_their_members(whole):
    index = json.loads((whole / "index.json").read_text())
    assert [s["clips"] for s in index["shards"]] == [3, 2, 1] and index["clips"] == 6
    for shard in index["shards"]:
        data = (whole / f"{shard['name']}.tar").read_bytes()
        assert (len(data), zlib.crc32(data)) == (shard["bytes"], shard["crc32"])
        sidecar = json.loads((whole / f"{shard['name']}.json").read_text())
        names = []
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
                names.append(info.name)
        assert names == [
            f"{s['key']}.{suffix}" for s in sidecar["samples"] for suffix in ("json", "safetensors", "wav")
        ]
        for sample in sidecar["samples"]:
            for suffix, value in members(sample["key"]).items():
                offset, size = sample["members"][suffix]
                assert data[offset : offset + size] == value


def test_the_index_has_the_moments_of_all_frames_and_the_rejected_clips(whole):
    index = json.loads((whole / "index.json").read_text())
    motion = torch.cat([load(members(key)["safetensors"])["motion"] for key in KEYS if key != "clip_4"]).double()
    torch.testing.assert_close(torch.tensor(index["motion_mean"]), motion.mean(0), check_dtype=False)
    torch.testing.assert_close(torch.tensor(index["motion_std"]), motion.std(0), check_dtype=False)
    assert index["rejected"] == {"face": 1} and index["split"] == "train"
    line = {"key": "clip_4", "source": "a/4.mp4", "stage": "face", "reason": "no face"}
    assert [json.loads(x) for x in (whole / "quarantine.jsonl").read_text().splitlines()] == [line]


@pytest.mark.parametrize("kept", [["clip_2"], KEYS[:3], KEYS[:5], KEYS])
def test_interrupted_preparation_resumes_to_the_same_bytes(whole, tmp_path, kept):
    write(make(tmp_path), kept, stop_before_packing=True)
    writer = make(tmp_path)
    for name in ("clip_9.part", ".shard"):
        (writer.work(0) / name).write_bytes(b"half")
    assert [k for shard in writer.shards for k in writer.missing(shard)] == [k for k in KEYS if k not in kept]
    write(writer)
    writer.finish(ABOUT)
    assert contents(tmp_path) == contents(whole)


def test_a_folder_cannot_be_continued_with_other_settings(whole):
    with pytest.raises(UserError, match=r"started with stages\.decode\.max_side=3, not 4"):
        make(whole, plan={"stages": {"decode": {"max_side": 4}}})

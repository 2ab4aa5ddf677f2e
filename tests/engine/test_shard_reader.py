"""Reading samples from local and remote shards, and the errors of damaged ones."""

import json
import os
import pickle
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from shard_files import random_split

from engine.errors import UserError
from engine.shards import source
from engine.shards.reader import Reading, ShardSplit
from tests.waiting import wait_until

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_split(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture
def copy(tmp_path):
    return random_split(tmp_path / "train")


@pytest.fixture
def server(file_server, folder, monkeypatch):
    monkeypatch.setattr(source, "RETRY_DELAY", 0.01)
    file_server.add(folder, "/train")
    return file_server


def requested(server):
    """Return the names of the files that were requested for."""
    return [path.rpartition("/")[2] for path, _ in server.requests]


def check_all(split, order=range(COUNT)):
    assert len(split) == COUNT and split.sizes == [5, 5, 5, 5, 3]
    for i in order:
        info, tensors = split[i]
        assert info["key"] == f"k{i:02d}" and int(tensors["label"]) == i and float(tensors["x"][0, 0]) == i
        assert tensors["x"].shape == (split.frames[i], 3) and tensors["x"].dtype == torch.float16


def test_samples_are_read_at_random(folder):
    split = ShardSplit(folder)
    check_all(split, [22, 0, 7, 4, 5])
    info, tensors = split.read(9, ["label", "no such tensor"])
    assert info["text"] == "text 9" and list(tensors) == ["label"]
    with pytest.raises(IndexError):
        split[COUNT]


def test_few_shards_are_open_at_once(copy, monkeypatch):
    monkeypatch.setattr("engine.shards.reader.OPEN_SHARDS", 2)
    split = ShardSplit(copy)
    check_all(split)
    opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert sorted(Path(file).name for file in opened if file.endswith(".tar")) == ["000003.tar", "000004.tar"]
    check_all(split)


def _sum(split, indices):
    return [float(split[i][1]["x"].float().sum()) for i in indices]


def zeros(folder, name):
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def replace(folder, name, old, new):
    (folder / name).write_text((folder / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: os.truncate(folder / "000001.tar", 5000), "000001.tar .* 5,000 bytes"),
        (lambda folder: zeros(folder, "000001.tar"), "000001.tar .*checksum"),
        (lambda folder: (folder / "000002.json").unlink(), "000002.json"),
        (lambda folder: replace(folder, "000002.json", '"crc32": ', '"crc32": 1'), "this index"),
        (lambda folder: replace(folder, "000001.json", '"tensors": [', '"tensors": ["z", '), ".k05 has no z"),
        (lambda folder: replace(folder, "index.json", '"version": 2', '"version": 1'), "supports 2"),
        (lambda folder: (folder / "index.json").unlink(), "prepare_data.py"),
    ],
)
def test_a_damaged_file_is_named(copy, harm, message):
    harm(copy)
    with pytest.raises(UserError, match=message):
        ShardSplit(copy).read(5)


def test_damage_after_the_first_reading_is_found_and_does_not_affect_other_shards(copy):
    check_all(ShardSplit(copy))
    zeros(copy, "000001.tar")
    ShardSplit(copy).read(4)
    for verify in (True, False):
        with pytest.raises(UserError, match=r"000001.tar"):
            ShardSplit(copy, Reading(verify=verify))[5]


# --- remote ---


def remote(server, tmp_path, **reading):
    return ShardSplit(f"{server.address}/train", Reading(cache=str(tmp_path / "cache"), **reading))


def test_remote_shards_are_downloaded_once_on_first_use(server, tmp_path):
    split = remote(server, tmp_path)
    assert not any(name.endswith(".tar") for name in requested(server))
    split[0], split[3]
    assert [name for name in requested(server) if name.endswith(".tar")] == ["000000.tar"]
    check_all(split)
    server.requests.clear()
    check_all(remote(server, tmp_path))  # a second process
    assert requested(server) == ["index.json"]


def test_a_remote_shard_with_another_checksum_is_refused(server, tmp_path):
    whole = server.files["/train/000004.tar"]
    server.files["/train/000004.tar"] = whole[:600] + b"?" + whole[601:]
    split = remote(server, tmp_path)
    with pytest.raises(UserError, match=r"000004.tar .*checksum"):
        split[22]
    server.files["/train/000004.tar"] = whole
    check_all(split)


def test_missing_files_and_servers_are_named(server, tmp_path):
    for address in (server.address, "http://127.0.0.1:9"):  # nobody is there
        with pytest.raises(UserError, match=address):
            ShardSplit(f"{address}/elsewhere", Reading(cache=str(tmp_path)))


def test_the_cache_stays_below_its_limit(server, folder, tmp_path):
    size = (folder / "000000.tar").stat().st_size
    for sample in (0, 5, 0, 10):  # of the first shard, the second, the first again, the third
        split = remote(server, tmp_path, cache_gb=2.5 * size / 1e9)
        split[sample]
        time.sleep(0.02)
    kept = {path.name for path in (tmp_path / "cache").glob("*/*.tar")}
    assert kept == {"000000.tar", "000002.tar"}  # the least recently used one was deleted
    check_all(split)  # what is deleted while open is still read, and the rest comes again
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar")) <= 2.5 * size
    with pytest.raises(UserError, match="too small"):
        remote(server, tmp_path, cache_gb=1.5 * size / 1e9)


def test_prefetched_shards_are_downloaded_in_the_background(server, tmp_path):
    split = pickle.loads(pickle.dumps(remote(server, tmp_path)))
    split.prefetch([(5, 10), (15, 20)])
    wait_until(lambda: len(list((tmp_path / "cache").glob("*/*.tar"))) == 2, 10)
    server.requests.clear()
    assert int(split[7][1]["label"]) == 7 and int(split[16][1]["label"]) == 16 and requested(server) == []


def test_several_processes_download_a_shard_once(server, tmp_path):
    split = remote(server, tmp_path)
    with get_context("fork").Pool(3) as pool:
        pool.starmap(_sum, [(split, range(COUNT))] * 3)
    tars = [name for name in requested(server) if name.endswith(".tar")]
    assert sorted(tars) == [f"{i:06d}.tar" for i in range(5)]


def test_other_url_schemes_use_fsspec_and_are_retried(folder, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/flaky/train", recursive=True)
    monkeypatch.setattr(source, "RETRY_DELAY", 0.001)
    plain = fsspec.open
    calls = []

    def flaky(url, mode):
        calls.append(url)
        if calls.count(url) < 3:
            raise RuntimeError("503 SlowDown")  # stores' own classes are no OSError
        return plain(url, mode)

    monkeypatch.setattr(fsspec, "open", flaky)
    check_all(ShardSplit("memory://flaky/train", Reading(cache=str(tmp_path))))
    monkeypatch.setattr(fsspec, "open", lambda url, mode: (_ for _ in ()).throw(RuntimeError("403 Forbidden")))
    with pytest.raises(UserError, match="403 Forbidden"):
        ShardSplit("memory://flaky/other", Reading(cache=str(tmp_path)))


def test_a_file_in_a_store_that_is_larger_than_stated_is_refused(folder, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.put(str(folder), "/large/train", recursive=True)
    memory.pipe("/large/train/000000.tar", bytes(2**20))
    with pytest.raises(UserError, match=r"000000\.tar has more"):
        ShardSplit("memory://large/train", Reading(cache=str(tmp_path)))[0]


def test_webdataset_reads_the_shards(folder):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(f"{folder}/{{000000..000004}}.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"k{i:02d}" for i in range(COUNT)]
    for (info, tensors), sample in zip(ShardSplit(folder), samples):
        assert json.loads(sample["json"])["text"] == info["text"]
        theirs = load(sample["safetensors"])
        assert theirs.keys() == tensors.keys() and all(theirs[name].equal(tensors[name]) for name in theirs)

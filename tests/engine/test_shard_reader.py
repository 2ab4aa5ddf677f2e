"""Samples come out of local and remote shards as they went in, and damage is one line that names the shard."""

import http.server
import os
import pickle
import threading
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from shard_files import random_split

from engine.errors import UserError
from engine.shards import source
from engine.shards.reader import Reading, ShardSplit

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_split(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture
def copy(tmp_path):
    return random_split(tmp_path / "train")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Counts what is asked for; `truncate` names a file of which only half comes, as often as its value says."""

    asked: list[str]
    truncate: dict[str, int]

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.asked.append(name)
        if self.truncate.get(name, 0) > 0:
            self.truncate[name] -= 1
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    """(URL of the split, handler class)."""
    monkeypatch.setattr(source, "RETRY_DELAY", 0.01)
    handler = type("Counting", (Handler,), {"asked": [], "truncate": {}})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder.parent)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/train", handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def check_all(split, order=range(COUNT)):
    assert len(split) == COUNT and split.sizes == [5, 5, 5, 5, 3]
    for i in order:
        info, tensors = split[i]
        assert info["key"] == f"k{i:02d}" and int(tensors["label"]) == i and float(tensors["x"][0, 0]) == i
        assert tensors["x"].shape == (split.frames[i], 3) and tensors["x"].dtype == torch.float16


def test_any_sample_is_read_where_it_lies(folder):
    split = ShardSplit(folder)
    check_all(split, [22, 0, 7, 4, 5])
    info, tensors = split.read(9, ["label", "no such tensor"])
    assert info["text"] == "text 9" and list(tensors) == ["label"]
    with pytest.raises(IndexError):
        split[COUNT]


def test_partial_reading_agrees_with_safetensors(folder):
    split = ShardSplit(folder)
    for i in (0, 11, 22):
        at, size = split._places[i, 1].tolist()
        data = (folder / f"{i // 5:06d}.tar").read_bytes()[at : at + size]
        ours, theirs = split[i][1], load(data)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _sum(split, indices):
    return [float(split[i][1]["x"].float().sum()) for i in indices]


def test_worker_processes_read_what_the_first_one_does(folder):
    split = ShardSplit(folder)
    expected = _sum(split, range(COUNT))  # opens every shard before the processes begin
    with get_context("fork").Pool(2) as pool:
        assert pool.starmap(_sum, [(split, range(12)), (split, range(12, COUNT))]) == [expected[:12], expected[12:]]
    assert _sum(pickle.loads(pickle.dumps(split)), range(COUNT)) == expected  # as a spawned process gets it


def test_few_files_stay_open(folder, monkeypatch):
    monkeypatch.setattr("engine.shards.reader.OPEN_SHARDS", 2)
    split = ShardSplit(folder)
    check_all(split)
    check_all(split)
    assert len(split._handles) == 2


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "000001.tar is missing"),
        (lambda path: os.truncate(path, 5000), r"000001.tar is damaged: 5,000 bytes instead of"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "000001.tar is damaged .its checksum"),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_a_bad_shard_is_one_line_with_its_name(copy, harm, message):
    harm(copy / "000001.tar")
    split = ShardSplit(copy)
    split[4]
    with pytest.raises(UserError, match=message):
        split[5]


def test_damage_shows_without_checksums_too(copy):
    path = copy / "000001.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"000001.tar is damaged"):
        ShardSplit(copy, Reading(verify=False))[5]


def test_bad_listings_are_one_line(copy, tmp_path):
    with pytest.raises(UserError, match=r"no prepared shards in .*prepare_data.py"):
        ShardSplit(tmp_path)
    sidecar = (copy / "000002.json").read_text()
    (copy / "000002.json").write_text(sidecar[:40])
    with pytest.raises(UserError, match=r"000002.json cannot be read"):
        ShardSplit(copy)
    (copy / "000002.json").write_text(sidecar.replace('"crc32": ', '"crc32": 1'))
    with pytest.raises(UserError, match=r"000002.json does not belong to this index"):
        ShardSplit(copy)
    (copy / "000002.json").unlink()
    with pytest.raises(UserError, match=r"000002.json cannot be read: No such file"):
        ShardSplit(copy)
    index = (copy / "index.json").read_text()
    (copy / "index.json").write_text(index.replace('"version": 2', '"version": 1'))
    with pytest.raises(UserError, match="shards of version 1, this program reads 2: prepare them again"):
        ShardSplit(copy)


# --- remote ---


def remote(server, tmp_path, **reading):
    return ShardSplit(server[0], Reading(cache=str(tmp_path / "cache"), **reading))


def test_remote_shards_are_fetched_once_and_when_needed(server, tmp_path):
    split = remote(server, tmp_path)
    assert not any(name.endswith(".tar") for name in server[1].asked)
    split[0], split[3]
    assert [name for name in server[1].asked if name.endswith(".tar")] == ["000000.tar"]
    check_all(split)
    server[1].asked.clear()
    check_all(remote(server, tmp_path))  # a second process
    assert server[1].asked == ["index.json"]


def test_a_truncated_answer_is_asked_for_again_and_named_when_it_stays_so(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    split = remote(server, tmp_path)
    server[1].truncate["000000.tar"] = 2
    split[0]
    server[1].truncate["000003.tar"] = 1000
    with pytest.raises(UserError, match=r"train/000003.tar could not be fetched: .*did not arrive whole"):
        split[15]
    assert not list((tmp_path / "cache").glob("*/000003.tar"))
    server[1].truncate.clear()
    check_all(split)


def test_a_changed_shard_behind_the_url_is_refused(server, folder, tmp_path):
    path = folder / "000004.tar"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:600] + b"?" + data[601:])
        split = remote(server, tmp_path)
        with pytest.raises(
            UserError, match=r"shard http.*000004.tar is damaged: checksum mismatch after two downloads"
        ):
            split[22]
    finally:
        path.write_bytes(data)
    check_all(split)


def test_missing_files_and_servers_are_one_line(server, tmp_path):
    url = server[0].replace("train", "elsewhere")
    with pytest.raises(UserError, match=r"elsewhere/index.json could not be fetched.* answered 404"):
        ShardSplit(url, Reading(cache=str(tmp_path)))
    with pytest.raises(UserError, match="cannot be reached"):
        ShardSplit("http://127.0.0.1:9/train", Reading(cache=str(tmp_path)))
    with pytest.raises(UserError, match=r"nonsense://x/index.json could not be fetched"):
        ShardSplit("nonsense://x", Reading(cache=str(tmp_path)))


def test_the_cache_keeps_its_limit(server, folder, tmp_path):
    size = (folder / "000000.tar").stat().st_size
    split = remote(server, tmp_path, cache_gb=2.5 * size / 1e9)
    for i in range(0, COUNT, 5):
        split[i]
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar")) <= 2.5 * size
        time.sleep(0.02)
    kept = {path.name for path in (tmp_path / "cache").glob("*/*.tar")}
    assert "000004.tar" in kept and "000000.tar" not in kept
    check_all(split)  # what was deleted while open is still read, and the rest comes again
    with pytest.raises(UserError, match=r"shard cache of .* GB is too small"):
        remote(server, tmp_path, cache_gb=1.5 * size / 1e9)


def test_coming_shards_are_fetched_in_the_background(server, tmp_path):
    split = pickle.loads(pickle.dumps(remote(server, tmp_path)))
    split.prefetch([(5, 10), (15, 20)])
    until = time.monotonic() + 10
    while len(list((tmp_path / "cache").glob("*/*.tar"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    server[1].asked.clear()
    assert int(split[7][1]["label"]) == 7 and int(split[16][1]["label"]) == 16 and server[1].asked == []


def test_several_processes_fetch_a_shard_once(server, tmp_path):
    split = remote(server, tmp_path)
    with get_context("fork").Pool(3) as pool:
        pool.starmap(_sum, [(split, range(COUNT))] * 3)
    tars = [name for name in server[1].asked if name.endswith(".tar")]
    assert sorted(tars) == [f"{i:06d}.tar" for i in range(5)]


def test_other_schemes_come_through_fsspec(folder, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/there/train", recursive=True)
    check_all(ShardSplit("memory://there/train", Reading(cache=str(tmp_path))))


def test_a_store_that_fails_now_and_then_is_asked_again(folder, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/flaky/train", recursive=True)
    monkeypatch.setattr(source, "RETRY_DELAY", 0.001)
    plain, calls = fsspec.open, []

    def flaky(url, mode):
        calls.append(url)
        if calls.count(url) < 3:
            raise RuntimeError("503 SlowDown")  # stores' own classes are no OSError
        return plain(url, mode)

    monkeypatch.setattr(fsspec, "open", flaky)
    check_all(ShardSplit("memory://flaky/train", Reading(cache=str(tmp_path))))
    monkeypatch.setattr(fsspec, "open", lambda url, mode: (_ for _ in ()).throw(RuntimeError("403 Forbidden")))
    with pytest.raises(UserError, match="could not be fetched: 403 Forbidden"):
        ShardSplit("memory://flaky/other", Reading(cache=str(tmp_path)))


def test_a_store_without_its_package_names_the_extra(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(fsspec, "open", lambda url, mode: (_ for _ in ()).throw(ImportError("Install s3fs")))
    with pytest.raises(UserError, match=r"Install s3fs; `bash scripts/setup.sh remote`"):
        ShardSplit("s3://bucket/train", Reading(cache=str(tmp_path)))


def test_all_processes_of_a_machine_verify_a_shard_once(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    counted, plain = tmp_path / "reads", source.checksum

    def counting(path):
        with counted.open("a") as file:
            file.write(f"{path.name}\n")
        return plain(path)

    monkeypatch.setattr(source, "checksum", counting)
    split = ShardSplit(copy)
    with get_context("fork").Pool(4) as pool:
        pool.starmap(_sum, [(split, range(COUNT))] * 4)
    check_all(ShardSplit(copy))
    assert sorted(counted.read_text().split()) == [f"{i:06d}.tar" for i in range(5)]
    path = copy / "000002.tar"
    path.write_bytes(bytes(path.stat().st_size))  # written again: verified again
    with pytest.raises(UserError, match=r"000002.tar is damaged .its checksum"):
        ShardSplit(copy)[12]

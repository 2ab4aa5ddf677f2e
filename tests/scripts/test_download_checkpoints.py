"""Downloads against a local server that truncates, corrupts, refuses, and forgets what a range is."""

import hashlib
import re

import numpy as np
import pytest
from huggingface_hub import constants

from engine.download import DamagedError, RemoteFile, fetch
from engine.errors import UserError, run_cli
from scripts import download_checkpoints
from scripts.download_checkpoints import process, read_catalogue

DATA = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(file_server):
    file_server.files["/w"] = DATA
    return file_server


def remote(server, size=300_000, sha256=SHA, path="sub/weights.bin", url="/w"):
    return RemoteFile(path, server.address + url, size, sha256)


def bring(file, folder):
    """Fetch, and return what is in the file."""
    assert fetch(file, folder, retry_delay=0.001) is True
    return (folder / file.path).read_bytes()


def test_file_is_fetched_once(server, tmp_path):
    assert bring(remote(server), tmp_path) == DATA
    assert fetch(remote(server), tmp_path) is False
    assert len(server.requests) == 1


@pytest.mark.parametrize("known", [True, False])
def test_truncated_download_is_resumed(server, tmp_path, known, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.faults["/w"] += ["truncate", "503"]
    file = remote(server) if known else remote(server, None, None)
    assert bring(file, tmp_path) == DATA
    starts = [wanted for _, wanted in server.requests]
    assert starts[0] is None and set(starts[1:]) == {"bytes=100000-"}


LEFTOVERS = {
    "a good beginning": (DATA[:1234], []),
    "a good beginning, but no ranges": (DATA[:1234], ["ignore_range"]),
    "too long": (b"x" * 500_000, []),
}


@pytest.mark.parametrize(("leftover", "faults"), LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_leftover_of_a_stopped_download_is_resumed_or_replaced(server, tmp_path, leftover, faults):
    part = tmp_path / ".partial" / "sub-weights.bin.part"
    part.parent.mkdir()
    part.write_bytes(leftover)
    server.faults["/w"] += faults
    assert bring(remote(server), tmp_path) == DATA
    assert len(leftover) != 1234 or server.requests[0][1] == "bytes=1234-"


def test_damaged_file_is_replaced_only_by_a_good_one(server, tmp_path):
    file = remote(server)
    target = tmp_path / file.path
    target.parent.mkdir()
    target.write_bytes(b"old")
    server.faults["/w"] += ["corrupt"]
    with pytest.raises(DamagedError, match="SHA-256"):
        fetch(file, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [target] and target.read_bytes() == b"old"
    assert bring(file, tmp_path) == DATA


@pytest.mark.parametrize(("url", "line"), [("/absent", "404"), ("/page", "web page")])
def test_missing_files_and_sign_in_pages_are_refused(server, tmp_path, url, line):
    server.files["/page"] = b"\n<!DOCTYPE html><html>Sign in</html>"
    with pytest.raises(UserError, match=line):
        fetch(remote(server, None, None, "a.pth", url), tmp_path, retry_delay=0.001)


def test_missing_network_is_one_line_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    catalogue = tmp_path / "list.yaml"
    catalogue.write_text("a: [{what: A, licence: MIT, origin: x, files: [{path: w, url: 'http://127.0.0.1:9/w'}]}]")
    arguments = ["download_checkpoints.py", "a", "--catalogue", str(catalogue), "--to", str(tmp_path / "to")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        run_cli(download_checkpoints.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: http://127.0.0.1:9 ")
    assert error.count("\n") == 1 and not [path for path in (tmp_path / "to").rglob("*") if path.is_file()]


@pytest.fixture
def checkpoints(server):
    files = (remote(server), RemoteFile("b", f"{server.address}/absent"), remote(server, path="c.bin"))
    return [{"what": "Something", "licence": "MIT", "origin": "https://example.org", "files": files}]


def test_the_command_continues_after_a_failed_download(checkpoints, tmp_path, capsys):
    with pytest.raises(UserError, match="1 of 3 files"):
        process(checkpoints, tmp_path, False, retry_delay=0.001)
    out, err = capsys.readouterr()
    assert "licence: MIT" in out and out.count("fetched:") == 2 and "https://example.org" in out
    assert "failed: b:" in err
    assert (tmp_path / "c.bin").read_bytes() == DATA


def test_listing_states_presence_size_and_source(checkpoints, server, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/weights.bin").write_bytes(DATA)
    (tmp_path / "c.bin").write_bytes(DATA[:-1])
    process(checkpoints, tmp_path, True)
    text = capsys.readouterr().out
    assert all(re.search(row, text) for row in (r"present +sub/weights.bin", r"missing +b", r"damaged +c.bin"))
    assert "licence: MIT" in text and not server.requests


def test_all_groups_are_named_by_the_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["download_checkpoints.py", "--help"])
    with pytest.raises(SystemExit):
        download_checkpoints.main()
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert set(read_catalogue()) <= words


def test_catalogue_has_unique_paths_licences_digests_and_commits():
    everything = [row for rows in read_catalogue().values() for row in rows]
    paths = [file.path for checkpoint in everything for file in checkpoint["files"]]
    assert len(paths) == len(set(paths)) and not any(".." in path for path in paths)
    for checkpoint in everything:
        assert checkpoint["licence"] and checkpoint["origin"].startswith("https://")
        for file in checkpoint["files"]:
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert file.url.startswith("https://")

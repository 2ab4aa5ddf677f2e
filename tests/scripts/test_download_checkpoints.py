"""Downloads against a local server that truncates, corrupts, refuses, and forgets what a range is."""

import hashlib
import io
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from engine import download
from engine.download import DamagedError, HubFile, NoNetworkError, RemoteFile, check, fetch
from engine.errors import UserError, run_cli
from scripts import download_checkpoints
from scripts.download_checkpoints import Checkpoint, listing, read_catalogue

DATA = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA = hashlib.sha256(DATA).hexdigest()


@dataclass
class Server:
    """Files by path; `faults` are used up, one an answer: truncate, corrupt, html, 503, ignore_range."""

    address: str = ""
    files: dict = field(default_factory=dict)
    faults: list = field(default_factory=list)
    requests: list = field(default_factory=list)


@pytest.fixture
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            data = state.files.get(self.path)
            if data is None:
                self.send_error(404, "Not Found")
                return
            wanted = self.headers.get("Range")
            if with_body:
                state.requests.append((self.path, wanted))
            fault = state.faults.pop(0) if with_body and state.faults else ""
            if fault == "503":
                self.send_error(503, "Busy")
                return
            start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and fault != "ignore_range" else 0
            if start >= len(data) > 0:
                self.send_error(416, "Range Not Satisfiable")
                return
            body = data[start:]
            if fault == "corrupt":
                body = bytes([body[0] ^ 1]) + body[1:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", "text/html" if fault == "html" else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 3] if fault == "truncate" else body)
                self.close_connection = True

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()


def remote(server, size=300_000, sha256=SHA, path="sub/weights.bin"):
    server.files.setdefault("/w", DATA)
    return RemoteFile(path, f"{server.address}/w", size, sha256)


def test_a_file_is_fetched_once(server, tmp_path):
    file = remote(server)
    assert fetch(file, tmp_path) is True
    assert (tmp_path / "sub/weights.bin").read_bytes() == DATA
    assert fetch(file, tmp_path) is False
    assert len(server.requests) == 1


@pytest.mark.parametrize("known", [True, False])
def test_truncated_answers_are_gone_on_with(server, tmp_path, known):
    server.faults += ["truncate", "truncate", "503"]
    file = remote(server) if known else remote(server, None, None)
    fetch(file, tmp_path, retry_delay=0.001)
    assert (tmp_path / "sub/weights.bin").read_bytes() == DATA
    starts = [wanted for _, wanted in server.requests]
    assert starts[0] is None and starts[1] == "bytes=100000-"
    assert starts[2] == starts[3] == f"bytes={100_000 + 200_000 // 3}-"  # the 503 brought nothing


def test_a_stopped_download_goes_on_and_a_server_without_ranges_starts_anew(server, tmp_path):
    part = tmp_path / ".partial" / "sub-weights.bin.part"
    for faults in ([], ["ignore_range"]):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(DATA[:1234])
        server.faults += faults
        fetch(remote(server), tmp_path)
        assert server.requests[-1][1] == "bytes=1234-"
        assert (tmp_path / "sub/weights.bin").read_bytes() == DATA
        (tmp_path / "sub/weights.bin").unlink()


def test_leftovers_of_another_file_do_not_end_up_in_this_one(server, tmp_path):
    part = tmp_path / ".partial" / "sub-weights.bin.part"
    part.parent.mkdir()
    for leftover in (b"x" * 500_000, b"x" * len(DATA), b"x" * 70):
        part.write_bytes(leftover)
        fetch(remote(server), tmp_path, retry_delay=0.001)
        assert (tmp_path / "sub/weights.bin").read_bytes() == DATA
        (tmp_path / "sub/weights.bin").unlink()
    part.write_bytes(b"x" * 500_000)  # longer than the file, whose size nobody told: the server refuses the range
    fetch(remote(server, None, SHA), tmp_path, retry_delay=0.001)
    assert (tmp_path / "sub/weights.bin").read_bytes() == DATA


def test_one_corrupted_answer_is_mended_and_two_are_reported(server, tmp_path):
    server.faults += ["corrupt"]
    fetch(remote(server), tmp_path)
    assert (tmp_path / "sub/weights.bin").read_bytes() == DATA
    (tmp_path / "sub/weights.bin").unlink()
    server.faults += ["corrupt", "corrupt"]
    with pytest.raises(DamagedError, match=r"verification failed after two downloads.*SHA-256"):
        fetch(remote(server), tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_damaged_file_is_replaced_only_by_a_good_one(server, tmp_path):
    file = remote(server)
    target = tmp_path / file.path
    target.parent.mkdir()
    target.write_bytes(b"old")
    server.faults += ["corrupt", "corrupt"]
    with pytest.raises(DamagedError):
        fetch(file, tmp_path)
    assert target.read_bytes() == b"old"
    fetch(file, tmp_path)
    assert target.read_bytes() == DATA


def test_refusals_are_one_line(server, tmp_path):
    file = RemoteFile("a", f"{server.address}/absent")
    with pytest.raises(UserError, match="answered 404"):
        fetch(file, tmp_path)
    server.faults += ["html"]
    with pytest.raises(UserError, match="web page"):
        fetch(remote(server), tmp_path)
    server.faults += ["503"] * 9
    with pytest.raises(UserError, match=r"did not arrive whole \(it answered 503"):
        fetch(remote(server), tmp_path, retry_delay=0.001)
    server.faults.clear()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fetch(remote(server, path="file/x"), tmp_path)


def test_no_network_is_one_line_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.constants, "ENDPOINT", "http://127.0.0.1:9")
    for source in ("http://127.0.0.1:9/w", HubFile("a/b", "c")):
        with pytest.raises(NoNetworkError, match="cannot be reached"):
            fetch(RemoteFile("w", source), tmp_path, retry_delay=0.001)
    monkeypatch.setattr("sys.argv", ["download_checkpoints.py", "talker_t2av", "--to", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run_cli(download_checkpoints.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: http://127.0.0.1:9 cannot be reached")
    assert error.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.fixture
def hub(server):
    download.check_reachable.cache_clear()
    server.files["/owner/repo/resolve/rev/folder/w.bin"] = DATA
    return HubFile("owner/repo", "folder/w.bin", "rev")


def test_hub_files_are_verified_too(server, hub, tmp_path):
    file = RemoteFile("here/w.bin", hub, len(DATA), SHA)
    assert fetch(file, tmp_path, server.address) is True
    assert (tmp_path / "here/w.bin").read_bytes() == DATA
    assert fetch(file, tmp_path, server.address) is False
    (tmp_path / "here/w.bin").unlink()
    server.faults += ["corrupt"]
    assert fetch(file, tmp_path, server.address) is True
    (tmp_path / "here/w.bin").unlink()
    server.faults += ["corrupt", "corrupt"]
    with pytest.raises(DamagedError, match="owner/repo"):
        fetch(file, tmp_path, server.address)
    server.faults += ["truncate"]
    try:
        fetch(file, tmp_path, server.address)
    except UserError as error:
        assert "run the command again" in str(error)
        fetch(file, tmp_path, server.address)
    assert (tmp_path / "here/w.bin").read_bytes() == DATA
    with pytest.raises(UserError, match=r"the hub does not give.*404"):
        fetch(RemoteFile("x", HubFile("owner/repo", "absent", "rev")), tmp_path, server.address)


def test_without_a_digest_the_format_itself_must_be_whole(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    whole = {
        "a.safetensors": save({"a": np.zeros(5, np.float32)}),
        "a.pth": buffer.getvalue(),
        "a.json": b'{"a": 1}',
    }
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
        check(tmp_path / name, RemoteFile(name, ""))
        (tmp_path / name).write_bytes(data[:-1])
        with pytest.raises(DamagedError, match="not a whole"):
            check(tmp_path / name, RemoteFile(name, ""))
    (tmp_path / "a.safetensors").write_bytes(b"<html>")
    with pytest.raises(DamagedError):
        check(tmp_path / "a.safetensors", RemoteFile("a.safetensors", ""))


@pytest.fixture
def checkpoints(server):
    files = (remote(server), RemoteFile("b", f"{server.address}/absent"), remote(server, path="c.bin"))
    return (Checkpoint("Something", "MIT", "https://example.org", files),)


def test_the_command_goes_on_past_a_file_that_cannot_be_downloaded(checkpoints, tmp_path, capsys):
    with pytest.raises(UserError, match="1 of 3 files could not be downloaded: b"):
        download_checkpoints.download(checkpoints, tmp_path, retry_delay=0.001)
    out, err = capsys.readouterr()
    assert "licence: MIT" in out and out.count("fetched:") == 2
    assert "failed: b:" in err and "https://example.org" in err
    assert (tmp_path / "c.bin").read_bytes() == DATA


def test_the_listing_says_what_is_here(checkpoints, server, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/weights.bin").write_bytes(DATA)
    (tmp_path / "c.bin").write_bytes(DATA[:-1])
    text = "\n".join(listing(checkpoints, tmp_path))
    assert re.search(r"present +sub/weights.bin \(0.3 MB, SHA-256 known\)", text)
    assert re.search(r"missing +b \(size unknown, no SHA-256 known\)", text)
    rounded = Checkpoint("c", "MIT", "o", (RemoteFile("c", "https://h/c", about=170_000_000),))
    assert "c (about 170 MB, no SHA-256 known)" in "\n".join(listing((rounded,), tmp_path))
    assert re.search(r"damaged +c.bin", text)
    assert "licence: MIT" in text and f"from {server.address}/absent" in text
    assert not server.requests


def test_the_catalogue_is_sound():
    everything = sum(read_catalogue().values(), ())
    paths = [file.path for checkpoint in everything for file in checkpoint.files]
    assert len(paths) == len(set(paths)) and len(everything) == 18
    for checkpoint in everything:
        assert checkpoint.licence and checkpoint.origin.startswith("https://")
        for file in checkpoint.files:
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert isinstance(file.source, HubFile) or file.source.startswith("https://")
            if isinstance(file.source, HubFile) and file.source.revision:
                assert re.fullmatch(r"[0-9a-f]{40}", file.source.revision)
    assert json.dumps(paths).count("..") == 0

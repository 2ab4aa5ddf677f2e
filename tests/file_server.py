"""A web server of files on this machine that truncates, corrupts and refuses as it is told."""

import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class FileServer(ThreadingHTTPServer):
    """Serves `files` by their path and notes `requests` of their content as (path, Range).

    faults: by path what happens to the next answers, one each: truncate, corrupt, 503, ignore_range.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def add(self, folder: Path, place: str = "") -> str:
        """Serve the files of a folder below `place`, as they are now; return its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[f"{place}/{path.relative_to(folder)}"] = path.read_bytes()
        return self.address + place


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        data = self.server.files.get(self.path)
        part = self.headers.get("Range")
        if data is None:
            return self.send_error(404, "Not Found")
        faults = self.server.faults[self.path]
        fault = ""
        if with_body:
            self.server.requests.append((self.path, part))
            fault = faults.pop(0) if faults else ""
        if fault == "503":
            return self.send_error(503, "Busy")
        start = int(re.match(r"bytes=(\d+)-", part)[1]) if part and fault != "ignore_range" else 0
        if start >= len(data) > 0:
            return self.send_error(416, "Range Not Satisfiable")
        body = data[start:]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 3] if fault == "truncate" else body)
            self.close_connection = True


@pytest.fixture
def file_server():
    with FileServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()

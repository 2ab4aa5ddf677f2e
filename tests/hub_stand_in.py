"""A stand-in of the Hugging Face hub on this machine: repositories are created, committed to, listed and fetched.

Every file of a commit comes within it, where the hub takes large ones at another address.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from engine import hub
from engine.download import check_reachable

COMMIT = "1" * 40


def use_endpoint(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def forget():
    hub._snapshot.cache_clear()
    check_reachable.cache_clear()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    forget()
    yield tmp_path / "cache"
    forget()


class Handler(BaseHTTPRequestHandler):
    """Answers as far as the client needs it. `server.repositories`: by OWNER/NAME the files, by path."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        repositories, data = self.server.repositories, None
        if fetched := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            data = repositories.get(fetched[1], {}).get(fetched[2])
        elif about := re.fullmatch(r"/api/models/([^/]+/[^/?]+)([/?].*)?", self.path):
            files = repositories.get(about[1])
            if files is not None and "/tree/" in self.path:
                tree = [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()]
                data = json.dumps(tree).encode()
            elif files is not None:
                data = json.dumps({"id": about[1], "sha": COMMIT, "siblings": []}).encode()
        self.answer(data, body)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories.setdefault(name, {})
            found = {"url": f"{constants.ENDPOINT}/{name}", "id": name}
        elif self.path == "/api/validate-yaml":
            found = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = json.loads(content)["files"]
            found = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        else:
            name = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main.*", self.path)[1]
            lines = [json.loads(line) for line in content.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            self.server.repositories[name] |= {path: base64.b64decode(text) for path, text in files.items()}
            url = f"{constants.ENDPOINT}/{name}/commit/{COMMIT}"
            found = {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
        self.answer(json.dumps(found).encode())

    def answer(self, data, body=True):
        self.send_response(200 if data is not None else 404)
        for name, value in {
            "Content-Length": len(data or b""),
            "Content-Type": "application/json",
            "ETag": f'"{hash(data)}"',
            "X-Repo-Commit": COMMIT,
            **({} if data is not None else {"X-Error-Code": "RepoNotFound"}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body and data:
            self.wfile.write(data)


@pytest.fixture
def stand_in_hub(monkeypatch, empty_cache):
    """Repositories of a stand-in hub, by OWNER/NAME; the client's cache is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories = {}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    yield server.repositories
    server.shutdown()
    server.server_close()

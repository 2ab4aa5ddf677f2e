"""The end of the web service: requests in work are finished or refused in a sentence, and later ones refused."""

import json
import signal
import socket
import sys
import threading
import time

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")

from websockets.sync.client import connect

from engine.errors import UserError
from scripts import serve
from service.limits import ServeLimits
from service.server import Server
from service.service import Service
from tests.forked import free_port
from tests.waiting import wait_until

SPEECH = {"model": "talker-t2av", "input": "Hi.", "voice": "anna", "response_format": "pcm"}
SECONDS = 0.8
LENGTH = {"min_seconds": SECONDS, "max_seconds": SECONDS}
LONG = {"min_seconds": 30.0, "max_seconds": 30.0}


@pytest.fixture
def start(models, monkeypatch):
    """Starts a server whose steps take 50 ms; returns it, its thread, and a client."""
    hicodit, talker, voice = models
    running = []

    def start(grace):
        service = Service(hicodit, talker, ServeLimits(rows=4, grace=grace), False, voice.parent)
        worker = service.workers["talker-t2av"]
        step = worker.step
        monkeypatch.setattr(worker, "step", lambda batch: (time.sleep(0.05), step(batch)))
        port = free_port()
        server = Server(service, "127.0.0.1", port)
        thread = threading.Thread(target=server.run)
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        running.append((server, thread, client))
        wait_until(lambda: server.started)
        return running[-1]

    yield start
    for server, thread, client in running:
        client.close()
        server.should_exit = server.force_exit = True
        thread.join(20)


def in_work(server):
    return len(server.service.workers["talker-t2av"].rows)


def asking(client, **more):
    """Ask for speech in a thread; return it, and the list that gets the answer."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/audio/speech", json=SPEECH | more)))
    thread.start()
    return thread, answers


def test_accepted_requests_are_finished_and_later_ones_refused(start, capfd):
    server, thread, client = start(grace=60.0)
    asked = [asking(client, **LENGTH), asking(client, **LENGTH, stream_format="audio")]
    wait_until(lambda: in_work(server) == 2)
    server.handle_exit(signal.SIGTERM, None)
    late = client.post("/v1/audio/speech", json=SPEECH)
    assert late.status_code == 503 and late.headers["retry-after"] == "1"
    for request, answers in asked:
        request.join(20)
        assert answers[0].status_code == 200
        assert len(np.frombuffer(answers[0].content, np.int16)) == SECONDS * 24_000
    thread.join(20)
    printed = capfd.readouterr()
    assert not thread.is_alive() and "Traceback" not in printed.out + printed.err


def test_requests_longer_than_the_grace_period_are_refused(start, capfd):
    server, thread, client = start(grace=0.0)
    request, answers = asking(client, **LONG)
    wait_until(lambda: in_work(server) == 1)
    with (
        pytest.raises(httpx.RemoteProtocolError, match="incomplete"),
        client.stream("POST", "/v1/audio/speech", json=SPEECH | LONG | {"stream_format": "audio"}) as stream,
    ):
        chunks = stream.iter_raw()
        next(chunks)
        server.handle_exit(signal.SIGTERM, None)
        list(chunks)
    request.join(20)
    thread.join(20)
    printed = capfd.readouterr()
    assert answers[0].status_code == 503
    assert not thread.is_alive() and "Traceback" not in printed.out + printed.err


def test_a_stream_whose_client_sends_nothing_does_not_keep_the_server(start, monkeypatch):
    monkeypatch.setattr("service.server.FLUSH", 0.2)
    server, thread, client = start(grace=0.0)
    address = str(client.base_url).replace("http", "ws", 1) + "/hicodit/stream"
    with connect(address) as stream:
        stream.send("{}")
        assert json.loads(stream.recv())["rate"] == 24_000
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()


def test_a_port_in_use_is_refused_before_a_model_is_loaded(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve.py", "--port", str(port)])
        with pytest.raises(UserError, match=f"port {port}: Address already in use"):
            serve.main()

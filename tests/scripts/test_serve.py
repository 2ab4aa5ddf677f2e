"""The web service with random tiny models: results as from the pipelines, one sentence for every error, limits."""

import asyncio
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi")
pytest.importorskip("websockets")
from drawn_faces import talking_head
from fastapi.testclient import TestClient

from engine.media.video import write_video
from service.admission import Service
from service.app import make_app
from service.limits import ServeLimits
from talker_t2av.pipeline import Job
from tests.waiting import wait_until

LENGTHS = {"max_seconds": 0.48, "min_seconds": 0.48}
JOB = {"mode": "tts", "text": "set red", **LENGTHS}


def service_of(models, demo=False, **limits):
    return Service(models[0], models[1], ServeLimits(rows=4, **limits), demo)


@pytest.fixture(scope="module")
def client(models):
    with TestClient(make_app(service_of(models, characters=50, megabytes=1)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def job(models):
    return JOB | {"voice": base64.b64encode(models[2].read_bytes()).decode()}


def sound(content):
    return soundfile.read(io.BytesIO(content))


def receive(socket):
    """Return the wave that comes after the first message, and the text that ends it."""
    assert socket.receive_json() == {"rate": 24_000, "format": "s16le"}
    pieces = []
    while "bytes" in (message := socket.receive()):
        pieces.append(np.frombuffer(message["bytes"], np.int16))
    return np.concatenate(pieces) / 32767, message["text"]


def test_health_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok", "models": ["hicodit", "talker_t2av"]}
    text = client.get("/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    names |= {line.split("{")[0].split()[0] for line in text.splitlines() if not line.startswith("#")}
    assert names >= {
        "requests_total", "request_seconds_sum", "running", "waiting", "requests_inside", "streams_open",
        "process_resident_memory_bytes",
    }  # fmt: skip
    assert 'requests_total{path="/health",status="200"}' in text and 'waiting{model="talker_t2av"} 0' in text


def test_speech_of_a_clip_is_the_pipelines(client, models, tmp_path):
    write_video(tmp_path / "head.mp4", talking_head(25), 25)
    content = (tmp_path / "head.mp4").read_bytes()
    answer = client.post("/hicodit?seed=3", content=content)
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
    wave, rate = sound(answer.content)
    assert rate == 24_000
    np.testing.assert_allclose(wave, models[0](tmp_path / "head.mp4", seed=3).wave, atol=1e-4)


def test_several_clients_at_once_get_what_each_gets_alone(client, models, job):
    settings = [{"seed": seed, "max_seconds": 0.48 + 0.16 * (seed % 3), "min_seconds": 0.48} for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda given: client.post("/talker", json=job | given), settings))
    for given, answer in zip(settings, answers):
        alone = models[1](Job("tts", "set red", str(models[2]), **given))
        np.testing.assert_allclose(sound(answer.content)[0], alone.wave, atol=2e-4)


def test_streams_give_the_same_sound(client, models, job):
    with client.websocket_connect("/talker/stream") as socket:
        socket.send_json(job | {"seed": 5})
        wave, end = receive(socket)
    assert '"done":true' in end.replace(" ", "")
    whole = sound(client.post("/talker", json=job | {"seed": 5}).content)[0]
    np.testing.assert_allclose(wave, whole, atol=2e-4)
    head = talking_head(25)
    with client.websocket_connect("/hicodit/stream") as socket:
        socket.send_json({"lookahead": 0.2, "seed": 1})
        for frame in head:
            socket.send_bytes(cv2.imencode(".png", frame[..., ::-1])[1].tobytes())
        socket.send_text("end")
        wave, _ = receive(socket)
    expected = np.concatenate([chunk.wave for chunk in models[0].stream(head, 1, lookahead=0.2)])
    np.testing.assert_allclose(wave, expected, atol=1e-4)


def test_the_parts_of_a_long_text_come_one_after_the_other(client, models, job, monkeypatch):
    monkeypatch.setattr(models[1], "sampling", replace(models[1].sampling, text_bytes=8))
    alone = models[1](Job("tts", "set red. set blue.", str(models[2]), **LENGTHS, seed=4))
    asked = job | {"text": "set red. set blue.", "seed": 4}
    whole = sound(client.post("/talker", json=asked).content)[0]
    np.testing.assert_allclose(whole, alone.wave, atol=2e-4)
    assert len(whole) > 2 * 0.48 * 24_000
    with client.websocket_connect("/talker/stream") as socket:
        socket.send_json(asked)
        np.testing.assert_allclose(receive(socket)[0], whole, atol=2e-4)


@pytest.mark.parametrize(
    ("method", "path", "given", "status", "message"),
    [
        ("post", "/talker", {"content": b"{"}, 400, "the body"),
        ("post", "/talker", {"content": b""}, 400, "empty"),
        ("post", "/talker", {"json": JOB | {"text": "x" * 51}}, 400, "51 characters"),
        ("post", "/talker", {"json": JOB | {"seed": -1}}, 400, "seed"),
        ("post", "/talker", {"json": JOB | {"voice": "***"}}, 400, "base64"),
        ("post", "/talker", {"json": JOB | {"voice": "AAAA"}}, 400, "voice"),
        ("post", "/talker", {"json": JOB | {"reference_audio": "/etc/passwd"}}, 400, "unknown setting"),
        ("post", "/talker", {"content": b"x" * 2**21}, 413, "1,048,576 bytes"),
        ("post", "/hicodit", {"content": b"no video"}, 400, "clip.mp4"),
        ("post", "/hicodit?face=all", {"content": b"no video"}, 400, "use /v1/videos"),
        ("post", "/hicodit?face=0", {"content": b"no video"}, 400, "face=0 is unknown"),
        ("get", "/talker", {}, 405, "Not Allowed"),
        ("get", "/nothing", {}, 404, "Not Found"),
    ],
)
def test_wrong_requests_get_one_sentence(client, method, path, given, status, message):
    answer = getattr(client, method)(path, **given)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and message in answer.json()["error"] and "\n" not in answer.json()["error"]
    assert "Traceback" not in answer.text and "/tmp" not in answer.text


@pytest.mark.parametrize(
    ("path", "messages", "error"),
    [
        ("/talker/stream", ["{"], "the body"),
        ("/hicodit/stream", ['{"face": 1}'], "unknown setting 'face'; there are: lookahead, seed"),
        ("/hicodit/stream", ['{"seed": 0}', b"no picture"], "JPEG or PNG"),
        ("/hicodit/stream", ['{"seed": 0}', b"\x89PNG damaged"], "damaged"),
        ("/hicodit/stream", ['{"seed": 0}', "end"], "no picture came"),
    ],
)
def test_wrong_streams_get_one_sentence(client, path, messages, error):
    with client.websocket_connect(path) as socket:
        for message in messages:
            (socket.send_bytes if isinstance(message, bytes) else socket.send_text)(message)
        answer = socket.receive_json()
        while "error" not in answer:
            answer = socket.receive_json()
    assert error in answer["error"] and answer["status"] == 400


def test_requests_beyond_the_limits_are_refused(models, job):
    service = service_of(models, requests=1, streams=0)
    with TestClient(make_app(service)) as client:
        with service.admitted():
            answer = client.post("/talker", json=job)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1" and "busy" in answer.json()["error"]
        with client.websocket_connect("/talker/stream") as socket:
            assert socket.receive_json()["status"] == 429
        assert client.post("/talker", json=job).status_code == 200 and service.requests == 0
        service.closing = True
        assert client.post("/talker", json=job).status_code == client.get("/health").status_code == 503


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("model", ["talker_t2av", "hicodit"])
def test_requests_of_a_worker_that_dies_are_answered(models, job, model, tmp_path, monkeypatch):
    """Its thread ends by what no handler takes; the request in work and later ones get 503, and so does /health."""
    service = service_of(models)
    monkeypatch.setattr(service.workers[model], "_step" if model == "talker_t2av" else "_generate", lambda _: 1 / 0)
    write_video(tmp_path / "head.mp4", talking_head(10), 25)
    clip = (tmp_path / "head.mp4").read_bytes()

    def ask():
        return client.post("/talker", json=job) if model == "talker_t2av" else client.post("/hicodit", content=clip)

    with TestClient(make_app(service)) as client:
        assert ask().status_code == ask().status_code == client.get("/health").status_code == 503
        assert service.requests == 0


def test_a_client_that_leaves_frees_its_row(client, models, job):
    service = client.app.state.service
    with client.websocket_connect("/talker/stream") as socket:
        socket.send_json(job | {"max_seconds": 30.0, "min_seconds": 30.0})
        socket.receive_json()
        socket.receive_bytes()
    wait_until(lambda: not service.workers["talker_t2av"].rows and service.streams == 0)


def test_a_client_that_hangs_up_frees_its_row(client, job):
    """The server is told that the connection is closed right after the request."""
    body = json.dumps(job | {"max_seconds": 30.0, "min_seconds": 30.0}).encode()
    messages, sent = [{"type": "http.disconnect"}, {"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return messages.pop() if len(messages) > 1 else messages[0]

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/talker", "raw_path": b"/talker", "query_string": b""}
    asyncio.run(client.app(scope | {"headers": [], "http_version": "1.1", "scheme": "http"}, receive, send))
    service = client.app.state.service
    assert sent[0]["status"] == 499 and service.requests == 0
    assert service.metrics.get_sample_value("requests_total", {"path": "/talker", "status": "499"}) == 1
    wait_until(lambda: not service.workers["talker_t2av"].rows)

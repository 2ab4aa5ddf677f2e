"""The web service with random tiny models: results as from the pipelines, one sentence for every error, limits."""

import asyncio
import base64
import errno
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
from fastapi.testclient import TestClient

from engine.cuda_graph import GraphedSteps
from engine.errors import UserError
from engine.media.video import write_video
from hicodit.bundled import CARTOON_RELEASE, REAL_RELEASE, PipelineChooser
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import SamplerConfig
from service.app import make_app, read_picture
from service.limits import ServeLimits
from service.service import Service, explain
from service.sound import encode
from service.workers import Ticket, WorkerEnded
from talker_t2av.generation import BatchedDecoder
from talker_t2av.pipeline import Job
from tests.drawn_faces import talking_head
from tests.gpu.dying_graphs import DyingOutputs
from tests.waiting import wait_until

SPEECH = "/v1/audio/speech"
STREAM = "/hicodit/stream"


def service_of(models, **limits):
    return Service(models[0], models[1], ServeLimits(rows=4, **limits), demo=False)


@pytest.fixture(scope="module")
def client(models):
    with TestClient(make_app(service_of(models)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def job(models):
    """A request for half a second of speech, with its voice."""
    voice = base64.b64encode(models[2].read_bytes()).decode()
    return {
        "model": "talker-t2av", "input": "set red", "response_format": "wav", "reference_audio": voice,
        "min_seconds": 0.48, "max_seconds": 0.48,
    }  # fmt: skip


def sound(content):
    return soundfile.read(io.BytesIO(content))


def receive(socket):
    """Return the wave that comes after the first message."""
    assert socket.receive_json() == {"rate": 24_000, "format": "s16le"}
    pieces = []
    while "bytes" in (message := socket.receive()):
        pieces.append(np.frombuffer(message["bytes"], np.int16))
    assert json.loads(message["text"])["done"]
    return np.concatenate(pieces) / 32767


def send_frames(socket, frames):
    for frame in frames:
        socket.send_bytes(cv2.imencode(".png", frame[..., ::-1])[1].tobytes())
    socket.send_text("end")


def test_several_clients_at_once_get_what_each_gets_alone(client, models, job):
    settings = [{"seed": seed, "max_seconds": 0.48 + 0.16 * (seed % 3), "min_seconds": 0.48} for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda given: client.post(SPEECH, json=job | given), settings))
    for given, answer in zip(settings, answers):
        alone = models[1](Job("tts", "set red", str(models[2]), **given))
        np.testing.assert_allclose(sound(answer.content)[0], alone.wave, atol=2e-4)


def test_a_stream_of_images_gives_the_same_audio(client, models):
    head = talking_head(25)
    with client.websocket_connect(STREAM) as socket:
        socket.send_json({"lookahead": 0.2, "seed": 1})
        send_frames(socket, head)
        wave = receive(socket)
    expected = np.concatenate([chunk.wave for chunk in models[0].stream(head, 1, lookahead=0.2)])
    np.testing.assert_allclose(wave, expected, atol=1e-4)


def test_padding_of_the_speech_is_silent_as_in_the_pipeline(client, models, job, monkeypatch):
    monkeypatch.setattr(models[1].system, "silence_padding", lambda speech: 0.5 * speech)
    settings = {"min_seconds": 0.48, "max_seconds": 0.48, "seed": 5}
    alone = models[1](Job("tts", "set red", str(models[2]), **settings)).wave
    for form in ({}, {"response_format": "pcm", "stream_format": "audio"}):
        content = client.post(SPEECH, json=job | settings | form).content
        wave = np.frombuffer(content, np.int16) / 32767 if form else sound(content)[0]
        np.testing.assert_allclose(wave, alone, atol=2e-4)


@pytest.mark.parametrize("field", ["input", "response_format", "seed"])
def test_half_of_a_surrogate_pair_is_a_wrong_value(client, job, field):
    body = json.dumps(job | {field: "\ud800"})  # which json writes as an escape
    answer = client.post(SPEECH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize("kind", ["wav", "mp3", "flac", "opus"])
def test_an_error_before_the_first_audio_is_raised_instead_of_an_empty_file(kind):
    async def waves():
        raise WorkerEnded
        yield

    async def first():
        return await anext(encode(waves(), 24_000, kind))

    with pytest.raises(WorkerEnded):
        asyncio.run(first())


def test_a_silent_stream_ends(client, monkeypatch):
    monkeypatch.setattr("service.app.IDLE", 0.05)
    with client.websocket_connect(STREAM) as socket:
        assert "nothing was received for 0.05 s" in socket.receive_json()["error"]


def test_the_parts_of_a_long_text_come_one_after_the_other(client, models, job, monkeypatch):
    monkeypatch.setattr(models[1], "sampling", replace(models[1].sampling, text_bytes=8))
    text = "set red. set blue."
    lengths = {"min_seconds": 0.48, "max_seconds": 0.48}
    alone = models[1](Job("tts", text, str(models[2]), **lengths, seed=4))
    asked = job | {"input": text, "seed": 4}
    whole = sound(client.post(SPEECH, json=asked).content)[0]
    np.testing.assert_allclose(whole, alone.wave, atol=2e-4)
    assert len(whole) > 2 * 0.48 * 24_000
    streamed = client.post(SPEECH, json=asked | {"response_format": "pcm", "stream_format": "audio"})
    np.testing.assert_allclose(np.frombuffer(streamed.content, np.int16) / 32767, whole, atol=2e-4)


def test_clips_and_streams_get_the_bundled_release_for_their_face(models, release, tmp_path, spy):
    """Cartoon faces and, with the noise of a camera, real ones."""
    write_video(tmp_path / "head.mp4", talking_head(25), 25)
    pipelines = {CARTOON_RELEASE: models[0], REAL_RELEASE: HiCoDiTPipeline.from_pretrained(release, precision="fp32")}
    conditions = spy(HiCoDiTPipeline, "conditions")
    service = Service(PipelineChooser(pipelines.get), None, ServeLimits(), demo=False)
    noise = np.random.default_rng(0).normal(0, 4, (25, 128, 128, 3))
    with TestClient(make_app(service)) as client, client.websocket_connect(STREAM) as socket:
        files = {"input_reference": (tmp_path / "head.mp4").read_bytes()}
        clip = client.post("/v1/videos", data={"model": "hicodit"}, files=files).json()
        wait_until(lambda: client.get(f"/v1/videos/{clip['id']}").json()["status"] == "completed")
        assert {call.args[0] for call in conditions.call_args_list} == {pipelines[CARTOON_RELEASE]}
        conditions.reset_mock()
        socket.send_json({})
        send_frames(socket, np.clip(talking_head(25) + noise, 0, 255).astype(np.uint8))
        assert len(receive(socket))
    assert {call.args[0] for call in conditions.call_args_list} == {pipelines[REAL_RELEASE]}


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    data = cv2.imencode(".png", np.zeros((6000, 6000), np.uint8))[1].tobytes()
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="6000 x 6000"):
        read_picture(data)


@pytest.mark.parametrize(
    ("settings", "image", "error"), [({"face": 1}, b"", "face"), ({"seed": 0}, b"\x89PNG damaged", "decoded")]
)
def test_wrong_streams_get_one_sentence(client, settings, image, error):
    with client.websocket_connect(STREAM) as socket:
        socket.send_json(settings)
        socket.send_bytes(image)
        while "error" not in (answer := socket.receive_json()):
            pass
    assert error in answer["error"] and answer["status"] == 400


def test_requests_beyond_the_limits_are_refused(models, job):
    service = service_of(models, requests=1, streams=0)
    with TestClient(make_app(service)) as client:
        with service.admitted():
            health = client.get("/health").json()
            answer = client.post(SPEECH, json=job)
        assert health == {"status": "ok", "models": ["hicodit", "talker-t2av"], "requests": 1}
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        with client.websocket_connect(STREAM) as socket:
            assert socket.receive_json()["status"] == 429
        assert client.post(SPEECH, json=job).status_code == 200 and not any(service.inside.values())
        service.closing = True
        assert client.post(SPEECH, json=job).status_code == client.get("/health").status_code == 503


def test_no_request_waits_for_the_capture_of_a_graph(models, job, monkeypatch):
    """All graphs are captured when the service starts, as on a GPU."""
    hicodit, talker, _ = models
    backends = []

    def new_backend():
        backends.append(DyingOutputs())
        return backends[-1]

    decoder = "service.workers.BatchedDecoder"
    monkeypatch.setattr(decoder, lambda *given, **more: BatchedDecoder(*given, backend=new_backend(), **more))
    monkeypatch.setattr(hicodit, "graphs", GraphedSteps(backend=new_backend()))
    monkeypatch.setattr(hicodit, "sampler", SamplerConfig("confidence", 2))
    monkeypatch.setattr(talker, "sampling", replace(talker.sampling, steps=2, text_bytes=40))
    crops = [hicodit.crops(talking_head(count)) for count in (25, 41)]
    service = Service(hicodit, talker, ServeLimits(rows=2), demo=False)
    with TestClient(make_app(service)) as client:
        captured = [backend.captures for backend in backends]
        tickets = [Ticket(crops[number % 2], number, pipeline=hicodit) for number in range(10)]
        for ticket in tickets:
            service.workers["hicodit"].submit(ticket)
        body = job | {"min_seconds": 0.16, "max_seconds": 2.0}
        texts = ["set red", "lay blue at f two now", "place white with s eight please"] * 4
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda text: client.post(SPEECH, json=body | {"input": text}), texts))
        assert {answer.status_code for answer in answers} == {200}
        assert all(len(ticket.result(60).wave) for ticket in tickets)
    assert [backend.captures for backend in backends] == captured and all(captured)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("cause", ["stated", "being handled"])
def test_a_full_disk_is_found_among_the_causes_of_an_error(cause):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError) as caught:
        try:
            raise full
        except OSError:
            if cause == "stated":
                raise RuntimeError("unable to write") from full
            raise RuntimeError("unable to write")  # noqa: B904
    assert explain(caught.value) == (507, "the server cannot write files: No space left on device")


def test_an_unexpected_error_is_logged_with_its_place(capsys):
    def broken():
        return {}["face"]

    with pytest.raises(KeyError) as caught:
        broken()
    assert explain(caught.value) == (500, "internal error: KeyError")
    assert "in broken" in capsys.readouterr().err


def test_requests_of_a_worker_that_dies_are_answered(models, job, monkeypatch):
    """Its thread ends by an unexpected exception; the running request and later ones get 503, and so does /health."""
    service = service_of(models)
    monkeypatch.setattr(service.workers["talker-t2av"], "step", lambda _: 1 / 0)
    with TestClient(make_app(service)) as client:
        assert [client.post(SPEECH, json=job).status_code for _ in range(2)] == [503, 503]
        assert client.get("/health").status_code == 503
        assert not any(service.inside.values())


def test_a_client_that_leaves_a_stream_frees_its_place(client):
    with client.websocket_connect(STREAM) as socket:
        socket.send_json({})
        socket.receive_json()
    wait_until(lambda: not any(client.app.state.service.inside.values()))

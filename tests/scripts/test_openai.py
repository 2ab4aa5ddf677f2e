"""OpenAI's interface by OpenAI's own client over the loopback interface, with random tiny models."""

import base64
import io
import json
import threading

import cv2
import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("python_multipart")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
import openai
import uvicorn
from starlette.exceptions import HTTPException

from engine.errors import UserError
from engine.media.audio import read_audio
from engine.media.ffmpeg import probe
from engine.media.video import mux_audio, read_video, write_video
from engine.word_times import Word, WordTimes
from service.app import make_app
from service.limits import ServeLimits
from service.service import Service
from service.voices import Voices
from talker_t2av.pipeline import TRUNCATED, Job
from tests.drawn_faces import scene, talking_head
from tests.forked import free_port
from tests.media_files import comment_of
from tests.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")  # its own service ends, the client stays
TEXT = "Hi."


@pytest.fixture(scope="module")
def service(models):
    hicodit, talker, voice = models
    talker.system.model.head_stop.forward = lambda h: h.new_full(h.shape[:-1], -9)  # speaks as long as the text allows
    return Service(hicodit, talker, ServeLimits(rows=4, characters=50, videos=2), False, voice.parent)


@pytest.fixture(scope="module")
def client(service):
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=port, log_level="error", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def true_wave(models, service):
    """What the pipeline says."""
    return models[1](Job("tts", TEXT, str(models[2]), seed=3)).wave


def speak(client, voice="anna", kind="wav", **more):
    extra = {"seed": 3} | more.pop("extra_body", {})
    return client.audio.speech.create(
        model="talker-t2av", input=TEXT, voice=voice, response_format=kind, extra_body=extra, **more
    )


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["talker-t2av", "hicodit"]
    assert client.models.retrieve("hicodit").owned_by == "speaking-faces"
    with pytest.raises(openai.NotFoundError, match="sora-2"):
        client.models.retrieve("sora-2")


@pytest.mark.parametrize("kind", ["wav", "mp3", "opus", "aac", "flac", "pcm"])
def test_speech_is_the_pipelines_in_each_format(client, true_wave, tmp_path, kind):
    content = speak(client, kind=kind).content
    file = tmp_path / f"speech.{kind}"
    file.write_bytes(content)
    wave = np.frombuffer(content, np.int16) / 32767 if kind == "pcm" else read_audio(file, 24_000)
    assert abs(len(wave) - len(true_wave)) < 0.1 * 24_000
    if kind in ("wav", "pcm", "flac"):
        np.testing.assert_allclose(wave, true_wave, atol=2e-4)
    assert kind != "wav" or soundfile.info(file).samplerate == 24_000
    if kind not in ("pcm", "aac"):  # which have no metadata
        assert comment_of(file).startswith("AI-generated speech: Talker-T2AV")


def test_a_client_that_leaves_a_stream_frees_its_row(client, service):
    with client.audio.speech.with_streaming_response.create(
        model="talker-t2av", input=TEXT * 4, voice="anna", response_format="pcm", stream_format="audio"
    ) as answer:
        next(answer.iter_bytes())
    wait_until(lambda: not service.workers["talker-t2av"].rows and not service.inside["requests"])


def test_a_client_that_does_not_wait_frees_its_row(client, service):
    with pytest.raises(openai.APITimeoutError):
        speak(client.with_options(timeout=0.5), extra_body={"min_seconds": 30.0, "max_seconds": 30.0})
    wait_until(lambda: not service.workers["talker-t2av"].rows and not service.inside["requests"], seconds=10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": " "}, "the text is empty"),
        ({"reference_audio": "***"}, "base64"),
        ({"reference_video": "/etc/passwd"}, "reference_video"),
        ({"voice": "otto"}, "otto"),
        ({"model": "hicodit"}, "model=hicodit"),
        ({"input": "x" * 51}, "51 characters"),
        ({"input": "a\0b"}, "null character"),
        ({"speed": "nan"}, "speed=nan must be a number"),
        ({"reference_audio": ""}, "reference_audio is an empty file"),
    ],
)
def test_wrong_speech_requests_get_one_sentence(client, fields, message):
    body = {"model": "talker-t2av", "input": TEXT, "voice": "anna"} | fields
    answer = client._client.post(f"{client.base_url}audio/speech", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and "\n" not in error["message"], answer.text
    assert error["type"] == "invalid_request_error" and "/tmp" not in answer.text


def test_names_of_openai_stand_for_the_model_and_the_default_voice(client, models, true_wave):
    speech = client.audio.speech.with_raw_response.create(
        model="tts-1", input=TEXT, voice="alloy", response_format="pcm", extra_body={"seed": 3}
    )
    assert "using anna" in speech.headers["x-remarks"]
    body = {"model": "talker-t2av", "input": TEXT}
    untyped = client._client.post(f"{client.base_url}audio/speech", content=json.dumps(body))
    assert "Content-Type: application/json" in untyped.json()["error"]["message"]
    np.testing.assert_allclose(np.frombuffer(speech.content, np.int16) / 32767, true_wave, atol=2e-4)
    strict = Service(None, models[1], ServeLimits(), False, models[2].parent, aliases=False)
    with pytest.raises(HTTPException, match="404"):
        strict.find("tts-1")
    with pytest.raises(UserError, match="alloy"):
        strict.voices.find("alloy")


def test_words_come_with_their_times_also_at_another_speed(client, true_wave, monkeypatch):
    pytest.importorskip("pocketsphinx")
    # random weights say nothing that could be placed
    monkeypatch.setattr(WordTimes, "align", lambda self, text, wave, rate: [Word(text, 0.2, 0.6)])
    timed = {"timestamp_granularities": ["word"]}
    answer = json.loads(speak(client, speed=0.25, extra_body=timed).content)
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(answer["audio"])))
    assert answer["words"] == [{"word": TEXT, "start": 0.8, "end": 2.4}] and answer["format"] == "wav"
    assert answer["duration"] == pytest.approx(len(wave) / rate, abs=0.1)
    assert len(wave) / rate == pytest.approx(len(true_wave) / 24_000 / 0.25, abs=0.1)


def finished(client, video):
    wait_until(lambda: client.videos.retrieve(video.id).status not in ("queued", "in_progress"))
    return client.videos.retrieve(video.id)


def test_videos_are_made_fetched_and_deleted(client, models, service, tmp_path):
    write_video(tmp_path / "head.mp4", talking_head(25), 25)
    video = client.videos.create(
        model="talker-t2av", prompt=TEXT, input_reference=tmp_path / "head.mp4", extra_body={"voice": "anna", "seed": 3}
    )
    assert video.status in ("in_progress", "queued")
    video = finished(client, video)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    (tmp_path / "talk.mp4").write_bytes(client.videos.download_content(video.id).content)
    talk = models[1](Job("t2av", TEXT, str(models[2]), str(tmp_path / "head.mp4"), seed=3))
    assert probe(tmp_path / "talk.mp4").audio == "aac"
    assert comment_of(tmp_path / "talk.mp4").startswith("AI-generated speech and face: Talker-T2AV")
    assert read_video(tmp_path / "talk.mp4", 25).shape == talk.frames.shape

    dubbed = finished(client, client.videos.create(model="hicodit", prompt="", input_reference=tmp_path / "head.mp4"))
    assert dubbed.status == "completed", dubbed.error
    (tmp_path / "dubbed.mp4").write_bytes(client.videos.download_content(dubbed.id).content)
    assert comment_of(tmp_path / "dubbed.mp4").startswith("AI-generated speech: HiCoDiT")
    speech = models[0](tmp_path / "head.mp4")
    mux_audio(tmp_path / "head.mp4", speech.wave, speech.rate, tmp_path / "expected.mp4")
    sounds = [read_audio(tmp_path / name, speech.rate) for name in ("dubbed.mp4", "expected.mp4")]
    np.testing.assert_allclose(*sounds, atol=5e-3)
    assert [found.id for found in client.videos.list()] == [dubbed.id, video.id]
    assert [found.id for found in client.videos.list(limit=1, order="asc")] == [video.id, dubbed.id]  # two pages
    failed = finished(client, client.videos.create(model="hicodit", prompt="", input_reference=("a.mp4", b"no video")))
    assert failed.status == "failed" and "/tmp" not in failed.error.message
    with pytest.raises(openai.ConflictError):
        client.videos.download_content(failed.id)
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)  # `videos=2` are kept
    assert client.videos.delete(dubbed.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(dubbed.id)
    assert not service.inside["requests"]


def test_a_face_is_a_picture_and_its_voice_a_recording_of_the_request(client, models, tmp_path):
    cv2.imwrite(str(tmp_path / "face.png"), talking_head(1)[0][..., ::-1])
    face = ("upload", (tmp_path / "face.png").read_bytes(), "image/png")  # the name of an upload does not matter
    files = {"input_reference": face, "reference_audio": models[2].open("rb")}
    data = {"prompt": TEXT, "min_seconds": 0.48, "max_seconds": 0.48}
    answer = client._client.post(f"{client.base_url}videos", data=data, files=files).json()
    video = finished(client, client.videos.retrieve(answer["id"]))
    assert (video.status, video.remarks) == ("completed", [TRUNCATED])
    (tmp_path / "talk.mp4").write_bytes(client.videos.download_content(answer["id"]).content)
    assert len(read_video(tmp_path / "talk.mp4", 25)) == 12
    reference = (tmp_path / "face.png").open("rb")
    alias = client.videos.create(
        model="talker-t2av", prompt=TEXT, input_reference=reference, extra_body={"voice": "ash"}
    )
    assert alias.remarks == ["voice ash is not available: using anna"]


def test_each_face_of_a_clip_gets_a_video(client, models, tmp_path):
    write_video(tmp_path / "two.mp4", scene(25, [lambda i: (5, 5, 112), lambda i: (180, 20, 90)]), 25)

    def dub(face):
        clip = tmp_path / "two.mp4"
        extra = {"seed": 3, "face": face}
        video = client.videos.create(model="hicodit", prompt="", input_reference=clip, extra_body=extra)
        return finished(client, video)

    def heard(video, face=1):
        content = client.videos.download_content(video.id, extra_query={"face": face}).content
        (tmp_path / "dubbed.mp4").write_bytes(content)
        return read_audio(tmp_path / "dubbed.mp4", 24_000)

    both = dub("all")
    right = dub("right")
    assert (both.status, both.faces, right.faces) == ("completed", 2, 1)
    second = heard(both, 2)
    np.testing.assert_allclose(second, heard(right), atol=5e-3)  # of another batch
    assert np.abs(heard(both, 1) - second).max() > 0.01
    with pytest.raises(openai.NotFoundError, match="face"):
        heard(both, 3)
    with pytest.raises(openai.BadRequestError, match=r"face=\.\./1"):
        dub("../1")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("audio/speech", {"content": [b"x" * 2**20] * 33}),  # in chunks, without a Content-Length
        ("videos", {"data": {"model": "hicodit"}, "files": {"input_reference": b"x" * 2**25}}),
    ],
)
def test_a_body_that_is_too_large_is_refused(client, path, body):
    answer = client._client.post(f"{client.base_url}{path}", **body)
    assert answer.status_code == 413 and "33,554,432" in answer.json()["error"]["message"]


def test_a_voice_of_the_folder_replaces_the_bundled_one_and_names_are_unique(models, tmp_path):
    own = tmp_path / "default.safetensors"
    models[1].save_voice(models[2], own)
    assert Voices(models[1], tmp_path, models[2]).files == {"default": own}
    (tmp_path / "default.wav").touch()
    with pytest.raises(UserError, match=r"default\.safetensors and default\.wav are both the voice default"):
        Voices(models[1], tmp_path, models[2])


def test_a_saved_voice_of_another_encoder_is_refused(models, tmp_path):
    voices = Voices(models[1], None, models[2])
    path = voices.find("default")
    assert models[1](Job("tts", TEXT, str(path), max_seconds=0.16)).wave.any()
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes().replace(models[1].system.speaker.digest().encode(), b"00000000"))
    with pytest.raises(UserError, match="another speaker encoder"):
        models[1](Job("tts", TEXT, str(other)))

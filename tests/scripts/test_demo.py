"""The page in a browser: what its buttons do with the bundled models, and how it is built where gradio is installed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from imageio_ffmpeg import count_frames_and_secs

from engine.errors import UserError
from engine.media.ffmpeg import probe
from engine.progress import showing, stage
from service import demo_actions as actions
from tests.forked import free_port
from tests.media_files import ffmpeg

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "assets" / "demo"
CLIP, VOICE, PICTURE = (str(EXAMPLES / name) for name in ("silent.mp4", "voice.wav", "face.png"))
SENTENCE = "Would you like some tea, or maybe coffee?"  # an example of the page


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return actions.Demo(tmp_path_factory.mktemp("demo"), device="cpu")


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        pytest.importorskip("gradio", reason="needs the demo extra")
        from service import demo_page

        yield demo_page


def test_a_clip_gets_speech(demo):
    seen = []
    with showing(lambda *step: seen.append(step)):
        made = demo.speak(CLIP, None, 2, 0.7, 2.5, 1)
    assert count_frames_and_secs(made.video)[0] == count_frames_and_secs(CLIP)[0]
    assert Path(made.figure).stat().st_size > 10_000
    assert [step[:2] for step in seen if "sampling" in step[2]] == [(0, 2), (1, 2), (2, 2)]
    again, other = (demo.speak(CLIP, None, 2, 0.7, guidance, 1) for guidance in (2.5, 0.5))
    waves = [soundfile.read(result.sound)[0] for result in (made, again, other)]
    assert again.sound != made.sound and (waves[0] == waves[1]).all() and (waves[0] != waves[2]).any()


@pytest.mark.parametrize(
    ("mode", "text", "voice", "face", "kinds"),
    [
        ("t2av", SENTENCE, VOICE, PICTURE, "sound and video"),
        ("tts", "hello four", VOICE, None, "sound"),
        ("a2v", "", VOICE, PICTURE, "video"),
        ("v2a", SENTENCE, VOICE, CLIP, "sound and video"),
    ],
)
def test_each_mode_writes_sound_video_or_both(demo, mode, text, voice, face, kinds):
    made = demo.talk(mode, text, voice, face, 2, 0.3, 2.0, 0)
    assert ("sound" in kinds, "video" in kinds) == (made.sound is not None, made.video is not None)
    seconds = [count_frames_and_secs(made.video)[1]] if made.video else []
    seconds += [soundfile.info(made.sound).duration] if made.sound else []
    assert min(seconds) > 0.3 and max(seconds) - min(seconds) < 0.1


@pytest.mark.parametrize(
    ("mode", "text", "voice", "face", "shown"),
    [
        ("speak", "", None, "text.mp4", "The face is not a video"),
        ("t2av", " ", VOICE, CLIP, "Enter a text."),
        ("a2v", "", "long.wav", CLIP, "The sound is longer than 30 s"),
    ],
)
def test_errors_name_no_paths_and_no_settings(demo, tmp_path, mode, text, voice, face, shown):
    folder = tmp_path / "Uploads"  # with a capital, as paths of a server may have
    folder.mkdir()
    (folder / "text.mp4").write_text("no media file" * 20)
    soundfile.write(folder / "long.wav", np.zeros(16_000 * 31), 16_000)
    voice, face = (str(folder / name) if name else name for name in (voice, face))
    with pytest.raises(UserError) as caught:
        if mode == "speak":
            demo.speak(face, voice, 2, 0.7, 2.5, 0)
        else:
            demo.talk(mode, text, voice, face, 2, 0.3, 2.0, 0)
    words = actions.in_page_words(str(caught.value), {"the sound": voice, "the face": face})
    assert shown in words and not re.search(r"/\w|\w=|_", words), words


def test_clips_that_browsers_cannot_play_get_a_copy_for_the_preview(demo, tmp_path):
    clip = tmp_path / "mine.mpg"
    ffmpeg("-i", CLIP, clip)
    copy = demo.preview(str(clip))
    assert Path(copy).suffix == ".mp4" and probe(copy).video == "h264"
    assert demo.original(copy) == str(clip)  # which is what the model reads
    assert demo.preview(CLIP) == demo.original(CLIP) == CLIP
    clip.write_bytes(b"no video")
    assert demo.preview(str(clip)) == str(clip)


class SlowDemo:
    """Buttons that work until they are stopped, but only the first time."""

    bundled = True

    def __init__(self, demo):
        self.hicodit = demo.hicodit
        self.talker = demo.talker
        self.preview = demo.preview
        self.original = demo.original
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.calls = 0

    def speak(self, *given):
        self.calls += 1
        count = 3000 if self.calls == 1 else 1
        try:
            with stage("working", count, "steps") as step:
                for _ in range(count):
                    step()
                    self.begun.set()
                    time.sleep(0.02)
        finally:
            self.ended.set()
        return actions.Made(["it worked"])

    def talk(self, mode, text, *given):
        if not text:
            raise actions.FieldError("the text", "Enter a text.")
        raise RuntimeError("at /secret/path")


@pytest.fixture
def served(page_of, demo):
    """A page with slow buttons, and its address."""
    slow = SlowDemo(demo)
    blocks = page_of.page(slow)
    _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True)
    yield slow, url
    blocks.close()


SPEAK = (None, None, 2, 0.7, 2.5, 0)


def client_of(url):
    from gradio_client import Client

    return Client(url, verbose=False)


def start(slow, url):
    """Press Speak as the page of a visitor does."""
    index = next(d["id"] for d in httpx.get(f"{url}config").json()["dependencies"] if d["api_name"] == "speak")
    event = {"data": SPEAK, "fn_index": index, "session_hash": "visitor"}
    httpx.post(f"{url}gradio_api/queue/join", json=event).raise_for_status()
    assert slow.begun.wait(20) and not slow.ended.wait(0.2)


def test_a_page_that_is_closed_frees_the_queue(served):
    slow, url = served
    with httpx.stream("GET", f"{url}gradio_api/heartbeat/visitor", timeout=30):  # the page keeps it open
        start(slow, url)
    assert slow.ended.wait(10)  # it would take a minute
    assert "It worked." in client_of(url).predict(*SPEAK, api_name="/speak")[0]


def test_stop_ends_a_run_and_the_queue_continues(served):
    slow, url = served
    start(slow, url)
    events = httpx.get(f"{url}config").json()["dependencies"]
    button = next(d["targets"] for d in events if d["cancels"])
    stop = next(d["id"] for d in events if d["targets"] == button and d["backend_fn"])
    press = {"data": [], "fn_index": stop, "session_hash": "visitor"}
    answer = httpx.post(f"{url}gradio_api/run/predict", json=press).json()
    assert "Stopped." in answer["data"][-1] and slow.ended.wait(10)
    assert "It worked." in client_of(url).predict(*SPEAK, api_name="/speak")[0]


@pytest.mark.parametrize(
    ("text", "shown"), [("x", "Internal error"), ("", "Invalid input: see the text")], ids=["a bug", "no text"]
)
def test_errors_are_shown_without_paths_and_mistakes_at_their_field(served, text, shown):
    result = client_of(served[1]).predict("tts", text, None, "Clip", None, None, 2, 0.3, 2.0, 0, api_name="/talk")
    assert shown in result[0] and "secret" not in str(result)
    fields = [line["value"] for line in result[1:4]]
    assert bool(fields[0]) == (text == "") and not any(fields[1:])


def test_uploads_are_deleted_at_the_end_and_other_files_are_not_served(tmp_path):
    pytest.importorskip("gradio", reason="needs the demo extra")
    port = str(free_port())
    call = [sys.executable, "scripts/demo.py", "--port", port, "--device", "cpu"]
    process = subprocess.Popen(
        call, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert "loading" in process.stdout.readline() and port in process.stdout.readline()
        url = f"http://127.0.0.1:{port}/gradio_api"
        path = httpx.post(f"{url}/upload", files={"files": ("mine.wav", b"sound")}).json()[0]
        assert Path(path).is_relative_to(tmp_path) and Path(path).read_bytes() == b"sound"
        assert httpx.get(f"{url}/file={ROOT / 'README.md'}").status_code == 403
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert not list(tmp_path.glob("speaking-faces-*")) and not Path(path).exists()

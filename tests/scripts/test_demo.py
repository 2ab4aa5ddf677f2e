"""The page in a browser: what its buttons do with the bundled models, and how it is built where gradio is installed."""

import sys
from pathlib import Path

import pytest
import soundfile
from imageio_ffmpeg import count_frames_and_secs

from engine.errors import UserError
from scripts import demo


@pytest.fixture(scope="module")
def buttons(tmp_path_factory):
    return demo.Demo(tmp_path_factory.mktemp("demo"), device="cpu")


def test_a_clip_speaks(buttons):
    video, figure = buttons.speak(demo.CLIP, None, 2, 0.7, 1)
    assert (
        count_frames_and_secs(video)[0] == count_frames_and_secs(demo.CLIP)[0] and Path(figure).stat().st_size > 10_000
    )
    again, _ = buttons.speak(demo.CLIP, None, 2, 0.7, 1)
    waves = [soundfile.read(Path(path).with_suffix(".wav"))[0] for path in (video, again)]
    assert again != video and (waves[0] == waves[1]).all()
    with pytest.raises(UserError, match="give a clip"):
        buttons.speak(None, None, 2, 0.7, 1)


def test_a_text_is_said(buttons):
    video, sound = buttons.talk("tts", "set blue by hotel four now", demo.VOICE, demo.CLIP, 0)
    assert video is None and soundfile.info(sound).duration > 0.5
    for mode, text, what in (("t2av", " ", "text"), ("a2v", "", "audio")):
        with pytest.raises(UserError, match=what):
            buttons.talk(mode, text, None, demo.CLIP, 0)


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(UserError, match=r"bash scripts/setup\.sh demo"):
        demo.main()


def test_the_page(buttons):
    gradio = pytest.importorskip("gradio", reason="needs the demo extra")
    values = [getattr(block, "value", None) for block in demo.page(gradio, buttons).blocks.values()]
    assert {"Speak", "Talk", "set blue by hotel four now"} <= {value for value in values if isinstance(value, str)}


def test_a_port_that_does_not_exist_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--port", "99999"])
    with pytest.raises(UserError, match="--port 99999 must lie between"):
        demo.main()

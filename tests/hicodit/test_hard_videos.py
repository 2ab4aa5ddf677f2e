"""Videos of hard kinds: each gives the face's track and mouth crops, or one clear line and exit code 2.

Formats, frame rates and pixels are tests/engine/test_media.py's, several faces and cuts test_face_tracking.py's,
damaged files tests/hostile's. Made here with ffmpeg from cartoon faces.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from drawn_faces import scene

from engine.errors import run_cli
from engine.faces.clip import ClipFrames
from engine.media.video import write_video
from tests.media_files import ffmpeg

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo" / "silent.mp4"
FRAMES = 30
SIZE = (160, 208)
HEAD = 112
WHERE = (30 + HEAD / 2) / 208


def head(i):
    return 30, 30, HEAD


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with the plain clip, nearly lossless."""
    folder = tmp_path_factory.mktemp("base")
    write_video(folder / "plain.mp4", scene(FRAMES, [head], SIZE), 25)
    return folder


def remade(*options, name="b.mp4", source=None):
    """A kind that ffmpeg makes of the plain clip, or of another one."""

    def make(base, folder):
        ffmpeg("-i", source or base / "plain.mp4", *options, folder / name)
        return folder / name

    return make


bundled = partial(remade, source=DEMO)  # its face is drawn with more care


def drawn(frames, heads, size=SIZE):
    """A kind that is drawn: heads as `scene` takes them."""

    def make(base, folder):
        write_video(folder / "drawn.mp4", scene(frames, heads, size), 25)
        return folder / "drawn.mp4"

    return make


def turned(turn, rotation):
    """Pictures turned by `transpose=turn`, and marked so that players turn them by `rotation` degrees."""

    def make(base, folder):
        ffmpeg("-i", base / "plain.mp4", "-vf", turn, folder / "side.mp4")
        ffmpeg("-display_rotation", rotation, "-i", folder / "side.mp4", "-c", "copy", folder / "marked.mp4")
        return folder / "marked.mp4"

    return make


# kind: (made by, frames, middle of the face as a fraction of the displayed width, fraction of frames with a face)
TRACKS = {
    "odd sizes": (remade("-vf", "crop=171:159:0:0", "-pix_fmt", "yuv444p"), 30, 86 / 171, 1),
    "stored on its side": (turned("transpose=1", 90), 30, WHERE, 1),
    "a leading black second": (remade("-vf", "tpad=start_duration=1"), 55, WHERE, 30 / 55),
    "a tiny face": (drawn(20, [lambda i: (400, 200, 60)], (360, 640)), 20, 430 / 640, 1),
    "a tilted head": (bundled("-vf", "rotate=0.5:c=gray"), 57, 0.47, 1),
}

# kind: (made by, what the line says)
REFUSALS = {
    "one picture as a gif": (remade("-frames:v", 1, name="b.gif"), "s of video; at least 0.2 s"),
    "no face": (remade("-vf", "crop=30:160:0:0"), r"no face found in any of its 1\.2 s"),
    "too little of a face": (drawn(80, [lambda i: head(i) if i < 11 else None]), r"at 0\.[56]-3\.2 s"),
    "upside down": (bundled("-vf", "hflip,vflip"), "there is a face upside down"),
    "on its side": (bundled("-vf", "transpose=1"), "a face on its side: rotate the video by 90 degrees anticlockwise"),
}


@pytest.mark.parametrize("kind", TRACKS)
def test_track(pipeline, base, tmp_path, kind):
    make, length, where, seen_fraction = TRACKS[kind]
    path = make(base, tmp_path)
    crops = next(pipeline.all_crops(path, "largest", strips=[tmp_path / "strip.png"]))
    track = crops.track
    assert len(track) == len(crops.mouth) == length
    assert abs(track.coverage - seen_fraction) < 0.06
    centre = track.boxes[:, 0] + track.boxes[:, 2] / 2
    picture = next(iter(ClipFrames(path, 25.0))).shape[2]
    assert np.abs(centre[[0, -1]] / picture - where).max() < 0.04
    # The mouth is darker than the skin that surrounds it, and in the middle of its picture.
    seen = crops.mouth[track.seen].astype(float)
    assert seen[:, 20:28, 20:28].mean() < seen[:, 20:28, [2, 3, 44, 45]].mean() - 10


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusal(pipeline, base, tmp_path, capsys, kind):
    make, message = REFUSALS[kind]
    path = make(base, tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: pipeline.crops(path) and None)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith(f"error: {path}") and line.count("\n") == 1
    assert re.search(message, line), line

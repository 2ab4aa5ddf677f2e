"""Videos of hard kinds: each gives the face's track and mouth crops, or one clear line and exit code 2.

Formats, frame rates and pixels are tests/engine/test_media.py's, several faces, small ones and cuts
test_face_tracking.py's, damaged files tests/hostile's. Made here with ffmpeg from cartoon faces.
"""

from pathlib import Path

import numpy as np
import pytest
from drawn_faces import scene

from engine.errors import run_cli
from engine.faces.clip import ClipFrames
from engine.media.video import write_video
from tests.media_files import ffmpeg

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo" / "silent.mp4"  # its face is drawn with more care
FRAMES = 30


def head(i):
    return 30, 30, 112


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "plain.mp4"
    write_video(path, scene(FRAMES, [head], (160, 208)), 25)
    return path


def turned(plain, folder):
    """Pictures that lie on their side, with a mark by which players turn them."""
    ffmpeg("-i", plain, "-vf", "transpose=1", folder / "side.mp4")
    ffmpeg("-display_rotation", 90, "-i", folder / "side.mp4", "-c", "copy", folder / "marked.mp4")
    return folder / "marked.mp4"


def tilted(plain, folder):
    ffmpeg("-i", DEMO, "-vf", "rotate=0.5:c=gray", folder / "tilted.mp4")
    return folder / "tilted.mp4"


@pytest.mark.parametrize(
    ("make", "length", "where"),  # the face's middle as a fraction of the width
    [(turned, FRAMES, 86 / 208), (tilted, 57, 0.47)],
)
def test_track(pipeline, plain, tmp_path, make, length, where):
    path = make(plain, tmp_path)
    crops = pipeline.crops(path)
    track = crops.track
    assert len(track) == len(crops.mouth) == length and track.coverage == 1
    centre = track.boxes[:, 0] + track.boxes[:, 2] / 2
    picture = next(iter(ClipFrames(path, 25.0))).shape[2]
    assert np.abs(centre[[0, -1]] / picture - where).max() < 0.04
    # The mouth is darker than the skin that surrounds it, and in the middle of its picture.
    mouth = crops.mouth.astype(float)
    assert mouth[:, 20:28, 20:28].mean() < mouth[:, 20:28, [2, 3, 44, 45]].mean() - 10


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("plain", ("-frames:v", 2), "0.08 s"),
        ("plain", ("-vf", "crop=30:160:0:0"), "no face found"),
        ("plain", ("-vf", "tpad=stop_duration=4"), "-5.2 s"),
        (DEMO, ("-vf", "hflip,vflip"), "upside down"),
        (DEMO, ("-vf", "transpose=1"), "90 degrees anticlockwise"),
    ],
)
def test_refusal(pipeline, plain, tmp_path, capsys, source, options, message):
    path = tmp_path / "b.mp4"
    ffmpeg("-i", plain if source == "plain" else source, *options, path)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: pipeline.crops(path) and None)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith(f"error: {path}") and line.count("\n") == 1
    assert message in line

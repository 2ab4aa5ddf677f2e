"""The square that the motion codec sees: around the face of a real clip, the whole of a cropped clip."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_faces import draw_face, scene
from PIL import Image

from engine.errors import UserError
from engine.media.video import read_video, write_video
from talker_t2av.faces import Square, find_square, read_square, read_surroundings

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo" / "silent.mp4"
REAL = ROOT.parent / "shared" / "samples" / "reference_video.mp4"


def frames_of(path, square, count=1, start=0):
    return np.concatenate(list(read_square(path, square, count, start)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A face of 128 pixels at the right of a wide clip, after half a second of black."""
    path = tmp_path_factory.mktemp("wide") / "wide.mp4"
    video = scene(40, [lambda i: (300, 60, 128)], (240, 480))
    video[:12] = 0
    write_video(path, video, 25)
    return path


def test_a_square_round_the_face_of_a_wide_clip(wide):
    square = find_square(wide, 1)
    assert abs(square.left + square.side / 2 - 364) < 12 and 120 < square.side < 200
    assert 8 <= square.first <= 16 and square.remark == ""
    shown = frames_of(wide, square, 1, square.first)
    assert shown.shape == (1, square.side, square.side, 3) and shown.mean() > 60
    assert np.array_equal(frames_of(wide, square, 5, 14), square.crop(read_video(wide)[14:19]))
    assert len(frames_of(wide, square, 99)) == 40


def test_clips_that_were_cropped_before_stay_whole():
    assert find_square(DEMO, 1) == Square(0, 0, 128)
    if not REAL.is_file():
        pytest.skip(f"the real clip {REAL} is absent")
    assert find_square(REAL, 1) == Square(0, 0, 512)  # the published crop of a real speaker


def test_without_a_face_the_centre_is_used_and_reported(tmp_path):
    write_video(tmp_path / "grey.mp4", np.full((10, 48, 64, 3), 90, np.uint8), 25)
    square = find_square(tmp_path / "grey.mp4", 1)
    assert (square.left, square.top, square.side) == (8, 0, 48)
    assert "no face" in square.remark
    assert find_square(tmp_path / "grey.mp4", 1, crop="centre").remark == ""


def test_a_face_box_names_the_face(wide):
    square = find_square(wide, 1, face_box="20,60,80,80")
    assert abs(square.left + square.side / 2 - 71) < 2 and square.side == round(1.78 * 80)
    with pytest.raises(UserError, match="480 x 240"):
        find_square(wide, 1, face_box="900,60,80,80")


def portrait(side=128, width=360, height=300):
    """A cartoon face on a wall with a pattern: (H, W, 3)."""
    wall = np.indices((height, width)).sum(0) // 20 % 2 * 20 + 150
    picture = np.repeat(wall[..., None], 3, 2).astype(np.uint8)
    picture[80 : 80 + side, 60 : 60 + side] = cv2.resize(draw_face(0.3), (side, side))
    return picture


def save(picture, path, orientation=None):
    """Save a picture as a camera does, with the EXIF orientation."""
    image = Image.fromarray(picture)
    exif = image.getexif()
    if orientation:
        exif[0x112] = orientation
    image.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def test_a_photo_is_turned_as_its_exif_data_say(tmp_path):
    square = find_square(save(portrait(), tmp_path / "upright.jpg"), 1)
    turned = find_square(save(np.rot90(portrait()), tmp_path / "turned.jpg", 6), 1)
    assert (turned.turn, abs(turned.left - square.left) < 8, abs(turned.side - square.side) < 8) == (0, True, True)
    cut = next(read_square(tmp_path / "turned.jpg", turned, 1))[0]
    assert np.abs(cut.astype(int) - turned.crop(portrait()[None])[0]).mean() < 3


def test_a_photo_on_its_side_is_turned_by_its_face(tmp_path):
    face = cv2.imread(str(DEMO.parent / "face.png"))[..., ::-1]  # drawn, and the cascade is sure of it
    picture = cv2.copyMakeBorder(face, 0, 40, 60, 60, cv2.BORDER_REPLICATE)
    square = find_square(save(np.rot90(picture, 3), tmp_path / "side.png"), 1)
    assert square.turn == 90 and "90 degrees anticlockwise" in square.remark
    cut = next(read_square(tmp_path / "side.png", square, 1))[0]
    assert np.array_equal(cut, replace(square, turn=0).crop(picture[None])[0])


def test_of_several_faces_the_largest_is_used_in_full_size(tmp_path):
    both = np.concatenate([portrait(110), portrait(150)], 1)
    large = cv2.resize(both, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    square = find_square(save(large, tmp_path / "two.jpg"), 1)
    assert "2 faces" in square.remark
    assert abs(square.left + square.side / 2 - 4 * (360 + 60 + 75)) < 60 and square.side > 700


def test_a_face_is_pasted_back_into_its_picture(tmp_path):
    path = save(portrait(), tmp_path / "portrait.png")
    square = Square(40, 50, 180)
    around = read_surroundings(path, square)
    frames = np.full((2, 32, 32, 3), 7, np.uint8)
    whole = np.stack(list(around.paste(frames)))
    inside = whole[:, 50:230, 40:220]
    assert (inside[:, 45:135, 45:135] == 7).all()  # the face itself
    outside = np.ones((300, 360), bool)
    outside[50:230, 40:220] = False
    assert (whole[:, outside] == portrait()[outside]).all()
    steps = np.abs(np.diff(whole[0].astype(int), axis=1)[100:200]).max()
    assert steps <= 20 + 10  # those of the wall, and the fading of the face
    whole_picture = save(portrait()[:, :300], tmp_path / "square.png")
    assert read_surroundings(whole_picture, Square(0, 0, 300)) is None


def test_a_face_at_the_border_of_its_picture_fades_on_the_other_side_only(tmp_path):
    around = read_surroundings(save(portrait(), tmp_path / "portrait.png"), Square(0, 50, 180))
    (whole,) = around.paste(np.full((1, 32, 32, 3), 7, np.uint8))
    middle = whole[140, :180]
    assert (middle[:120] == 7).all()
    assert np.abs(middle[179].astype(int) - portrait()[140, 179]).max() <= 1


def test_a_large_picture_round_a_face_is_scaled_down(tmp_path):
    large = cv2.resize(portrait(), None, fx=5, fy=5)
    around = read_surroundings(save(large, tmp_path / "large.png"), Square(200, 250, 900))
    assert around.picture.shape == (800, 960, 3)
    assert (around.left, around.top, around.side) == (107, 133, 480)

"""Real clips, which are not in the repository: preparation, the judge of words, and the default weights."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from corpora.preparation.clip import WorkItem
from corpora.preparation.media import Decode, Face
from corpora.preparation.networks import Crops
from corpora.preparation.sources_studio import grid
from engine.media.audio import read_audio
from engine.media.video import read_video
from engine.metrics.grid_recogniser import GridRecogniser
from engine.metrics.lips import LipOpening
from engine.metrics.words import GRID as JUDGE
from hicodit.bundled import FILMED, bundled_weights
from hicodit.pipeline import HiCoDiTPipeline

GRID = Path(__file__).resolve().parents[2] / "shared" / "grid"
NEW = ("s31", "s32", "s33", "s34")
RATE = 16_000
CLIPS = 5

pytestmark = pytest.mark.skipif(not GRID.is_dir(), reason="needs ../shared/grid, real clips that are not in here")


@pytest.fixture(scope="module")
def held_out():
    """Sentences of s1 on which nothing was trained."""
    clips = grid(GRID, protocol="seen", speakers=["s1"]).clips("test")
    return clips[:: len(clips) // CLIPS][:CLIPS]


@pytest.fixture(scope="module")
def judge():
    return GridRecogniser.from_pretrained(JUDGE)


def wrong_words(text: str, heard: str) -> int:
    return sum(one != two for one, two in zip(text.split(), heard.split(), strict=True))


def test_real_clips_are_prepared_with_their_words(held_out):
    new = [grid(GRID, protocol="seen", speakers=[name]) for name in NEW[:2]]
    for clip in [held_out[0], *(source.clips("train")[0] for source in new)]:
        item = WorkItem(clip, GRID)
        for step in (Decode(), Face(), Crops({})):
            step(item)
        words = [part for part in clip.phonemes if part[0] != "sil"]
        assert [word for word, _, _ in words] == clip.text.split()
        assert 73 <= item.length <= 75 and len(item.tensors["mouth"]) == item.length
        assert words[-1][2] < item.length / 25
        assert item.tensors["mouth"].float().std() > 10


def test_the_speaker_metric_accepts_recordings(held_out, judge):
    heard = [judge.transcribe(read_audio(GRID / clip.video, RATE), RATE) for clip in held_out]
    assert sum(wrong_words(clip.text, words) for clip, words in zip(held_out, heard)) <= 2


@pytest.mark.skipif(not FILMED.is_dir(), reason=f"needs the release {FILMED.name}")
def test_the_default_weights_say_what_held_out_lips_say(held_out, judge):
    pipeline = HiCoDiTPipeline.from_pretrained(FILMED)
    wrong = 0
    for clip in held_out:
        assert bundled_weights(GRID / clip.video) == FILMED
        speech = pipeline(GRID / clip.video, seed=0)
        wrong += wrong_words(clip.text, judge.transcribe(speech.wave, speech.rate))
    assert wrong <= 0.4 * 6 * CLIPS  # about 80 % are wrong by chance


@pytest.mark.skipif(not FILMED.is_dir(), reason=f"needs the release {FILMED.name}")
def test_new_people_get_a_remark_and_known_ones_none(held_out):
    pipeline = HiCoDiTPipeline.from_pretrained(FILMED)
    if pipeline.people is None:
        pytest.skip(f"{FILMED.name} has no people.json: python scripts/known_people.py SHARDS {FILMED}")
    assert [pipeline.people.remark(pipeline.crops(GRID / clip.video).voice_faces) for clip in held_out[:2]] == ["", ""]
    for name in ("s31", "s34"):
        assert pipeline.people.remark(pipeline.crops(min((GRID / name).glob("*.mp4"))).voice_faces)


def test_mouth_opening_does_not_depend_on_the_size_of_the_image():
    pytest.importorskip("dlib")
    pytest.importorskip("face_recognition_models")
    frames = read_video(GRID / "s31" / "bbac2n.mp4")[:40]
    opening = LipOpening()
    full = opening(frames)
    half = opening(np.stack([cv2.resize(frame, None, fx=0.6, fy=0.6) for frame in frames]))
    assert full.std() > 0.02 and np.corrcoef(full, half)[0, 1] > 0.9
    assert opening(frames[:1].repeat(3, 0)).std() == 0

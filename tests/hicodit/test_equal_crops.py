"""Preparation, infer.py, evaluation, demo and service cut the same pictures from a clip, byte for byte."""

from pathlib import Path

import numpy as np
import pytest
from drawn_faces import scene, talking_head

pytest.importorskip("fastapi", reason="needs the serve extra")
from fastapi.testclient import TestClient

from corpora.preparation.clip import SourceClip, WorkItem
from corpora.preparation.media import Decode, Face
from corpora.preparation.networks import Crops
from engine.evaluation.clips import Clip
from engine.media.audio import read_audio
from engine.media.video import write_video
from engine.metrics.metric import Take
from hicodit.evaluate import write_outputs
from hicodit.inference import ClipRunner
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import InferConfig
from service import demo_actions
from service.app import make_app
from service.limits import ServeLimits
from service.service import Service
from tests.waiting import wait_until

GRID = Path(__file__).resolve().parents[3] / "shared" / "grid"
FRAMES = 30


def drawn_clip(path: Path, frames: np.ndarray) -> Path:
    """Write a clip whose audio is three frames shorter than its picture."""
    wave = np.tile(read_audio("assets/demo/voice.wav", 24_000), 2)[: (len(frames) - 3) * 960]
    write_video(path, frames, 25, wave, 24_000)
    return path


def in_preparation(clip: Path) -> WorkItem:
    """Return what preparation makes of a clip."""
    item = WorkItem(SourceClip("clip", clip.name), clip.parent)
    for stage in (Decode(), Face(), Crops({})):
        stage(item)
    return item


def in_service(pipeline: HiCoDiTPipeline, clip: Path) -> None:
    service = Service(pipeline, None, ServeLimits(), demo=False)
    with TestClient(make_app(service)) as client, clip.open("rb") as file:
        answer = client.post("/v1/videos", files={"input_reference": (clip.name, file)}, data={"model": "hicodit"})
        name = answer.json()["id"]
        wait_until(lambda: client.get(f"/v1/videos/{name}").json()["status"] in ("completed", "failed"))
        assert client.get(f"/v1/videos/{name}").json()["status"] == "completed"


@pytest.fixture
def check(release, tmp_path, monkeypatch, spy):
    """Asserts that all programs cut the same pictures from a clip; gives what preparation makes."""

    def check(clip: Path) -> WorkItem:
        run = spy(HiCoDiTPipeline, "run")
        monkeypatch.setattr(demo_actions.TalkerPipeline, "from_pretrained", lambda *_, **__: None)

        jobs = ClipRunner(InferConfig(weights=str(release), input=str(clip), output=str(tmp_path / "infer")))
        jobs.generate([jobs.prepare(clip)])
        write_outputs([Clip("clip", None, Take(source=clip), {})], tmp_path, "cpu", str(release))
        demo_actions.Demo(tmp_path, release, device="cpu").speak(str(clip), None, 1, 1.0, 1.0, 0)
        pipeline = jobs.pipelines.for_clip(clip)
        in_service(pipeline, clip)

        used = [crops for call in run.call_args_list for crops in call.args[1]]
        assert len(used) == 4
        prepared = in_preparation(clip)
        mouth = prepared.tensors["mouth"].numpy()
        length = prepared.length
        track = prepared.face_track
        for crops in used:
            assert np.array_equal(crops.mouth[:length], mouth)
            assert np.array_equal(crops.track.boxes, track.boxes) and np.array_equal(crops.track.points, track.points)
            assert np.array_equal(crops.voice_faces, used[0].voice_faces)
        config = pipeline.system.encoders.config
        at = np.array(pipeline.system.voice_face_indices(len(track))) * config.picture_every
        assert np.array_equal(prepared.crop_faces(config, at), used[0].voice_faces)
        return prepared

    return check


def test_crops_of_drawn_faces_are_equal(check, tmp_path):
    check(drawn_clip(tmp_path / "head.mp4", talking_head(FRAMES)))


def test_crops_of_a_small_face_in_a_large_frame_are_equal(check, tmp_path):
    """The face is tracked in frames of 640 pixels and cut from larger ones, beyond preparation's `max_side`."""
    frames = scene(16, [lambda i: (600 + 2 * i, 200, 200)], (900, 1600))
    prepared = check(drawn_clip(tmp_path / "far.mp4", frames))
    assert prepared.frames.shape[2] == 1280 and max(prepared.face_frames.size) > 640


@pytest.mark.skipif(not GRID.is_dir(), reason="needs ../shared/grid, real clips that are not in the repository")
@pytest.mark.parametrize("speaker", ["s1", "s31", "s34"])
def test_crops_of_real_faces_are_equal(check, speaker):
    check(min((GRID / speaker).glob("*.mp4")))

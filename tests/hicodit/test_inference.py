"""`infer.py` as a person uses it: outputs, folders of clips, and one line for every kind of bad input."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from drawn_faces import scene, talking_head
from omegaconf import OmegaConf

from engine.batch_runner import run_jobs
from engine.config import compose, load, plain
from engine.errors import UserError
from engine.media.ffmpeg import probe
from engine.media.video import read_video, write_video
from engine.settings import make, override
from hicodit import inference
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import GuidanceScales, InferConfig, read_settings, with_preset


def run(config):
    settings, clips = read_settings(config)
    return run_jobs(inference.runner_of(settings), clips, settings)


def config(release, source, output, **changes):
    given = {"weights": str(release), "input": str(source), "output": str(output)}
    return OmegaConf.merge(compose("infer", []), given, changes)


def test_each_clip_of_a_folder_gets_its_own_wave_video_and_figure(release, clip, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copyfile(clip, clips / "long.mp4")
    write_video(clips / "short.mp4", talking_head(30), 25)
    out = tmp_path / "out"
    assert run(config(release, clips, out)) == 0
    assert "2.8 s of speech" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{suffix}" for name in ("long", "short") for suffix in ("mp4", "png", "wav")
    ]
    for name, frames in (("long", 40), ("short", 30)):
        sound = soundfile.info(out / f"{name}.wav")
        assert (sound.samplerate, sound.frames) == (24_000, frames * 960)
        assert len(read_video(out / f"{name}.mp4")) == frames and probe(out / f"{name}.mp4").audio


def test_sampler_groups_set_both_and_single_fields_override(release):
    pipeline = HiCoDiTPipeline.from_pretrained(release)

    def settings(*words):
        c = make(InferConfig, plain(load("infer", words)))
        return override(pipeline.sampler, c.sampler), override(pipeline.guidance, c.guidance)

    assert settings() == (pipeline.sampler, pipeline.guidance)
    sampler, guidance = settings("sampler=paper")
    assert (sampler.method, sampler.steps, len(guidance.branches)) == ("euler", 64, 5)
    sampler, guidance = settings("sampler=fast", "sampler.steps=5", "guidance.lip=2.0")
    assert (sampler.method, sampler.steps, guidance.lip) == ("confidence", 5, 2.0)
    _, guidance = with_preset("fast", pipeline.sampler, GuidanceScales(all=2.0, guidance_form="literal"))
    assert (guidance.guidance_form, guidance.all) == ("normalised", 2.0)


def test_an_existing_output_survives_a_failed_run(release, clip, tmp_path, monkeypatch):
    for name in ("head.wav", "head_face.png"):
        (tmp_path / name).write_text("keep me")

    def full_disk(*_):
        raise UserError("no space left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr("hicodit.inference.mux_audio", full_disk)  # the wave is written by then
        with pytest.raises(UserError, match="no space"):
            run(config(release, clip, tmp_path, debug=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head.wav", "head_face.png"]
    assert all(path.read_text() == "keep me" for path in tmp_path.iterdir())
    run(config(release, clip, tmp_path, figure=False))
    assert (tmp_path / "head.wav").stat().st_size > 1000


def test_a_clip_is_never_replaced_by_its_own_output(release, clip, tmp_path):
    shutil.copy(clip, tmp_path / "a.mp4")
    with pytest.raises(UserError, match="replace the input"):
        run(config(release, tmp_path, tmp_path))
    assert (tmp_path / "a.mp4").read_bytes() == clip.read_bytes()


def test_a_look_ahead_without_a_stream_is_refused(release, clip, tmp_path):
    with pytest.raises(UserError, match=r"lookahead=0\.2 is only used with stream=true"):
        run(config(release, clip, tmp_path, lookahead=0.2))


def test_two_clips_of_one_output_are_refused(release, clip, tmp_path):
    for name in ("a.mp4", "a.mov"):
        shutil.copy(clip, tmp_path / name)
    with pytest.raises(UserError, match="rename"):
        run(config(release, tmp_path, tmp_path / "out"))


def tracked(path):
    """The frames of a track that `debug` wrote."""
    return json.loads(path.read_text())["frames"]


def test_a_face_box_selects_the_face_and_debug_writes_the_track(release, clip, tmp_path):
    given = {"face_box": "30,24,68,68", "debug": True, "figure": False}
    assert run(config(release, clip, tmp_path / "box", **given)) == 0
    names = ["head.mp4", "head.wav", "head_face.json", "head_face.png"]
    assert sorted(p.name for p in (tmp_path / "box").iterdir()) == names
    frames = tracked(tmp_path / "box" / "head_face.json")
    assert len(frames) == 40 and frames[7]["box"] == [30, 24, 68, 68] and len(frames[7]["points"]) == 5


def test_each_face_gets_its_own_files(release, tmp_path):
    write_video(tmp_path / "two.mp4", scene(30, [lambda i: (5, 5, 112), lambda i: (180, 20, 90)]), 25)
    assert run(config(release, tmp_path / "two.mp4", tmp_path / "out", face="all", debug=True, figure=False)) == 0
    suffixes = (".mp4", ".wav", "_face.json", "_face.png")
    expected = {f"two_face{n}{suffix}" for n in (1, 2) for suffix in suffixes}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    lefts = [tracked(tmp_path / "out" / f"two_face{n}_face.json")[0]["box"][0] for n in (1, 2)]
    assert lefts[0] < 60 < 150 < lefts[1]
    write_video(tmp_path / "two_face1.mp4", scene(6, []), 25)
    with pytest.raises(UserError, match=r"replace .*two_face1\.mp4"):
        run(config(release, tmp_path, tmp_path, face="all"))


def test_landmarks_of_a_folder_are_in_pixels_of_the_clip_as_it_is_shown(release, tmp_path):
    """A clip of 1280 pixels, in which the face is looked for at 640: landmarks go in and come out in its own pixels."""
    video = np.full((30, 360, 1280, 3), 150, np.uint8)
    video[:, 50:178, 800:928] = talking_head(30)
    write_video(tmp_path / "wide.mp4", video, 25)
    points = np.zeros((68, 2)) + (864, 126)
    points[36:42] = np.linspace((845, 110), (853, 110), 6)  # the eyes
    points[42:48] = np.linspace((875, 110), (883, 110), 6)
    points[48:] = np.linspace((850, 140), (878, 140), 20)
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "wide.json").write_text(json.dumps([points.tolist()] * 30))
    given = {"face_landmarks": str(tmp_path / "points"), "debug": True}
    assert run(config(release, tmp_path / "wide.mp4", tmp_path / "out", **given)) == 0
    for frame in tracked(tmp_path / "out" / "wide_face.json"):
        matrix = np.array(frame["mouth"])
        x, y, w, h = frame["box"]
        assert np.allclose(frame["points"], points, atol=1e-3) and frame["seen"]
        assert np.abs(matrix[:, :2] @ (864, 140) + matrix[:, 2] - 48).max() <= 0.51
        assert x < 849 and x + w > 879 and y < 108 and y + h > 140 and w < 128

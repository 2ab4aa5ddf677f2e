"""`infer.py model=talker_t2av` as a person uses it: files out, many jobs, one line for every kind of mistake."""

import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf
from talker_fixtures import face_file, save_talker, voice_file

from engine.batch_runner import run_jobs
from engine.config import compose
from engine.errors import UserError
from engine.media.ffmpeg import command, probe
from engine.media.video import read_video
from talker_t2av import inference
from talker_t2av.settings import InferConfig, read_jobs, read_settings


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("talker")
    rng = np.random.default_rng(5)
    soundfile.write(root / "stereo.wav", 0.1 * rng.standard_normal((20_011, 2)), 22_050, subtype="PCM_24")
    return {
        "weights": str(save_talker(root)),
        "voice": str(voice_file(root / "voice.wav")),
        "stereo": str(root / "stereo.wav"),
        "face": str(face_file(root / "face.mp4")),
    }


def run(config):
    settings, jobs = read_settings(config)
    return run_jobs(inference.runner_of(settings), jobs, settings)


def config(files, output, **changes):
    changes = {"weights": files["weights"], "output": str(output), "max_seconds": 0.64, "figure": False} | changes
    return OmegaConf.merge(compose("infer_talker", []), changes)


def decoded(path: str | Path, *arguments: str) -> bytes:
    return subprocess.run(command("-v", "error", "-i", str(path), *arguments, "-"), capture_output=True).stdout


def test_four_modes_write_their_files_and_keep_what_was_given(files, tmp_path):
    voice = {"reference_audio": files["voice"]}
    face = {"reference_video": files["face"]}
    assert run(config(files, tmp_path, mode="t2av", text="hi", **voice, **face)) == 0
    assert run(config(files, tmp_path, mode="tts", text="hi", seed=4, **voice)) == 0
    assert run(config(files, tmp_path, mode="a2v", audio=files["stereo"], **face)) == 0
    assert run(config(files, tmp_path, mode="v2a", video=files["face"], **voice)) == 0
    names = ["a2v.mp4", "a2v.wav", "t2av.mp4", "t2av.wav", "tts.wav", "v2a.mp4", "v2a.wav"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names

    wave, rate = soundfile.read(tmp_path / "t2av.wav")
    assert rate == 24_000 and len(read_video(tmp_path / "t2av.mp4")) * 960 == len(wave)
    assert probe(tmp_path / "t2av.mp4").audio == "aac"
    pcm = ["-map", "0:a", "-f", "s32le", "-c:a", "pcm_s32le"]
    assert (tmp_path / "a2v.wav").read_bytes() == Path(files["stereo"]).read_bytes()
    assert len(decoded(files["stereo"], *pcm)) == 20_011 * 2 * 4
    assert decoded(tmp_path / "a2v.mp4", *pcm) == decoded(files["stereo"], *pcm)
    assert len(read_video(tmp_path / "a2v.mp4")) == -(-20_011 * 25 // 22_050)
    packets = ["-map", "0:v", "-c", "copy", "-f", "framemd5"]
    shown = {"audio": files["stereo"], "text": r"$\x 你", "name": "silent", "figure": True, **face}
    run(config(files, tmp_path / "shown", mode="a2v", **shown))
    assert sorted(p.name for p in (tmp_path / "shown").iterdir()) == ["silent.mp4", "silent.png", "silent.wav"]
    assert cv2.imread(str(tmp_path / "shown" / "silent.png")).std() > 20
    assert decoded(tmp_path / "v2a.mp4", *packets) == decoded(files["face"], *packets) != b""
    assert len(soundfile.read(tmp_path / "v2a.wav")[0]) == 15 * 960


def test_many_jobs_and_two_that_fail(files, tmp_path, capsys):
    lines = [
        {"text": "one", "name": "first"},
        {"text": "two", "reference_audio": "nowhere.wav"},
        {"text": 5},
        {"mode": "t2av", "text": "three", "reference_video": files["face"], "seed": 3},
    ]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert run(config(files, tmp_path / "out", mode="tts", reference_audio=files["voice"], jobs=str(jobs))) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0004.mp4", "0004.wav", "first.wav"]
    said = capsys.readouterr()
    missing, wrong = said.err.splitlines()
    assert "0002" in missing and "nowhere.wav" in missing
    assert "line 3" in wrong and "text=5" in wrong
    assert "2 of 4 jobs" in said.out


def test_the_bundled_model_works_on_the_demo_where_nothing_is_given():
    def job(**given):
        return read_jobs(InferConfig(**given))[0][1]

    for mode in ("t2av", "tts", "a2v", "v2a"):
        one = job(mode=mode)
        files = (one.reference_audio, one.reference_video, one.audio, one.video)
        assert one.text and all(Path(f).is_file() for f in files if f) and any(files)
    assert job(text="hello").text == "hello" and job(mode="v2a", video="x.mp4").text == ""
    assert job(mode="t2av", reference_video="x.mp4").reference_audio is None  # its own audio
    with pytest.raises(UserError, match="reference_audio"):
        job(mode="tts", text="a", weights="folder")


def test_no_job_replaces_what_another_reads_and_only_a_single_job_has_a_name(files, tmp_path):
    jobs = tmp_path / "tts.json"
    rows = [{"text": "one", "name": "voice"}, {"text": "two", "reference_audio": str(tmp_path / "voice.wav")}]
    jobs.write_text("\n".join(map(json.dumps, rows)))
    given = {"mode": "tts", "reference_audio": files["voice"], "jobs": str(jobs)}
    with pytest.raises(UserError, match=r"would replace the input .*voice\.wav"):
        run(config(files, tmp_path, **given))
    jobs.write_text('{"text": "one", "name": "tts"}')
    with pytest.raises(UserError, match=r"would replace the input .*tts\.json"):
        run(config(files, tmp_path, **given, timestamps=True))
    with pytest.raises(UserError, match="name=mine only applies to a single job"):
        run(config(files, tmp_path / "out", **given, name="mine"))


def test_audio_and_voices_that_are_too_short_are_named(files, tmp_path):
    soundfile.write(tmp_path / "short.wav", 0.1 * np.ones(30), 24_000)
    short = str(tmp_path / "short.wav")
    with pytest.raises(UserError, match=r"short\.wav has 0\.001 s: at least 0\.04 s"):
        run(config(files, tmp_path / "out", mode="a2v", audio=short, reference_video=files["face"]))
    with pytest.raises(UserError, match=r"short\.wav has 0\.00 s of audio: a voice needs at least 0\.25 s"):
        run(config(files, tmp_path / "out", mode="tts", text="a", reference_audio=short))
    assert not (tmp_path / "out").exists()


def test_jobs_of_a_file_have_the_bundled_voice_and_face_but_their_own_text(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"text": "hello"}\n{"text": "hello", "reference_video": "x.mp4"}\n{"reference_audio": "v.wav"}\n')
    (_, plain), (_, own), (_, wordless) = read_jobs(InferConfig(jobs=str(path)))
    assert Path(plain.reference_audio).is_file() and Path(plain.reference_video).is_file()
    assert (own.reference_video, own.reference_audio) == ("x.mp4", None)  # its own audio
    assert "requires text" in str(wordless)
    (_, faceless), *_ = read_jobs(InferConfig(jobs=str(path), weights="folder"))
    assert "requires the file reference_video" in str(faceless)


def test_times_of_words_are_written_beside_the_result(files, tmp_path):
    pytest.importorskip("pocketsphinx")
    given = {"text": "set blue", "reference_audio": files["voice"], "reference_video": files["face"]}
    assert run(config(files, tmp_path, mode="t2av", timestamps=True, min_seconds=0.64, **given)) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["t2av.json", "t2av.mp4", "t2av.srt", "t2av.vtt", "t2av.wav"]
    words = json.loads((tmp_path / "t2av.json").read_text())
    assert words["origin"] == "text"
    assert [word["text"] for word in words["words"]] in ([], ["set", "blue"])  # random weights may say nothing
    assert run(config(files, tmp_path / "tts", mode="tts", timestamps=True, **given)) == 0
    assert sorted(path.suffix for path in (tmp_path / "tts").iterdir()) == [".json", ".srt", ".vtt", ".wav"]

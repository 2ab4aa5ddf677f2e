"""Evaluation of any outputs: manifests, and the whole command."""

import json
import re
import sys
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.evaluation.clips import read_clips
from engine.media.audio import write_wav
from engine.metrics import lip_sync
from engine.metrics.lip_sync import LipSync
from engine.metrics.quality import STOI
from engine.metrics.words import WordErrors
from scripts import evaluate

RATE = 16_000


# --- which files belong together ---


@pytest.fixture
def folders(tmp_path):
    """Three clips of noise bursts, and two systems that add noise: true/, good/, bad/ and a manifest."""
    rng = np.random.default_rng(0)
    time = np.arange(2 * RATE) / RATE
    rows = []
    for i in range(3):
        voice = sum(np.sin(2 * np.pi * (110 + 10 * i) * k * time) / k for k in range(1, 12))
        wave = 0.1 * voice * (np.sin(2 * np.pi * 3 * time) > -0.3)
        for name, level in {"true": 0, "good": 0.003, "bad": 0.05}.items():
            write_wav(tmp_path / name / f"s{i % 2}" / f"c{i}.wav", wave + level * rng.standard_normal(len(wave)), RATE)
        rows.append({"id": f"s{i % 2}/c{i}", "text": "set blue", "speaker": f"s{i % 2}"})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_files_are_found_by_id_or_named_by_the_manifest(folders):
    clips = read_clips(folders / "clips.jsonl", folders / "true", {"good": folders / "good"})
    assert clips[0].takes["good"].audio == folders / "good" / "s0" / "c0.wav" and clips[0].truth.text == "set blue"
    row = {"id": "x", "text": "a", "output": "good/s0/c0.wav", "reference": "true/s0/c0.wav", "video": "c.mp4"}
    (folders / "named.jsonl").write_text(json.dumps(row))
    (clip,) = read_clips(folders / "named.jsonl", None, {})
    assert clip.takes["output"].audio == folders / "good/s0/c0.wav" and clip.truth.video == folders / "c.mp4"
    assert clip.takes["output"].video is None and clip.takes["output"].source == folders / "c.mp4"
    (folders / "true" / "s0" / "c0.txt").write_text("Text:  SET BLUE\nConf:  4\n")
    (folders / "true" / "s1" / "c1.normalized.txt").write_text("Set green.\n")
    one, _, two = read_clips(None, folders / "true", {})
    assert (one.truth.text, two.truth.text, one.speaker, two.speaker) == ("SET BLUE", "Set green.", "s0", "s1")


def test_a_manifest_names_the_outputs_of_one_system_alone(folders):
    rows = [{"id": "s0/c0", "text": "blue\u2028two", "output": "bad/s0/c0.wav", "heard": "set blue"}]
    (folders / "own.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False))
    (alone,) = read_clips(folders / "own.jsonl", folders / "true", {})
    assert alone.takes["output"].audio == folders / "bad/s0/c0.wav" and alone.truth.text == "blue\u2028two"
    (given,) = read_clips(folders / "own.jsonl", folders / "true", {"good": folders / "good"})
    assert given.takes["good"].audio == folders / "good/s0/c0.wav"
    with pytest.raises(UserError, match="transcript of one system, not of 2"):
        read_clips(folders / "own.jsonl", folders / "true", {name: folders / name for name in ("good", "bad")})
    (folders / "own.jsonl").write_text('{"id": "a", "output": 5}')
    with pytest.raises(UserError, match="output must be a string"):
        read_clips(folders / "own.jsonl", folders / "true", {})


def test_files_are_found_with_suffixes_of_any_case_and_in_linked_folders(folders):
    (folders / "true/s0/c0.wav").rename(folders / "true/s0/c0.WAV")
    (folders / "linked").mkdir()
    (folders / "linked/all").symlink_to(folders / "true")
    clips = read_clips(None, folders / "linked", {})
    assert [clip.id for clip in clips] == ["all/s0/c0", "all/s0/c2", "all/s1/c1"]
    assert clips[0].truth.audio == folders / "linked/all/s0/c0.WAV"


# --- the command ---


class Report(NamedTuple):
    code: int
    results: dict[str, Any]
    out: str
    err: str
    page: str


@pytest.fixture
def run(monkeypatch, folders, capsys):
    """Run the command on `folders` and return what it leaves.

    outputs: names of folders with outputs; None where a model makes them.
    """

    def run(*words, outputs=("good",), metrics="stoi", table="codec", media=False):
        if metrics and "stoi" in metrics:
            pytest.importorskip("pystoi")
        report = folders / "report"
        words += (f"manifest={folders}/clips.jsonl", f"references={folders}/true", f"output={report}")
        given = {"table": table, "metrics": metrics and f"[{metrics}]", "media": str(media).lower()}
        given["outputs"] = outputs and f"{{{', '.join(f'{name}: {folders}/{name}' for name in outputs)}}}"
        words += tuple(f"{name}={value}" for name, value in given.items() if value)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "workers=1", "resamples=200"])
        code = evaluate.main()
        said = capsys.readouterr()
        results, page = ((report / name).read_text() for name in ("results.json", "report.html"))
        return Report(code, json.loads(results), *said, page)

    return run


def write_tone(path, hertz, seconds=2.0):
    write_wav(path, 0.1 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE), RATE)


def test_two_systems_are_compared_in_tables_and_a_page(run):
    code, results, out, _, page = run(outputs=("good", "bad"), metrics="stoi,utmos", media=True)
    assert code == 0
    good, bad, true = (results["systems"][name]["stoi"] for name in ("good", "bad", "true speech"))
    assert true["value"] == pytest.approx(1) and true["value"] > good["value"] > bad["value"]
    assert good["interval"][0] <= good["value"] <= good["interval"][1] and good["interval_speakers"] is not None
    (test,) = results["tests"]
    assert test["difference"] == pytest.approx(good["value"] - bad["value"])
    assert "no significant difference" in out
    assert "utmos_state_dict.pt" in results["left_out"]["figures"]["utmos"]
    assert all("WhisperX-VAE (25 Hz, 32 dimensions)" in text for text in (out, page))  # a row of the paper's table
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert page.count("<audio") == page.count('alt="spectrogram"') == 3 * 3


def test_outputs_of_other_clips_are_a_control(run):
    _, results, _, _, _ = run("exchanged=true", outputs=("good", "bad"))
    good, control = (results["systems"][name]["stoi"] for name in ("good", "good, exchanged"))
    assert control["clips"] == good["clips"] == 3 and control["value"] < good["value"]
    assert {tuple(test["systems"]) for test in results["tests"]} == {("good", "bad")}
    assert "good, exchanged" not in run("exchanged=true", "clips=1").results["systems"]


def test_the_report_names_the_better_system(run, folders):
    rows = []
    for i in range(9):  # the p-value of fewer clips cannot be small
        name = f"s{i % 3 % 2}/c{i % 3}.wav"
        rows.append({"id": f"{i}", "reference": f"true/{name}"} | ({"speaker": f"s{i % 2}"} if i < 4 else {}))
        for system in ("good", "bad"):
            (folders / system / f"{i}.wav").write_bytes((folders / system / name).read_bytes())
    (folders / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, results, out, _, page = run(outputs=("bad", "good"))
    (test,) = results["tests"]
    assert results["systems"]["good"]["stoi"]["interval_speakers"] is None  # some speakers are unknown
    assert test["better"] == "good" and test["interval"][0] < test["difference"] < test["interval"][1] < 0
    assert all("good is better" in text for text in (out, page))


def test_skipped_clips_and_other_durations_are_reported(run, folders):
    write_tone(folders / "good" / "s0" / "c0.wav", 111, seconds=1)
    write_tone(folders / "good" / "s0" / "c2.wav", 111, seconds=0.1)
    _, results, out, err, page = run()
    assert all("2 of 3 outputs of good" in text for text in (out, page))
    assert "s0/c2 (good, STOI)" in err and results["systems"]["good"]["stoi"]["clips"] == 2


def test_unreadable_and_missing_files_are_reported_and_skipped(run, folders):
    (folders / "good" / "s0" / "c0.wav").write_text("no sound")
    (folders / "good" / "s1" / "c1.wav").unlink()
    code, results, out, err, _ = run(outputs=("good", "bad"))
    assert code == 1 and [results["systems"][name]["stoi"]["clips"] for name in ("good", "bad")] == [1, 3]
    assert [row["clip"] for row in results["left_out"]["files"]] == ["s0/c0", "s1/c1"]
    assert "c0.wav" in err and "different clips" in out


def test_a_nan_result_is_skipped(run, monkeypatch):
    measured = STOI.measure
    values = iter([float("nan")])
    monkeypatch.setattr(STOI, "measure", lambda *a: {"stoi": (next(values, None) or measured(*a)["stoi"][0], 1)})
    results = run().results
    assert [row["why"] for row in results["left_out"]["files"]] == ["the result is not finite"]
    assert results["systems"]["good"]["stoi"]["value"] > 0.5


@pytest.fixture
def run_words(run, monkeypatch, folders):
    """Run the command with the recogniser of a grammar, which is not loaded."""
    pytest.importorskip("pocketsphinx")
    (folders / "g.jsgf").write_text("#JSGF V1.0;\ngrammar g;\npublic <s> = set blue;\n")
    monkeypatch.setattr(WordErrors, "load", lambda self: None)
    return partial(run, "protocol.wer=grammar", f"grammar={folders}/g.jsgf", metrics="wer", table=None)


def test_words_outside_the_grammar_have_their_own_column(run_words, monkeypatch):
    texts = iter(["set blue", "set free", "set blue"] * 2)
    measured = {"set blue": {"wer": (0, 2)}, "set free": {"wer_free": (1, 2)}}
    words = dict.fromkeys(("heard", "text", "words"), "set blue")
    monkeypatch.setattr(WordErrors, "measure", lambda *_: measured[next(texts)] | words)
    code, results, out, *_ = run_words()
    cells = results["systems"]["good"]
    assert code == 0 and cells["wer"]["value"] == 0 and cells["wer_free"]["value"] > 0
    assert "WER free %" in out and "whisper-medium" in out  # the paper's recogniser is another one


def test_a_changed_file_of_the_recogniser_invalidates_cached_measurements(run_words, monkeypatch, folders):
    monkeypatch.setattr(WordErrors, "measure", lambda *_: {"wer": (0, 2), "heard": "", "text": "set", "words": "set"})
    run_words()
    for name in ("free.arpa", "free.dict", "g.dict"):
        (folders / name).write_text("of another corpus")
        assert run_words().results["found_in_cache"] == {"WordErrors": 0}
    assert run_words().results["found_in_cache"] == {"WordErrors": 6}


def test_measurements_are_cached_by_the_content_of_the_files(run, monkeypatch, folders):
    first = run().results
    (folders / "elsewhere").mkdir()
    for speaker in ("s0", "s1"):
        (folders / "good" / speaker).rename(folders / "elsewhere" / speaker)  # the contents count, not the place
    with monkeypatch.context() as patch:
        patch.setattr(STOI, "measure", lambda *_: pytest.fail("measured again"))
        second = run(outputs=("elsewhere",)).results
    assert second["found_in_cache"] == {"STOI": 6} and first["found_in_cache"] == {"STOI": 0}
    assert second["systems"]["elsewhere"] == first["systems"]["good"]
    for file, content in zip(sorted((folders / "report" / "cache").rglob("*.npz")), (b"", b"PK\x03\x04 cut short")):
        file.write_bytes(content)
    mended = run(outputs=("elsewhere",)).results
    assert mended["found_in_cache"] == {"STOI": 4} and mended["systems"] == second["systems"]
    write_tone(folders / "elsewhere" / "s0" / "c0.wav", 111)
    assert run(outputs=("elsewhere",)).results["found_in_cache"] == {"STOI": 5}
    write_tone(folders / "true" / "s1" / "c1.wav", 95)  # the ground-truth clip and the output that is compared with it
    assert run(outputs=("elsewhere",)).results["found_in_cache"] == {"STOI": 4}


# --- outputs that a model generates ---


def test_a_codec_resynthesises_the_clips_and_resumes(run, folders):
    again = partial(run, "model=rvq_codec", outputs=None, metrics="stoi,bitrate")
    code, results, *_ = again("devices=2", "device=cpu")
    cells = results["systems"]["rvq_codec"]
    assert code == 0 and cells["stoi"]["clips"] == 3 and results["systems"]["true speech"]["stoi"]["value"] > 0.99
    kept = folders / "report" / "outputs" / "s0" / "c0.wav"
    before = kept.stat().st_mtime_ns
    (folders / "report" / "outputs" / "s1" / "c1.wav").unlink()
    assert again().results["systems"] == results["systems"] and kept.stat().st_mtime_ns == before
    assert cells["bitrate"]["value"] == 12 * 8 * 50  # levels, bits of 256 codes, frames per second
    with pytest.raises(UserError, match="other settings"):
        again("generate.levels=1")
    facts = json.loads((folders / "report/outputs/system.json").read_text())
    facts["digest_of_weights"] = "of other weights"
    (folders / "report/outputs/system.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="other settings or by an earlier version"):
        again()
    for file in (folders / "report/outputs").rglob("*.wav"):
        file.unlink()
    assert again().results["systems"] == results["systems"]  # there was nothing to mix them with
    write_tone(folders / "true" / "s1" / "c1.wav", 95)  # another file of the same name
    with pytest.raises(UserError, match="s1/c1"):
        again()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("protocol.werr=grid", "protocol=werr"),
        ("protocol.stoi=other", "it has only one: omit it"),
        ("systems={../../a: {}}", "systems: a name"),
        ("systems={a: 1}", "systems.a=1 must be settings"),
    ],
)
def test_unknown_protocols_and_systems_are_refused(run, word, message):
    with pytest.raises(UserError, match=message):
        run("model=rvq_codec", word, outputs=None)


def test_a_clip_without_video_is_reported_before_the_model_runs(run, capsys):
    with pytest.raises(UserError, match="3 clips"):
        run("model=hicodit", "metrics=stoi", outputs=None, metrics=None, table=None)
    assert capsys.readouterr().err.count("ID.mp4") == 3


def test_lip_sync_of_audio_outputs_uses_the_input_video(run, monkeypatch, folders):
    (folders / "face.mp4").write_bytes(b"a video")
    row = {"id": "x", "output": "good/s0/c0.wav", "reference": "true/s0/c0.wav", "video": "face.mp4"}
    (folders / "clips.jsonl").write_text(json.dumps(row))
    used = []
    score = lip_sync.SyncScore(1.0, 1.0, 0, torch.zeros(1, 1))
    monkeypatch.setattr(LipSync, "weight_files", ())
    monkeypatch.setattr(LipSync, "load", lambda metric: setattr(metric, "network", MagicMock()))
    monkeypatch.setattr(lip_sync, "face_video", used.append)
    monkeypatch.setattr(lip_sync, "sync_score", lambda *_: score)
    assert run(outputs=None, metrics="lse_c,lse_d", table="hicodit").code == 0
    assert set(used) == {folders / "face.mp4"}


def test_the_prompt_of_a_talker_is_another_clip_of_the_speaker(folders):
    rows = [{"id": "s0/c0", "text": "one", "speaker": "a"}, {"id": "s0/c2", "text": "two", "speaker": "a"}]
    rows += [{"id": "s1/c1", "text": "one", "speaker": "b"}]
    rows[0]["reference_video"] = "face.mp4"
    (folders / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = read_clips(folders / "m.jsonl", folders / "true", {})
    assert clips[0].prompt.video == folders / "face.mp4" and clips[0].prompt.audio is None
    assert clips[1].prompt.audio == folders / "true" / "s0" / "c0.wav"
    assert clips[2].prompt.audio is None  # never its own voice

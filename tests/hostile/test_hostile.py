"""Damaged and malicious inputs: each ends the program with a one-line error and exit code 2.

`CASES` of each module `rows_*` are tuples (name, call, line): `call(folder)` uses the input in an empty folder, `line`
is a pattern of the error. No case may write outside its folder, run its payload, or use 2 GiB of memory.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.batch_runner import BatchResult
from engine.download import RemoteFile, fetch
from engine.errors import UserError, run_cli
from engine.release import read_release, save_release
from engine.training.settings import TrainerConfig
from engine.training.trainer import Trainer
from tests.engine.toy_task import CONFIG, ToyGAN, ToySet
from tests.hostile import rows_files, rows_media, rows_values
from tests.hostile.rows_files import MEMORY

CASES = [*rows_files.CASES, *rows_media.CASES, *rows_values.CASES]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("call, line", [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_a_hostile_input_ends_in_one_line_and_leaves_nothing(call, line, tmp_path, capsys):
    folder = tmp_path / "a" / "b" / "c"  # room for `../../..`
    folder.mkdir(parents=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: call(folder))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(line, error), error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY
    assert not list(tmp_path.rglob("ran")), "a payload was run"
    outside = [path for path in tmp_path.rglob("*") if folder not in path.parents and path not in folder.parents]
    assert outside == [folder]


def test_interpolations_in_the_config_of_a_release_are_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    save_release(tmp_path / "release", "toy", {"width": 3}, {"w": torch.ones(2)}, "")
    (tmp_path / "release" / "config.yaml").write_text("kind: toy\nx: ${oc.env:SECRET}\n")
    assert read_release(tmp_path / "release", "toy")[0] == {"x": "${oc.env:SECRET}"}


def test_a_run_does_not_write_through_a_symbolic_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "profile").write_text("")
    (tmp_path / "run" / "log.jsonl").symlink_to(tmp_path / "profile")
    with pytest.raises(UserError, match=r"log\.jsonl is a link"):
        Trainer(ToyGAN(), ToySet(), TrainerConfig(**CONFIG), tmp_path / "run").fit()
    assert (tmp_path / "profile").read_text() == ""


def test_a_download_larger_than_expected_is_stopped(file_server, tmp_path):
    file_server.files["/index.json"] = bytes(2000)
    index = RemoteFile("index.json", f"{file_server.address}/index.json", most=1999)
    with pytest.raises(UserError, match="sends more than the expected 1,999 bytes"):
        fetch(index, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [("infer.py model=talker_t2av --help", 141), ("train.py experiment=hicodit_minute --info defaults", 0)],
    ids=["help", "info, which Hydra logs"],
)
def test_a_closed_pipe_on_standard_output_is_not_an_error(words, code):
    command = f"{sys.executable} {words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{code}\n", "")


def test_control_characters_of_file_names_are_not_printed(capsys):
    names = ["\x1b[2Jgone", "\u202egpj", "\x9b31m", "plain é 你"]
    BatchResult(failed=[("line\nbreak", "no such file")], lines=names).print()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["?[2Jgone", "?gpj", "?31m", "plain é 你"]
    assert printed.err == "failed: line break: no such file\n"

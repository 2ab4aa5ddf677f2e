"""`speaking-faces`, the console command, and the errors of `infer.py` before it imports torch."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def command(*words: str, folder: Path) -> subprocess.CompletedProcess:
    """Run the installed command's function in a folder, as the script that pip makes does; it prints its seconds."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["speaking-faces"]
    module, _, function = entry.partition(":")
    timed = "import atexit, time; t = time.perf_counter(); atexit.register(lambda: print(time.perf_counter() - t))"
    call = [sys.executable, "-c", f"{timed}; import {module}; {module}.{function}()", *words]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_command_works_in_any_folder_and_prints_its_duration(tmp_path):
    done = command("sampler=fast", "sampler.steps=2", "codec=assets/rvq_speech", "figure=false", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["silent.mp4", "silent.wav"]
    _, line, wall = done.stdout.splitlines()
    stated = float(re.search(r"of speech in ([\d.]+) s", line)[1])
    assert stated == pytest.approx(float(wall), rel=0.03, abs=0.5)
    wrong = command("train", "experiment=nosuch", folder=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: experiment=nosuch does not exist")


WAITING = """
import tempfile, time
from engine.errors import run_cli
def main():
    with tempfile.TemporaryDirectory():
        print("ready", flush=True)
        time.sleep(60)
run_cli(main)
"""


def test_a_command_that_is_terminated_removes_its_temporary_files(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, env=environment, cwd=ROOT)
    assert process.stdout.readline() == b"ready\n" and [*tmp_path.iterdir()]
    process.terminate()
    assert process.wait(60) == 143 and not [*tmp_path.iterdir()]


MISTAKES = [
    ("input=nothing.mp4", "input=nothing.mp4"),
    ("codec=nowhere", "codec=nowhere"),
    ("output={text}", "output="),
    ("device=tpu", "device=tpu"),
    ("model=talker_t2av mode=v2a video={clip} reference_video={clip}", "silent.mp4 has no audio"),
    ("model=talker_t2av name=../x", "name="),
    ("text=hello", "text is a setting of model=talker_t2av"),
    ("model=talker_t2av sampler=fast", "sampler is a setting of model=hicodit"),
    ("modle=talker_t2av", "unknown setting 'modle'; did you mean model"),
]
CALL = """
import json, sys, infer
for words in json.load(sys.stdin):
    sys.argv[1:] = words.split()
    try:
        infer.main()
    except ValueError as error:
        print(error)
    assert "torch" not in sys.modules, words
"""


def test_wrong_settings_are_reported_before_torch_is_imported(tmp_path):
    demo = ROOT / "assets" / "demo"
    named = {"text": demo / "silent.txt", "clip": demo / "silent.mp4"}
    words = [mistake.format(**named) for mistake, _ in MISTAKES]
    call = [sys.executable, "-c", CALL]
    done = subprocess.run(call, input=json.dumps(words), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(MISTAKES), lines
    for line, (mistake, message) in zip(lines, MISTAKES):
        assert message in line, mistake
    assert not list(tmp_path.iterdir())


COMMANDS = [p for p in (*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")) if "run_cli(main" in p.read_text()]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_without_the_environment_an_error_says_how_to_install_it(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call = [sys.executable, "-S", script, "--help"]  # -S: without installed packages
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert len(COMMANDS) > 10 and done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the project's packages are not installed") and done.stderr.count("\n") == 1

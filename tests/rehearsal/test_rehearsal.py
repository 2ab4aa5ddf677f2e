"""The documentation's commands have a row, and they run at small size."""

import re

import pytest

from engine.config import compose
from tests.rehearsal import walk

PROGRAMS = {  # configuration of each program
    "train.py": "train",
    "infer.py": "infer",
    "scripts/prepare_data.py": "prepare",
    "scripts/evaluate.py": "evaluate",
}


def test_every_command_has_a_row_and_every_row_a_command(tmp_path):
    commands = walk.documented()
    assert sum(bool(step.call) or "needs" in step.reason for step in walk.plan(tmp_path)) > 50
    programs = re.findall(r"(?:python |bash |torchrun --nproc\S+ )(-m )?([\w/.]+)(?= |$)", "\n".join(commands))
    files = [name.replace(".", "/") + ".py" if module else name for module, name in programs]
    missing = [name for name in files if not list(walk.ROOT.glob(name.removesuffix(".py") + "*"))]
    assert len(files) > 70 and missing == []


def test_the_settings_of_every_small_call_exist(tmp_path):
    composed = 0
    for step in walk.plan(tmp_path):
        words = walk.words_of(step.call)
        program = next((word for word in words if word in PROGRAMS), None)
        if program is None:
            continue
        config = PROGRAMS[program] + "_talker" * ("model=talker_t2av" in words)
        settings = words[words.index(program) + 1 :]
        if "-m" in settings:  # a sweep
            continue
        compose(config, [word for word in settings if "=" in word and not word.startswith("-")])
        composed += 1
    assert composed > 40


@pytest.mark.slow
def test_the_documentation_is_walked(tmp_path):
    failed, passed_over = walk.walk(tmp_path / "work")
    assert failed == 0
    # docs/releasing.md, from a folder of clips to a talking face, by LoRA on stand-ins of the released weights
    assert (tmp_path / "work" / "runs" / "talker_finetune" / "release" / "model.safetensors").is_file()
    assert list((tmp_path / "work" / "outputs").glob("*.mp4"))
    if passed_over:
        pytest.skip(f"{len(passed_over)} commands were not run, the others ended well; {passed_over[0]}")

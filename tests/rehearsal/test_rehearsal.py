"""The documentation's commands have a row, and they run at small size."""

import re

import pytest

from tests.rehearsal import walk


def test_every_command_has_a_row_and_every_row_a_command(tmp_path):
    commands = walk.documented()
    assert sum(bool(step.call) or "needs" in step.reason for step in walk.plan(tmp_path)) > 50
    programs = re.findall(r"(?:python |bash |torchrun --nproc\S+ )(-m )?([\w/.]+)(?= |$)", "\n".join(commands))
    files = [name.replace(".", "/") + ".py" if module else name for module, name in programs]
    missing = [name for name in files if not list(walk.ROOT.glob(name.removesuffix(".py") + "*"))]
    assert len(files) > 70 and missing == []


@pytest.mark.slow
def test_the_documentation_is_walked(tmp_path):
    failed, passed_over = walk.walk(tmp_path / "work")
    assert failed == 0
    # docs/releasing.md, from a folder of clips to a talking face, by LoRA on stand-ins of the released weights
    assert (tmp_path / "work" / "runs" / "talker_finetune" / "release" / "model.safetensors").is_file()
    assert list((tmp_path / "work" / "outputs").glob("*.mp4"))
    if passed_over:
        pytest.skip(f"{len(passed_over)} commands were not run, the others ended well; {passed_over[0]}")

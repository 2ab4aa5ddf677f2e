"""The documentation's commands are found, each has a row, and they run at small size."""

import re

import pytest

from tests.rehearsal import walk

PAGE = """Text with `python infer.py` and `not a command`.

```bash
python train.py experiment=NAME \\
    trainer=fsdp   # it's a comment
bash scripts/setup.sh && .venv/bin/python infer.py
```

    torchrun --nproc_per_node=8 train.py
    step 1/2 | loss 3.0

A sentence `python
scripts/plot_run.py runs/A`, and more.
"""


def test_commands_of_a_page():
    assert sorted(walk.commands_of(PAGE)) == [
        (1, "python infer.py"),
        (4, "python train.py experiment=NAME trainer=fsdp"),
        (6, "bash scripts/setup.sh && .venv/bin/python infer.py"),
        (9, "torchrun --nproc_per_node=8 train.py"),
        (12, "python scripts/plot_run.py runs/A"),
    ]
    with pytest.raises(ValueError, match=r"line 2: 'make all' is not understood"):
        list(walk.commands_of("```bash\nmake all\n```\n"))


def test_every_command_has_a_row_and_every_row_a_command(tmp_path, monkeypatch):
    commands = walk.documented()
    assert sum(bool(step.call) or "needs" in step.reason for step in walk.plan(tmp_path)) > 50
    programs = re.findall(r"(?:python |bash |torchrun --nproc\S+ )(-m )?([\w/.]+)(?= |$)", "\n".join(commands))
    files = [name.replace(".", "/") + ".py" if module else name for module, name in programs]
    assert (
        len(files) > 70 and [name for name in files if not list(walk.ROOT.glob(name.removesuffix(".py") + "*"))] == []
    )
    monkeypatch.setattr(walk, "documented", lambda: commands | {"python scripts/new.py": "docs/new.md:7"})
    with pytest.raises(ValueError, match=r"docs/new\.md:7: 'python scripts/new\.py' has no row"):
        walk.plan(tmp_path)
    monkeypatch.setattr(walk, "documented", lambda: {"python infer.py": "README.md:1"})
    with pytest.raises(ValueError, match="no documented command has"):
        walk.plan(tmp_path)


@pytest.mark.slow
def test_the_documentation_is_walked(tmp_path):
    failed, passed_over = walk.walk(tmp_path / "work")
    assert failed == 0
    # docs/one_card.md, from a folder of clips to a talking face, by LoRA on stand-ins of the released weights
    assert (tmp_path / "work" / "runs" / "talker_finetune" / "release" / "model.safetensors").is_file()
    assert list((tmp_path / "work" / "outputs").glob("*.mp4"))
    if passed_over:
        pytest.skip(f"{len(passed_over)} commands were not run, the others ended well; {passed_over[0]}")

"""Mistakes that a command used to report after work was done, or might: each is one line, at once, and leaves nothing.

The commands run in this process, in an empty folder with the files of `folder`. Making data counts as work. There is
one row for each kind of mistake of a program, not one for each setting.
"""

import importlib
import json
import shlex
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import run_cli
from engine.training import run
from engine.training.settings import TrainerConfig

ROOT = Path(__file__).resolve().parents[2]
HICODIT = "experiment=hicodit_synthetic"
SPEAK = "model=talker_t2av mode=tts text=a reference_audio=sounds/voice.wav"
SHARDS = "source.root=corpus output=shards"
TRAIN = [
    (f"{HICODIT} trainer.device=cuda", "no CUDA device"),
    (f"{HICODIT} run=file", "run=file"),
    (f"{HICODIT} run=finished", "finished/release"),
    (f"{HICODIT} run=other", "model has changed"),
    (f"{HICODIT} data.held_out=[nope]", "nope"),
    (f"{HICODIT} data.split=trian", "trian"),
    (f"{HICODIT} task.model.levels=99", "99 levels"),
    (f"{HICODIT} init=damaged", "damaged/model.safetensors"),
    ("experiment=rvq_synthetic trainer.by_length=true", "no lengths"),
]
INFER = [
    ("detector=nowhere.onnx", "nowhere.onnx"),
    ("input=clip.mp4 output=spoken reference_audio=spoken/clip.wav", "would replace the input spoken/clip.wav"),
    ("input=clip.mp4 guidance.guidance_form=literal", "use sampler.method=euler"),
    (f"{SPEAK} mode=t2av reference_video=clip.mp4 output=. name=clip", "would replace"),
    ("model=talker_t2av jobs=bad.jsonl", "line 1 of jobs=bad.jsonl"),
    (f"{SPEAK} min_seconds=2 max_seconds=1", "max_seconds=1 is below min_seconds=2"),
]
REPORT = "references=sounds output=report"
OWN = "corpus=corpus output=report split=[train]"
EVALUATE = [
    (f"{REPORT} outputs=sounds cache=file", "cache=file"),
    (f"{REPORT} outputs=nowhere", "nowhere"),
    (f"{REPORT} protocol.wer=grammar", "grammar=FILE.jsgf"),
    (f"table=synthetic_hicodit {OWN} only=[other]", "only=other"),
    (f"{REPORT} model=rvq_codec generate.sampler=fast", "generate.sampler"),
    (f"{REPORT} systems={{{{a:{{{{model:hicodit,mode:tts}}}}}}}}", "systems.a.mode"),
    (f"{REPORT} table=talker model=lia_x generate.levels=2", "generate.levels=2"),
    (f"table=synthetic_hicodit {OWN} model=rvq_codec only=[tokenizer] generate.codec=nowhere", "nowhere"),
    (f"{REPORT} outputs=sounds generate.levels=2", "generate.levels has no effect"),
]
PREPARE = [
    ("source.root=nowhere output=shards", "source.root=nowhere"),
    (f"{SHARDS} splits=[nope]", "nope"),
    (f"{SHARDS} stages.rvq.codec=assets/lia_x_real", "'lia_x'"),
]
SCRIPTS = [
    ("export sounds out", "sounds has no checkpoint"),
    ("export {assets}/rvq_speech sounds --compact", "sounds exists"),
    ("serve --rows 0", "--rows=0"),
    ("plan_run nope", "experiment=nope"),
    ("dry_run hicodit_paper", "trainer.parallel=ddp"),
    ("check_gpu --out out", "1 CUDA devices are required"),
]
PACKAGES = [  # command, module that is not installed, the line
    (f"train {HICODIT}", "resemblyzer", "this requires resemblyzer"),
    (f"train {HICODIT} trainer.tensorboard=true", "torch.utils.tensorboard", "setup.sh tensorboard"),
    ("infer timestamps=true", "pocketsphinx", "setup.sh eval"),
    ("scripts.serve", "fastapi", "setup.sh serve"),
    (f"scripts.prepare_data {SHARDS} executor=ray", "ray", "setup.sh cluster"),
]
PROGRAMS = {"train": TRAIN, "infer": INFER, "scripts.evaluate": EVALUATE, "scripts.prepare_data": PREPARE}
ROWS = [(program, words, message) for program, rows in PROGRAMS.items() for words, message in rows]
ROWS += [(f"scripts.{words.partition(' ')[0]}", words.partition(" ")[2], message) for words, message in SCRIPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files to name: a text, a release whose weights are damaged, audio, a corpus, runs of earlier commands."""
    made = tmp_path_factory.mktemp("late")
    (made / "file").write_text("x")
    (made / "bad.jsonl").write_text('{"text": 3\n')
    shutil.copy(ROOT / "assets/demo/silent.mp4", made / "clip.mp4")
    shutil.copytree(ROOT / "assets/hicodit_tiny", made / "damaged")
    (made / "damaged/model.safetensors").write_bytes(b"x" * 100)
    (made / "sounds").mkdir()
    shutil.copy(ROOT / "assets/demo/voice.wav", made / "sounds")
    (made / "spoken").mkdir()
    shutil.copy(ROOT / "assets/demo/voice.wav", made / "spoken/clip.wav")
    (made / "corpus/train").mkdir(parents=True)
    clip = {"id": "a", "text": "x", "voice": 0, "expression": 0, "phonemes": []}
    (made / "corpus/train.jsonl").write_text(json.dumps(clip) + "\n")
    shutil.copy(ROOT / "assets/demo/grammar.jsgf", made / "corpus")
    (made / "finished/release").mkdir(parents=True)
    (made / "finished/release/notes.txt").write_text("mine")
    return made


@pytest.fixture(scope="module")
def other_run(folder):
    """The run of another model."""
    from engine.training.trainer import Trainer
    from tests.engine.toy_task import CONFIG, ToyGAN, ToySet

    Trainer(ToyGAN(), ToySet(), TrainerConfig(**CONFIG | {"steps": 1}), folder / "other").fit()


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture
def refused(folder, other_run, monkeypatch, capfd):
    """Assert that a command is refused with one line, which has `message`, in seconds, and leaves nothing."""

    def check(program, words, message):
        main = importlib.import_module(program).main
        before = files(folder)
        monkeypatch.setattr(run, "make_data", lambda data: pytest.fail("data were made first"))
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *shlex.split(words.format(assets=ROOT / "assets"))])
        monkeypatch.chdir(folder)
        start = time.process_time()
        with pytest.raises(SystemExit) as ended:
            run_cli(main)
        seconds = time.process_time() - start
        said = capfd.readouterr().err
        if message not in said and "resemblyzer" in said.lower() and find_spec("resemblyzer") is None:
            pytest.skip(said.strip())  # a missing package is named first
        assert ended.value.code == 2 and message in said, said
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert seconds < 10 and files(folder) == before

    return check


@pytest.mark.parametrize(("program", "words", "message"), ROWS, ids=lambda text: None)
def test_a_mistake_is_one_line_before_work(program, words, message, refused):
    refused(program, words, message)


@pytest.mark.parametrize(("command", "module", "message"), PACKAGES, ids=lambda text: None)
def test_a_missing_package_is_named_before_work(command, module, message, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    program, _, words = command.partition(" ")
    refused(program, words, message)


@pytest.mark.parametrize("command", [f"train {HICODIT}", "scripts.make_synthetic_corpus --out full"])
def test_a_full_disk_is_named_before_work(refused, monkeypatch, command):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    refused(*command.split(" ", 1), "1 MB free, but 500 MB are required")

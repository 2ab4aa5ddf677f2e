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
import torch

from engine.errors import run_cli
from engine.training import run

ROOT = Path(__file__).resolve().parents[2]
HICODIT, TALKER = "experiment=hicodit_synthetic", "experiment=talker_synthetic"
SPEAK = "model=talker_t2av mode=tts text=a reference_audio=sounds/voice.wav"
SHARDS = "source.root=corpus output=shards"
TRAIN = [
    (f"{HICODIT} trainer.lr=-1", "trainer.lr=-1.0 must be a number"),
    (f"{HICODIT} trainer.device=cuda", "no CUDA device is available"),
    (f"{HICODIT} trainer.best=wer", "trainer.best=wer is not"),
    (f"{HICODIT} run=file", "cannot write to run=file"),
    (f"{HICODIT} run=finished", "finished/release exists but is not a release folder"),
    (f"{HICODIT} run=other", "the model has changed since"),
    (f"{HICODIT} data.held_out=[nope]", "data.held_out has nope: these data have train, seen, unseen"),
    (f"{HICODIT} task.model.levels=99", "task.model has 99 levels"),
    (f"{HICODIT} task.identity_input=nose", "task.identity_input='nose'"),
    (f"{HICODIT} task.codec=missing", "task.codec=missing: no such file"),
    (f"{HICODIT} task.codec=damaged", "contains a model of kind 'hicodit'"),
    (f"{HICODIT} init=damaged", "damaged/model.safetensors is damaged"),
    (f"{HICODIT} init=assets/hicodit_tiny lora.rank=4096", "lora.rank=4096 is as wide as every layer"),
    (f"{TALKER} task.codecs.speech=sounds", "weights folder sounds has no config.yaml"),
    (f"{TALKER} task.tokenizer=null task.model.llm.vocab_size=200", "vocab_size=200 must be at least 262"),
    ("experiment=talker_speech_3 task.model.motion_dim=7", "motion_dim=7, but the motion has 40"),
    ("experiment=lia_x_synthetic lora.rank=3 init=assets/lia_x_tiny", "LiaXTask has no low-rank training"),
    ("experiment=lia_x_synthetic task.weights.perceptual=1.0", "task.vgg"),
    ("experiment=rvq_synthetic trainer.by_length=true", "CodedCrops has no lengths"),
    ("experiment=rvq_synthetic task.decoder_only=true", "task.decoder_only=true needs task.init"),
    ("experiment=rvq_synthetic task.mel.n_mels=[20]", "mel.n_mels=[20] and mel.windows=[128, 512, 2048]"),
]  # fmt: skip
INFER = [
    ("weights=damaged", "damaged/model.safetensors is damaged"),
    ("codec=assets/lia_x_tiny", "contains a model of kind 'lia_x'"),
    ("detector=nowhere.onnx", "no face detector at nowhere.onnx"),
    ("encoders=.", "its encoders"),
    ("face_landmarks=absent", "face_landmarks=absent: no such file"),
    ("input=/dev/null", "neither a file nor a folder"),
    ("model=talker_t2av output=file", "cannot write to output=file"),
    (f"{SPEAK} mode=t2av reference_video=clip.mp4 output=. name=clip", "would replace the input"),
    ("model=talker_t2av jobs=bad.jsonl", "jobs=bad.jsonl, line 1"),
]
NO_APPLE = [] if torch.backends.mps.is_available() else [("device=mps", "but no Apple GPU is available")]
REPORT = "references=sounds output=report"
OWN = "corpus=corpus output=report split=[train]"
EVALUATE = [
    ("outputs=sounds references=sounds output=file", "cannot write to output=file"),
    (f"{REPORT} outputs=sounds cache=file", "cannot write to cache=file"),
    (f"{REPORT} outputs=nowhere", "outputs.nowhere=nowhere is not a folder"),
    (f"{REPORT} outputs='{{{{true speech: .}}}}'", "'true speech' is the name of the ground-truth row"),
    (f"{REPORT} protocol.wer=ears", "protocol.wer=ears is unknown; choose whisper-medium"),
    (f"{REPORT} protocol.wer=grammar", "protocol.wer=grammar requires grammar=FILE.jsgf: none is given"),
    (f"{REPORT} true_speech=LRS9", "true_speech=LRS9 is not a ground-truth row of the table; choose LRS3, LRS2"),
    (f"table=synthetic_hicodit {OWN} only=[other]", "only=other is unknown; choose hicodit, tokenizer"),
    (f"table=synthetic_hicodit {OWN} systems='{{{{x: {{{{step: 1}}}}}}}}'", "systems.x=step is unknown"),
    (f"table=synthetic_hicodit {OWN} split=[]", "requires split="),
]
PREPARE = [
    ("source.root=nowhere output=shards", "source.root=nowhere is not a folder"),
    ("source.root=corpus output=file", "cannot write to output=file"),
    (f"{SHARDS} splits=[nope]", "no split nope"),
    (f"{SHARDS} executor=cloud", "executor=cloud is unknown; choose processes, ray"),
    (f"{SHARDS} stages.rvq.codec=assets/lia_x_tiny", "contains a model of kind 'lia_x'"),
]
SCRIPTS = [
    ("make_synthetic_corpus --out file", "cannot write to --out=file"),
    ("make_speech_corpus --out made --grid nowhere", "--grid nowhere is not a folder"),
    ("download_checkpoints hicodit --to file", "cannot write to --to=file"),
    ("export sounds out", "sounds has no checkpoint to export"),
    ("export {assets}/rvq_tiny sounds --compact", "sounds exists but is not a release folder"),
    ("export damaged other out", "expected one run or release"),
    ("export damaged out --compact --only x", "--only requires --average"),
    ("export --average damaged out", "expected FOLDER:WEIGHT"),
    ("plot_run sounds", "no log in sounds"),
    ("plot_run other other", "other is listed twice"),
    ("plot_run sounds --out curves.txt", "its name must end in"),
    ("known_people corpus nowhere", "release nowhere is not a folder"),
    ("serve --rows 0", "--rows=0 must be"),
    ("plan_run nope", "experiment=nope does not exist"),
    ("plan_run hicodit_synthetic --json file/x.json", "--json file/x.json cannot be written"),
    ("dry_run hicodit_paper", "trainer.parallel=ddp is not supported"),
    ("benchmark training --out file", "cannot write to --out=file"),
    ("check_gpu --out out", "1 CUDA devices are required, 0 found"),
    ("check_golden sounds", "no case (*.safetensors) under sounds"),
]
PACKAGES = [  # command, module that is not installed, the line
    (f"train {HICODIT}", "resemblyzer", "this requires resemblyzer"),
    (f"train {HICODIT} trainer.tensorboard=true", "torch.utils.tensorboard", "setup.sh tensorboard"),
    ("train experiment=talker_synthetic init=assets/talker_t2av_tiny lora.rank=4", "peft", "setup.sh finetune"),
    ("scripts.serve", "fastapi", "setup.sh serve"),
    ("scripts.demo", "gradio", "setup.sh demo"),
    (f"scripts.prepare_data {SHARDS} executor=ray", "ray", "setup.sh cluster"),
    (f"scripts.prepare_data {SHARDS} stages.enhance.use=true", "clearvoice", "setup.sh prepare"),
    (f"scripts.prepare_data {SHARDS} workers=0 stages.heard_expression.use=true", "funasr", "setup.sh emotion"),
]
PROGRAMS = {"train": TRAIN, "infer": INFER + NO_APPLE, "scripts.evaluate": EVALUATE, "scripts.prepare_data": PREPARE}
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
    shutil.copytree(ROOT / "assets/lia_x_tiny", made / "cut")
    for release in ("damaged", "cut"):
        (made / release / "model.safetensors").write_bytes(b"x" * 100)
    (made / "sounds").mkdir()
    shutil.copy(ROOT / "assets/demo/voice.wav", made / "sounds")
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
    from tests.engine.toy_task import CONFIG, ToyRegression, ToySet

    Trainer(ToyRegression(), ToySet(), CONFIG | {"steps": 1}, folder / "other").fit()


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture
def refused(folder, other_run, monkeypatch, capfd):
    """Assert that a command is refused with one line, which has `message`, in seconds, and leaves nothing."""

    def check(program, words, message):
        main, before = importlib.import_module(program).main, files(folder)
        monkeypatch.setattr(run, "make_data", lambda data: pytest.fail("data were made first"))
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *shlex.split(words.format(assets=ROOT / "assets"))])
        monkeypatch.chdir(folder)
        start = time.process_time()
        with pytest.raises(SystemExit) as ended:
            run_cli(main)
        seconds, said = time.process_time() - start, capfd.readouterr().err
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

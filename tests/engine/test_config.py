"""Configurations of the programs: what composes, what one line says of a mistake, what Hydra's own options do."""

import dataclasses
import re
import sys

import pytest
import torch
from omegaconf import OmegaConf
from shard_files import write_split
from test_trainer import records, train_arguments

import infer
import train
from engine.config import compose, load
from engine.errors import UserError
from engine.instantiate import build
from engine.schema import find_field, find_schema
from engine.settings import check_value, hints_of, kind_of
from engine.training import run
from engine.training.settings import TrainerConfig

RECIPE = "experiment=hicodit_minute"


def test_composition():
    words = ["trainer=gpu", "trainer.lr=1", "task.model.width=9", "task/encoders=small", "+task.new=3"]
    config = load("train", [RECIPE, *words, "name=mine"])
    assert (config.name, config.run) == ("mine", "runs/mine") and "hydra" not in config
    assert (config.trainer.precision, config.trainer.lr, config.trainer.device) == ("bf16", 1.0, "cuda")
    assert (config.task.model.width, config.task.encoders.kind, config.task.new) == (9, "tiny", 3)
    assert isinstance(OmegaConf.to_object(config).trainer, TrainerConfig)
    assert OmegaConf.to_object(load("train", [RECIPE])).trainer.betas == (0.9, 0.98)
    assert "make" not in compose("train", [RECIPE, "~data.make"]).data
    frozen = compose("train", ["experiment=hicodit_grid_cpu", "task.frozen=[model,identity,expression]"]).task.frozen
    assert frozen == ["model", "identity", "expression"]  # as grid.sh sets it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cofig=1"], "unknown setting 'cofig'"),
        ([RECIPE, "trainer.stepps=1"], "unknown setting 'trainer.stepps'; did you mean trainer.steps"),
        ([RECIPE, "trainer=gpuu"], "trainer=gpuu does not exist; did you mean gpu"),
        ([RECIPE, "trainer.steps=many"], "trainer.steps=many must be a whole number"),
        ([RECIPE, "trainer.steps=0"], "trainer.steps=0 must be a whole number from 1"),
        ([RECIPE, "trainer.betas=3"], "trainer.betas=3 must be a list"),
        ([RECIPE, "~trainer"], "trainer has a default and cannot be removed"),
        ([RECIPE, "trainer.lr=1,2"], "add --multirun"),
        ([RECIPE, "name"], "unknown argument 'name'"),
        ([RECIPE, "run=${nowhere}"], "nowhere"),
        ([], "choose a recipe with experiment=NAME; there are: .*hicodit_minute"),
        (["experiment=hicodit_paper"], r"missing: data\.root=\.\.\. task\.codec=\.\.\."),
    ],
)
def test_mistakes_are_one_line_that_names_what_is_valid(words, message):
    with pytest.raises(UserError, match=message) as caught:
        load("train", words)
    assert "\n" not in str(caught.value)


NAMES = ["My clip (1).mp4", "a,b.mp4", "it's=x.mp4", "x[1", "{a}.mp4", "~/x.mp4", "é.mp4", "2024", "1e5", "true"]
NAMES += ["end\\", "a\\'b", "$HOME", "a b", "a, b.wav"]


def test_any_file_name_can_be_given():
    for name in NAMES:
        config = compose("infer", [f"input={name}", f"reference_audio={name}"])
        assert config.input == config.reference_audio == name
    assert compose("infer", ["input=null"]).input is None
    config = compose("prepare", ["source.root=My clips (1)", "splits=[3]"])
    assert config.source.root == "My clips (1)" and config.splits == ["3"]


@pytest.mark.parametrize("name", ["infer", "infer_talker"])
def test_every_text_setting_of_inference_can_be_set(name):
    schema = find_schema(name)
    words = {"devices": "1", "executor": "processes", "mode": "tts", "compat": "paper"}
    for field in dataclasses.fields(schema):
        if "choices" in field.metadata and kind_of(hints_of(schema)[field.name])[0] is str:
            choices = field.metadata["choices"]
            words[field.name] = words.get(field.name) or (choices[-1] if choices else "x")
    words = {key: word for key, word in words.items() if find_field(name, key) and key != "model"}
    config = load(name, [f"{key}={word}" for key, word in words.items()])
    assert {key: config[key] for key in words} == words


def command(monkeypatch, program, *words):
    """Run a program's command line in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
    try:
        return program.main()
    except SystemExit as end:
        return end.code


def test_help_lists_settings_with_defaults_and_sentences(monkeypatch, capsys):
    assert command(monkeypatch, infer, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("Generate the speech of a silent clip")
    assert re.search(r"^  batch_size +8 +number of clips", text, re.MULTILINE)
    assert re.search(r"^  fast +Eight steps", text, re.MULTILINE) and "python infer.py input=clip.mp4" in text
    assert max(map(len, text.splitlines())) <= 140
    monkeypatch.setenv("COLUMNS", "80")
    assert command(monkeypatch, infer, "--help") == 0
    before_examples = capsys.readouterr().out.partition("Examples:")[0]
    assert max(map(len, before_examples.splitlines())) <= 80
    assert command(monkeypatch, train, RECIPE, "--help") == 0
    text = capsys.readouterr().out
    assert re.search(r"^  task\.phoneme_weight +0\.2 +weight of", text, re.MULTILINE)
    assert "32 clips, 30 steps; its speech is unintelligible" in " ".join(text.split())


def test_options_of_hydra_itself(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, RECIPE, "trainer.lr=1e-3", "--cfg", "job", "--package", "trainer") == 0
    assert "lr: 0.001\n" in capsys.readouterr().out
    assert command(monkeypatch, train, "--info", "defaults", RECIPE) == 0
    assert "experiment/hicodit_synthetic" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown option --count"):
        command(monkeypatch, train, "--count=3")
    assert not list(tmp_path.iterdir())


def test_a_sweep_numbers_its_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word for word in train_arguments("runs/toy", steps=2) if not word.startswith("trainer.lr=")]
    assert command(monkeypatch, train, "-m", *words, "trainer.lr=1e-3,2e-3") == 0
    assert "run=runs/toy/1:" in capsys.readouterr().out
    for number, rate in enumerate((1e-3, 2e-3)):
        folder = tmp_path / "runs/toy" / str(number)
        assert (folder / "release/model.safetensors").is_file()
        assert records(folder)
        config = OmegaConf.load(folder / "checkpoints/step-00000002/info.json").config
        assert (config.trainer.lr, config.run) == (rate, f"runs/toy/{number}")


def test_a_failing_run_does_not_end_a_sweep(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.steps=0 must be"):
        command(monkeypatch, train, "-m", *train_arguments("toy"), "trainer.steps=0,1")
    assert not (tmp_path / "toy/0/release").exists() and (tmp_path / "toy/1/release").is_dir()


def test_an_output_folder_by_hydras_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, *train_arguments("unused", steps=1), "hydra.run.dir=there") == 0
    assert (tmp_path / "there/release").is_dir() and not (tmp_path / "unused").exists()


class Broken:
    def __init__(self):
        len(3)


def test_build_shows_user_errors_as_they_are_and_bugs_with_their_traceback():
    node = {"_target_": "engine.media.video.read_video", "path": "nowhere.mp4"}
    with pytest.raises(UserError, match=r"^no such file: nowhere\.mp4$"):
        build(node)
    with pytest.raises(UserError, match="unexpected keyword argument 'speed'"):
        build(node | {"speed": 3})
    with pytest.raises(TypeError, match="has no len"):
        build({"_target_": f"tests.engine.test_config.{Broken.__name__}"})


def test_a_validation_split_that_is_missing_is_found_before_training(tmp_path):
    """Prepared shards, recordings, and what has no validation split at all."""
    write_split(tmp_path / "train", [({"key": "a", "frames": 9, "text": ""}, {"x": torch.zeros(1)})], 1)
    (tmp_path / "seen.jsonl").write_text('{"id": "a"}')

    def check(**data):
        run.check_validation(OmegaConf.create({"task": {}, "data": data}))

    for held_out, shards in (([], {}), (["train"], {}), (["seen"], None), (None, None)):
        check(root=str(tmp_path), held_out=held_out, shards=shards)
    for shards in ({"window": 1}, None):
        with pytest.raises(UserError, match=r"data.held_out has val: prepare it, or set data.held_out=\[\]"):
            check(root=str(tmp_path), held_out=["val"], shards=shards)
    check(held_out=["val"])


def test_whole_bounds_make_no_whole_number():
    check_value("ratio", 0.5, float, {"bounds": (0, 1)})
    with pytest.raises(UserError, match="ratio=2 must be a number"):
        check_value("ratio", 2, float, {"bounds": (0, 1)})
    check_value("ratios", [0.5], tuple[float, ...], {"bounds": (0, 1)})
    with pytest.raises(UserError, match=r"count=0\.5 must be a whole number"):
        check_value("count", 0.5, int | None, {"bounds": (0, 1)})


def test_a_class_in_a_value_set_whole_is_refused_before_work():
    words = ["source=folder", "source.root=clips", "output=shards"]
    with pytest.raises(UserError, match=r"os\.system"):
        load("prepare", [*words, "stages.transcription.second={_target_: os.system}"])

"""Configurations of the programs: composition, errors of the user, and the options of Hydra."""

import re
import sys

import pytest
import torch
from omegaconf import OmegaConf
from shard_files import write_split
from test_trainer import train_arguments

import infer
import train
from engine.config import compose, load, plain
from engine.errors import UserError
from engine.instantiate import build
from engine.training import run
from engine.training.settings import TrainerConfig

RECIPE = "experiment=hicodit_minute"


def test_composition():
    words = ["trainer=gpu", "trainer.lr=1", "task.model.width=9", "task/model=hicodit_small", "+task.new=3"]
    config = load("train", [RECIPE, *words, "name=mine"])
    assert (config.name, config.run) == ("mine", "runs/mine") and "hydra" not in config
    assert (config.trainer.precision, config.trainer.lr, config.trainer.device) == ("bf16", 1.0, "cuda")
    assert (config.task.model.width, config.task.model.low_blocks, config.task.new) == (9, 6, 3)
    assert isinstance(OmegaConf.to_object(config).trainer, TrainerConfig)
    assert OmegaConf.to_object(load("train", [RECIPE])).trainer.betas == (0.9, 0.98)
    assert "make" not in compose("train", [RECIPE, "~data.make"]).data
    frozen = compose("train", ["experiment=hicodit_grid_cpu", "task.frozen=[model,identity,expression]"]).task.frozen
    assert frozen == ["model", "identity", "expression"]  # as grid.sh sets it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([RECIPE, "trainer.stepps=1"], "mean trainer.steps"),
        ([RECIPE, "trainer=gpuu"], "mean gpu"),
        ([RECIPE, "trainer.steps=many"], "trainer.steps=many"),
        ([RECIPE, "~trainer"], "cannot be removed"),
        ([RECIPE, "trainer=null"], "trainer=null does not exist; available: cpu, gpu"),
        ([RECIPE, "task=5"], r"set task\.KEY=VALUE"),
        (["trainer=[1]"], r"trainer=\[1\] does not exist"),
        ([RECIPE, "trainer.lr=1,2"], "--multirun"),
        ([RECIPE, "run=${nowhere}"], "nowhere"),
        ([], "hicodit_minute"),
        (["experiment=hicodit_paper"], r"data\.root="),
    ],
)
def test_a_wrong_override_is_a_one_line_error(words, message):
    with pytest.raises(UserError, match=message) as caught:
        load("train", words)
    assert "\n" not in str(caught.value)


NAMES = ["My clip (1).mp4", "a,b.mp4", "it's=x.mp4", "x[1", "{a}.mp4", "~/é.mp4", "1e5", "true", "a\\'b\\", "$HOME"]


def test_any_file_name_is_a_valid_value():
    for name in NAMES:
        config = compose("infer", [f"input={name}", f"reference_audio={name}"])
        assert config.input == config.reference_audio == name
    assert compose("infer", ["input=null"]).input is None
    config = compose("prepare", ["source.root=My clips (1)", "splits=[3]"])
    assert config.source.root == "My clips (1)" and config.splits == ["3"]


def command(monkeypatch, program, *words):
    """Run a program's command line in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
    try:
        return program.main()
    except SystemExit as end:
        return end.code


def test_help_lists_settings_with_defaults_and_descriptions(monkeypatch, capsys):
    assert command(monkeypatch, infer, "--help") == 0
    text = capsys.readouterr().out
    assert re.search(r"^  batch_size +8 +number of clips", text, re.MULTILINE)
    assert command(monkeypatch, train, RECIPE, "--help") == 0
    text = capsys.readouterr().out
    assert re.search(r"^  task\.phoneme_weight +0\.2 +weight of", text, re.MULTILINE)


def test_options_of_hydra_itself(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, RECIPE, "trainer.lr=1e-3", "--cfg", "job", "--package", "trainer") == 0
    assert "lr: 0.001\n" in capsys.readouterr().out
    assert command(monkeypatch, train, "--info", "defaults", RECIPE) == 0
    assert "experiment/hicodit_synthetic" in capsys.readouterr().out
    with pytest.raises(UserError, match="--count"):
        command(monkeypatch, train, "--count=3")
    assert not list(tmp_path.iterdir())


def test_a_sweep_trains_one_numbered_run_per_value_and_a_failing_one_stops_no_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.steps=0"):
        command(monkeypatch, train, "-m", *train_arguments("runs/toy"), "trainer.steps=0,1,2")
    runs = tmp_path / "runs/toy"
    assert [(runs / f"{number}/release").is_dir() for number in range(3)] == [False, True, True]
    config = OmegaConf.load(runs / "2/checkpoints/step-00000002/info.json").config
    assert (config.trainer.steps, config.run) == (2, "runs/toy/2")


def test_the_output_folder_can_be_set_by_hydras_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, *train_arguments("unused", steps=1), "hydra.run.dir=there") == 0
    assert (tmp_path / "there/release").is_dir() and not (tmp_path / "unused").exists()


class Broken:
    def __init__(self):
        len(3)


def test_build_passes_user_errors_and_bugs_through():
    node = {"_target_": "engine.media.video.read_video", "path": "nowhere.mp4"}
    with pytest.raises(UserError, match=r"nowhere\.mp4"):
        build(node)
    with pytest.raises(UserError, match="speed"):
        build(node | {"speed": 3})
    with pytest.raises(TypeError, match="has no len"):
        build({"_target_": f"tests.engine.test_config.{Broken.__name__}"})


def test_a_missing_validation_split_is_an_error_before_training(tmp_path):
    write_split(tmp_path / "prepared", [({"key": "a", "frames": 9, "text": ""}, {"x": torch.zeros(1)})], 1)
    (tmp_path / "recorded.jsonl").write_text('{"id": "a"}')

    def check(*splits):
        data = {"root": str(tmp_path), "held_out": splits, "shards": None}
        run.check_validation(OmegaConf.create({"task": {}, "data": data}))

    check()
    check("prepared", "recorded")
    with pytest.raises(UserError, match=r"data\.held_out contains val:"):
        check("val")


def test_a_missing_validation_recording_is_an_error_before_training(tmp_path):
    sample = {"key": "a", "frames": 9, "text": "", "source": "s1/head.mp4"}, {"x": torch.zeros(1)}
    write_split(tmp_path / "seen", [sample], 1)
    corpus = tmp_path / "recordings"
    config = OmegaConf.create({
        "task": {"validate_corpus": str(corpus), "validate_clips": 4},
        "data": {"root": str(tmp_path), "held_out": ["seen"], "shards": {}},
    })  # fmt: skip
    with pytest.raises(UserError, match=r"s1/head\.mp4"):
        run.check_validation(config)
    (corpus / "s1").mkdir(parents=True)
    (corpus / "s1" / "head.mp4").touch()
    run.check_validation(config)


def test_a_target_in_an_override_is_checked():
    words = ["source=folder", "source.root=clips", "output=shards"]
    with pytest.raises(UserError, match=r"os\.system"):
        load("prepare", [*words, "stages.transcription.second={_target_: os.system}"])


def test_networks_of_filters_run_on_the_device_of_the_job():
    words = ["source=folder", "source.root=clips", "output=shards", "downloads=checkpoints", "device=cuda"]
    stages = plain(compose("prepare", [*words, "features=hicodit_paper_voxceleb2"]))["stages"]
    parts = [part for stage in stages.values() for part in stage.values() if isinstance(part, dict)]
    engines = [part for part in parts if "preparation.engines" in part.get("_target_", "")]
    assert len(engines) == 6 and all(part.get("device") == "cuda" for part in engines)

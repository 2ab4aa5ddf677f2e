import re

import pytest
import torch
from omegaconf import OmegaConf
from shard_files import write_split

from engine.config import _compose, build, load
from engine.errors import UserError
from engine.settings import check_value, kind_of
from engine.training import run

FILES = {
    "main.yaml": """
defaults:
  - _self_
  - trainer: cpu
  - experiment: null
name: ???
input: clips/a.mp4   # a clip
reference: null      # a voice
count: 3             # how many
ratio: 0.5
flag: false
sizes: [1, 2]
splits: ${sizes}
sampler:
  steps: 64          # evaluations
  kind: euler
""",
    "trainer/cpu.yaml": "# plain processor\nlr: 1.0e-3   # learning rate\nsteps: 10\n",
    "trainer/gpu.yaml": "# a CUDA device\ndefaults:\n  - cpu\n  - _self_\nsteps: 20\n",
    "experiment/tiny_talker.yaml": """# @package _global_
# the small one
defaults:
  - /model@task.model: small
  - override /trainer: gpu
task:
  _target_: engine.media.video.read_video
""",
    "model/small.yaml": "width: 8   # channels\n",
    "model/large.yaml": "width: 64   # channels\n",
    "sampler/other.yaml": "steps: 1\n",
    "reference/loud.yaml": "# no choice of main.yaml\nx: 1\n",
}
EXPERIMENT = "experiment=tiny_talker"


@pytest.fixture
def compose(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("engine.config.CONFIGS", tmp_path)
    return lambda *words: load("main", words, "Does a thing.\n\nExamples:\nrun it")


def test_composition(compose):
    config = compose(EXPERIMENT, "count=5", "task.model.width=9", "trainer.lr=1", "model@task.model=large")
    assert (config.name, config.count, config.trainer.steps, config.trainer.lr) == ("tiny_talker", 5, 20, 1)
    assert config.task.model.width == 9 and "hydra" not in config
    assert compose(EXPERIMENT, "trainer=cpu").trainer.steps == 10
    assert compose(EXPERIMENT, "name=mine").name == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cuont=1"], "unknown setting 'cuont'; did you mean count"),
        ([EXPERIMENT, "trainer.stepps=1"], "unknown setting 'trainer.stepps'; did you mean trainer.steps"),
        ([EXPERIMENT, "width=1"], "did you mean task.model.width"),
        (["trianer=gpu"], "did you mean trainer"),
        (["trainer=gpuu"], "trainer=gpuu does not exist; did you mean gpu?"),
        ([EXPERIMENT, "model@task.model=lrage"], "did you mean large?"),
        (["experiment=zzz"], "there are: tiny_talker"),
        (["count=many"], r"count=many must be a whole number \(default: 3\)"),
        (["count=1.5"], "must be a whole number"),
        (["ratio=half"], "ratio=half must be a number"),
        (["flag=3"], "flag=3 must be true or false"),
        (["sizes=3"], "sizes=3 must be a list"),
        (["splits=3"], "splits=3 must be a list"),
        (["sampler=3"], "sampler=3 must be a group of settings"),
        (["input"], "unknown argument 'input'"),
        (["--count=3"], "unknown setting '--count'; did you mean count"),
        ([], "choose a recipe with experiment=NAME; there are: tiny_talker"),
        ([EXPERIMENT, "reference=${nowhere}"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_that_names_what_is_valid(compose, words, message):
    with pytest.raises(UserError, match=message) as caught:
        compose(*words)
    assert "\n" not in str(caught.value)


NAMES = ["My clip (1).mp4", "a,b.mp4", "it's=x.mp4", "x[1", "{a}.mp4", "~/x.mp4", "é.mp4"]
NAMES += ["end\\", "a\\'b", "$HOME", "a b"]


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_can_be_given(compose, name):
    config = compose(EXPERIMENT, f"input={name}", f"reference={name}")
    assert config.input == config.reference == name


@pytest.mark.parametrize(
    ("setting", "word", "value"),
    [
        ("reference", "a, b.wav", "a, b.wav"),  # also the name of a folder with choices
        ("reference", "null", None),
        ("input", "2024", "2024"),  # a text
        ("input", "null", None),
        ("splits", "[3]", [3]),  # its default is an interpolation
    ],
)
def test_a_word_becomes_a_value_of_the_settings_kind(compose, setting, word, value):
    assert compose(EXPERIMENT, f"{setting}={word}")[setting] == value


@pytest.mark.parametrize("name", ["infer", "infer_talker"])
def test_every_text_setting_of_inference_can_be_set(name):
    words = {
        key: field.metadata["choices"][-1] if field.metadata["choices"] else "x"
        for key, (field, hint) in _compose(name, []).described.items()
        if kind_of(hint)[0] is str
    } | {"devices": "1", "executor": "processes"}  # a number, or all; Ray may not be installed
    config = load(name, [f"{key}={word}" for key, word in words.items()], "")
    assert {key: OmegaConf.select(config, key) for key in words} == words


def test_a_missing_value_is_named(compose, tmp_path):
    with (tmp_path / "experiment/tiny_talker.yaml").open("a") as file:
        file.write("corpus: ???\n")
    with pytest.raises(UserError, match=r"missing: corpus=\.\.\."):
        compose(EXPERIMENT)


def test_help_reads_like_help(compose, capsys):
    with pytest.raises(SystemExit) as ended:
        compose("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith("Does a thing.") and text.rstrip().endswith("run it")
    for row in (
        r"count +3 +how many",
        r"input +clips/a.mp4 +a clip",
        r"sampler.steps +64 +evaluations",
        r"trainer.lr +0.001 +learning rate",
        r"gpu +a CUDA device",
        r"tiny_talker +the small one",
    ):
        assert re.search(rf"^  {row}$", text, re.MULTILINE), row
    with pytest.raises(SystemExit):
        compose(EXPERIMENT, "-h")
    assert re.search(r"task.model.width +8 +channels", capsys.readouterr().out)


def test_build_shows_user_errors_as_they_are(compose):
    config = compose(EXPERIMENT)
    config.task = {"_target_": "engine.media.video.read_video", "path": "nowhere.mp4"}
    with pytest.raises(UserError, match=r"^no such file: nowhere\.mp4$"):
        build(config.task)
    config.task = {"_target_": "engine.media.video.read_video", "path": "a.mp4", "speed": 3}
    with pytest.raises(UserError, match="unexpected keyword argument 'speed'"):
        build(config.task)


def test_a_validation_split_that_is_missing_is_found_before_training(tmp_path):
    """Prepared shards, recordings, and what has no validation split at all."""
    write_split(tmp_path / "train", [({"key": "a", "frames": 9, "text": ""}, {"x": torch.zeros(1)})], 1)
    (tmp_path / "seen.jsonl").write_text('{"id": "a"}')

    def check(**data):
        run.check_validation(OmegaConf.create({"task": {}, "data": data}))

    for held_out, shards in (([], {}), (["train"], {}), (["seen"], None), (None, None)):
        check(root=str(tmp_path), held_out=held_out, shards=shards)
    for shards in ({"window": 1}, None):
        with pytest.raises(UserError, match=r"data.held_out has val: make that split, or set data.held_out=\[\]"):
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
        load("prepare", [*words, "stages.transcription.second={_target_: os.system}"], "")

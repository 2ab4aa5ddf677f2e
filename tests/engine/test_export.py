"""Export of a run as a release, and averages and 8-bit copies of releases."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from toy_task import CONFIG, ToyGAN, ToySet

from engine.errors import UserError
from engine.release import read_release, save_release
from engine.training import checkpoint
from engine.training.export import average, export, last_validation
from engine.training.settings import TrainerConfig
from engine.training.trainer import Trainer
from scripts import export as script

RECORD = {
    "command": "python train.py experiment=toy",
    "task": {"init": "assets/old"},
    "data": {"root": "data/toys", "train": {"_target_": "toys.Set"}},
    "trainer": CONFIG,
}


@pytest.fixture
def call(monkeypatch, capsys):
    """Run scripts/export.py with words and return what it prints."""

    def export_command(*words):
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, words)])
        script.main()
        return capsys.readouterr().out

    return export_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 20 steps, with checkpoints of steps 15 and 20."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    trainer = Trainer(ToyGAN(), ToySet(), TrainerConfig(**CONFIG), folder, RECORD)
    trainer.fit()
    return trainer


def test_a_run_is_exported_with_averaged_weights_and_a_card(run, tmp_path, call):
    there = shutil.copytree(run.run, tmp_path / "elsewhere")
    assert "step-00000020 of" in call(there, tmp_path / "out")
    config, state = read_release(tmp_path / "out", "toy")
    assert config == {"width": 8}
    averages = {k.removeprefix("generator."): v for k, v in run.ema.averages.items() if k.startswith("generator.")}
    assert state.keys() == averages.keys()
    assert all(torch.equal(state[k], averages[k].half().float()) for k in state)
    assert not torch.equal(state["0.weight"], run.task.generator[0].weight.detach().half().float())
    text = (tmp_path / "out" / "README.md").read_text()
    weight = last_validation(there / "log.jsonl", 20)[0]["weight"]
    for words in (f"| weight | {weight:.4g} |", "`toys.Set`, `data/toys`", run.code, "`assets/old`"):
        assert words in text
    (result,) = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results  # what the hub shows
    assert result.metric_type == "weight" and result.metric_value == pytest.approx(weight)


def test_a_checkpoint_that_the_run_deletes_in_the_meantime_is_one_line(run, tmp_path, monkeypatch):
    there = shutil.copytree(run.run, tmp_path / "run")
    read = checkpoint.read

    def read_late(folder, prefixes):
        (folder / checkpoint.INFO).unlink()
        return read(folder, prefixes)

    monkeypatch.setattr(checkpoint, "read", read_late)
    with pytest.raises(UserError, match="step-00000020 was deleted by the run"):
        export(there, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_averages_the_last_weights_are_exported(tmp_path):
    config = TrainerConfig(**CONFIG | {"steps": 5, "ema_decay": 0.0})
    run = Trainer(ToyGAN(), ToySet(), config, tmp_path / "run", RECORD)
    run.fit()
    export(run.run, tmp_path / "out")
    state = read_release(tmp_path / "out", "toy")[1]
    last = run.task.generator.state_dict()
    assert not run.ema.averages and all(torch.equal(state[k], last[k].half().float()) for k in state)


def test_a_step_is_chosen_by_number_or_by_a_metric(run, tmp_path, call):
    there = shutil.copytree(run.run, tmp_path / "run")
    for step, weight in ((15, 0.1), (20, 0.4)):
        (there / "checkpoints" / f"step-{step:08d}" / "results.json").write_text(json.dumps({"weight": weight}))
    for words, step in ((("--best", "min weight"), 15), (("--best", "max weight"), 20), (("--step", 15), 15)):
        assert f"step-{step:08d} of" in call(there, tmp_path / "out", *words)
    assert "step 14" in (tmp_path / "out" / "README.md").read_text()  # the last validation before step 15
    for words in (("--best", "min wer"), ("--step", 3)):
        with pytest.raises(UserError, match=str(words[1])):
            call(there, tmp_path / "out", *words)


def test_an_export_replaces_a_release_and_a_failed_one_keeps_it(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def files():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    export(run.run, tmp_path / "out")
    before = files()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr("engine.release.save_file", full)
        export(run.run, tmp_path / "out", step=15)
    assert files() == before
    export(run.run, tmp_path / "out", step=15)
    assert files().keys() == before.keys() and files() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_last_validation_is_read_from_a_truncated_log(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "validation/wer": 0.5}, {"step": 9, "validation/wer": 0.1}]
    log.write_text(
        "\n".join(map(json.dumps, rows))
        + '\n{"step": 1e400, "validation/wer": 0.3}\n{"step": 1'
        + "0" * 400
        + ', "a": 1}\n{"step": 10, "valid'
    )
    log.write_bytes(b"\xff\xfe" + b"\0" * 100 + b"\n" + log.read_bytes())  # a block that was lost in a power failure
    assert last_validation(log, 8) == ({"wer": 0.5}, 2)
    assert last_validation(log, 1) == ({}, 0) == last_validation(tmp_path / "none", 1)


# --- averages and 8 bits ---


def weights(value: float) -> dict[str, torch.Tensor]:
    values = {"decoder.w": torch.full((2, 3), value), "encoder.w": torch.full((4,), value)}
    return values | {"decoder.count": torch.tensor(int(value))}


@pytest.fixture
def releases(tmp_path, monkeypatch):
    """Releases a and b in the current folder."""
    for name, value in (("a", 1.0), ("b", 4.0)):
        tensors = weights(value) | {"big.w": torch.rand(64, 64)}
        save_release(tmp_path / name, "toy", {"of": name}, tensors, f"card {name}")
    monkeypatch.chdir(tmp_path)


def test_average_keeps_the_first_releases_config_and_card(releases, tmp_path, call):
    call("--average", "a:1", "b:2", "out", "--only", "decoder.")
    config, mixed = read_release(tmp_path / "out", "toy")
    assert config == {"of": "a"} and (tmp_path / "out" / "README.md").read_text() == "card a"
    assert mixed["decoder.w"].unique() == 3.0 and mixed["encoder.w"].unique() == 1.0
    assert mixed["decoder.count"] == 1  # whole numbers have no mean
    for prefixes in (["head"], ["decoder.", "head"]):
        with pytest.raises(UserError, match="--only head"):
            call("--average", "a:1", "b:2", "out", "--only", *prefixes)
    with pytest.raises(UserError, match=r"encoder\.w"):
        average([weights(1.0), weights(1.0) | {"encoder.w": torch.zeros(5)}], [1.0, 1.0], ("",))


def test_compact_stores_large_matrices_in_8_bits(releases, tmp_path, call):
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    call("--compact", "a", "out", "--exact", "big.")
    exact = read_release(tmp_path / "out", "toy")[1]["big.w"]
    assert torch.equal(exact, read_release(tmp_path / "a", "toy")[1]["big.w"].half())
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    call("--compact", "a", "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < size / 2
    call("--compact", "a", "a")  # in place
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

"""A run that stops at a step with a validation catches up on that validation when it resumes."""

import pytest
from test_trainer import records, trainer
from toy_task import ToySet

from engine.training.tracking import Tracker

SETTINGS = {"best": "min weight", "keep": 9}  # every step that is validated is saved, too
STEP = 14  # a multiple of CONFIG["validate_every"], not of "checkpoint_every"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run that nothing stopped."""
    run = tmp_path_factory.mktemp("whole")
    trainer(run, **SETTINGS).fit()
    return run


def assert_same_records(whole, broken):
    assert records(whole) == records(broken)
    assert [record["step"] for record in records(whole) if "lr" not in record] == [7, 14, 20]
    one, two = (run / f"checkpoints/step-{STEP:08d}/results.json" for run in (whole, broken))
    assert one.read_text() == two.read_text()


def test_a_run_that_stops_before_a_validation_catches_up_on_it(whole, tmp_path):
    signal = ToySet(trouble_at=8 * (STEP - 1) + 1, trouble="term")  # with the first of 8 samples of this step
    assert trainer(tmp_path, signal, **SETTINGS).fit() is None
    assert records(tmp_path)[-1]["step"] == STEP and "lr" in records(tmp_path)[-1]
    trainer(tmp_path, **SETTINGS).fit()
    assert_same_records(whole, tmp_path)


@pytest.mark.parametrize("where", ["measure", "write", "note"])
def test_a_killed_validation_is_recorded_once(whole, tmp_path, monkeypatch, where):
    run = trainer(tmp_path, **SETTINGS)
    owner = {"measure": run.task, "write": Tracker, "note": run.checkpoints}[where]
    original = getattr(owner, where)

    def kill(*arguments):
        if run.step == STEP and (where != "write" or "lr" not in arguments[-1]):
            run.checkpoints.wait()  # that of this step is whole, however slow the disk
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, where, kill)
        run.fit()
    trainer(tmp_path, **SETTINGS).fit()
    assert_same_records(whole, tmp_path)

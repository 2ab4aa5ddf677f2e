import random

import torch

from engine.training.guard import SETTLED, StepGuard


def good(guard, loss, norm=1.0, finite=True):
    values = torch.tensor([loss, norm])
    return bool(guard.check(1, "model", values, torch.tensor(finite), values[:1]))


def settled(run, spike=20.0, offset=0.0):
    guard, draws = StepGuard(run, spike, ["model"]), random.Random(0)
    for _ in range(SETTLED):
        assert good(guard, offset + draws.gauss(0, 1))
    assert guard.settle() == []
    return guard


def test_spike_of_either_figure_is_a_reason_to_skip_also_with_negative_losses(tmp_path):
    for offset in (100.0, -100.0):
        guard = settled(tmp_path, offset=offset)
        assert good(guard, offset + 5)
        assert not good(guard, offset + 40)
        (skip,) = guard.settle()
        assert skip.reason.startswith("loss") and skip.losses == [offset + 40]
        assert not good(guard, offset, 9.0)
        assert "grad_norm 9" in guard.settle()[0].reason
        assert good(guard, offset - 1000)  # better is fine


def test_spikes_are_not_looked_for_before_there_is_a_usual_or_without_a_threshold(tmp_path):
    assert good(StepGuard(tmp_path, 20.0, ["model"]), 1e9, 1e9)
    assert good(settled(tmp_path, spike=None), 1e9)


def test_what_is_left_out_does_not_become_usual_and_the_state_goes_on(tmp_path):
    guard = settled(tmp_path)
    before = guard.figures["model"].clone()
    assert not good(guard, 1000.0) and not good(guard, float("nan"), 0.0, finite=False)
    assert torch.equal(guard.figures["model"], before)
    guard.settle()
    other = StepGuard(tmp_path, 20.0, ["model"])
    other.load_state(guard.state())
    assert not good(other, 1000.0) and other.in_a_row == guard.in_a_row


def test_steps_in_a_row_are_counted_over_parts_and_windows(tmp_path):
    guard, finite, values = StepGuard(tmp_path, None, ["one", "two"]), torch.tensor, torch.ones(2)
    for step, (one, two) in enumerate([(1, 1), (0, 0), (1, 0), (1, 1), (1, 0)], 1):
        for part, fine in (("one", one), ("two", two)):
            guard.check(step, part, values, finite(bool(fine)), values[:1])
    found = guard.settle()
    assert [(skip.step, skip.part, skip.in_a_row) for skip in found] == [(2, "one", 1), (3, "two", 2), (5, "two", 1)]
    assert found[0].reason == "loss or gradient is not finite"
    guard.check(6, "one", values, finite(False), values[:1])
    guard.check(6, "two", values, finite(True), values[:1])
    assert guard.settle()[0].in_a_row == 2 and (guard.skipped, guard.in_a_row) == (4, 2)

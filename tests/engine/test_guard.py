import pytest
import torch

from engine.errors import UserError
from engine.training.guard import StepGuard


def test_steps_in_a_row_are_counted_over_parts_windows_and_restarts(tmp_path):
    guard = StepGuard(tmp_path)

    def check(step, *finite):
        for part, fine in zip(("one", "two"), finite):
            guard.check(step, part, torch.tensor(fine), torch.ones(2), [])

    for step, finite in enumerate([(True, True), (False, False), (True, False), (True, True), (True, False)], 1):
        check(step, *finite)
    skips = guard.settle()
    assert [(skip.step, skip.part, skip.in_a_row) for skip in skips] == [(2, "one", 1), (3, "two", 2), (5, "two", 1)]
    assert skips[0].losses == [1, 1] and guard.settle() == []
    state, guard = guard.state(), StepGuard(tmp_path)
    guard.load_state(state)
    check(6, False, True)
    assert guard.settle()[0].in_a_row == 2 and (guard.skipped, guard.in_a_row) == (4, 2)
    with pytest.raises(UserError, match="count of skipped steps is damaged"):
        guard.load_state({"skipped": 1})

import random

from engine.training.guard import SETTLED, StepGuard


def settled(run, spike=20.0, offset=0.0):
    guard, draws = StepGuard(run, spike), random.Random(0)
    for _ in range(SETTLED):
        assert guard.reason_to_skip("model", {"loss": offset + draws.gauss(0, 1), "grad_norm": 1.0}, True) is None
    return guard


def test_spike_of_either_figure_is_a_reason_to_skip_also_with_negative_losses(tmp_path):
    for offset in (100.0, -100.0):
        guard = settled(tmp_path, offset=offset)
        assert guard.reason_to_skip("model", {"loss": offset + 5, "grad_norm": 1.0}, True) is None
        assert "loss" in guard.reason_to_skip("model", {"loss": offset + 40, "grad_norm": 1.0}, True)
        assert "grad_norm 9" in guard.reason_to_skip("model", {"loss": offset, "grad_norm": 9.0}, True)
        assert guard.reason_to_skip("model", {"loss": offset - 1000, "grad_norm": 1.0}, True) is None  # better is fine


def test_spikes_are_not_looked_for_before_there_is_a_usual_or_without_a_threshold(tmp_path):
    assert StepGuard(tmp_path, 20.0).reason_to_skip("model", {"loss": 1e9, "grad_norm": 1e9}, True) is None
    assert settled(tmp_path, spike=None).reason_to_skip("model", {"loss": 1e9, "grad_norm": 1.0}, True) is None


def test_what_is_left_out_does_not_become_usual_and_the_state_goes_on(tmp_path):
    guard = settled(tmp_path)
    before = dict(guard.figures)
    assert guard.reason_to_skip("model", {"loss": 1000.0, "grad_norm": 1.0}, True)
    assert guard.reason_to_skip("model", {"loss": 0.0, "grad_norm": 0.0}, False) == "loss or gradient is not finite"
    guard.skip()
    assert guard.figures == before
    other = StepGuard(tmp_path, 20.0)
    other.load_state(guard.state())
    assert other.reason_to_skip("model", {"loss": 1000.0, "grad_norm": 1.0}, True) and other.in_a_row == 1

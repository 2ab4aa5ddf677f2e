"""Flow matching on problems whose answer is known: the solver, guidance, losses, and what sampling evaluates."""

import math

import pytest
import torch

from engine.errors import UserError
from talker_t2av.diffusion_head import DiffusionHead, FlowHead
from talker_t2av.flow_matching import (
    FlowDraws,
    drop,
    euler,
    flow_loss,
    guide,
    noised,
    solver_times,
    step_lengths,
    zero_steps,
)


def head(width: int = 16) -> FlowHead:
    torch.manual_seed(0)
    return FlowHead(DiffusionHead(3, 5, width, 2, 2, max_positions=16)).eval()


def conditions(batch: int = 2, width: int = 16, patches: int = 1) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    shapes = [(batch, width), (batch, 3, 4 * patches), (batch, 5), (batch, 3, 4)]
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


def test_times_run_from_one_to_zero_and_are_finer_near_the_noise():
    times = solver_times(10)
    assert times[0] == pytest.approx(1, abs=1e-6) and times[-1] == pytest.approx(0, abs=1e-6)
    steps = times[:-1] - times[1:]
    assert (steps > 0).all() and (steps[1:] > steps[:-1]).all()
    torch.testing.assert_close(solver_times(4, sway=0.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    with pytest.raises(UserError, match="steps=0"):
        solver_times(0)


def test_zero_steps_follow_the_number_of_steps():
    assert [zero_steps(n) for n in (1, 10, 48, 49, 73, 74)] == [1, 1, 1, 2, 2, 3]


def test_a_straight_flow_is_solved_exactly_in_one_step():
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(euler(lambda x, i: noise - data, noise, [1.0]), data)


def test_the_flow_to_a_gaussian_converges_to_its_closed_form():
    """For data N(m, s^2) the velocity is linear in x, and the flow's end is m + s z."""
    mean, std, z = 0.7, 0.3, torch.randn(1, 1, 1000, dtype=torch.float64)

    def solve(steps: int) -> float:
        times = solver_times(steps).double()

        def velocity(x, i):
            t = times[i]
            variance = (1 - t) ** 2 * std**2 + t**2
            return (x - (1 - t) * mean) * (t - (1 - t) * std**2) / variance - mean

        return (euler(velocity, z, step_lengths(times)) - (mean + std * z)).abs().mean().item()

    coarse, fine = solve(50), solve(400)
    assert fine < 0.01
    assert coarse / fine == pytest.approx(8, rel=0.3)  # first order


def test_skipped_steps_leave_x_and_are_not_evaluated():
    called = []
    euler(lambda x, i: called.append(i) or torch.zeros_like(x), torch.ones(1, 1, 1), [0.25] * 4, skip=2)
    assert called == [2, 3]


def test_guidance_of_parallel_velocities():
    """CFG-Zero* replaces the unconditional velocity by its best multiple: here the conditional one itself."""
    v = torch.randn(2, 3, 4)
    torch.testing.assert_close(guide(2 * v, v, 5.0), 2 * v)
    torch.testing.assert_close(guide(2 * v, v, 5.0, zero_star=False), 6 * v)
    other = torch.randn(2, 3, 4)
    torch.testing.assert_close(guide(v, other, 1.0), v)


def test_guidance_one_evaluates_half_and_agrees():
    model, (mu, cond, given, noise) = head(), conditions()
    rows = []
    model.estimator.out_proj.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    one = model.sample(mu, cond, given, noise, model.schedule(5), guidance=1.0)
    assert rows == [2] * 4  # the first of five steps is not computed
    rows.clear()
    near = model.sample(mu, cond, given, noise, model.schedule(5), guidance=1.0 + 1e-7)
    assert rows == [4] * 4
    torch.testing.assert_close(one, near)


def test_rows_of_a_batch_do_not_see_each_other():
    model, all_rows = head(), conditions(3, patches=2)
    settings = (model.schedule(6), 0.5, 2.0)
    together = model.sample(*all_rows, *settings)
    for i in range(3):
        alone = model.sample(*(x[i : i + 1] for x in all_rows), *settings)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_one_step_is_the_scaled_noise():
    mu, cond, given, noise = conditions()
    model = head()
    torch.testing.assert_close(model.sample(mu, cond, given, noise, model.schedule(1), 0.3), 0.3 * noise)


def test_the_true_velocity_has_no_loss():
    x1 = torch.randn(5, 3, 4)
    draws = FlowDraws.sample(x1)
    assert ((draws.t > 0) & (draws.t < 1)).all()
    assert flow_loss(draws.z - x1, x1, draws.z) == 0
    x = noised(x1, draws)
    torch.testing.assert_close(x - draws.t[:, None, None] * (draws.z - x1), x1)


def test_a_mask_leaves_frames_out():
    x1, mask = torch.randn(2, 3, 4), torch.ones(2, 1, 4)
    mask[:, :, 2:] = 0
    wrong = torch.zeros(2, 3, 4)
    wrong[:, :, 2:] = 100.0
    assert flow_loss(wrong - x1, x1, torch.zeros_like(x1), mask) == 0
    assert flow_loss(wrong - x1, x1, torch.zeros_like(x1)) == pytest.approx(5000)


def test_conditions_are_dropped_by_example():
    x = torch.ones(4, 2, 3)
    kept = drop(x, torch.tensor([0.05, 0.1, 0.100001, 0.9]), 0.1)
    assert kept.sum((1, 2)).tolist() == [0, 0, 6, 6]


def test_a_head_without_examples_has_a_zero_loss_and_zero_gradients():
    model = head()
    loss = model.loss(torch.zeros(0, 3, 4), torch.zeros(0, 16), torch.zeros(0, 3, 4), torch.zeros(0, 5))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_time_features_span_the_stated_frequencies():
    from talker_t2av.diffusion_head import time_features

    u = torch.tensor([0.001])
    features = time_features(u, 8)[0]
    assert features[0] == pytest.approx(math.sin(1.0)) and features[3] == pytest.approx(math.sin(1e-4), rel=1e-3)
    assert features[4] == pytest.approx(math.cos(1.0))

"""Flow matching on problems whose answer is known: the solver, guidance, losses, and what sampling evaluates."""

import pytest
import torch

from talker_t2av.diffusion_head import DiffusionHead, FlowHead
from talker_t2av.flow_matching import FlowDraws, euler, flow_loss, guide, noised, solver_times, zero_steps


def head(width: int = 16) -> FlowHead:
    torch.manual_seed(0)
    return FlowHead(DiffusionHead(3, 5, width, 2, 2, max_positions=16)).eval()


def conditions(batch: int = 2, width: int = 16, patches: int = 1) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    shapes = [(batch, width), (batch, 3, 4 * patches), (batch, 5), (batch, 3, 4)]
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


def test_zero_steps_follow_the_number_of_steps():
    assert [zero_steps(n) for n in (1, 10, 48, 49, 73, 74)] == [1, 1, 1, 2, 2, 3]


def test_the_solver_converges_to_the_closed_form_of_a_gaussian_at_first_order():
    """For data N(m, s^2) the velocity is linear in x, and the flow's end is m + s z."""
    mean = 0.7
    std = 0.3
    z = torch.randn(1, 1, 1000, dtype=torch.float64)

    def solve(steps: int) -> float:
        times = solver_times(steps).double()

        def velocity(x, i):
            t = times[i]
            variance = (1 - t) ** 2 * std**2 + t**2
            return (x - (1 - t) * mean) * (t - (1 - t) * std**2) / variance - mean

        return (euler(velocity, z, (times[:-1] - times[1:]).tolist()) - (mean + std * z)).abs().mean().item()

    coarse, fine = solve(50), solve(400)
    assert fine < 0.01
    assert coarse / fine == pytest.approx(8, rel=0.3)  # first order


def test_steps_without_guidance_evaluate_half_the_rows():
    """Guidance of one in all steps, or none in the last: only the conditional branch is computed."""
    model = head()
    mu, cond, given, noise = conditions()
    rows = []
    model.estimator.out_proj.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    schedule = model.schedule(4)
    one = model.sample(mu, cond, given, noise, schedule, guidance=1.0)
    near = model.sample(mu, cond, given, noise, schedule, guidance=1.0 + 1e-7)
    found = model.sample(mu, cond, given, noise, schedule, guidance=3.0, unguided=1)
    assert rows == [2, 2, 2] + [4, 4, 4] + [4, 4, 2]  # the first of four steps is not computed
    torch.testing.assert_close(one, near)
    evaluate = model.branches(mu, cond, given, schedule, unconditional=True)
    x = noise
    for i in (1, 2):
        x = x - schedule.lengths[i] * guide(*evaluate(x, i), 3.0)
    torch.testing.assert_close(found, x - schedule.lengths[3] * evaluate(x, 3)[0])


def test_a_single_step_returns_the_noise_scaled_by_the_temperature():
    mu, cond, given, noise = conditions()
    model = head()
    torch.testing.assert_close(model.sample(mu, cond, given, noise, model.schedule(1), 0.3), 0.3 * noise)


def test_the_flow_matching_loss_of_the_true_velocity_is_zero():
    x1 = torch.randn(5, 3, 4)
    draws = FlowDraws.sample(x1)
    assert ((draws.t > 0) & (draws.t < 1)).all()
    assert flow_loss(draws.z - x1, x1, draws.z) == 0
    x = noised(x1, draws)
    torch.testing.assert_close(x - draws.t[:, None, None] * (draws.z - x1), x1)


def test_a_head_without_examples_has_zero_loss_and_zero_gradients():
    model = head()
    loss = model.loss(torch.zeros(0, 3, 4), torch.zeros(0, 16), torch.zeros(0, 3, 4), torch.zeros(0, 5))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

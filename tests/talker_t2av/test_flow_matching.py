"""What sampling by flow matching evaluates, beside the golden cases of its solver, guidance and loss (`cfm_*`)."""

import torch

from talker_t2av.diffusion_head import DiffusionHead, FlowHead
from talker_t2av.flow_matching import guide, zero_steps


def head(width: int = 16) -> FlowHead:
    torch.manual_seed(0)
    return FlowHead(DiffusionHead(3, 5, width, 2, 2, max_positions=16)).eval()


def conditions(batch: int = 2, width: int = 16, patches: int = 1) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    shapes = [(batch, width), (batch, 3, 4 * patches), (batch, 5), (batch, 3, 4)]
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


def test_zero_steps_follow_the_number_of_steps():
    assert [zero_steps(n) for n in (1, 10, 48, 49, 73, 74)] == [1, 1, 1, 2, 2, 3]


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


def test_a_head_without_examples_has_zero_loss_and_zero_gradients():
    model = head()
    loss = model.loss(torch.zeros(0, 3, 4), torch.zeros(0, 16), torch.zeros(0, 3, 4), torch.zeros(0, 5))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

"""Training and sampling beside their golden cases (`llm_forward_*`, `cfm_*`): padding, labels, what is evaluated."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from talker_fixtures import DM, DS, tiny_model
from torch.nn.utils.rnn import pad_sequence

from talker_t2av.diffusion_head import DiffusionHead, FlowHead
from talker_t2av.flow_matching import guide, zero_steps
from talker_t2av.losses import IGNORED, SpanLayout, phoneme_loss, stop_labels, training_forward, training_losses


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows, the second without motion."""
    g = torch.Generator().manual_seed(0)
    prompt = torch.tensor([5, 7, 4])
    speech_frames = torch.tensor([14, 9, 21])
    end = prompt + torch.tensor([4, 3, 6])  # of four frames a slot
    ids = [torch.randint(0, 250, (length,), generator=g) for length in end + 2]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "speech_span": torch.stack([prompt, end], 1),
        "speech": torch.randn(3, 21, DS, generator=g),
        "speech_frames": speech_frames,
        "motion": torch.randn(3, 20, DM, generator=g),
        "motion_frames": torch.tensor([12, 0, 20]),
        "speaker": torch.randn(3, 256, generator=g),
    }


def test_padding_does_not_change_the_result(batch):
    model = tiny_model()
    wider = batch | {
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=9),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
        "speech": F.pad(batch["speech"], (0, 0, 0, 7), value=5.0),
        "motion": F.pad(batch["motion"], (0, 0, 0, 8), value=5.0),
    }
    losses = []
    for given in (batch, wider):
        torch.manual_seed(0)
        losses.append(training_losses(model, training_forward(model, given))["loss"])
    torch.testing.assert_close(*losses)


def test_the_task_embedding_depends_on_whether_motion_is_given(batch):
    model = tiny_model()
    first = training_forward(model, batch).embeds[:, 0]
    assert torch.equal(first, model.task_embedding.weight[[1, 0, 1]])


@pytest.mark.parametrize(
    ("start", "length", "total", "step", "labels"),
    [
        ([2, 1, 0], [6, 9, 0], 8, [1, 1, 1], ["..000..1", ".0000000", "........"]),  # the second runs past the end
        ([2, 1], [12, 6], 15, [2, 1], ["...0.0.0.....1.", ".000..1........"]),  # of two tokens a patch, the last
    ],
)
def test_stop_labels_mark_the_last_patch_and_leave_two_before_it(start, length, total, step, labels):
    """A point stands for a position that is not asked. The weight is the number of zeros before an end, on average."""
    found, weight = stop_labels(torch.tensor(start), torch.tensor(length), total, step=torch.tensor(step))
    assert found.tolist() == [[IGNORED if label == "." else int(label) for label in row] for row in labels]
    assert weight == 3


def head() -> FlowHead:
    torch.manual_seed(0)
    return FlowHead(DiffusionHead(3, 5, 16, 2, 2, max_positions=16)).eval()


def conditions() -> tuple[torch.Tensor, ...]:
    """mu, context, speaker and noise of two rows."""
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=g) for shape in ((2, 16), (2, 3, 4), (2, 5), (2, 3, 4)))


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


def test_phonemes_are_predicted_before_each_patch_in_every_order():
    """From the state before the patch of speech: with alternating tokens, that of the motion in order va."""
    for order, used in (("add", [6, 7, 8]), ("av", [6, 8, 10]), ("va", [7, 9, 11])):
        config = SimpleNamespace(patch_size=4, phonemes=3, order=order, delay=0)
        model = SimpleNamespace(config=config, head_phoneme=torch.nn.Linear(5, 12))
        hidden = torch.randn(1, 20, 5, requires_grad=True)
        batch = {
            "attention_mask": torch.ones(1, 19),
            "phoneme": torch.ones(1, 12, dtype=torch.uint8),
            "speech_frames": torch.tensor([12]),
            "motion_frames": torch.tensor([12]),
            "speech_span": torch.tensor([[6, 12]]),
        }
        phoneme_loss(model, hidden, batch).backward()
        assert hidden.grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == used
        layout = SpanLayout.of(config, batch)
        assert (layout.begin["speech"] - 1 + layout.step * torch.arange(3)).tolist() == used

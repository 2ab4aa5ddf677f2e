"""Training and sampling beside their golden cases (`llm_forward_*`, `cfm_*`): padding, labels, what is evaluated."""

import pytest
import torch
import torch.nn.functional as F
from talker_fixtures import DM, DS, tiny_model
from torch.nn.utils.rnn import pad_sequence

from talker_t2av.diffusion_head import DiffusionHead, FlowHead
from talker_t2av.flow_matching import guide, zero_steps
from talker_t2av.losses import IGNORED, stop_labels, training_forward, training_losses


def batch_of(rows: list[tuple[int, int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of so many prompt tokens, speech frames and motion frames; without motion, none are given."""
    g = torch.Generator().manual_seed(seed)
    slots = [-(-speech // 4) for _, speech, _ in rows]
    lengths = torch.tensor([prompt + own + 2 for (prompt, *_), own in zip(rows, slots)])
    ids = [torch.randint(0, 250, (length,), generator=g) for length in lengths]
    frames = max(r[1] for r in rows)
    motions = max(r[2] for r in rows)
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
        "speech_span": torch.tensor([(prompt, prompt + own) for (prompt, *_), own in zip(rows, slots)]),
        "speech": torch.randn(len(rows), frames, DS, generator=g),
        "speech_frames": torch.tensor([r[1] for r in rows]),
        "motion": torch.randn(len(rows), motions, DM, generator=g),
        "motion_frames": torch.tensor([r[2] for r in rows]),
        "speaker": torch.randn(len(rows), 256, generator=g),
    }


ROWS = [(5, 14, 12), (7, 9, 0), (4, 21, 20)]


def test_padding_does_not_change_the_result():
    model = tiny_model()
    batch = batch_of(ROWS)
    wider = batch | {
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=9),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
        "speech": F.pad(batch["speech"], (0, 0, 0, 7), value=5.0),
        "motion": F.pad(batch["motion"], (0, 0, 0, 8), value=5.0),
    }
    torch.manual_seed(0)
    one = training_losses(model, training_forward(model, batch))
    torch.manual_seed(0)
    two = training_losses(model, training_forward(model, wider))
    torch.testing.assert_close(one["loss"], two["loss"])


def test_the_task_embedding_depends_on_whether_motion_is_given():
    model = tiny_model()
    batch = batch_of(ROWS)
    assert torch.equal(training_forward(model, batch).embeds[:, 0], model.task_embedding.weight[[1, 0, 1]])


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

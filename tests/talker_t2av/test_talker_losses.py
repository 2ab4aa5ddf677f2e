"""The training forward beside its golden cases (`llm_forward_*`): padding, the task, and the stop head's labels."""

import pytest
import torch
import torch.nn.functional as F
from talker_fixtures import DM, DS, tiny_model
from torch.nn.utils.rnn import pad_sequence

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

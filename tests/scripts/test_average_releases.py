"""Averages of releases: exact means where asked, the first release elsewhere, one clear line for what does not fit."""

import pytest
import torch

from engine.errors import UserError
from scripts.average_releases import _split, average


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "decoder.w": torch.full((2, 3), value),
        "encoder.w": torch.full((4,), value),
        "decoder.count": torch.tensor(int(value)),
    }


def test_means_where_asked_and_nowhere_else():
    mixed = average([state(1.0), state(4.0)], [1.0, 2.0], ("decoder.",))
    torch.testing.assert_close(mixed["decoder.w"], torch.full((2, 3), 3.0))
    assert torch.equal(mixed["encoder.w"], state(1.0)["encoder.w"])
    assert mixed["decoder.count"] == 1  # whole numbers have no mean


def test_without_prefix_all_are_averaged():
    assert average([state(1.0), state(3.0)], [0.5, 0.5])["encoder.w"].tolist() == [2.0] * 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"encoder\.w is missing or of another shape"):
        average([state(1.0), state(1.0) | {"encoder.w": torch.zeros(5)}], [1.0, 1.0])
    with pytest.raises(UserError, match=r"decoder\.extra is missing"):
        average([state(1.0), state(1.0) | {"decoder.extra": torch.zeros(5)}], [1.0, 1.0])
    with pytest.raises(UserError, match="--only head: no tensor begins so"):
        average([state(1.0)], [1.0], ("head",))


@pytest.mark.parametrize("text", ["runs/a", "runs/a:", ":1", "runs/a:0", "runs/a:-1", "runs/a:nan", "runs/a:inf"])
def test_weights_are_above_zero(text):
    with pytest.raises(UserError, match="give FOLDER:WEIGHT"):
        _split(text)

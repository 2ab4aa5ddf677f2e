"""export.py --average and --compact: exact means, 8 bits, and one clear line for what does not fit."""

import pytest
import torch

from engine.errors import UserError
from engine.release import average, read_release, save_release
from scripts import export


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "decoder.w": torch.full((2, 3), value),
        "encoder.w": torch.full((4,), value),
        "decoder.count": torch.tensor(int(value)),
    }


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"encoder\.w is missing or of another shape"):
        average([state(1.0), state(1.0) | {"encoder.w": torch.zeros(5)}], [1.0, 1.0])
    with pytest.raises(UserError, match=r"decoder\.extra is missing"):
        average([state(1.0), state(1.0) | {"decoder.extra": torch.zeros(5)}], [1.0, 1.0])
    with pytest.raises(UserError, match="--only head: no tensor begins so"):
        average([state(1.0)], [1.0], ("head",))


@pytest.fixture
def command(tmp_path, monkeypatch):
    for name, value in (("a", 1.0), ("b", 4.0)):
        save_release(tmp_path / name, "toy", {"of": name}, state(value) | {"big.w": torch.rand(64, 64)}, f"card {name}")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["export.py", *words])
        export.main()
        return read_release(tmp_path / "out", "toy")

    return run


def test_average_keeps_the_first_releases_config_and_card(command, tmp_path, capsys):
    config, mixed = command("--average", "a:1", "b:2", "out", "--only", "decoder.")
    assert config == {"of": "a"} and (tmp_path / "out" / "README.md").read_text() == "card a"
    assert mixed["decoder.w"].unique() == 3.0 and mixed["encoder.w"].unique() == 1.0
    assert mixed["decoder.count"] == 1  # whole numbers have no mean
    assert capsys.readouterr().out.startswith("out: 1 x a + 2 x b, ")


def test_compact_stores_large_matrices_in_8_bits(command, tmp_path):
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    _, exact = command("--compact", "a", "out", "--exact", "big.")
    assert torch.equal(exact["big.w"], read_release(tmp_path / "a", "toy")[1]["big.w"].half())
    _, rounded = command("--compact", "a", "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < size / 2
    torch.testing.assert_close(rounded["big.w"].float(), exact["big.w"].float(), atol=0.005, rtol=0)
    with pytest.raises(UserError, match="--exact head: no tensor of a begins so"):
        command("--compact", "a", "out", "--exact", "head")

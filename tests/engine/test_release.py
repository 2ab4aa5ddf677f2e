"""Weights in a release folder: precision, digest, and the codec that belongs to them."""

import pytest
import torch

from engine.errors import UserError
from engine.hub import check_release, release_folder
from engine.release import find_codec, read_release, save_release, weights_digest
from engine.training.export import compact


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(64, 32, 3, generator=generator) * torch.logspace(-4, 2, 64)[:, None, None]
    big[5] = 0
    small = {"bias": torch.randn(64, generator=generator), "n": torch.tensor(7)}
    return {"a.weight": big, "b.weight": big.clone()} | small


def test_the_error_of_8_bit_weights_is_half_a_step_of_their_row(tmp_path):
    old = state()
    save_release(tmp_path / "r", "toy", {"x": 1}, compact(old, exact=("b.",)), "card")
    config, new = read_release(tmp_path / "r", "toy")
    assert config == {"x": 1} and new.keys() == old.keys()
    error = (new["a.weight"] - old["a.weight"]).flatten(1).abs().amax(1)
    assert (error <= old["a.weight"].flatten(1).abs().amax(1) * 0.5 / 127 + 1e-12).all()
    assert error.max() > 0
    assert torch.equal(new["b.weight"], old["b.weight"].half().float())  # asked to be kept
    assert torch.equal(new["bias"], old["bias"].half().float()) and new["n"] == 7
    assert all(v.dtype in (torch.float32, torch.int64) for v in new.values())


def test_the_digest_depends_on_names_and_values():
    def digest(**values):
        return weights_digest(torch.nn.ParameterDict({name: torch.full((2,), x) for name, x in values.items()}))

    assert digest(a=1.0, b=2.0) == digest(b=2.0, a=1.0)
    assert len({digest(a=1.0, b=2.0), digest(a=1.0, c=2.0), digest(a=1.0, b=3.0)}) == 3


def test_a_codec_is_searched_in_the_release_beside_it_and_among_the_bundled(tmp_path):
    model = tmp_path / "run" / "release"
    bundled = tmp_path / "assets"
    save_release(model, "model", {}, state(), "card")
    trained_with = tmp_path / "codec_run" / "release"  # a folder of the model's own name
    save_release(trained_with, "codec", {}, state(), "card")
    assert find_codec(model, str(trained_with), ("codec",), bundled) == str(trained_with)
    assert find_codec(model, "owner/codec", ("codec",), bundled) == "owner/codec"
    for place in (bundled, model.parent, model):
        save_release(place / "tiny", "codec", {}, state(), "card")
        assert find_codec(model, "x/tiny", ("codec",), bundled) == str(place / "tiny")
    with pytest.raises(UserError, match="names 5"):
        find_codec(model, 5, ("codec",), bundled)


def test_a_run_folder_is_refused_with_the_path_of_its_release(tmp_path):
    run = tmp_path / "run"
    save_release(run / "release", "toy", {}, state(), "card")
    assert release_folder(run / "release") == run / "release"
    for refuse in (release_folder, lambda folder: check_release("weights", str(folder))):
        with pytest.raises(UserError, match=f"{run}/release$"):
            refuse(run)

"""Stored numbers of the official MaskGCT codec and of the discriminators (tests/golden/codecs)."""

import json
from pathlib import Path

import pytest

import tests.golden.runners.rvq  # noqa: F401
from rvq_codec.codec import RVQCodecConfig, build_decoder, build_encoder, build_quantizer
from tests.golden.check import check
from tests.golden.runners import load_case

FOLDER = Path(__file__).parents[1] / "golden" / "codecs"
CASES = sorted([*FOLDER.glob("mgct_*.safetensors"), *FOLDER.glob("disc_*.safetensors")])


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_case(path):
    results = check(load_case(path))
    assert results
    assert all(r.passed for r in results), [r for r in results if not r.passed]


def test_a_wrong_latent_fails():
    case = load_case(FOLDER / "mgct_small_encoder.safetensors")
    case.outputs["z"] = case.outputs["z"] * (1 + 1e-3)
    assert not all(r.passed for r in check(case))


def test_released_keys_and_shapes_of_the_full_size():
    config = RVQCodecConfig()

    def shapes(module, prefix):
        return {prefix + k: list(v.shape) for k, v in module.state_dict().items()}

    encoder = shapes(build_encoder(config), "")
    decoder = shapes(build_quantizer(config), "quantizer.") | shapes(build_decoder(config), "model.")
    decoder["model.head.istft.window"] = [1920]  # stored in the file, computed by ours
    assert encoder == json.loads((FOLDER / "mgct_full_encoder.keys.json").read_text())
    assert decoder == json.loads((FOLDER / "mgct_full_decoder.keys.json").read_text())

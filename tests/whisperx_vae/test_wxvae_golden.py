"""Stored numbers of the official WhisperX-VAE (odd strides) and resampler (tests/golden/codecs)."""

from pathlib import Path

import pytest

import tests.golden.runners.whisperx_vae  # noqa: F401
from tests.golden.check import check
from tests.golden.runners import load_case

FOLDER = Path(__file__).parents[1] / "golden" / "codecs"


@pytest.mark.parametrize("name", ["wxvae_oddstride", "resample"])
def test_case(name):
    results = check(load_case(FOLDER / f"{name}.safetensors"))
    assert results
    assert all(r.passed for r in results), [r for r in results if not r.passed]


def test_a_wrong_latent_fails():
    case = load_case(FOLDER / "wxvae_oddstride.safetensors")
    case.outputs["encode_147"] = case.outputs["encode_147"] * (1 + 1e-3)
    assert [r.output for r in check(case) if not r.passed] == ["encode_147"]

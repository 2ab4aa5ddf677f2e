"""Names and shapes of MaskGCT's codec at the released size."""

import json
from pathlib import Path

import torch

from engine.official import rename_all
from rvq_codec.codec import RVQCodecConfig, build_decoder, build_encoder, build_quantizer
from rvq_codec.released import RULES, config_of

FOLDER = Path(__file__).parents[1] / "golden" / "codecs"


def test_released_keys_and_shapes_of_the_full_size():
    config = RVQCodecConfig()

    def shapes(module, prefix):
        return {prefix + k: list(v.shape) for k, v in module.state_dict().items()}

    encoder = shapes(build_encoder(config), "")
    decoder = shapes(build_quantizer(config), "quantizer.") | shapes(build_decoder(config), "model.")
    decoder["model.head.istft.window"] = [1920]  # stored in the file, computed by ours
    assert encoder == json.loads((FOLDER / "mgct_full_encoder.keys.json").read_text())
    assert decoder == json.loads((FOLDER / "mgct_full_decoder.keys.json").read_text())


def test_sizes_follow_from_the_tensors():
    encoder, decoder = (
        {key: torch.empty(shape, device="meta") for key, shape in json.loads((FOLDER / name).read_text()).items()}
        for name in ("mgct_full_encoder.keys.json", "mgct_full_decoder.keys.json")
    )
    assert RVQCodecConfig(**config_of(rename_all(encoder | decoder, RULES))) == RVQCodecConfig()

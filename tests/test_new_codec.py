"""A new codec needs one entry in the table of a model."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import hicodit.system
from engine.codec import Codec
from engine.errors import UserError
from hicodit.conditions import encoder_config
from hicodit.model import ModelConfig
from hicodit.pipeline import Crops, HiCoDiTPipeline
from hicodit.system import HiCoDiTSystem


@dataclass(frozen=True)
class ToyConfig:
    hop: int = 480


class ToyCodec(Codec):
    """Tokens are quantised linear projections of the samples of a frame. Its receptive field is not stated."""

    Config = ToyConfig
    kind = "toy"
    sample_rate = 24_000
    levels = 3
    codes = 16

    def __init__(self, config):
        super().__init__(config)
        self.hop = config.hop
        self.basis = torch.nn.Parameter(torch.randn(self.levels, self.hop) / math.sqrt(self.hop))

    def encode(self, signal):
        frames = signal[:, 0, : signal.shape[-1] // self.hop * self.hop].unflatten(1, (-1, self.hop))
        return (4 * frames @ self.basis.T).round().long().clamp(0, self.codes - 1).transpose(1, 2)

    def decode(self, code):
        return (code.transpose(1, 2) / 4 @ self.basis).flatten(1)[:, None]

    def digest(self):
        return "00000toy"


def test_hicodit_generates_speech_with_a_new_token_codec(tmp_path, monkeypatch):
    torch.manual_seed(0)
    ToyCodec(ToyConfig()).save_pretrained(tmp_path / "toy", "card")
    sizes = {"width": 12, "heads": 2, "low_blocks": 1, "high_blocks": 1, "cond_dim": 8, "lip_dim": 12, "face_dim": 8}
    model = ModelConfig(levels=3, low_levels=1, codes=16, **sizes)
    tiny = {"lip_dim": 12, "lip_heads": 2, "face_dim": 8, "face_width": 4, "mouth_size": 16, "face_size": 16}
    system = HiCoDiTSystem(model, encoder_config({"kind": "tiny", **tiny}))
    system.save_pretrained(tmp_path / "hicodit", "card", {"codec": "toy", "token_digest": "00000toy"})
    with pytest.raises(UserError, match="toy"):
        HiCoDiTPipeline.from_pretrained(tmp_path / "hicodit")
    monkeypatch.setitem(hicodit.system.CODECS, ToyCodec.kind, ToyCodec)
    pipeline = HiCoDiTPipeline.from_pretrained(tmp_path / "hicodit")
    random = np.random.default_rng(0)
    mouth, voices = (random.integers(0, 255, shape, np.uint8) for shape in ((10, 16, 16), (4, 16, 16, 3)))
    crops = Crops(mouth, voices, torch.zeros(1, dtype=torch.long))
    (speech,) = pipeline.run([crops], [0])
    assert speech.tokens.shape == (3, 20) and speech.wave.shape == (10 * 960,)
    tokens = torch.from_numpy(speech.tokens)[None]
    (decoded,) = pipeline.codec.decode_stream(tokens.split(6, 2), 2)  # at the end, as the receptive field is not stated
    np.testing.assert_allclose(decoded[0, 0].numpy(), speech.wave, atol=1e-5)

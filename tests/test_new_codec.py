"""A codec that a model has never seen: one entry in its table is all it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import hicodit.system
import talker_t2av.system
from engine.codec import Codec, PortraitCodec, load_codec
from engine.errors import UserError
from hicodit.conditions import encoder_config
from hicodit.model import ModelConfig
from hicodit.pipeline import Crops, HiCoDiTPipeline
from hicodit.system import HiCoDiTSystem
from talker_t2av.pipeline import TalkerPipeline
from tests.talker_t2av.talker_fixtures import DM, DS, face_file, save_talker, voice_file


@dataclass(frozen=True)
class ToyConfig:
    hop: int = 480


class Toy(Codec):
    """Frames are linear projections of their samples."""

    Config = ToyConfig
    sample_rate = 24_000
    reach = (0, 0)

    def __init__(self, config):
        super().__init__(config)
        self.hop = config.hop
        self.basis = torch.nn.Parameter(torch.randn(self.width, self.hop) / math.sqrt(self.hop))

    def encode(self, signal):
        frames = signal[:, 0, : signal.shape[-1] // self.hop * self.hop].unflatten(1, (-1, self.hop))
        return frames @ self.basis.T

    def decode(self, code):
        return (code @ self.basis).flatten(1)[:, None]

    def digest(self):
        return "00000toy"


class ToyLatents(Toy):
    kind = "toy_latents"
    width = DS
    channels = DS


class ToyTokens(Toy):
    kind = "toy_tokens"
    width = 3
    levels = 3
    codes = 16

    def encode(self, signal):
        return (super().encode(signal) * 4).round().long().clamp(0, self.codes - 1).transpose(1, 2)

    def decode(self, code):
        return super().decode(code.transpose(1, 2) / 4)


class ToyFace(PortraitCodec):
    """Motion is the brightness of each fifth of the picture."""

    kind = "toy_face"
    Config = ToyConfig
    sample_rate = 25
    channels = DM
    size = 20

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def identity(self, picture):
        return picture.mean()

    def encode(self, signal):
        return self.gain * signal.unflatten(2, (DM, -1)).mean((1, 3, 4))

    def decode(self, code, identity):
        rows = (code + identity)[:, None, :, None].expand(-1, 3, -1, self.size)
        return rows.repeat_interleave(self.size // DM, 2)

    def digest(self):
        return "00000toy"


def test_hicodit_speaks_by_a_token_codec_of_its_table(tmp_path, monkeypatch):
    torch.manual_seed(0)
    ToyTokens(ToyConfig()).save(tmp_path / "toy", "card")
    sizes = {"width": 12, "heads": 2, "low_blocks": 1, "high_blocks": 1, "cond_dim": 8, "lip_dim": 12, "face_dim": 8}
    model = ModelConfig(levels=3, low_levels=1, codes=16, **sizes)
    tiny = {"lip_dim": 12, "lip_heads": 2, "face_dim": 8, "face_width": 4, "mouth_size": 16, "face_size": 16}
    system = HiCoDiTSystem(model, encoder_config({"kind": "tiny", **tiny}))
    system.save(tmp_path / "hicodit", "card", {"codec": "toy", "token_digest": "00000toy"})
    with pytest.raises(UserError, match="toy"):
        HiCoDiTPipeline.from_pretrained(tmp_path / "hicodit")
    monkeypatch.setitem(hicodit.system.CODECS, ToyTokens.kind, ToyTokens)
    pipeline = HiCoDiTPipeline.from_pretrained(tmp_path / "hicodit")
    random = np.random.default_rng(0)
    mouth, voices = (random.integers(0, 255, shape, np.uint8) for shape in ((10, 16, 16), (4, 16, 16, 3)))
    crops = Crops(mouth, voices, torch.zeros(1, dtype=torch.long))
    (speech,) = pipeline.run([crops], [0])
    assert speech.tokens.shape == (3, 20) and speech.wave.shape == (10 * 960,)


def test_talker_speaks_and_draws_by_codecs_of_its_table(tmp_path, monkeypatch):
    save_talker(tmp_path)
    folders = {"speech": tmp_path / "toy_speech", "motion": tmp_path / "toy_face"}
    ToyLatents(ToyConfig(960)).save(folders["speech"], "card")
    ToyFace(ToyConfig()).save(folders["motion"], "card")
    monkeypatch.setitem(talker_t2av.system.CODECS["speech"], ToyLatents.kind, ToyLatents)
    monkeypatch.setitem(talker_t2av.system.CODECS["motion"], ToyFace.kind, ToyFace)
    pipeline = TalkerPipeline.from_pretrained(tmp_path / "talker", codecs=folders)
    voice = str(voice_file(tmp_path / "voice.wav"))
    face = str(face_file(tmp_path / "face.mp4"))
    talk = pipeline.t2av("set red", voice, face, crop="centre", min_seconds=0.4, max_seconds=0.4, prefix_seconds=0.2)
    assert talk.frames.shape[1:] == (20, 20, 3) and len(talk.wave) == 960 * len(talk.frames) == 960 * len(talk.motion)


def test_a_stream_decodes_to_what_the_whole_decodes_to():
    codec = ToyLatents(ToyConfig())
    code = torch.randn(1, 9, DS)
    for reach in ((0, 0), Codec.reach):  # a codec that says nothing of its reach is decoded at the end
        codec.reach = reach
        pieces = list(codec.decode_stream(code.split([2, 0, 4, 3], 1)))
        assert len(pieces) == (3 if reach == (0, 0) else 1)
        torch.testing.assert_close(torch.cat(pieces, -1), codec.decode(code))


def test_what_is_no_codec_of_the_table_is_named(tmp_path):
    ToyLatents(ToyConfig()).save(tmp_path / "toy", "card")
    with pytest.raises(UserError, match="of kind 'toy_latents', but toy_tokens or toy_face is needed"):
        load_codec(tmp_path / "toy", {"toy_tokens": ToyTokens, "toy_face": ToyFace})
    with pytest.raises(UserError, match="weights folder not found"):
        load_codec(tmp_path / "absent", {"toy_tokens": ToyTokens})

"""The released checkpoint: names, sizes, strictness, and a reader that runs nothing."""

import json
from dataclasses import asdict

import pytest
import torch
from omegaconf import OmegaConf

from engine.errors import UserError
from engine.official import rename_all
from tests.reference import released_names
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig
from whisperx_vae.released import RULES

TINY = WhisperXVAEConfig(
    encoder_width=4, hidden=64, latent_dim=6, decoder_width=32, whisper_context=50, whisper_heads=1, whisper_layers=1
)  # hidden: one attention head of Whisper's head size
HYPER = {
    "cfg": {
        "dataset": {"sr": 24000},
        "model": {
            "codec_encoder": {"in_dim": 4, "ratios": [2, 4, 10, 12], "hidden_dim": 64},
            "codec_decoder": {"hidden_dim": 32, "ratios": [12, 10, 4, 2], "z_dim": 6},
        },
    }
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return WhisperXVAE(TINY).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    """A Lightning-like file: training-only tensors beside the needed ones, and an OmegaConf node."""

    def write(state=None, hyper=HYPER):
        state = released_names.whisperx_vae(model.state_dict()) if state is None else state
        state = {**state, "discriminator.convs.0.weight": torch.zeros(3)}
        state["semantic_model.decoder.token_embedding.weight"] = torch.zeros(4, 2)
        content = {"state_dict": state, "epoch": 0, "hyper_parameters": OmegaConf.create(hyper), "optimizer": [{}]}
        torch.save(content, tmp_path / "epoch=0-step=480000.ckpt")
        return tmp_path / "epoch=0-step=480000.ckpt"

    return write


def test_checkpoint_with_foreign_objects(checkpoint, model):
    loaded = WhisperXVAE.from_pretrained(checkpoint().parent)
    assert loaded.config == TINY
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_absent_position_table_is_computed(checkpoint, model):
    state = released_names.whisperx_vae(model.state_dict())
    del state["semantic_model.encoder.positional_embedding"]
    again = WhisperXVAE.from_tensors(asdict(TINY), rename_all(state, RULES), "test")
    assert torch.equal(again.whisper.embed_positions.weight, model.whisper.embed_positions.weight)


def test_a_missing_tensor_is_refused(checkpoint, model):
    state = released_names.whisperx_vae(model.state_dict())
    with pytest.raises(UserError, match="lacks"):
        WhisperXVAE.from_pretrained(checkpoint({k: v for k, v in state.items() if k != "CodecDec.model.0.bias"}))


def test_contradicting_configuration_is_refused(checkpoint):
    hyper = json.loads(json.dumps(HYPER))
    hyper["cfg"]["model"]["codec_encoder"]["in_dim"] = 80
    with pytest.raises(UserError, match=r"codec_encoder.in_dim=80, its weights have 4"):
        WhisperXVAE.from_pretrained(checkpoint(hyper=hyper))

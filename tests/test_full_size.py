"""Networks of the published sizes, on the meta device."""

import pytest
import torch
from omegaconf import OmegaConf

from engine.config import CONFIGS
from engine.release import _no_larger_than
from lia_x import LiaX
from rvq_codec import RVQCodec
from whisperx_vae import WhisperXVAE


@pytest.mark.parametrize(
    ("codec", "name"), [(RVQCodec, "rvq_maskgct"), (WhisperXVAE, "whisperx_vae_base"), (LiaX, "lia_x_base")]
)
def test_a_codec_is_no_larger_than_its_own_release(codec, name):
    arguments = OmegaConf.to_container(OmegaConf.load(CONFIGS / "codec" / f"{name}.yaml"))
    with torch.device("meta"):
        state = codec.from_arguments(arguments).stored()
        with _no_larger_than(state, *codec.beyond):
            codec.from_arguments(arguments)

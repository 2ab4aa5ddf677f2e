"""Encoders that are loaded from released checkpoints, at small sizes, on a CUDA device that is not there.

They read nothing on the host, and no copy to the device waits: whoever takes their features does.
"""

import pytest
import torch
from transformers import WavLMConfig

from hicodit.conditions.upstream import UpstreamEncoderConfig, UpstreamEncoders
from talker_t2av.speaker.encoder import WavLMEncoder
from tests.gpu.fakes import audited, faked
from tests.talker_t2av.talker_fixtures import VAE
from whisperx_vae import WhisperXVAE

HUBERT = {"width": 16, "layers": 1, "heads": 2, "hidden": 32, "conv_kernel": 8, "conv_groups": 4}
WAVLM = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WAVLM |= {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


def released(name):
    encoders = UpstreamEncoders(UpstreamEncoderConfig(lip=HUBERT, identity_blocks=(1, 1, 1, 1)))
    with torch.device("meta"):  # POSTER V2 has one size
        network = encoders._read(name).eval()
    encoders._networks[name] = faked(network)
    return getattr(encoders, name)


RUNS = {  # lip features of a clip of two windows and of a short one; of speech, two windows
    "lip": lambda: released("lip")(faked(torch.zeros(2, 520, 88, 88)), torch.tensor([520, 40])),
    "identity": lambda: released("identity")(faked(torch.zeros(2, 3, 3, 224, 224))),
    "expression": lambda: released("expression")(faked(torch.zeros(20, 3, 112, 112))),
    "voice": lambda: faked(WavLMEncoder(WavLMConfig(**WAVLM), channels=8).eval()).embed(faked(torch.zeros(16_000))),
    "voices": lambda: faked(WavLMEncoder(WavLMConfig(**WAVLM), channels=8).eval()).hidden_states(
        faked([torch.zeros(16_000), torch.zeros(9_000)])
    ),
    "speech": lambda: faked(WhisperXVAE(VAE).eval()).encode(faked(torch.zeros(1, 1, 40_000))),
}


@pytest.mark.parametrize("name", RUNS)
def test_encoders_read_nothing(name):
    with audited() as audit, torch.inference_mode():
        features = RUNS[name]()
    assert features.device.type == "cuda" and not audit.reads and not audit.waits

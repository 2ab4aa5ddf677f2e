"""Packed attention on a (fake) CUDA device takes PyTorch's kernel for rows of different lengths."""

import pytest
import torch

from engine.nn.packing import Packing
from talker_t2av.model import TalkerConfig, TalkerT2AV
from tests.gpu.fakes import CUDA, fake_cuda, faked
from tests.talker_t2av.talker_fixtures import LLM


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_packed_talker_takes_the_kernel_in_half_precision(precision):
    model = TalkerT2AV(TalkerConfig(LLM, encoder_heads=2, head_heads=2, packed=True))
    layers = model.llm.config.num_hidden_layers
    with fake_cuda() as operators:
        fake, embeds = faked(model), torch.empty(1, 9, model.width, device=CUDA)
        bounds = torch.empty(3, dtype=torch.int32, device=CUDA)
        places = torch.empty(9, dtype=torch.long, device=CUDA)
        packing = Packing(torch.empty(2, 5, dtype=torch.bool, device=CUDA), places, places, places, bounds, 5)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            fake.llm.model(
                inputs_embeds=embeds,
                position_ids=places[None],
                attention_mask={"full_attention": None},
                packing=packing,
            )
    assert operators.counts["torch_attn::_varlen_attn"] == (layers if precision == "bf16" else 0)

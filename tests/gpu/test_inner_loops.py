"""What inner loops launch, and in which precision; whole pipelines show that they wait for nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.common import Operators
from engine.cuda_graph import map_tensors
from engine.precision import convert_matrices
from hicodit.conditions.types import Conditions
from hicodit.generation import generate
from hicodit.model import FLOAT32, HiCoDiT, ModelConfig
from hicodit.settings import GuidanceScales, SamplerConfig
from talker_t2av.fused import fuse_layers
from talker_t2av.generation import BatchedDecoder
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import MODES, Sampling
from tests.gpu import fakes
from tests.gpu.fakes import CUDA, fake_cuda, faked
from tests.talker_t2av.talker_fixtures import request, tiny_model
from tests.tiny import HICODIT


def test_half_precision_of_hicodits_steps_is_where_it_is_meant():
    torch.manual_seed(0)
    model = convert_matrices(HiCoDiT(ModelConfig(**HICODIT)).eval(), torch.bfloat16, FLOAT32)
    steps = 3
    frames = torch.tensor([20, 15])
    conditions = Conditions(torch.randn(2, 20, 32), torch.rand(2, 256), torch.tensor([[1, 4], [2, 0]]), frames)
    sampler = SamplerConfig("confidence", steps)
    guidance = GuidanceScales(2.5, 1.25, 1.5, 2.0)
    with fakes.Operators() as operators, torch.inference_mode():
        generate(model, conditions, sampler, guidance, [0, 1])
    half = {name for (name, dtype) in operators.types if dtype == torch.bfloat16}
    assert "_log_softmax" not in half and not half & {"cumsum", "sort", "native_layer_norm", "add_"}
    products = {dtype: n for (name, dtype), n in operators.types.items() if name == "linear"}
    assert set(products) == {torch.float32, torch.bfloat16}
    assert products[torch.float32] == 6 * steps  # modulation: two of time, two of the stages, two of temporal scales


def test_launches_and_casts_of_a_patch_of_the_talker_in_half_precision():
    """At the depth of the paper. The ceilings only fall."""
    config = tiny_model().config
    attention = []
    launches = Operators()
    model = TalkerT2AV(replace(config, llm=config.llm | {"num_hidden_layers": 28}, encoder_layers=4, head_layers=8))
    fuse_layers(model.eval().to_precision(torch.bfloat16))
    decoder = BatchedDecoder(model, MODES["t2av"], Sampling(10, guidance=2.0), 2)
    for asked in (request(), request(9)):
        decoder.join(asked)
    shapes = map_tensors(lambda x: x.shape, decoder.state)

    def attend(q, k, v, **_):  # one kernel on CUDA; fake tensors would show the operators that compute it elsewhere
        attention.append(1)
        return torch.empty_like(q)

    with (
        mock.patch("torch.inference_mode", lambda mode=True: torch.no_grad()),  # it hides operators
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attend),
        mock.patch.object(FakeTensor, "cpu", lambda x: SimpleNamespace(tolist=lambda: [99] * len(x))),  # no row ends
        fake_cuda() as operators,
        torch.inference_mode(),
    ):
        decoder.device = CUDA
        decoder.model = faked(model)
        decoder.heads = {"speech": decoder.model.speech_cfm, "motion": decoder.model.motion_cfm}
        decoder.encoders = {"speech": decoder.model.speech_tokens, "motion": decoder.model.motion_tokens}
        for name in ("state", "plan", "cache"):
            setattr(decoder, name, faked(getattr(decoder, name)))
        for schedule in decoder.schedules.values():
            object.__setattr__(schedule, "shifts", faked(schedule.shifts))
        operators.types.clear()
        with launches:
            for _ in range(3):
                decoder.step()
    assert {dtype for name, dtype in operators.types if name in ("mm", "addmm")} == {torch.bfloat16, torch.float32}
    assert all(patch.shape[1] == 4 for patch in (decoder.patch.speech, decoder.patch.motion))
    assert map_tensors(lambda x: x.shape, decoder.state) == shapes
    assert len(attention) == 3 * (28 + 2 * 4 + 2 * 8 * 9)
    total = (launches.kernels + len(attention)) / 3
    casts = launches.names["_to_copy"] / 3
    assert total < 3550 and casts < 72

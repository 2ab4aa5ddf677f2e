"""The precision of the operators in HiCoDiT's sampling steps."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.precision import convert_matrices
from hicodit.conditions.types import Conditions
from hicodit.generation import generate
from hicodit.model import FLOAT32_MODULES, HiCoDiT, ModelConfig
from hicodit.settings import GuidanceScales, SamplerConfig
from tests.tiny import HICODIT


class OutputTypes(TorchDispatchMode):
    """Counts calls by operator and type of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else [out]:
            if isinstance(result, torch.Tensor):
                self.calls[func.overloadpacket.__name__, result.dtype] += 1
        return out


def test_half_precision_of_hicodits_steps_is_where_it_is_meant():
    torch.manual_seed(0)
    model = convert_matrices(HiCoDiT(ModelConfig(**HICODIT)).eval(), torch.bfloat16, FLOAT32_MODULES)
    steps = 3
    frames = torch.tensor([20, 15])
    conditions = Conditions(torch.randn(2, 20, 32), torch.rand(2, 256), torch.tensor([[1, 4], [2, 0]]), frames)
    sampler = SamplerConfig("confidence", steps)
    with OutputTypes() as types, torch.inference_mode():
        generate(model, conditions, sampler, GuidanceScales(2.5, 1.25, 1.5, 2.0), [0, 1])
    half = {name for name, dtype in types.calls if dtype == torch.bfloat16}
    assert "_log_softmax" not in half and not half & {"cumsum", "sort", "native_layer_norm", "add_"}
    products = {dtype: count for (name, dtype), count in types.calls.items() if name == "linear"}
    assert set(products) == {torch.float32, torch.bfloat16}
    assert products[torch.float32] == 6 * steps  # modulation: two of time, two of the stages, two of temporal scales

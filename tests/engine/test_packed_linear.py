"""Weights of inference in oneDNN's layout give the same products.

Axes: N input features, M output features.
"""

import pytest
import torch
from torch import nn

from engine.precision import PackedLinear, can_pack, convert_matrices, pack_linear

x86 = pytest.mark.skipif(not can_pack(torch.float32), reason="weights are packed on x86 processors alone")
half = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not can_pack(torch.bfloat16), reason="needs AVX-512 or AVX-NE-CONVERT")
)


@x86
@pytest.mark.parametrize("dtype", [torch.float32, half])
@pytest.mark.parametrize("shape", [(0, 48), (48,), (1, 48), (5, 48), (2, 3, 7, 48), (600, 48)])
def test_a_packed_layer_gives_the_same_numbers(dtype, shape):
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(48, 96, bias=bias).to(dtype)
        packed = pack_linear(nn.Sequential(layer))[0]
        assert isinstance(packed, PackedLinear) and packed.weight.dtype == dtype
        assert torch.equal(packed.weight.to_dense(), layer.weight)
        x = torch.randn(shape, dtype=dtype)
        with torch.inference_mode():
            found, wanted = packed(x), layer(x)
            part = packed(x.expand(2, *shape)[:, ..., :])  # not contiguous
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(part[1], wanted)


@x86
def test_layers_that_share_a_weight_stay_as_they_are():
    table, tied, free = nn.Embedding(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 16)
    tied.weight = table.weight
    network = nn.ModuleDict({"table": table, "tied": tied, "free": free})
    pack_linear(network)
    assert type(network["tied"]) is nn.Linear and type(network["free"]) is PackedLinear
    assert network["tied"].weight is table.weight


def test_nothing_is_packed_for_another_device():
    network = nn.Sequential(nn.Linear(4, 4))
    assert type(pack_linear(network, "cuda")[0]) is nn.Linear


@x86
def test_half_of_a_network_in_half_precision_is_packed_as_it_is():
    network = nn.ModuleDict({"time": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    pack_linear(convert_matrices(network, torch.bfloat16, without=("time",)))
    assert type(network["time"]) is PackedLinear
    assert [network[name].weight.dtype for name in ("time", "out")] == [torch.float32, torch.bfloat16]

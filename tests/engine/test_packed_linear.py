"""Linear layers of inference: weights in the layout of oneDNN, and weights in 8 bits.

Axes: N input features, M output features.
"""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

import engine.precision
from engine.errors import UserError
from engine.precision import (
    Int8Linear,
    PackedLinear,
    can_int8,
    can_pack,
    convert_matrices,
    pick_dtype,
    prepare_inference,
    uses_int8,
)

x86 = pytest.mark.skipif(not can_pack(torch.float32), reason="weights are packed on x86 processors alone")
vnni = pytest.mark.skipif(not can_int8("cpu"), reason="needs an x86 processor with VNNI")
half = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not can_pack(torch.bfloat16), reason="needs AVX-512 or AVX-NE-CONVERT")
)


@x86
@pytest.mark.parametrize("dtype", [torch.float32, half])
@pytest.mark.parametrize("shape", [(0, 48), (2, 3, 7, 48), (600, 48)])
def test_a_packed_layer_equals_nn_linear(dtype, shape):
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(48, 96, bias=bias).to(dtype)
        packed = prepare_inference(nn.Sequential(layer))[0]
        assert isinstance(packed, PackedLinear) and packed.weight.dtype == dtype
        assert torch.equal(packed.weight.to_dense(), layer.weight)
        x = torch.randn(shape, dtype=dtype)
        with torch.inference_mode():
            found = packed(x)
            wanted = layer(x)
            part = packed(x.expand(2, *shape)[:, ..., :])  # not contiguous
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(part[1], wanted)


@x86
def test_packed_layers_keep_their_dtype_and_tied_layers_are_not_packed():
    table = nn.Embedding(8, 16)
    tied = nn.Linear(16, 8, bias=False)
    tied.weight = table.weight
    network = nn.ModuleDict({"table": table, "tied": tied, "time": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    prepare_inference(convert_matrices(network, torch.bfloat16, without=("time", "tied")))
    assert type(network["tied"]) is nn.Linear and network["tied"].weight is table.weight
    assert type(network["time"]) is type(network["out"]) is PackedLinear
    assert [network[name].weight.dtype for name in ("time", "out")] == [torch.float32, torch.bfloat16]
    assert type(prepare_inference(nn.Sequential(nn.Linear(4, 4)), device="cuda")[0]) is nn.Linear


@vnni
@pytest.mark.parametrize("shape", [(0, 48), (2, 3, 7, 48), (20, 2730)])
def test_an_int8_layer_is_the_product_of_rounded_numbers(shape):
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(shape[-1], 96, bias=bias)
        x = 3 * torch.randn(shape)
        eight = Int8Linear(layer)
        weight = layer.weight.detach()
        row = x.abs().amax(-1, keepdim=True)
        channel = weight.abs().amax(1) / 127
        rounded = torch.quantize_per_tensor(x / row, 1 / 127, 128, torch.quint8).dequantize().double()
        sums = rounded @ (weight / channel[:, None]).round().double().T
        with torch.inference_mode():
            found = eight(x)
            exact = layer(x)
            part = eight(x.expand(2, *shape)[:, ..., :])  # not contiguous
            turned = eight(x.expand(2, *shape).transpose(-1, 0).contiguous().transpose(-1, 0))
        wanted = row * channel * sums + (layer.bias if bias else 0)
        wrong = ((found - wanted).abs() > 1e-4 * row) / max(1, found.numel())
        assert wrong.sum() <= 0.01  # an integer rounded the other way, where x lies between two of them
        assert torch.equal(part[1], found) and torch.equal(turned[1], found)
        assert found.shape == exact.shape and (found - exact).norm() <= 0.02 * exact.norm()


@vnni
def test_a_row_in_int8_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    eight = Int8Linear(nn.Linear(64, 32))
    x = torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]
    with torch.inference_mode():
        assert torch.equal(eight(x), torch.cat([eight(row[None]) for row in x]))
        assert torch.equal(eight(torch.zeros(1, 64))[0], eight.bias)


@vnni
def test_only_layers_of_blocks_are_converted_to_int8():
    block = nn.ModuleDict({"qkv": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    network = nn.ModuleDict({"input": nn.Linear(8, 8), "blocks": nn.ModuleList([block]), "head": nn.Linear(8, 8)})
    prepare_inference(network, int8=True)
    assert type(block["qkv"]) is Int8Linear
    assert type(network["input"]) is PackedLinear and type(network["head"]) is PackedLinear


def test_int8_falls_back_to_auto_on_older_processors(monkeypatch, capsys):
    if can_int8("cpu"):
        assert uses_int8("int8", "cpu")
        with pytest.raises(UserError, match="compile=true"):
            uses_int8("int8", "cpu", compiled=True)
    monkeypatch.setattr(engine.precision, "VNNI", ())  # as of an older processor
    assert not uses_int8("int8", "cpu") and pick_dtype("int8", "cpu") == pick_dtype("auto", "cpu")
    assert "precision=auto" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_torchao_converts_the_weights_of_blocks():
    torch.manual_seed(0)
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 64)]), "head": nn.Linear(64, 64)})
    x = torch.randn(3, 64)
    layer = network["blocks"][0]
    head = network["head"].weight
    exact = layer(x)
    prepare_inference(network, True, "cuda")  # torchao converts where the weights are, here on the processor
    found = network["blocks"][0](x)
    assert network["head"].weight is head and not torch.equal(found, exact)
    assert (found - exact).norm() <= 0.02 * exact.norm()

"""Numerical precision of networks in inference: `precision=auto|fp32|bf16|int8`.

With bfloat16, the operands of matrix products are in half precision, which halves the memory and is up to three times
as fast on CPUs with native support. Residual streams, log posteriors, sampling and codecs stay in float32.

On x86 CPUs, weights are prepacked for inference into the memory layout of oneDNN (`PackedLinear`). Without it, PyTorch
uses MKL for float32, which is half as fast on AMD CPUs, and repacks bfloat16 weights in each call.

With int8 (`Int8Linear`), the weights of transformer blocks take a quarter of the memory of float32, and small batches
are memory-bound. Weights are quantised per output channel and activations dynamically per row, so that no calibration
is needed and the result of a row does not depend on the rest of the batch. Everything else is float32.

Axes: N input features, M output features.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Collection
from typing import TypeVar

import torch
from torch import Tensor, nn

from engine.errors import UserError, require
from engine.settings import PRECISIONS, require_choice

CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # checks of torch.cpu: x86, x86, ARM
VNNI = ("avx512_vnni", "avx_vnni")  # CPU flags of int8 dot-product instructions
BLOCKS = ("blocks", "layers")  # attribute names of transformer blocks, whose linear layers are quantised
LARGEST = 127  # maximum absolute quantised value
TINY = 1e-30  # minimum scale of a weight
PACKED_FOR = 256  # number of input rows for which the layout is optimised

M = TypeVar("M", bound=nn.Module)


def pick_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Return the dtype of matrices. `auto` selects bfloat16 on devices with native support.

    With `int8`, it is the dtype of matrices that are not quantised.
    """
    require_choice("precision", precision, PRECISIONS)
    if precision in ("fp32", "bf16"):
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if precision == "int8" and can_int8(device):
        return torch.float32  # casts between two dtypes would cost more than the few other matrices save
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.device(device).type == "cpu":
        found = torch.cpu.get_capabilities()
        native = any(found.get(feature, False) for feature in CPU_FEATURES)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def convert_matrices(network: M, dtype: torch.dtype, without: Collection[str] = ()) -> M:
    """Convert the weights of linear layers in place, for use under `half_precision`. Do not save the result.

    Args:
        without: names of modules to exclude, including their submodules.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and not set(name.split(".")) & set(without):
            layer.to(dtype)
    return network


class PackedLinear(nn.Module):
    """Inference-only linear layer whose weight (M, N) is prepacked for oneDNN. `weight.to_dense()` unpacks it.

    It uses the operators of PyTorch's inductor (`torch._inductor.mkldnn_lowerings`).
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), PACKED_FOR)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x (..., N) -> (..., M), both in the dtype of the weight."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this is an x86 CPU for which PyTorch has oneDNN matrix products of a dtype."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Int8Linear(nn.Module):
    """Inference-only float32 linear layer with int8 matrix products. Its weight (M, N) is prepacked for FBGEMM.

    With scales s = max |x| / 127 of each row and c = max |w| / 127 of each channel it is s c sum(round(x / s) round(w /
    c)) + bias. The sum is exact in 32 bits. For small batches, FBGEMM is twice as fast as oneDNN, whose operator for
    signed activations requires AMX.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        weight = layer.weight.detach()
        scale = weight.abs().amax(1) / LARGEST + TINY
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        zeros = torch.zeros(self.out_features, dtype=torch.long)
        quantised = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zeros, 0)
        self.weight = torch.ops.quantized.linear_prepack(quantised, None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x (..., N), of at least two dimensions -> (..., M)."""
        largest = x.abs().amax(-1, keepdim=True)  # (..., 1)
        # The operator rounds x / s + 128, multiplies unsigned integers, and subtracts the contribution of 128 from the
        # sum. A row of zeros yields NaN here, whose integer values do not matter, as their sum is multiplied by 0.
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = product(x / largest, 1 / LARGEST, 128, self.weight)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)


def can_int8(device: torch.device | str) -> bool:
    """Return whether the device is an x86 CPU with int8 dot-product instructions."""
    found = torch.cpu.get_capabilities()
    return torch.device(device).type == "cpu" and can_pack(torch.float32) and any(found.get(name) for name in VNNI)


def uses_int8(precision: str, device: torch.device | str, compiled: bool = False) -> bool:
    """Return whether layers are quantised to int8. Print a line if the device does not support the requested
    precision.
    """
    if precision != "int8":
        return False
    if torch.device(device).type == "cuda":
        require("torchao", "torchao", "int8")
        return True
    if not can_int8(device):
        print("precision=int8 needs an x86 processor with VNNI: continuing with precision=auto", file=sys.stderr)
        return False
    if compiled:
        raise UserError("precision=int8 cannot be compiled on a CPU: omit compile=true")
    return True


def prepare_inference(network: M, int8: bool = False, device: torch.device | str = "cpu", compiled: bool = False) -> M:
    """Convert the linear layers of a network in place for faster inference. Do not save the result.

    Gradients are not supported, and outputs change by rounding. Layers that share their weight with another module are
    not packed.

    Args:
        int8: quantise the linear layers of transformer blocks (see `uses_int8`). On CUDA, torchao quantises only the
            weights, which halves the memory of bfloat16 without a speed-up.
        compiled: whether `torch.compile` is used, which does not support packed weights.
    """
    on_cpu = torch.device(device).type == "cpu"
    for_torchao = set()
    packs = on_cpu and not compiled and can_pack(torch.float32)
    uses = Counter(p.data_ptr() for m in network.modules() for p in m.parameters(recurse=False))
    for path, module in list(network.named_modules()):
        in_block = not set(BLOCKS).isdisjoint(path.split("."))
        for name, layer in list(module.named_children()):
            if type(layer) is not nn.Linear:
                continue
            if int8 and in_block and on_cpu:
                setattr(module, name, Int8Linear(layer))
            elif int8 and in_block:
                for_torchao.add(layer)
            elif packs and uses[layer.weight.data_ptr()] == 1 and can_pack(layer.weight.dtype):
                setattr(module, name, PackedLinear(layer))
    if for_torchao:
        torchao = require("torchao.quantization", "torchao", "int8")
        torchao.quantize_(network, torchao.Int8WeightOnlyConfig(), lambda layer, name: layer in for_torchao)
    return network


def half_precision(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context for networks with matrices of `dtype`; it does nothing for float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)

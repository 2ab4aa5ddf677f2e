"""In which numbers networks run in inference: `precision=auto|fp32|bf16|int8`.

In bfloat16, matrices and what they are multiplied with are in half precision: half of the bytes, and up to three times
the speed on a processor that multiplies such numbers. Sums over layers, log posteriors, draws and codecs stay float32.

On x86 processors, weights of inference are packed (`PackedLinear`): put once into the memory layout of oneDNN, a
library within PyTorch. Otherwise PyTorch gives float32 products to MKL, which is half as fast on processors of AMD, and
converts bfloat16 weights to that layout in each call.

In 8 bits (`Int8Linear`), a block's weights take a quarter of the bytes of float32: at few rows, reading them is what a
layer costs. Weights have a scale for each output channel and activations one for each row, found when the layer runs.
So nothing is calibrated, and a row's result does not depend on what shares its batch. All else is float32.

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

CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # by torch.cpu's names: x86, x86, ARM
VNNI = ("avx512_vnni", "avx_vnni")  # instructions that multiply 8-bit integers
BLOCKS = ("blocks", "layers")  # lists of transformer blocks: their linear layers are put into 8 bits
LARGEST = 127  # absolute value of the integers that are used
TINY = 1e-30  # smallest scale of a weight
PACKED_FOR = 256  # rows of the input that the layout suits best; products with fewer or more rows are as fast

M = TypeVar("M", bound=nn.Module)


def pick_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Return the type of the matrices; `auto` takes bfloat16 where the processor multiplies it itself.

    With `int8`, it is the type of the matrices that are not put into 8 bits.
    """
    require_choice("precision", precision, PRECISIONS)
    if precision in ("fp32", "bf16"):
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if precision == "int8" and can_int8(device):
        return torch.float32  # casts between two types would cost more than the few other matrices
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = any(found.get(feature, False) for feature in CPU_FEATURES)
    return torch.bfloat16 if native else torch.float32


def convert_matrices(network: M, dtype: torch.dtype, without: Collection[str] = ()) -> M:
    """Convert the weights of linear layers in place, for use under `half_precision`; the result is not to be saved.

    Args:
        without: names of modules that stay as they are, with all that they hold.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and not set(name.split(".")) & set(without):
            layer.to(dtype)
    return network


class PackedLinear(nn.Module):
    """A linear layer without gradients whose weight (M, N) is in oneDNN's own layout; `weight.to_dense()` unpacks it.

    The operators are those of PyTorch's own compiler (`torch._inductor.mkldnn_lowerings`).
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), PACKED_FOR)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N) -> (..., M), both of the weight's type."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor is an x86 for which PyTorch has oneDNN's products of a type."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Int8Linear(nn.Module):
    """A float32 linear layer without gradients that multiplies 8-bit integers; its weight (M, N) is in FBGEMM's layout.

    With scales s = max |x| / 127 of each row and c = max |w| / 127 of each channel it is
    s c sum(round(x / s) round(w / c)) + bias. The sum is exact, in 32 bits. FBGEMM is a library within PyTorch. At few
    rows it reads weights twice as fast as oneDNN, whose operator for signed activations needs AMX.
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
        """x (..., N), of two axes or more -> (..., M)."""
        largest = x.abs().amax(-1, keepdim=True)  # (..., 1)
        # The operator rounds x / s + 128, multiplies unsigned integers, and takes what the 128 add from the sum.
        # A row of zeros has no numbers here, whatever integers they become: their sum is multiplied by 0.
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = product(x / largest, 1 / LARGEST, 128, self.weight)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)


def can_int8(device: torch.device | str) -> bool:
    """Return whether a device is an x86 processor that multiplies 8-bit integers itself."""
    found = torch.cpu.get_capabilities()
    return torch.device(device).type == "cpu" and can_pack(torch.float32) and any(found.get(name) for name in VNNI)


def uses_int8(precision: str, device: torch.device | str, compiled: bool = False) -> bool:
    """Return whether layers are put into 8 bits; say so in one line if the processor cannot do what is asked."""
    if precision != "int8":
        return False
    if torch.device(device).type == "cuda":
        require("torchao", "torchao", "int8")
        return True
    if not can_int8(device):
        print("precision=int8 needs an x86 processor with VNNI: continuing with precision=auto", file=sys.stderr)
        return False
    if compiled:
        raise UserError("precision=int8 cannot be compiled on a processor: leave out compile=true")
    return True


def prepare_inference(network: M, int8: bool = False, device: torch.device | str = "cpu", compiled: bool = False) -> M:
    """Put the linear layers of a network into the layouts of inference, in place; the result is not to be saved.

    It has no gradients, and outputs change by rounding. Layers that share their weight with another module are not
    packed.

    Args:
        int8: put the layers of transformer blocks into 8 bits (see `uses_int8`). On CUDA the weights alone are, by
            torchao: half of the memory of bfloat16, and no speed.
        compiled: whether `torch.compile` is applied, which does not take packed weights.
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
    """Context in which networks with matrices of `dtype` run; does nothing in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)

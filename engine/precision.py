"""How networks run in inference: in which precision (`precision=auto|fp32|bf16`), and compiled or not (`compile=true`).

In bfloat16, matrices and what they are multiplied with are in half precision: half of the bytes, and up to three times
the speed on a processor that multiplies such numbers. Sums over layers, log posteriors, draws and codecs stay float32.

On x86 processors, weights of inference are packed (`pack_linear`): put once into the memory layout of oneDNN, a library
within PyTorch. Otherwise PyTorch gives float32 products to MKL, which is half as fast on processors of AMD, and
converts bfloat16 weights to that layout in each call.

Axes: N input features, M output features.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor, nn

from engine.cuda_graph import GraphedStep
from engine.settings import PRECISIONS, require_choice

CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # by torch.cpu's names: x86, x86, ARM
PACKED_FOR = 256  # rows of the input that the layout suits best; products with fewer or more rows are as fast

M = TypeVar("M", bound=nn.Module)


def pick_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """`auto`, `fp32` or `bf16` -> type of the matrices; `auto` takes bfloat16 where the processor multiplies it itself.

    Raises:
        UserError: another word.
    """
    require_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
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
        self.in_features, self.out_features = layer.in_features, layer.out_features
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


def pack_linear(network: M, device: torch.device | str = "cpu") -> M:
    """Replace the linear layers by packed ones in place, on x86 processors; elsewhere nothing is done.

    The result is for inference: it has no gradients and is not to be saved. Layers that share their weight with another
    module stay as they are. Outputs change by rounding.
    """
    if torch.device(device).type != "cpu" or not can_pack(torch.float32):
        return network
    shared = Counter(p.data_ptr() for m in network.modules() for p in m.parameters(recurse=False))
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and shared[layer.weight.data_ptr()] == 1 and can_pack(layer.weight.dtype):
                setattr(module, name, PackedLinear(layer))
    return network


def half_precision(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """Context in which networks with matrices of `dtype` run; does nothing in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def compile_step(device: torch.device | str) -> Callable[[Callable], Callable]:
    """Return a wrapper of a step's function that compiles it whole; see `engine.cuda_graph` for CUDA graphs."""
    return lambda step: GraphedStep(step, device, compile=True)

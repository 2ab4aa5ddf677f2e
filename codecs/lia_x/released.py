"""Names of the released LIA-X checkpoint (`lia-x.pt`, a flat state dict) and ours.

The tables follow the modules, so any block or the whole network of any size is covered. The released file also stores
the constant low-pass kernels (`*.kernel`) and keeps an axis of one in front of modulated weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.errors import UserError
from lia_x.decoder import Decoder, Level
from lia_x.encoder import Encoder
from lia_x.ops import ConvLayer, ModulatedConv2d, StyledConv, ToFlow, ToRGB, blur_kernel


def _child_names(module: nn.Module) -> dict[str, str]:
    """Released name of every child of `module` that is called otherwise there."""
    if isinstance(module, Encoder):
        names = {"stem": "enc_2r.block1", "head": "enc_2r.block8", "to_motion": "enc_r2t.0"}
        last = len(module.blocks) - 1
        names |= {f"blocks.{i}": f"enc_2r.block{i + 2}.0" for i in range(last)}
        return names | {f"blocks.{last}": "enc_2r.block_512"}
    if isinstance(module, Decoder):
        return {"directions": "direction", "first": "conv1"}
    return {}


def _level_names(index: int) -> dict[str, str]:
    """Released names of level `index`'s children: the first level is called 512, the others 2, 3, ..."""
    conv, tag = ("conv_512", "_512") if index == 0 else (f"conv{index + 1}", str(index + 1))
    return {
        "grow": f"{conv}_1",
        "flow_blocks": f"{conv}_2",
        "to_flow": f"flow{tag}",
        "carry": f"{conv}_2_up",
        "refine_blocks": f"{conv}_2_rgb",
        "to_rgb": f"rgb{tag}",
    }


def _parameter_names(module: nn.Module) -> dict[str, str]:
    if isinstance(module, ConvLayer):
        index = 1 if module.resample else 0  # a re-sampling layer's child 0 is the blur
        return {"weight": f"{index}.weight", "bias": f"{index + 1}.bias"}
    if isinstance(module, StyledConv):
        return {"bias": "activate.bias"}
    if isinstance(module, Decoder):
        return {"constant": "input.input"}
    return {}


def _pairs(module: nn.Module, ours: str, released: str) -> Iterator[tuple[str, str]]:
    names = _parameter_names(module)
    for name, _ in module.named_parameters(recurse=False):
        yield ours + name, released + names.get(name, name)
    names = _child_names(module)
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and isinstance(module, Encoder | Decoder):
            for i, item in enumerate(child):
                path = f"{name}.{i}"
                if isinstance(item, Level):
                    for part, theirs in _level_names(i).items():
                        if getattr(item, part) is not None:
                            yield from _pairs(getattr(item, part), f"{ours}{path}.{part}.", f"{released}{theirs}.")
                else:
                    yield from _pairs(item, f"{ours}{path}.", f"{released}{names[path]}.")
        else:
            prefix = {"encoder": "enc", "decoder": "dec"}.get(name, names.get(name, name))
            yield from _pairs(child, f"{ours}{name}.", f"{released}{prefix}.")


def released_names(module: nn.Module) -> dict[str, str]:
    """Our parameter name -> released name, for `module` (a whole `LiaX` or one of its blocks)."""
    return dict(_pairs(module, "", ""))


def released_kernels(module: nn.Module) -> dict[str, Tensor]:
    """The low-pass kernels that the released file stores for `module`, by released name."""
    names = released_names(module)
    kernels = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(part, ConvLayer) and part.resample:
            key, gain = (
                names[prefix + "weight"].removesuffix("1.weight") + "0.kernel",
                4 if part.resample == "up" else 1,
            )
        elif isinstance(part, ModulatedConv2d) and part.up:
            key, gain = names[prefix + "weight"].removesuffix("weight") + "blur.kernel", 4
        elif isinstance(part, ToRGB | ToFlow):
            key, gain = names[prefix + "bias"].removesuffix("bias") + "up.kernel", 4
        else:
            continue
        kernels[key] = blur_kernel(gain)
    return kernels


def modulated_weights(module: nn.Module) -> set[str]:
    """Our names of the weights that have an axis of one in front in the released file."""
    return {
        f"{path}.weight".removeprefix(".") for path, part in module.named_modules() if isinstance(part, ModulatedConv2d)
    }


def from_released(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` in released names -> `module`'s state dict. Stored kernels may be absent.

    Raises:
        UserError: a tensor is missing or unknown, or a stored kernel is not the one this network uses.
    """
    state = dict(state)
    for key, kernel in released_kernels(module).items():
        stored = state.pop(key, kernel)
        if stored.shape != kernel.shape or not torch.allclose(stored.float().cpu(), kernel, atol=1e-6):
            raise UserError(f"tensor {key!r} is not the [1, 3, 3, 1] low-pass kernel: not a LIA-X checkpoint")
    names, modulated = released_names(module), modulated_weights(module)
    for what, keys in (
        ("lacks", set(names.values()) - state.keys()),
        ("has an unknown", state.keys() - names.values()),
    ):
        if keys:
            raise UserError(f"the LIA-X checkpoint {what} tensor {min(keys)!r} ({len(keys)} such)")
    return {
        ours: state[theirs].squeeze(0) if ours in modulated and state[theirs].ndim == 5 else state[theirs]
        for ours, theirs in names.items()
    }

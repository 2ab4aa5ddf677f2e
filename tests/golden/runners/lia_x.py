"""Runners for the LIA-X cases, `liax_*`. Axes: B images, C channels, S side."""

import re

import numpy as np
import torch
from torch import Tensor, nn

from engine.official import rename
from lia_x import ops
from lia_x.codec import Identity, LiaX
from lia_x.networks import Decoder
from lia_x.upstream import RULES, our_state
from tests.golden.runners import Case, runner

HOOKED_LEVELS = ("512", "2", "3", "4", "5", "6", "7")  # released names of the levels, coarsest first
PLAIN = ("style_dim", "motion_dim", "scale")


def pictures(lowres: Tensor) -> Tensor:
    """(N, 3, 32, 32) bytes -> (N, 3, 512, 512) in [-1, 1]: every pixel as a 16 x 16 square, plus a fixed pattern."""
    values = lowres.numpy().astype(np.int64).repeat(16, -2).repeat(16, -1)
    axis = np.arange(values.shape[-1])
    values = np.clip(values + ((7 * axis[:, None] + 13 * axis) % 17) - 8, 0, 255)
    return torch.from_numpy(values.astype(np.float32) / np.float32(127.5) - np.float32(1))


def stored(case: Case, name: str, image: Tensor) -> dict[str, Tensor]:
    """The views of an image (B, 3, 512, 512) that the case stores: every n-th pixel (`_sN`), a crop, statistics."""
    flat = image.double().flatten(2)
    out = {f"{name}_stats": torch.stack([flat.mean(-1), flat.std(-1), flat.abs().amax(-1)], -1)}
    if f"{name}_crop" in case.outputs:
        out[f"{name}_crop"] = case.first(f"{name}_crop", image[..., 200:264, 300:364], 0)
    for output in case.outputs:
        view = re.fullmatch(rf"{name}_s(\d+)", output)
        if view:
            out[output] = image[..., :: int(view[1]), :: int(view[1])]
    return out


def build(case: Case) -> LiaX:
    sizes = {name: case.config[name] for name in PLAIN if name in case.config}
    return LiaX.from_tensors(sizes, our_state(case.weights()), case.name)


def navigate_relative(decoder: Decoder, style: Tensor, target: Tensor, source: Tensor, start: Tensor) -> Tensor:
    """Move the style (B, D) to the motion code `source`, and from there as from `start` to `target`: (B, M) all."""
    return style + (decoder.directions(target) - decoder.directions(start)) + decoder.directions(source)


@runner("liax_")
@torch.no_grad()
def run_network(case: Case) -> dict[str, Tensor]:
    model = build(case)
    x = pictures(case.inputs["lowres_u8"])
    motion = case.inputs["motion"]
    identity = model.identity(x[:1])
    out = {"z_s2r": identity.style, "motion_code": model.encode(x), "direction": model.decoder.directions(motion)}
    for i, features in enumerate(identity.maps):
        step = max(1, features.numel() // 3000) | 1
        out[f"feat_{i}_strided"] = features.flatten()[::step]

    hooks = [model.decoder.first.register_forward_hook(lambda _m, _i, y: out.update(conv1=case.first("conv1", y, 1)))]
    for name, level in zip(HOOKED_LEVELS, model.decoder.levels, strict=False):

        def keep(_module: nn.Module, _inputs: tuple, state: tuple, name: str = name) -> None:
            _, _, flow, picture = state
            out.update({f"rgb_{name}": picture, f"flowlogit_{name}": flow})

        hooks.append(level.register_forward_hook(keep))
    out |= stored(case, "img_abs", model.decode(motion[:1], identity))
    for hook in hooks:
        hook.remove()

    if "img_none_s4" in case.outputs:
        out |= stored(case, "img_none", model.decoder(identity.style, identity.maps))
    if "z_rel" in case.outputs or "img_rel_s4" in case.outputs:
        out["z_rel"] = navigate_relative(model.decoder, identity.style, motion[:1], motion[1:2], motion[2:3])
        out |= stored(case, "img_rel", model.decoder(out["z_rel"], identity.maps))
    return out


@runner("liax_animate")
@torch.no_grad()
def run_animate(case: Case) -> dict[str, Tensor]:
    """Relative motion from edited motion codes, as the official demo draws it by the same networks."""
    model = build(case)
    x = pictures(case.inputs["lowres_u8"])
    chunk = case.meta["chunk_size"]
    driven, length = (len(case.outputs[f"{name}_stats"]) for name in ("animate", "edit_vid"))

    def edited(identity: Identity) -> Tensor:
        code = model.encoder.to_motion(identity.style)
        for index, value in zip(case.meta["edit_indices"], case.meta["edit_values"], strict=True):
            code[:, index] += value
        return code

    def animate(source: Tensor, driving: Tensor, size: int) -> Tensor:
        identity = model.identity(source)
        codes = model.encode(driving, size)
        start = edited(identity)
        styles = (
            navigate_relative(model.decoder, identity.style, part, start, codes[:1]) for part in codes.split(size)
        )
        return torch.cat([model.decoder(style, identity.maps) for style in styles])

    out = {"motion_codes": model.encode(x)}
    out |= stored(case, "animate", animate(x[:1], x[1 : 1 + driven], chunk["animate"]))
    identity = model.identity(x[0])
    out |= stored(case, "edit_img", model.decode(edited(identity), identity))
    return out | stored(case, "edit_vid", animate(x[0], x[:length], chunk["edit_vid"]))


@runner("liax_ops")
@torch.no_grad()
def run_blocks(case: Case) -> dict[str, Tensor]:
    keys = case.keys
    inputs = case.inputs
    weights = case.weights()
    width = case.config["in_channel"]
    out_width = case.config["out_channel"]
    style_dim = case.config["style_dim"]
    flow_out, flow_in = keys["flow_res.conv1.conv.weight"][1:3]

    def load(name: str, module: nn.Module) -> nn.Module:
        prefix = f"{name}."
        own = {key: value for key, value in weights.items() if key.startswith(prefix) and "kernel" not in key}
        own = {rename(key, RULES).removeprefix(prefix): value for key, value in own.items()}
        module.load_state_dict({k: v.squeeze(0) if v.ndim == 5 else v for k, v in own.items()})
        return module.eval()

    x = inputs["x"]
    style = inputs["style"]
    square = inputs["hsq"]
    feat = inputs["feat"]
    out = {
        "conv3": load("conv3", ops.ConvLayer(width, out_width, 3))(x),
        "conv1": load("conv1", ops.ConvLayer(3, out_width, 1))(inputs["img"]),
        "conv_down3": load("conv_down3", ops.ConvLayer(width, out_width, 3, "down"))(x),
        "conv_down1": load("conv_down1", ops.ConvLayer(width, out_width, 1, "down", activate=False))(x),
        "conv_up3": load("conv_up3", ops.ConvLayer(width, out_width, 3, "up"))(x),
        "equal_conv4": load("equal_conv4", ops.EqualConv2d(width, out_width, 4))(x),
        "equal_linear": load("equal_linear", ops.EqualLinear(style_dim, out_width))(style),
        "upsample": ops.upsample(x),
        "mod3": load("mod3", ops.ModulatedConv2d(width, out_width, 3, style_dim))(x, style),
        "mod3_up": load("mod3_up", ops.ModulatedConv2d(width, out_width, 3, style_dim, up=True))(x, style),
        "mod1_nodemod": load("mod1_nodemod", ops.ModulatedConv2d(width, 3, 1, style_dim, demodulate=False))(x, style),
        "styled": load("styled", ops.StyledConv(width, out_width, style_dim))(x, style),
        "styled_up": load("styled_up", ops.StyledConv(width, out_width, style_dim, up=True))(x, style),
        "const": weights["const.input"].expand(len(style), -1, -1, -1),
        "enc_res": load("enc_res", ops.ResBlock(width, out_width, down=True))(inputs["xe"]),
        "dec_res_same": load("dec_res_same", ops.ResBlock(out_width, out_width))(inputs["xb"]),
        "dec_res_change": load("dec_res_change", ops.ResBlock(width, out_width))(x),
        "flow_res": load("flow_res", ops.FlowResBlock(flow_in, flow_out, style_dim))(inputs["x32"], style),
    }
    to_rgb = load("to_rgb", ops.ToRGB(width))
    out["to_rgb"] = to_rgb(square)
    out["to_rgb_skip"] = to_rgb(square, inputs["rgb_skip"])
    to_flow = load("to_flow", ops.ToFlow(width, style_dim))
    for name, skip in (("to_flow", None), ("to_flow_skip", inputs["flow_skip"])):
        results = to_flow(square, style, feat, skip)
        out |= {f"{name}_{part}": value for part, value in zip(("warp", "h", "out"), results, strict=True)}
    basis = load("direction", ops.MotionBasis(*keys["direction.weight"]))
    out["direction"] = basis(inputs["motion"])
    out["direction_q"] = basis.directions()
    return out

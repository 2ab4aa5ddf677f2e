"""The LIA-X building blocks against their textbook definitions. Axes as in `lia_x.ops`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lia_x import ops

KERNEL = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def upfirdn2d(x, kernel, up=1, down=1, pad=(0, 0)):
    """Insert up - 1 zeros after every sample, zero-pad, convolve, keep every down-th sample."""
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height * up, width * up)
    spread[..., ::up, ::up] = x
    spread = F.pad(spread, (*pad, *pad)).reshape(batch * channels, 1, height * up + sum(pad), width * up + sum(pad))
    out = F.conv2d(spread, kernel.flip(0, 1)[None, None])[..., ::down, ::down]
    return out.reshape(batch, channels, *out.shape[-2:])


@pytest.fixture
def rng():
    return torch.manual_seed(0)


def test_upsample_is_zero_insertion_and_low_pass(rng):
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(ops.upsample(x), upfirdn2d(x, KERNEL * 4, up=2, pad=(2, 1)))


@pytest.mark.parametrize(("pad", "stride"), [((2, 2), 1), ((1, 1), 1), ((1, 1), 2)])
def test_blur(rng, pad, stride):
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(ops.blur(x, pad, stride=stride), upfirdn2d(x, KERNEL, down=stride, pad=pad))


@pytest.mark.parametrize(("kernel", "pad"), [(3, (2, 2)), (1, (1, 1))])
def test_downsampling_layer_blurs_then_strides(rng, kernel, pad):
    layer = ops.ConvLayer(3, 4, kernel, "down", activate=False)
    x = torch.randn(2, 3, 9, 8)
    expected = F.conv2d(upfirdn2d(x, KERNEL, pad=pad), layer.weight / (3 * kernel**2) ** 0.5, stride=2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_convolution_equals_a_loop_over_scaled_weights(rng, up, demodulate):
    layer = ops.ModulatedConv2d(3, 4, 3, 5, demodulate, up)
    x, style = torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    expected = []
    for picture, gain in zip(x, layer.modulation(style), strict=True):
        weight = layer.weight / 27**0.5 * gain[:, None, None]
        if demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8)
        if up:
            y = F.conv_transpose2d(picture[None], weight.transpose(0, 1), stride=2)
            expected.append(upfirdn2d(y, KERNEL * 4, pad=(1, 1)))
        else:
            expected.append(F.conv2d(picture[None], weight, padding=1))
    torch.testing.assert_close(layer(x, style), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_zero_flow_and_open_mask_pass_the_source_through(rng):
    layer = ops.ToFlow(4, 5)
    torch.nn.init.zeros_(layer.conv.weight)
    with torch.no_grad():
        layer.bias[0, 2] = 50.0  # mask = 1
    x, source = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    warp, blend, logits = layer(x, torch.randn(2, 5), source)
    torch.testing.assert_close(warp, source, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(blend, warp)
    assert logits.shape == (2, 3, 8, 8)


def test_flow_channel_zero_moves_along_x(rng):
    layer = ops.ToFlow(1, 5)
    torch.nn.init.zeros_(layer.conv.weight)
    with torch.no_grad():  # a shift of one pixel: 2 / (side - 1) in grid units with aligned corners
        layer.bias[0, 0], layer.bias[0, 2] = np.arctanh(2 / 7), 50.0
    source = torch.randn(1, 1, 8, 8)
    warp, _, _ = layer(torch.zeros(1, 1, 8, 8), torch.randn(1, 5), source)
    torch.testing.assert_close(warp[..., :-1], source[..., 1:], rtol=1e-4, atol=1e-4)


def test_directions_are_lapack_q_and_follow_the_weight(rng):
    basis = ops.MotionBasis(12, 5).requires_grad_(False)
    q, _ = np.linalg.qr(basis.weight.numpy() + np.float32(1e-8))
    np.testing.assert_allclose(basis.directions().numpy(), q, atol=1e-5)
    assert basis.directions() is basis.directions()  # decomposed once
    with torch.no_grad():
        basis.weight.copy_(torch.randn(12, 5))
    q, _ = np.linalg.qr(basis.weight.numpy() + np.float32(1e-8))
    np.testing.assert_allclose(basis.directions().numpy(), q, atol=1e-5)


def test_directions_learn(rng):
    basis = ops.MotionBasis(12, 5)
    basis(torch.randn(3, 5)).sum().backward()
    assert basis.weight.grad.abs().max() > 0
    with torch.no_grad():
        frozen = basis.directions()
    assert not frozen.requires_grad


def test_cached_directions_serve_autograd_after_inference_mode(rng):
    basis = ops.MotionBasis(12, 5).requires_grad_(False)
    with torch.inference_mode():
        basis.directions()
    motion = torch.randn(3, 5, requires_grad=True)
    basis(motion).sum().backward()
    assert motion.grad is not None

"""The directions of LIA-X; golden case `liax_ops` holds its other building blocks. Axes as in `lia_x.ops`."""

import numpy as np
import pytest
import torch

from lia_x import ops


@pytest.fixture
def rng():
    return torch.manual_seed(0)


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

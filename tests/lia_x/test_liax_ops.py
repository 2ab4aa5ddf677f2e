"""The directions of LIA-X; golden case `liax_ops` holds its other building blocks. Axes as in `lia_x.ops`."""

import numpy as np
import pytest
import torch

from lia_x import ops


@pytest.fixture
def rng():
    return torch.manual_seed(0)


def test_directions_are_lapack_q_and_learn(rng):
    basis = ops.MotionBasis(12, 5)
    q, _ = np.linalg.qr(basis.weight.detach().numpy() + np.float32(1e-8))
    np.testing.assert_allclose(basis.directions().detach().numpy(), q, atol=1e-5)
    basis(torch.randn(3, 5)).sum().backward()
    assert basis.weight.grad.abs().max() > 0

"""ExactFactors against torch's own linear algebra, all derivatives included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_snf.dense import near_identity
from pyro_snf.dense.exact import ExactFactors

# float64, condition numbers of a few dozen.
ROUNDING = 1e-11


def make_theta(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(dim, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 2, 5, 64])
def test_value_inverse_and_solves(dim: int) -> None:
    theta = make_theta(dim)
    matrix = near_identity.matrix(theta)
    inverse = torch.linalg.inv(matrix)
    factors = ExactFactors(near_identity.matrix(theta))
    rows = torch.randn(3, dim, dtype=torch.float64)
    exact = torch.linalg.slogdet(matrix).logabsdet
    assert torch.allclose(factors.log_abs_det, exact, rtol=ROUNDING, atol=ROUNDING)
    assert torch.allclose(factors.inverse_t, inverse.mT, rtol=ROUNDING, atol=ROUNDING)
    assert factors.inverse_t.is_contiguous()
    assert torch.allclose(factors.solve(rows), rows @ inverse.mT, rtol=ROUNDING, atol=ROUNDING)
    transposed = factors.solve(rows, transposed=True)
    assert torch.allclose(transposed, rows @ inverse, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_first_and_second_derivatives(dim: int) -> None:
    direction = torch.randn(dim, dim, dtype=torch.float64)
    gradients, products = [], []
    for exact in (False, True):
        theta = make_theta(dim).requires_grad_()
        if exact:
            value = near_identity.log_abs_det(theta)
        else:
            matrix = near_identity.matrix(theta)
            value = ExactFactors(matrix).differentiable_log_abs_det(matrix)
        (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction).sum(), theta)
        gradients.append(gradient.detach())
        products.append(product)
    assert torch.allclose(*gradients, rtol=ROUNDING, atol=ROUNDING)
    assert torch.allclose(*products, rtol=ROUNDING, atol=ROUNDING)


def test_first_derivative_without_a_graph_is_the_same() -> None:
    theta = make_theta(5).requires_grad_()
    matrix = near_identity.matrix(theta)
    ExactFactors(matrix).differentiable_log_abs_det(matrix).backward()
    expected = torch.linalg.inv(near_identity.matrix(theta.detach())).mT / math.sqrt(5)
    assert torch.allclose(theta.grad, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 64, 300])
def test_singular_matrix_is_refused(dim: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(dim, dim, dtype=dtype)
    matrix[1] = 2 * matrix[0]
    theta = (matrix - torch.eye(dim, dtype=dtype)) * math.sqrt(dim)
    factors = ExactFactors(near_identity.matrix(theta))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        _ = factors.log_abs_det
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        factors.solve(torch.ones(1, dim, dtype=dtype))


def test_condition_of_a_million_is_accepted_in_float32() -> None:
    theta = torch.diag(torch.logspace(0, -6, 32) - 1) * math.sqrt(32)
    expected = near_identity.log_abs_det(theta.double())
    # Forming I + Θ/√D rounds entries of 1e-6 to 1e-7: each of the smallest is off by some per cent.
    assert abs(ExactFactors(near_identity.matrix(theta)).log_abs_det - expected) < 0.5


def test_half_precision_is_factorized_in_float32() -> None:
    factors = ExactFactors(near_identity.matrix(make_theta(8).bfloat16()))
    assert factors.log_abs_det.dtype == torch.float32

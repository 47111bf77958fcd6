"""The dense map and its LU factors against torch's own linear algebra, all derivatives included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from pyro_snf.maps import Dense
from pyro_snf.maps.dense import LUFactors

# float64, condition numbers of a few dozen.
ROUNDING = 1e-11

DENSE = Dense()


def make_theta(dim: int) -> Tensor:
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim))


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("dim", [1, 2, 5, 64])
def test_products_gradients_and_factors(dim: int) -> None:
    theta, other = make_theta(dim), make_theta(dim).mT
    matrix, rows, cotangent = DENSE.weight(theta), torch.randn(3, dim), torch.randn(3, dim)
    assert close(matrix, torch.eye(dim) + theta / math.sqrt(dim))
    assert close(DENSE.theta_of(matrix), theta)
    assert close(DENSE.multiply(theta, rows), rows @ matrix.mT)
    assert close(DENSE.multiply_transposed(theta, rows), rows @ matrix)
    assert close(DENSE.apply_weight(matrix, rows, transposed=True), rows @ matrix)
    assert DENSE.norm_bound(theta) >= torch.linalg.matrix_norm(matrix, 2) - ROUNDING
    theta.requires_grad_()
    value = (cotangent * DENSE.multiply(theta, rows)).sum()
    assert close(DENSE.gradient(theta, rows, cotangent), *torch.autograd.grad(value, theta))
    trace = (DENSE.weight(other) @ DENSE.weight(theta)).trace()
    found = DENSE.trace_gradient(theta, other, torch.Size([dim]))
    assert close(found, *torch.autograd.grad(trace, theta))

    inverse = torch.linalg.inv(matrix)
    factors = DENSE.factorize(theta, torch.Size([dim]))
    assert close(factors.log_abs_det, torch.linalg.slogdet(matrix).logabsdet)
    assert close(factors.log_abs_det, DENSE.exact_log_abs_det(theta, torch.Size([dim])))
    assert close(factors.gradient, inverse.mT)
    assert factors.gradient.is_contiguous()
    assert close(factors.solve(rows), rows @ inverse.mT)
    assert close(factors.solve(rows), DENSE.exact_solve(theta, rows))
    assert close(factors.solve(rows, transposed=True), rows @ inverse)
    condition = torch.linalg.cond(matrix).item()
    assert 0.5 * condition < factors.condition < 2 * math.sqrt(dim) * condition


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_first_and_second_derivatives(dim: int) -> None:
    direction, results = torch.randn(dim, dim), []
    for is_exact in (False, True):
        theta = make_theta(dim).requires_grad_()
        if is_exact:
            value = torch.linalg.slogdet(DENSE.weight(theta)).logabsdet
        else:
            factors = DENSE.factorize(theta, torch.Size([dim]))
            value = DENSE.log_abs_det(factors).attach_to(theta)
        (plain,) = torch.autograd.grad(value, theta, retain_graph=True)
        (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction).sum(), theta)
        results.append((plain, gradient.detach(), product))
    assert all(map(close, *results))
    inputs = [make_theta(dim).requires_grad_(), *torch.randn(2, 3, dim).requires_grad_()]
    assert gradcheck(lambda theta, x, v: DENSE.gradient(theta.detach(), x, v), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 64, 300])
def test_singular_matrix_is_refused(dim: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(dim, dim, dtype=dtype)
    matrix[1] = 2 * matrix[0]
    factors = LUFactors(DENSE.weight(DENSE.theta_of(matrix)))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        _ = factors.log_abs_det
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        factors.solve(torch.ones(1, dim, dtype=dtype))


def test_condition_of_a_million_is_accepted_in_float32() -> None:
    matrix = torch.diag(torch.logspace(0, -6, 32))
    # Forming I + Θ/√D rounds entries of 1e-6 to 1e-7: each of the smallest is off by some per cent.
    factors = LUFactors(DENSE.weight(DENSE.theta_of(matrix).float()))
    assert abs(factors.log_abs_det - matrix.logdet()) < 0.5


def test_half_precision_is_factorized_in_float32() -> None:
    factors = LUFactors(DENSE.weight(make_theta(8).bfloat16()))
    assert factors.log_abs_det.dtype == factors.gradient.dtype == torch.float32

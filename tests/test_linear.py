"""SelfNormalizingLinear: its parametrization, its start, and what its operations cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_snf import SelfNormalizingLinear
from tests.registry import LOG_DETS, linear, nudge_inverses

# Float64, condition numbers below 10.
EXACT = 1e-9


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("scale", [1.0, 0.1, 7.0])
def test_start_is_a_multiple_of_the_identity(scale: float, log_det: str) -> None:
    layer, x = SelfNormalizingLinear(4, log_det=log_det, init_scale=scale), torch.randn(3, 4)
    assert torch.allclose(layer(x), scale * x, rtol=1e-12)
    assert torch.allclose(layer.weight, scale * torch.eye(4), rtol=1e-12)
    assert torch.allclose(layer.inverse_weight, torch.eye(4) / scale, rtol=1e-12)
    assert not layer.inverse_weight.requires_grad
    with torch.no_grad():
        expected = torch.full((3,), 4 * math.log(scale))
        assert torch.allclose(layer.log_abs_det_jacobian(x, layer(x)), expected, atol=1e-12)


def test_weight_is_the_formula() -> None:
    layer, x = linear(5), torch.randn(3, 5)
    expected = torch.diag(layer.log_scale.exp()) @ (torch.eye(5) + layer.theta / math.sqrt(5))
    assert torch.allclose(layer.weight, expected, rtol=1e-12)
    assert torch.allclose(layer(x), x @ expected.mT + layer.bias, rtol=1e-9)
    for name in ("weight", "inverse_weight", "error_estimate", "num_refactorizations"):
        with pytest.raises(AttributeError):
            setattr(layer, name, torch.eye(5))


def test_without_a_bias_zero_stays_zero() -> None:
    layer = linear(3, bias=False)
    assert layer.bias is None
    assert not layer(torch.zeros(2, 3)).any()
    assert not layer.inv(torch.zeros(2, 3)).any()


def test_repr() -> None:
    expected = (
        "SelfNormalizingLinear(3, log_det=Learned(mixture=0.5, reconstruction_weight=1.0, "
        "reconstruction='both'), "
        "inverse='iterative', training_value='0', bias=False)"
    )
    assert repr(SelfNormalizingLinear(3, log_det="learned", bias=False)) == expected


def test_same_step_at_every_width() -> None:
    # "One Adam step on Θ moves A by the same in every direction, whatever D is."
    moves = []
    for dim in (4, 64):
        layer = SelfNormalizingLinear(dim)
        layer.theta.grad = torch.ones(dim, dim)
        torch.optim.Adam([layer.theta], lr=0.1).step()
        change = (layer.weight - torch.eye(dim)).detach()
        moves.append(change.norm().item() / math.sqrt(dim))
    assert moves[0] == pytest.approx(moves[1], rel=1e-6)


# --- The cost -----------------------------------------------------------------------------------


@pytest.fixture
def factorizations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every O(D³) factorization that a layer makes."""
    made: list[int] = []
    factorize = torch.linalg.lu_factor_ex

    def counting(matrix: Tensor) -> object:
        made.append(len(matrix))
        return factorize(matrix)

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", counting)
    return made


def solution(layer: SelfNormalizingLinear, y: Tensor) -> Tensor:
    return torch.linalg.solve(layer.weight.detach(), (y - layer.bias).mT).mT.detach()


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(("size", "is_good"), [(0.02, True), (3.0, False), (100.0, False)])
@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_good_inverse_is_refined_and_a_bad_one_gives_way_to_an_exact_solve(
    log_det: str, size: float, is_good: bool, factorizations: list[int]
) -> None:
    layer = linear(20, log_det=log_det)
    nudge_inverses(layer, size)
    factorizations.clear()
    y = torch.randn(5, 20, requires_grad=True)
    x = layer.inv(y)
    assert torch.allclose(x, solution(layer, y), rtol=EXACT)
    # Masked samples, and all that a loss does not depend on: rows of the cotangent are 0.
    x[:2].sum().backward()
    assert not y.grad[2:].any()
    assert y.grad[:2].any()
    assert len(factorizations) == (0 if is_good else 1)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("inverse", ["iterative", "exact", "one_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_inverse_is_backward_stable(condition: float, dtype: torch.dtype, inverse: str) -> None:
    # The residual of y is rounding, whatever the condition; the error of x may be that times it.
    left, right = (torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2))
    matrix = left * torch.logspace(0, -math.log10(condition), 16) @ right
    layer = SelfNormalizingLinear(16, inverse=inverse, dtype=dtype)
    with torch.no_grad():
        layer.theta.copy_(4 * (matrix - torch.eye(16)))
    layer.refactorize()
    y = torch.randn(50, 16, dtype=dtype)
    x = layer.inv(y)
    residual = layer.with_cache(0)(x.detach().double().to(dtype)) - y
    level = torch.finfo(dtype).eps * 16 * (x.norm(dim=-1) + 1)
    if inverse == "one_pass":  # R's own rounding counts, condition and all
        level = level * condition
    assert (residual.norm(dim=-1) < level).all()


def test_exact_value_is_computed_once_a_weight(factorizations: list[int]) -> None:
    layer, x = linear(20).eval(), torch.randn(5, 20)
    factorizations.clear()
    for number in (1, 2):
        for _ in range(3):
            layer.log_abs_det_jacobian(x, layer(x))
            with torch.no_grad():
                layer.log_abs_det_jacobian(x + 1, layer(x + 1))
        assert len(factorizations) == number
        with torch.no_grad():
            layer.theta.mul_(0.9)


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_training_step_makes_no_factorization(log_det: str, factorizations: list[int]) -> None:
    layer, x = linear(20, log_det=log_det), torch.randn(5, 20)
    factorizations.clear()
    for _ in range(3):
        loss = layer(x).square().sum() - layer.log_abs_det_jacobian(x, layer(x)).sum()
        loss.backward()
        with torch.no_grad():
            layer.theta.sub_(1e-4 * layer.theta.grad)
    assert not factorizations


def test_many_rows_and_evaluation_are_worth_factors(factorizations: list[int]) -> None:
    layer = linear(64)
    nudge_inverses(layer, 0.01)
    factorizations.clear()
    layer.inv(torch.randn(3, 64))
    assert not factorizations  # few rows, weights that will change: refined
    layer.inv(torch.randn(40, 64))
    assert len(factorizations) == 1
    layer.eval()
    for _ in range(3):
        y = torch.randn(3, 64)
        assert torch.allclose(layer(layer.inv(y)), y)
    assert len(factorizations) == 1  # kept until the weights change


def test_scale_is_summed_in_float32() -> None:
    layer = SelfNormalizingLinear(784, init_scale=0.1, dtype=torch.bfloat16)
    x = torch.ones(2, 784, dtype=torch.bfloat16)
    value = layer.log_abs_det_jacobian(x, layer(x))
    assert torch.allclose(value, layer.log_scale.double().sum().to(value), atol=1e-3)


def test_frozen_weight_does_not_train_the_learned_inverse() -> None:
    layer = linear(3, log_det="learned")
    layer.theta.requires_grad_(False)
    x = torch.randn(4, 3)
    y = layer(x)
    (y.square().sum() - layer.log_abs_det_jacobian(x, y).sum()).backward()
    assert layer.log_det.theta.grad is None


def test_gradient_of_one_pass_is_by_the_inverse_of_that_pass() -> None:
    layer = linear(4, inverse="one_pass")
    y = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(layer.inv(y).sum(), y)
    x = layer.inv(y.view_as(y))
    layer.log_det.estimator.inverse_t.mul_(2.0)
    (actual,) = torch.autograd.grad(x.sum(), y)
    assert torch.equal(actual, expected)

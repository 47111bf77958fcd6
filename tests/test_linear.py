"""SelfNormalizingLinear: its parametrization, its start, and what its operations cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_snf import SelfNormalizingLinear
from tests.registry import INVERSES, LOG_DETS, linear, nudge_inverses

pytestmark = pytest.mark.usefixtures("few_rows")

# Float64, condition numbers below 10.
EXACT = 1e-9


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("scale", [1.0, 0.1, 7.0])
def test_start_is_a_multiple_of_the_identity(scale: float, log_det: str) -> None:
    layer, x = SelfNormalizingLinear(4, log_det=log_det, init_scale=scale), torch.randn(3, 4)
    assert torch.allclose(layer(x), scale * x, rtol=1e-12)
    assert torch.allclose(layer.weight, scale * torch.eye(4), rtol=1e-12)
    assert torch.allclose(layer.inverse_weight, torch.eye(4) / scale, rtol=1e-12)
    with torch.no_grad():
        expected = torch.full((3,), 4 * math.log(scale))
        assert torch.allclose(layer.log_abs_det_jacobian(x, layer(x)), expected, atol=1e-12)


def test_weight_is_the_formula() -> None:
    layer = linear(5)
    expected = torch.diag(layer.log_scale.exp()) @ (torch.eye(5) + layer.theta / math.sqrt(5))
    assert torch.allclose(layer.weight, expected, rtol=1e-12)
    x = torch.randn(3, 5)
    assert torch.allclose(layer(x), x @ expected.mT + layer.bias, rtol=1e-9)


@pytest.mark.parametrize("name", ["weight", "inverse_weight", "certificate", "num_refreshes"])
def test_what_is_derived_is_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(linear(3), name, torch.eye(3))


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_inverse_weight_is_a_constant(log_det: str) -> None:
    assert not linear(3, log_det=log_det).inverse_weight.requires_grad


def test_without_a_bias_zero_stays_zero() -> None:
    layer = linear(3, bias=False)
    assert layer.bias is None
    assert not layer(torch.zeros(2, 3)).any()
    assert not layer.inv(torch.zeros(2, 3)).any()


def test_repr_tells_what_matters() -> None:
    text = repr(SelfNormalizingLinear(3, log_det="learned", bias=False))
    for part in ("3", "log_det='learned'", "inverse='refined'", "bias=False", "0"):
        assert part in text


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


# --- The refined inverse ------------------------------------------------------------------------


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


SOMETIMES_ZERO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "general": lambda y, bias: y,
    "one row is b": lambda y, bias: torch.where(torch.arange(len(y))[:, None] == 1, bias, y),
    "every row is b": lambda y, bias: bias.expand_as(y).clone(),
    "huge": lambda y, bias: 1e150 * y,
    "one row is NaN": lambda y, bias: torch.where(torch.arange(len(y))[:, None] == 1, math.nan, y),
}


@pytest.mark.parametrize("rows", SOMETIMES_ZERO)
@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_good_inverse_is_refined_without_a_factorization(
    log_det: str, rows: str, factorizations: list[int]
) -> None:
    layer = linear(20, log_det=log_det)
    nudge_inverses(layer, 0.02)
    factorizations.clear()
    y = SOMETIMES_ZERO[rows](torch.randn(5, 20), layer.bias.detach())
    x = layer.inv(y)
    assert not factorizations
    expected = torch.linalg.solve(layer.weight.detach(), (y - layer.bias).mT).mT.detach()
    finite = torch.isfinite(expected)
    assert torch.allclose(x[finite], expected[finite], rtol=EXACT)


def test_zero_gradients_are_solved_without_a_factorization(factorizations: list[int]) -> None:
    # Masked samples, and all that a loss does not depend on: rows of the cotangent are 0.
    layer = linear(20)
    nudge_inverses(layer, 0.02)
    factorizations.clear()
    y = torch.randn(5, 20, requires_grad=True)
    layer.inv(y)[:2].sum().backward()
    assert not factorizations
    assert not y.grad[2:].any()
    assert y.grad[:2].any()


@pytest.mark.parametrize("log_det", ["refined", "learned"])
@pytest.mark.parametrize("size", [0.5, 3.0, 100.0])
def test_bad_inverse_gives_way_to_an_exact_solve(log_det: str, size: float) -> None:
    layer = linear(20, log_det=log_det)
    nudge_inverses(layer, size)
    y = torch.randn(5, 20)
    expected = torch.linalg.solve(layer.weight.detach(), (y - layer.bias).mT).mT.detach()
    assert torch.allclose(layer.inv(y), expected, rtol=EXACT)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_inverse_is_backward_stable(condition: float, dtype: torch.dtype, inverse: str) -> None:
    # The residual of y is rounding, whatever the condition; the error of x may be that times it.
    left, right = (torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2))
    matrix = left * torch.logspace(0, -math.log10(condition), 16) @ right
    layer = SelfNormalizingLinear(16, inverse=inverse, dtype=dtype)
    with torch.no_grad():
        layer.theta.copy_(4 * (matrix - torch.eye(16)))
    layer.refresh()
    y = torch.randn(50, 16, dtype=dtype)
    x = layer.inv(y)
    residual = layer.with_cache(0)(x.detach().double().to(dtype)) - y
    level = torch.finfo(dtype).eps * 16 * (x.norm(dim=-1) + 1)
    if inverse == "learned":  # one pass: R's own rounding counts, condition and all
        level = level * condition
    assert (residual.norm(dim=-1) < level).all()


def test_exact_value_is_computed_once_a_weight(factorizations: list[int]) -> None:
    layer, x = linear(20).eval(), torch.randn(5, 20)
    factorizations.clear()
    for _ in range(3):
        layer.log_abs_det_jacobian(x, layer(x))
        with torch.no_grad():
            layer.log_abs_det_jacobian(x + 1, layer(x + 1))
    assert len(factorizations) == 1
    with torch.no_grad():
        layer.theta.mul_(0.9)
    layer.log_abs_det_jacobian(x, layer(x))
    assert len(factorizations) == 2


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


def test_many_rows_and_evaluation_are_worth_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture few_rows
    layer = linear(64)
    nudge_inverses(layer, 0.01)
    made: list[int] = []
    factorize = torch.linalg.lu_factor_ex
    monkeypatch.setattr(
        torch.linalg, "lu_factor_ex", lambda matrix: (made.append(1), factorize(matrix))[1]
    )
    layer.inv(torch.randn(3, 64))
    assert not made  # few rows, weights that will change: refined
    layer.inv(torch.randn(40, 64))
    assert len(made) == 1
    layer.eval()
    for _ in range(3):
        y = torch.randn(3, 64)
        assert torch.allclose(layer(layer.inv(y)), y)
    assert len(made) == 1  # kept until the weights change

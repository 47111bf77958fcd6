"""SmoothLeakyReLU: formula, inverse, gradients, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_snf import SmoothLeakyReLU, smooth_leaky_relu

ALPHAS = [0.01, 0.1, 0.3, 0.5, 0.9, 0.999]

# x is found to a few units in the last place of y, and y is as flat as α.
INVERSE = {torch.float32: 4e-7, torch.float64: 1e-15}
EXACT = 1e-12

POSITIVE = torch.logspace(-6, 4, 200, dtype=torch.float64)
GRID = torch.cat([-POSITIVE.flip(0), torch.zeros(1, dtype=torch.float64), POSITIVE])


def formula(x: Tensor, alpha: float) -> Tensor:
    x = x.double()
    return alpha * x + (1 - alpha) * torch.logaddexp(x, torch.zeros_like(x))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_formula(alpha: float) -> None:
    x = GRID
    activation = SmoothLeakyReLU(alpha, dtype=torch.float64)
    assert torch.allclose(activation(x), formula(x, alpha), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_log_det_is_the_log_slope(alpha: float) -> None:
    x = GRID.clone().requires_grad_()
    activation = SmoothLeakyReLU(alpha, dtype=torch.float64)
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    log_det = activation.log_abs_det_jacobian(x, y)
    assert torch.allclose(log_det, slope.log(), rtol=EXACT, atol=EXACT)
    # Far out it is log α and log 1.
    assert log_det[0].item() == pytest.approx(math.log(alpha), rel=1e-9)
    assert log_det[-1].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_slope_is_between_alpha_and_one(alpha: float) -> None:
    x = GRID
    activation = SmoothLeakyReLU(alpha, dtype=torch.float64)
    log_det = activation.log_abs_det_jacobian(x, x)
    assert (log_det <= 0).all()
    assert (log_det >= math.log(alpha) - EXACT).all()
    assert (activation(x).diff() > 0).all()


@pytest.mark.parametrize("dtype", INVERSE, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_inverse_of_any_size(alpha: float, dtype: torch.dtype) -> None:
    activation, y = SmoothLeakyReLU(alpha, dtype=dtype), GRID.to(dtype)
    x = activation.inv(y)
    assert x.dtype == dtype
    # Backward stable: T(x), in float64, is y to a few units in the last place.
    residual = (formula(x, activation.alpha.double().item()) - y.double()).abs()
    assert (residual / (y.double().abs() + 1)).max() < 4 * INVERSE[dtype]


@pytest.mark.parametrize("dtype", INVERSE, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_round_trip(alpha: float, dtype: torch.dtype) -> None:
    activation, x = SmoothLeakyReLU(alpha, dtype=dtype), GRID.to(dtype)
    again = activation.inv(activation(x).clone())
    # Rounding of y, seen through a slope of α at worst.
    allowed = 8 * INVERSE[dtype] * (1 + x.abs()) / alpha
    assert ((again - x).abs() < allowed).all()


@pytest.mark.parametrize("alpha", [1e-6, 1 - 1e-6])
def test_extreme_slopes(alpha: float) -> None:
    activation = SmoothLeakyReLU(alpha, dtype=torch.float64)
    x = torch.linspace(-20, 20, 101)
    assert (activation.inv(activation(x).clone()) - x).abs().max() < 1e-14 / alpha


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_passes_through(value: float) -> None:
    activation = SmoothLeakyReLU(0.3)
    x = torch.tensor([1.0, value, -2.0])
    for part in (activation, activation.inv):
        y = part(x)
        assert torch.equal(y[1:2].nan_to_num(7), x[1:2].nan_to_num(7))
        # Its neighbours are what they are without it.
        assert torch.equal(y[[0, 2]], part(x[[0, 2]]))


def test_largest_numbers_have_an_inverse() -> None:
    activation = SmoothLeakyReLU(0.3, dtype=torch.float32)
    y = torch.tensor([1e38, -1e37, 1e-38, -1e-38, 0.0], dtype=torch.float32)
    x = activation.inv(y)
    assert torch.isfinite(x).all()
    assert torch.allclose(activation(x.clone()), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.8])
def test_gradients_of_the_inverse_are_implicit(alpha: float) -> None:
    activation = SmoothLeakyReLU(alpha, learnable=True, dtype=torch.float64)
    y = torch.linspace(-30, 30, 31).requires_grad_()
    x = activation.inv(y)
    gradients = torch.autograd.grad(x.sum(), [y, activation.logit_alpha])
    # dx = (dy − ∂T/∂α dα) / T'(x), dα/dlogit = α (1 − α)
    slope = alpha + (1 - alpha) * torch.sigmoid(x)
    by_alpha = -((x - torch.logaddexp(x, torch.zeros(()))) / slope).sum()
    assert torch.allclose(gradients[0], 1 / slope, rtol=EXACT)
    assert gradients[1].item() == pytest.approx((by_alpha * alpha * (1 - alpha)).item(), rel=EXACT)


@pytest.mark.parametrize("direction", ["T", "T.inv", "log-det", "inverse log-det"])
def test_first_and_second_derivatives(direction: str) -> None:
    activation = SmoothLeakyReLU(0.2, learnable=True, dtype=torch.float64).with_cache(0)
    x = torch.tensor([-5.0, -0.3, 0.0, 0.4, 6.0], requires_grad=True)

    def function(x: Tensor, _: Tensor) -> Tensor:
        part = activation.inv if "inv" in direction else activation
        y = part(x)
        return part.log_abs_det_jacobian(x, y) if "log-det" in direction else y

    assert gradcheck(function, (x, activation.logit_alpha))
    assert gradgradcheck(function, (x, activation.logit_alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_is_what_was_asked_for(alpha: float) -> None:
    for activation in (SmoothLeakyReLU(alpha), smooth_leaky_relu(alpha, learnable=True)):
        assert activation.alpha.item() == pytest.approx(alpha, rel=1e-12)
    single = SmoothLeakyReLU(alpha, dtype=torch.float32)
    assert single.alpha.item() == pytest.approx(alpha, rel=1e-6)


def test_alpha_is_learned_only_if_asked() -> None:
    assert not list(SmoothLeakyReLU(0.3).parameters())
    assert "logit_alpha" in SmoothLeakyReLU(0.3).state_dict()
    assert [name for name, _ in SmoothLeakyReLU(0.3, learnable=True).named_parameters()] == [
        "logit_alpha"
    ]


def test_alpha_can_be_recovered_from_data() -> None:
    activation = SmoothLeakyReLU(0.9, learnable=True)
    x = torch.linspace(-4, 4, 50)
    target = formula(x, 0.2)
    optimizer = torch.optim.Adam(activation.parameters(), lr=0.2)
    for _ in range(200):
        loss = (activation(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert activation.alpha.item() == pytest.approx(0.2, abs=0.01)
    # And alpha stays inside (0, 1) whatever the optimizer does to its logit.
    with torch.no_grad():
        activation.logit_alpha.fill_(-30.0)
    assert 0 < activation.alpha.item() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    activation = SmoothLeakyReLU(0.3, dtype=dtype)
    x = torch.linspace(-8, 8, 33).to(dtype)
    y = activation(x)
    assert y.dtype == dtype
    again = activation.inv(y.clone())
    allowed = 8 * torch.finfo(dtype).eps * (1 + x.double().abs()) / 0.3
    assert ((again.double() - x.double()).abs() < allowed).all()


def test_sign_is_positive() -> None:
    assert SmoothLeakyReLU().sign == SmoothLeakyReLU().inv.sign == 1


def test_repr_tells_alpha() -> None:
    assert repr(SmoothLeakyReLU(0.25)) == "SmoothLeakyReLU(alpha=0.25, learnable=False)"

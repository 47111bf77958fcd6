"""The activations: formula, inverse, gradients, extremes."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_snf import (
    RationalQuadraticSpline,
    SmoothLeakyReLU,
    rational_quadratic_spline,
    smooth_leaky_relu,
)
from tests.registry import is_close

ALPHAS = [1e-6, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6]

# x is found to a few units in the last place of y, and y is as flat as α.
INVERSE = {torch.float32: 4e-7, torch.float64: 1e-15}
EXACT = 1e-12
# A spline's knots are sums of lengths; and Pyro moves the bounds of its bins by 1e-6.
SPLINE = 1e-9

POSITIVE = torch.logspace(-6, 4, 200, dtype=torch.float64)
GRID = torch.cat([-POSITIVE.flip(0), torch.zeros(1, dtype=torch.float64), POSITIVE])


def formula(x: Tensor, alpha: float) -> Tensor:
    x = x.double()
    return alpha * x + (1 - alpha) * torch.logaddexp(x, torch.zeros_like(x))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_formula_and_log_det(alpha: float) -> None:
    x = GRID.clone().requires_grad_()
    activation = SmoothLeakyReLU(alpha, dtype=torch.float64)
    y = activation(x)
    assert is_close(y, formula(x, alpha), EXACT)
    assert (y.diff() > 0).all()
    (slope,) = torch.autograd.grad(y.sum(), x)
    log_det = activation.log_abs_det_jacobian(x, y)
    assert is_close(log_det, slope.log(), EXACT)
    assert ((log_det <= 0) & (log_det >= math.log(alpha) - EXACT)).all()
    # At a distance it is log α and log 1.
    assert log_det[0].item() == pytest.approx(math.log(alpha), rel=1e-9)
    assert log_det[-1].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dtype", INVERSE, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_inverse_of_any_size(alpha: float, dtype: torch.dtype) -> None:
    activation, y = SmoothLeakyReLU(alpha, dtype=dtype), GRID.to(dtype)
    x = activation.inv(y)
    assert x.dtype == dtype
    # The inverse is backward stable: T(x), in float64, is y to a few units in the last place.
    residual = (formula(x, activation.alpha.double().item()) - y.double()).abs()
    assert (residual / (y.double().abs() + 1)).max() < 4 * INVERSE[dtype]
    y = torch.tensor([1e38, -1e37 * alpha, 1e-38, -1e-38, 0.0], dtype=dtype)
    x = activation.inv(y)
    assert torch.isfinite(x).all()
    assert torch.allclose(activation(x.clone()), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["SmoothLeakyReLU", "spline"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_pass_through(value: float, kind: str) -> None:
    activation = SmoothLeakyReLU(0.3) if kind == "SmoothLeakyReLU" else spline(3)
    x = torch.tensor([[1.0, value, -2.0], [1.0, 0.0, -2.0]])
    for part in (activation, activation.inv):
        y = part(x)
        assert torch.equal(y[0, 1].nan_to_num(7), x[0, 1].nan_to_num(7))
        assert torch.equal(y[0, [0, 2]], y[1, [0, 2]])  # their neighbours are not affected
    log_det = activation.log_abs_det_jacobian(x, activation(x)).view(2, -1).sum(-1)
    assert log_det.isnan().tolist() == [math.isnan(value), False]


@pytest.mark.parametrize("direction", ["T", "T.inv", "log-det", "inverse log-det"])
@pytest.mark.parametrize("kind", ["SmoothLeakyReLU", "spline"])
def test_first_and_second_derivatives(kind: str, direction: str) -> None:
    if kind == "spline":
        activation = spline(4, num_bins=3, bound=2.0).with_cache(0)
    else:
        activation = SmoothLeakyReLU(0.2, learnable=True).with_cache(0)
    x = torch.tensor([[-5.0, -0.3, 0.1, 1.9], [-1.4, 0.5, -1.9, 2.5]], requires_grad=True)

    def function(x: Tensor, *_: Tensor) -> Tensor:
        part = activation.inv if "inv" in direction else activation
        y = part(x)
        return part.log_abs_det_jacobian(x, y) if "log-det" in direction else y

    assert gradcheck(function, (x, *activation.parameters()))
    assert gradgradcheck(function, (x, *activation.parameters()))


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


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_is_the_option(alpha: float) -> None:
    fixed, learnable = SmoothLeakyReLU(alpha), smooth_leaky_relu(alpha, learnable=True)
    for activation in (fixed, learnable):
        assert activation.alpha.item() == pytest.approx(alpha, rel=1e-9)
        assert activation.sign == activation.inv.sign == 1
        assert repr(activation).startswith(f"SmoothLeakyReLU(alpha={alpha:.4g}, learnable=")
        assert "logit_alpha" in activation.state_dict()
    assert not list(fixed.parameters())
    assert dict(learnable.named_parameters()).keys() == {"logit_alpha"}
    single = SmoothLeakyReLU(alpha, dtype=torch.float32)
    assert single.alpha.item() == pytest.approx(alpha, rel=1e-6)


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
    # And alpha stays inside (0, 1) for any logit.
    with torch.no_grad():
        activation.logit_alpha.fill_(-30.0)
    assert 0 < activation.alpha.item() < 1


# --- Splines ------------------------------------------------------------------------------------


def spline(
    event_shape: int | tuple[int, ...] = 3, *, size: float = 1.0, **options: object
) -> RationalQuadraticSpline:
    """A random spline; slopes are further from 1 the larger the size."""
    made = RationalQuadraticSpline(event_shape, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(size * torch.randn(parameter.shape))
    return made


def test_spline_starts_as_the_identity() -> None:
    made = RationalQuadraticSpline((2, 3, 4))
    assert repr(made) == "RationalQuadraticSpline((2, 3, 4), num_bins=5, bound=10)"
    assert made.sign == made.inv.sign == 1
    x = 8 * torch.randn(50, 2, 3, 4)
    y = made(x)
    assert is_close(y, x, EXACT)
    assert made.log_abs_det_jacobian(x, y).abs().max() < EXACT


def test_spline_is_increasing_and_smooth() -> None:
    made = spline(1, size=0.5)
    x = torch.linspace(-12, 12, 200_001).unsqueeze(-1).requires_grad_()
    y = made(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (y.diff(dim=0) > 0).all()
    assert (slope > 0).all()
    # Also across the knots and the bounds: between neighbours, 1.2e-4 apart, it changes little.
    assert (slope[1:] / slope[:-1]).log().abs().max() < 1e-2
    outside = x.abs() >= 10
    assert torch.equal(y[outside], x[outside])
    assert torch.equal(slope[outside], torch.ones_like(slope[outside]))


def test_spline_goes_through_its_knots() -> None:
    made = spline(2, num_bins=4, bound=3.0)
    knots = []
    for unnormalized in (made.unnormalized_widths, made.unnormalized_heights):
        shares = 1e-3 + (1 - 4e-3) * unnormalized.softmax(-1)
        knots.append((6 * shares.cumsum(-1) - 3)[:, :-1].detach())
    inner = made.unnormalized_slopes + math.log(math.expm1(1 - 1e-3))
    slopes = 1e-3 + torch.nn.functional.softplus(inner).detach()
    for k in range(3):
        x = knots[0][:, k].clone().requires_grad_()
        y = made(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert is_close(y, knots[1][:, k], SPLINE)
        assert torch.allclose(slope, slopes[:, k], rtol=1e-6)


def test_spline_is_that_of_pyro_between_the_outer_knots() -> None:
    # At the bounds, Pyro's slopes are 0.999; the other parameters are the same up to an offset.
    ours = spline(3, num_bins=5, bound=4.0)
    theirs = dist.transforms.Spline(3, count_bins=5, bound=4.0, order="quadratic")
    with torch.no_grad():
        theirs.unnormalized_widths.copy_(ours.unnormalized_widths)
        theirs.unnormalized_heights.copy_(ours.unnormalized_heights)
        offset = math.log(math.expm1(1 - 1e-3))
        theirs.unnormalized_derivatives.copy_(ours.unnormalized_slopes + offset)
    x = torch.linspace(-6, 6, 1000).unsqueeze(-1).expand(-1, 3).clone()
    widths = (1e-3 + (1 - 5e-3) * ours.unnormalized_widths.softmax(-1)).detach()
    lower, upper = 8 * widths[:, 0] - 4, 4 - 8 * widths[:, -1]
    inner = ((x > lower + 1e-5) & (x < upper - 1e-5)) | (x.abs() > 4)
    y, expected = ours(x), theirs(x)
    assert is_close(y[inner], expected[inner], SPLINE)
    log_slopes = theirs.log_abs_det_jacobian(x, expected)
    for index in range(len(x)):
        if inner[index].all():
            actual = ours.log_abs_det_jacobian(x[index], y[index])
            assert torch.allclose(actual, log_slopes[index].sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", INVERSE, ids=str)
@pytest.mark.parametrize("size", [0.5, 2.0, 6.0])
def test_spline_round_trip(size: float, dtype: torch.dtype) -> None:
    made = spline(100, size=size).to(dtype)
    x = (torch.rand(500, 100) * 24 - 12).to(dtype)
    y = made(x).detach()
    again = made.inv(y.clone()).detach().requires_grad_()
    assert again.dtype == dtype
    # The inverse is backward stable: T(T⁻¹(y)) is y to the rounding of numbers as large as the
    # bound, multiplied by the slope, which is up to 2000 here.
    y_again = made(again)
    (slope,) = torch.autograd.grad(y_again.sum(), again)
    allowed = 20 * torch.finfo(dtype).eps * made.bound * (1 + slope)
    assert ((y_again - y).abs() <= allowed).all()
    if dtype == torch.float64:
        log_det = made.log_abs_det_jacobian(again, y_again)
        assert torch.allclose(log_det, slope.log().sum(-1), rtol=EXACT, atol=1e-10)


def test_spline_parameters_may_be_of_any_size() -> None:
    made = spline(20, size=1e3)
    x = (torch.rand(200, 20) * 24 - 12).requires_grad_()
    y = made(x)
    log_det = made.log_abs_det_jacobian(x, y)
    (y.sum() + log_det.sum()).backward()
    assert torch.isfinite(log_det).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())
    assert torch.isfinite(made.inv(y.detach().clone())).all()


def test_spline_can_be_fitted() -> None:
    # A density model of a mixture of two normals: −log p decreases to the entropy of the mixture.
    made = rational_quadratic_spline(1, num_bins=8, bound=6.0)
    base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [made.inv])
    signs = torch.randint(2, (2000, 1)) * 2.0 - 1
    data = 2 * signs + 0.5 * torch.randn(2000, 1)
    entropy = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * 0.25)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -density.log_prob(data).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(entropy, abs=0.05)


def test_numpy_numbers_are_numbers() -> None:
    for alpha in (np.float32(0.5), np.float64(0.5)):
        assert SmoothLeakyReLU(alpha).alpha.item() == 0.5
    made = RationalQuadraticSpline(np.int64(3), num_bins=np.int64(4), bound=np.float32(2))
    assert [type(made.num_bins), type(made.bound)] == [int, float]

"""The controller of the reconstruction weight."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from pyro_snf import GECO, SelfNormalizingLinear
from tests.registry import density_loss, linear, nudge_inverses

# One multiplication and one exponential in float64.
EXACT = 1e-12


def controlled(tolerance: float, size: float = 0.0, **options: float) -> SelfNormalizingLinear:
    """A layer whose R is off by about ``size``."""
    layer = linear(5, log_det="learned", reconstruction_weight=GECO(tolerance, **options))
    nudge_inverses(layer, size)
    return layer


def weight(layer: SelfNormalizingLinear) -> float:
    return layer.estimator.reconstruction_weight.weight.item()


def test_weight_starts_where_it_is_told() -> None:
    assert GECO(0.1).weight.item() == pytest.approx(1.0)
    assert GECO(0.1, weight=250.0).weight.item() == pytest.approx(250.0)


@pytest.mark.parametrize("error", [1e-12, 0.01, 0.0999, 0.1001, 0.3, 1e12])
def test_one_step_is_the_formula(error: float) -> None:
    controller = GECO(0.1, weight=2.0, rate=0.05, decay=0.75)
    assert controller.update(torch.tensor(error**2))
    mean = 0.75 * 0.1**2 + 0.25 * error**2
    excess = min(max(math.log(math.sqrt(mean) / 0.1), -1), 1)
    assert controller.mean_square_error.item() == pytest.approx(mean, rel=EXACT)
    assert controller.weight.item() == pytest.approx(2.0 * math.exp(0.05 * excess), rel=EXACT)


@pytest.mark.parametrize(("error", "sign"), [(1.0, 1), (0.001, -1)])
def test_weight_moves_both_ways(error: float, sign: int) -> None:
    controller = GECO(0.1, decay=0.5)
    weights = [controller.weight.item()]
    for _ in range(20):
        controller.update(torch.tensor(error**2))
        weights.append(controller.weight.item())
    assert weights == sorted(weights, reverse=sign < 0)
    assert len(set(weights)) == len(weights)


def test_weight_rests_at_the_tolerance() -> None:
    controller = GECO(0.1)
    for _ in range(5):
        controller.update(torch.tensor(0.01))
    assert controller.weight.item() == pytest.approx(1.0)


@pytest.mark.parametrize("error", [0.0, 1e300])
def test_no_step_is_larger_than_the_rate(error: float) -> None:
    controller = GECO(0.1, rate=0.05, decay=0.0)
    controller.update(torch.tensor(error))
    assert abs(controller.log_weight.item()) == pytest.approx(0.05)


@pytest.mark.parametrize("error", [math.nan, math.inf, -math.inf])
def test_errors_that_are_not_finite_are_passed_over(error: float) -> None:
    controller = GECO(0.1)
    controller.update(torch.tensor(4.0))
    state = copy.deepcopy(controller.state_dict())
    assert not controller.update(torch.tensor(error))
    assert all(torch.equal(controller.state_dict()[name], state[name]) for name in state)


def test_controller_holds_an_error_that_it_controls() -> None:
    # A plant whose error is 1/λ: the weight must settle where the error is the tolerance.
    controller = GECO(0.05, rate=0.1, decay=0.5)
    for _ in range(300):
        controller.update((1 / controller.weight) ** 2)
    assert 1 / controller.weight.item() == pytest.approx(0.05, rel=0.01)


def test_state_is_saved() -> None:
    controller = GECO(0.1)
    for _ in range(5):
        controller.update(torch.tensor(1.0))
    buffer = io.BytesIO()
    torch.save(controller.state_dict(), buffer)
    buffer.seek(0)
    other = GECO(0.1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for each in (controller, other):
        each.update(torch.tensor(0.5))
    assert torch.equal(other.weight, controller.weight)
    assert torch.equal(other.mean_square_error, controller.mean_square_error)


def test_state_is_saved_with_the_layer() -> None:
    layer = controlled(0.01, size=0.3)
    for _ in range(3):
        density_loss(layer, torch.randn(4, 5)).backward()
        with torch.no_grad():
            layer.theta.mul_(0.99)
    other = controlled(0.01)
    other.load_state_dict(layer.state_dict())
    assert weight(other) == weight(layer) > 1


@pytest.mark.parametrize(("size", "sign"), [(0.5, 1), (0.0, -1)])
def test_layer_moves_the_weight_both_ways(size: float, sign: int) -> None:
    layer = controlled(0.01, size)
    density_loss(layer, torch.randn(8, 5))
    assert (weight(layer) - 1) * sign > 0


def test_layer_reports_the_mean_square_error_per_element() -> None:
    layer, x = controlled(0.01, size=0.5, decay=0.0), torch.randn(8, 5)
    layer.log_abs_det_jacobian(x, layer(x))
    reconstruction = x @ (layer.inverse_weight @ layer.weight).detach().mT
    expected = (reconstruction - x).square().mean()
    actual = layer.estimator.reconstruction_weight.mean_square_error
    assert actual.item() == pytest.approx(expected.item(), rel=1e-9)


def test_one_step_of_the_controller_a_step_of_the_optimizer() -> None:
    layer, x = controlled(0.01, size=0.5), torch.randn(8, 5)
    density_loss(layer, x)
    once = weight(layer)
    for _ in range(3):  # more log-determinants of the same parameters
        density_loss(layer, x + 1)
    assert weight(layer) == once
    with torch.no_grad():
        layer.estimator.theta.mul_(0.99)
    density_loss(layer, x)
    assert weight(layer) > once


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_nothing_moves_outside_training(how: str) -> None:
    layer = controlled(0.01, size=0.5).train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        density_loss(layer, torch.randn(8, 5))
    assert weight(layer) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_data_leave_the_weight_alone(value: float) -> None:
    layer, x = controlled(0.01, size=0.5), torch.full((2, 5), value)
    layer.log_abs_det_jacobian(x, layer(x))
    assert weight(layer) == 1


def test_weight_scales_the_penalty() -> None:
    gradients = []
    for first in (1.0, 10.0):
        layer = linear(
            5,
            log_det="learned",
            mixture=0.0,
            reconstruction_weight=GECO(0.01, weight=first, rate=1e-15),
        )
        nudge_inverses(layer, 0.5)
        density_loss(layer, torch.ones(4, 5)).backward()
        gradients.append(layer.estimator.theta.grad)
    assert torch.allclose(gradients[1], 10 * gradients[0], rtol=1e-9)


def test_weight_moves_in_a_half_precision_layer() -> None:
    # λ = exp(4), rate 0.01: in bfloat16 the steps of log λ would be rounded away.
    layer = controlled(0.001, size=0.5, weight=math.exp(4)).bfloat16()
    before = weight(layer)
    for _ in range(5):
        x = torch.randn(8, 5, dtype=torch.bfloat16)
        layer.log_abs_det_jacobian(x, layer(x))
        with torch.no_grad():
            layer.theta.mul_(0.9)
    assert weight(layer) == pytest.approx(before * math.exp(0.05), rel=0.01)


def test_repr() -> None:
    assert repr(GECO(0.1)) == "GECO(tolerance=0.1, rate=0.01, decay=0.9)"

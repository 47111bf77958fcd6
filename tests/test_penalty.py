"""The weight of a reconstruction penalty: its controller, GECO, and how layers step it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_snf import (
    GECO,
    PairRefined,
    Reconstruction,
    SelfNormalizingLinear,
    self_normalizing_pair,
)
from tests.registry import density_loss, linear, nudge_inverses

# One multiplication and one exponential in float64.
EXACT = 1e-12


def controlled(tolerance: float, size: float = 0.0, **options: float) -> SelfNormalizingLinear:
    """A layer whose R is off by about ``size``."""
    controller = GECO(tolerance, **options)
    layer = linear(5, log_det="learned", mixture=0.0, reconstruction_weight=controller)
    nudge_inverses(layer, size)
    return layer


def weight(layer: SelfNormalizingLinear) -> float:
    return layer.log_det.reconstruction_weight.weight.item()


# --- The controller -----------------------------------------------------------------------------


def test_weight_starts_where_it_is_told() -> None:
    assert GECO(0.1).weight.item() == pytest.approx(1.0)
    assert GECO(0.1, weight=250.0).weight.item() == pytest.approx(250.0)
    assert repr(GECO(0.1)) == "GECO(tolerance=0.1, rate=0.01, fall=1.0, decay=0.9)"
    assert "max_weight=3.0, " in repr(GECO(0.1, max_weight=3))
    assert "min_weight=0.5, max_weight=3.0, " in repr(GECO(0.1, min_weight=0.5, max_weight=3))


@pytest.mark.parametrize(
    ("name", "bound", "error", "expected", "bad"),
    [
        ("min_weight", 1.5, 0.0, r"min_weight in \[0, 2.0\], the first one", (2.1, -0.1)),
        ("max_weight", 3.0, 1.0, "max_weight >= 2.0, the first one", (1.9,)),
    ],
)
def test_weight_is_bounded_and_leaves_the_bound(
    name: str, bound: float, error: float, expected: str, bad: tuple[float, ...]
) -> None:
    controller = GECO(0.1, weight=2.0, rate=0.1, decay=0.0, **{name: bound})
    for _ in range(20):
        controller.update(torch.tensor(error))
    assert controller.weight.item() == pytest.approx(bound)
    controller.update(torch.tensor(1.0 - error))
    assert controller.weight.item() == pytest.approx(bound * math.exp(0.1 - 0.2 * error))
    for value in (*bad, math.nan, "3"):
        with pytest.raises(ValueError, match=expected):
            GECO(0.1, weight=2.0, **{name: value})


@pytest.mark.parametrize("error", [0.0, 1e-12, 0.01, 0.0999, 0.1, 0.1001, 0.3, 1e12, 1e150])
def test_one_step_is_the_formula(error: float) -> None:
    controller = GECO(0.1, weight=2.0, rate=0.05, fall=0.2, decay=0.75)
    controller.update(torch.tensor(error**2))
    mean = 0.75 * 0.1**2 + 0.25 * error**2
    # No step is larger than the rate; at the tolerance there is none.
    excess = min(max(math.log(math.sqrt(mean) / 0.1), -1), 1)
    excess *= 0.2 if excess < 0 else 1
    assert controller.mean_square_error.item() == pytest.approx(mean, rel=EXACT)
    assert controller.weight.item() == pytest.approx(2.0 * math.exp(0.05 * excess), rel=EXACT)


@pytest.mark.parametrize("error", [math.nan, math.inf, -math.inf])
def test_errors_that_are_not_finite_are_ignored(error: float) -> None:
    controller = GECO(0.1)
    controller.update(torch.tensor(4.0))
    state = copy.deepcopy(controller.state_dict())
    controller.update(torch.tensor(error))
    assert all(torch.equal(controller.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("start", [0.01, 1e4])
def test_controller_holds_an_error_that_it_controls(start: float) -> None:
    # A plant whose error is 1/λ: the weight must settle where the error is the tolerance.
    controller = GECO(0.05, weight=start, rate=0.1, decay=0.5)
    for _ in range(300):
        controller.update((1 / controller.weight) ** 2)
    assert 1 / controller.weight.item() == pytest.approx(0.05, rel=0.01)


# --- In a layer ---------------------------------------------------------------------------------


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
    actual = layer.log_det.reconstruction_weight.mean_square_error
    assert actual.item() == pytest.approx(expected.item(), rel=1e-9)


def test_one_step_of_the_controller_a_step_of_the_optimizer() -> None:
    layer, x = controlled(0.01, size=0.5), torch.randn(8, 5)
    density_loss(layer, x)
    once = weight(layer)
    for _ in range(3):  # more log-determinants of the same parameters
        density_loss(layer, x + 1)
    assert weight(layer) == once
    with torch.no_grad():
        layer.log_det.theta.mul_(0.99)
    density_loss(layer, x)
    assert weight(layer) > once
    other = controlled(0.01)
    other.load_state_dict(layer.state_dict())
    assert weight(other) == weight(layer)


def eval_mode(layer: SelfNormalizingLinear, x: Tensor) -> None:
    density_loss(layer.eval(), x)


def no_grad(layer: SelfNormalizingLinear, x: Tensor) -> None:
    with torch.no_grad():
        density_loss(layer, x)


def bad_data(layer: SelfNormalizingLinear, x: Tensor) -> None:
    for value in (math.nan, math.inf):
        bad = torch.full_like(x, value)
        layer.log_abs_det_jacobian(bad, layer(bad))


@pytest.mark.parametrize("use", [eval_mode, no_grad, bad_data])
def test_weight_moves_in_training_with_good_data_only(
    use: Callable[[SelfNormalizingLinear, Tensor], None],
) -> None:
    layer = controlled(0.01, size=0.5)
    use(layer, torch.randn(8, 5))
    assert weight(layer) == 1


def test_weight_scales_the_penalty() -> None:
    gradients = []
    for first in (1.0, 10.0):
        layer = controlled(0.01, size=0.5, weight=first, rate=1e-15)
        density_loss(layer, torch.ones(4, 5)).backward()
        gradients.append(layer.log_det.theta.grad)
    assert torch.allclose(gradients[1], 10 * gradients[0], rtol=1e-9)


def test_schedule_is_a_function_of_the_number_of_steps() -> None:
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 1.0

    layer, x = linear(5, log_det="learned", reconstruction_weight=schedule), torch.randn(8, 5)
    for _ in range(3):
        for _ in range(2):
            density_loss(layer, x)
        with torch.no_grad():
            layer.theta.mul_(0.99)
    assert seen == [0, 0, 1, 1, 2, 2]


def test_weight_moves_in_a_half_precision_layer() -> None:
    # λ = exp(4), rate 0.01: in bfloat16 the steps of log λ would be rounded away.
    layer = controlled(0.001, size=0.5, weight=math.exp(4)).bfloat16()
    before, x = weight(layer), torch.randn(8, 5, dtype=torch.bfloat16)
    for _ in range(5):
        layer.log_abs_det_jacobian(x, layer(x))
        with torch.no_grad():
            layer.theta.mul_(0.9)
    assert weight(layer) == pytest.approx(before * math.exp(0.05), rel=0.01)


def test_functions_are_shared_with_the_layer() -> None:
    class Owner:
        rate = 1.0

        def weight(self, step: int) -> float:
            return self.rate

    owner = Owner()
    layer = self_normalizing_pair(2, [4], reconstruction=Reconstruction(owner.weight))
    owner.rate = 3.0
    assert layer.reconstruction.weight(0) == 3.0


def test_equal_seeds_of_probes_and_noise_are_different_numbers() -> None:
    methods = [PairRefined(seed=7), Reconstruction(seed=7)]
    layer = self_normalizing_pair(2, [4], log_det=methods[0], reconstruction=methods[1])
    draws = [
        torch.randn(3, generator=stream.generator(0, torch.device("cpu"), stream=number))
        for stream, number in [(layer.log_det.probes, 0), (layer.reconstruction.probes, 2)]
    ]
    assert not torch.equal(*draws)

"""Diagnostics against their definitions, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import ComposeTransformModule, iterated
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor, nn

from pyro_snf import (
    Compose,
    SelfNormalizingLinear,
    SelfNormalizingPair,
    SmoothLeakyReLU,
    self_normalizing_linear,
)
from pyro_snf.diagnostics import gradient_error, inverse_error, pair_report, report
from pyro_snf.maps import kernels
from tests.pairs import jacobians, trace_surrogate
from tests.registry import (
    LOG_DETS,
    conditional_pair,
    conv,
    exact_pair,
    free_form,
    linear,
    nudge_inverses,
)

# Float64: the same definitions, summed in another order.
EXACT = 1e-9


SIZE = (5, 4)


class Kind(NamedTuple):
    make: Callable[..., Any]
    """Makes a layer of some keywords."""
    size: tuple[int, int] | None = SIZE
    """Of the images that it is asked for."""


KINDS = {
    "linear D=1": Kind(partial(linear, 1), None),
    "linear": Kind(partial(linear, 6), None),
    "conv": Kind(partial(conv, 2, inverse_kernel_size=3)),
    "conv circular": Kind(partial(conv, 2, padding_mode="circular")),
    "conv 1×1": Kind(partial(conv, 2, kernel_size=1)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


EVERY_METHOD = pytest.mark.parametrize("log_det", LOG_DETS)


def matrices(layer: Any, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """W and its approximate inverse, as matrices."""
    weight = layer.weight.detach()
    if size is None:
        return weight, layer.inverse_weight
    inverse = layer.inverse_weight(size)
    mode = layer.padding_mode
    return kernels.matrix(weight, size, mode), kernels.matrix(inverse, size, mode)


# --- Layers -------------------------------------------------------------------------------------


@EVERY_METHOD
def test_inverse_error_is_its_definition_and_changes_nothing(log_det: str, kind: Kind) -> None:
    layer, size = kind.make(log_det=log_det), kind.size
    nudge_inverses(layer, 0.3)
    weight, inverse = matrices(layer, size)
    expected = (torch.eye(len(weight)) - inverse @ weight).norm() / math.sqrt(len(weight))
    layer(torch.zeros(2, len(layer.theta), *(size or ())))
    state, random_state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    found = inverse_error(layer, size)
    assert found == pytest.approx(expected.item(), rel=EXACT, abs=EXACT)
    # Without a size, that of the latest images is taken.
    for part, sizes in [(layer.inv, [size]), (layer, [])]:
        assert inverse_error(part, *sizes) == pytest.approx(found, rel=EXACT, abs=EXACT)
    report(layer.inv)
    assert gradient_error(layer) == gradient_error(layer, size)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in layer.parameters())
    if size is None and log_det == "refined":
        layer.log_det.estimator.inverse_t.zero_()
        assert inverse_error(layer) == pytest.approx(1.0)


@EVERY_METHOD
def test_gradient_error_is_that_of_the_next_training_step(log_det: str, kind: Kind) -> None:
    # The penalty has no gradient at x = 0.
    layer, size = kind.make(log_det=log_det), kind.size
    nudge_inverses(layer, 0.3)
    found = gradient_error(layer.eval(), size)
    assert gradient_error(layer.inv, size) == found
    event_shape = torch.Size([len(layer.theta), *(size or ())])
    exact = torch.autograd.grad(
        layer.log_det.linear_map.exact_log_abs_det(layer.theta, event_shape), layer.theta
    )[0]
    x = torch.zeros(1, *event_shape)
    value = layer.train().log_abs_det_jacobian(x, layer(x)).sum()
    (used,) = torch.autograd.grad(value, layer.theta)
    relative = ((used - exact).norm() / exact.norm()).item()
    cosine = nn.functional.cosine_similarity(used.flatten(), exact.flatten(), dim=0).item()
    assert found == pytest.approx((relative, cosine), rel=EXACT, abs=EXACT)
    # A wrong R that is tracked is noticed; one that is learned is not.
    assert (relative > 1e-3) == (log_det == "learned")


def test_float32_layers_are_measured_in_float64() -> None:
    layer = linear(50).float()
    layer.refactorize()
    assert 0 < inverse_error(layer) < 1e-5


@pytest.mark.parametrize("measure", [inverse_error, gradient_error])
def test_what_cannot_be_measured_is_an_error(measure: Callable[[object], object]) -> None:
    for other in (SmoothLeakyReLU(), flow(), dist.transforms.Spline(3), free_form(3)):
        with pytest.raises(ValueError, match=r"expected a dense or convolutional .*; got"):
            measure(other)
    with pytest.raises(ValueError, match="expected image_size"):
        measure(conv(2))
    layer = linear(4)
    with torch.no_grad():
        layer.theta.copy_(-2 * torch.eye(4))  # A = 0
    with pytest.raises(torch.linalg.LinAlgError):
        gradient_error(layer)


# --- report -------------------------------------------------------------------------------------


def flow() -> Compose:
    layers = [
        SelfNormalizingLinear(3),
        SmoothLeakyReLU(),
        SelfNormalizingLinear(3, log_det="exact"),
    ]
    return Compose(layers)


def test_report_has_a_row_a_layer_and_prints_as_a_table() -> None:
    found = report(flow())
    assert [(row.name, row.dim, row.log_det) for row in found.layers] == [
        ("0", 3, "Refined"),
        ("2", 3, "Exact"),
    ]
    assert found.layers[0].num_refactorizations == 0
    assert math.isnan(found.layers[0].error_estimate)
    assert found.layers[1].num_refactorizations is found.layers[1].error_estimate is None
    text = str(found)
    assert repr(found) == text
    header, first, second = text.splitlines()
    assert header.split() == [
        *("layer", "D", "log_det", "condition", "inverse", "error", "estimate", "factorized")
    ]
    assert first.split()[:4] == ["0", "3", "Refined", "1"]
    assert second.split()[-2:] == ["–", "–"]
    assert len(first) == len(header)


@EVERY_METHOD
def test_report_of_a_layer(log_det: str, kind: Kind) -> None:
    layer, size = kind.make(log_det=log_det), kind.size
    if size is not None:
        assert "–" in str(report(layer))  # before the first image
    x = torch.ones(1, len(layer.theta), *(size or ()))
    layer.log_abs_det_jacobian(x, layer(x))
    (row,) = report(layer).layers
    assert row.dim == x.numel()
    if layer.uses_approximate_inverse or size is None or layer.kernel_size == (1, 1):
        assert row.inverse_error == pytest.approx(inverse_error(layer, size), rel=EXACT, abs=EXACT)
    else:  # its kernel of least squares is used nowhere
        assert math.isnan(row.inverse_error)
    assert row.error_estimate == layer.error_estimate
    assert row.num_refactorizations == layer.num_refactorizations
    # An estimate: the norm from above, that of the inverse from below.
    assert 0.3 < row.condition / torch.linalg.cond(matrices(layer, size)[0]).item() < 5
    with torch.no_grad():
        linear_map = layer.log_det.linear_map
        weight = linear_map.weight(layer.theta)
        weight[0] = 0
        layer.theta.copy_(linear_map.theta_of(weight))
    assert report(layer).layers[0].condition > 1e12  # to rounding


def names(container: object) -> list[str]:
    return [row.name for row in report(container).layers]


def test_report_finds_the_layers_of_anything() -> None:
    base, stack = dist.Normal(torch.zeros(3), 1.0), flow()
    assert names(stack) == ["0", "2"]
    assert names(SelfNormalizingLinear(3)) == ["SelfNormalizingLinear"]
    # Pyro's own stacks, and the inverses that it makes of them, which are no modules.
    pyros = ComposeTransformModule([SelfNormalizingLinear(3), SmoothLeakyReLU()])

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    guide = AutoNormalizingFlow(model, partial(iterated, 2, self_normalizing_linear))
    guide()
    assert len(set(names(guide))) == 2
    for container, count in [
        (stack.inv, 2),
        (dist.TransformedDistribution(base, [stack]), 2),
        (dist.TransformedDistribution(base, [stack.inv]), 2),
        ([stack, SelfNormalizingLinear(2)], 3),
        ({"a": stack}.values(), 2),
        (nn.ModuleDict({"prior": stack}), 2),
        (pyros, 1),
        (pyros.inv, 1),
        (dist.TransformedDistribution(base, [pyros.inv]), 1),
    ]:
        assert len(names(container)) == count


@pytest.mark.parametrize(
    "nothing", [SmoothLeakyReLU(), [], dist.Normal(0.0, 1.0), dist.transforms.Spline(3), 3]
)
def test_report_without_layers_is_an_error(nothing: object) -> None:
    with pytest.raises(ValueError, match="expected a flow with self-normalizing layers"):
        report(nothing)


# --- Pairs of networks --------------------------------------------------------------------------


def test_pair_report_is_its_definitions() -> None:
    layer, x = free_form(3, log_det="learned"), torch.randn(20, 3)
    before = copy.deepcopy(layer.state_dict())
    f, g = layer.forward_net, layer.inverse_net
    found = pair_report(layer, x)
    back = g(f(x)).detach()
    assert found.reconstruction_error == pytest.approx((back - x).square().mean().sqrt().item())
    forward, inverse = jacobians(f, x), jacobians(g, f(x)).detach()
    errors = (inverse @ forward.detach() - torch.eye(3)).square().sum((1, 2))
    assert found.inverse_error == pytest.approx((errors.mean() / 3).sqrt().item(), rel=EXACT)
    assert found.condition == pytest.approx(torch.linalg.cond(forward).median().item(), rel=EXACT)

    exact, surrogate = (
        torch.cat(
            [
                one.flatten()
                for one in torch.autograd.grad(
                    trace_surrogate(forward, matrix).mean(),
                    list(f.parameters()),
                    retain_graph=True,
                    materialize_grads=True,
                )
            ]
        )
        for matrix in (torch.linalg.inv(forward), inverse)
    )
    relative = ((surrogate - exact).norm() / exact.norm()).item()
    assert found.gradient.relative == pytest.approx(relative, rel=1e-6)
    assert 1e-3 < relative < 1
    assert (found.num_events, found.num_oriented, found.num_recovered) == (20, 20, 20)
    assert found.num_unique == 20
    assert pair_report(layer.inv, x) == found
    assert str(layer.state_dict()) == str(before)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_pair_report_of_other_layers() -> None:
    found = pair_report(exact_pair(3), torch.randn(5, 3))
    assert max(found.reconstruction_error, found.inverse_error, found.gradient.relative) < EXACT
    assert found.gradient.cosine == pytest.approx(1.0)
    conditioned = conditional_pair().float().condition(torch.randn(6, 2, dtype=torch.float32))
    assert pair_report(conditioned, torch.randn(6, 3, dtype=torch.float32)).num_recovered == 6
    with pytest.raises(ValueError, match="expected a SelfNormalizingPair or its inverse; got Self"):
        pair_report(linear(3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"transform\.condition\(context\)"):
        pair_report(conditional_pair(), torch.randn(4, 3))


def test_pair_report_of_a_fold() -> None:
    class Fold(nn.Module):
        """``|x|``, to which the sign is lost."""

        def forward(self, x: Tensor) -> Tensor:
            return (1 + x * x).sqrt()

    layer = SelfNormalizingPair(Fold(), nn.Identity(), event_shape=1)
    x = torch.tensor([[1.0], [2.0], [-3.0], [1.5]])
    found = pair_report(layer, x)
    assert (found.num_events, found.num_oriented, found.num_recovered) == (4, 3, 3)
    assert found.num_unique == 2  # 1.5 comes after −3, from where −1.5 is found


def test_pair_report_of_a_fold_far_from_the_events() -> None:
    class Cubic(nn.Module):
        """Three x for every image in (−2, 2)."""

        def forward(self, x: Tensor) -> Tensor:
            return x**3 - 3 * x

    class Branch(nn.Module):
        """The largest of the three, 2 cos(arccos(y/2)/3)."""

        def forward(self, y: Tensor) -> Tensor:
            return 2 * ((y / 2).acos() / 3).cos()

    layer = SelfNormalizingPair(Cubic(), Branch(), event_shape=1)
    found = pair_report(layer, torch.linspace(1.2, 1.7, 8).unsqueeze(1))
    assert (found.num_events, found.num_oriented, found.num_recovered) == (8, 8, 8)
    assert found.num_unique == 0


def test_report_of_pairs() -> None:
    flow = Compose([free_form(3), SelfNormalizingPair(nn.Identity(), nn.Identity(), event_dim=1)])
    first, second = report(flow).layers
    assert (first.dim, second.dim) == (3, 0)
    assert math.isnan(first.condition)
    assert math.isnan(first.inverse_error)
    flow.log_abs_det_jacobian(torch.randn(4, 3), torch.randn(4, 3))
    assert report(flow).layers[0].error_estimate == flow.parts[0].error_estimate
    assert "PairRefined" in str(report(flow))

"""Diagnostics against their definitions, in float64."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import ComposeTransformModule, iterated
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor, nn

from pyro_snf import (
    Compose,
    SelfNormalizing,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    self_normalizing_linear,
)
from pyro_snf.conv import kernels
from pyro_snf.diagnostics import gradient_error, inverse_error, pair_report, report
from tests.pairs import jacobians, trace_surrogate
from tests.registry import (
    CASES,
    LOG_DETS,
    conditional_pair,
    conv,
    exact_pair,
    free_form,
    linear,
    nudge_inverses,
    train,
)

# Float64: the same definitions, summed in another order.
EXACT = 1e-9


@pytest.mark.parametrize("dim", [1, 6])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_inverse_error_is_its_definition(log_det: str, dim: int) -> None:
    layer = linear(dim, log_det=log_det)
    assert inverse_error(layer) < EXACT
    nudge_inverses(layer, 0.3)
    eye = torch.eye(dim)
    expected = (eye - layer.inverse_weight @ layer.weight.detach()).norm() / math.sqrt(dim)
    assert inverse_error(layer) == pytest.approx(expected.item(), rel=EXACT, abs=EXACT)
    assert (inverse_error(layer) > 1e-3) == (log_det != "exact")


def test_inverse_error_without_any_inverse_is_one() -> None:
    layer = linear(6)
    layer.estimator.inverse_t.zero_()
    assert inverse_error(layer) == pytest.approx(1.0)


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_gradient_error_is_its_definition(log_det: str) -> None:
    layer = linear(6, log_det=log_det)
    assert gradient_error(layer).relative < EXACT
    assert gradient_error(layer).cosine == pytest.approx(1.0)
    nudge_inverses(layer, 0.3)
    exact = torch.linalg.inv(layer.weight.detach())
    off = layer.inverse_weight - exact
    relative, cosine = gradient_error(layer)
    assert relative == pytest.approx((off.norm() / exact.norm()).item(), rel=EXACT)
    expected = torch.nn.functional.cosine_similarity(
        layer.inverse_weight.flatten(), exact.flatten(), dim=0
    )
    assert cosine == pytest.approx(expected.item(), rel=EXACT)
    assert 1e-3 < relative < 1
    assert 0.5 < cosine < 1


def test_gradient_error_is_that_of_the_gradient_that_is_used() -> None:
    # With a scale of 1, W = A and the gradient in W is √D times the one in Θ.
    layer = linear(6, log_det="learned", mixture=0.0, reconstruction_weight=0.0)
    with torch.no_grad():
        layer.log_scale.zero_()
    nudge_inverses(layer, 0.3)
    x = torch.randn(1, 6)
    layer.log_abs_det_jacobian(x, layer(x)).sum().backward()
    used = layer.theta.grad * math.sqrt(6)
    exact = torch.linalg.inv(layer.weight.detach()).mT
    expected = ((used - exact).norm() / exact.norm()).item()
    assert gradient_error(layer).relative == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_inverse_of_a_layer_will_do(log_det: str) -> None:
    layer = linear(4, log_det=log_det)
    nudge_inverses(layer, 0.3)
    assert inverse_error(layer.inv) == inverse_error(layer)
    assert gradient_error(layer.inv) == gradient_error(layer)
    assert report(layer.inv).layers[0].inverse_error == inverse_error(layer)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_diagnostics_change_nothing(log_det: str) -> None:
    layer = linear(4, log_det=log_det)
    nudge_inverses(layer, 0.3)
    state = copy.deepcopy(layer.state_dict())
    random_state = torch.get_rng_state()
    inverse_error(layer), gradient_error(layer), str(report(layer))
    assert repr(layer.state_dict()) == repr(state)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_float32_layers_are_measured_in_float64() -> None:
    layer = linear(50).float()
    layer.refresh()
    assert 0 < inverse_error(layer) < 1e-5


# --- report -------------------------------------------------------------------------------------


def flow() -> Compose:
    layers = [
        SelfNormalizingLinear(3),
        SmoothLeakyReLU(),
        SelfNormalizingLinear(3, log_det="exact"),
    ]
    return Compose(layers)


def test_report_has_a_row_a_layer() -> None:
    rows = report(flow()).layers
    assert [(row.name, row.dim, row.log_det) for row in rows] == [
        ("0", 3, "refined"),
        ("2", 3, "exact"),
    ]
    assert rows[0].refreshes == 0
    assert math.isnan(rows[0].certificate)
    assert rows[1].refreshes is None
    assert rows[1].certificate is None


def test_report_follows_a_training_run() -> None:
    layer = CASES["linear refined"].make()
    train(layer, CASES["linear refined"])
    (row,) = report(layer).layers
    assert row.certificate == layer.certificate
    assert row.refreshes == layer.num_refreshes
    assert row.inverse_error == inverse_error(layer)


def test_condition_is_exact_with_an_exact_inverse() -> None:
    layer = linear(6)
    (row,) = report(layer).layers
    assert row.condition == pytest.approx(np.linalg.cond(layer.weight.detach().numpy(), 1))


def test_report_prints_as_a_table() -> None:
    text = str(report(flow()))
    assert repr(report(flow())) == text
    header, first, second = text.splitlines()
    assert header.split() == [
        *("layer", "D", "log_det", "condition", "inverse", "error", "certificate", "refreshes")
    ]
    assert first.split()[:4] == ["0", "3", "refined", "1"]
    assert second.split()[-2:] == ["–", "–"]
    assert len(first) == len(header)


def names(container: object) -> list[str]:
    return [row.name for row in report(container).layers]


def test_report_finds_the_layers_of_anything() -> None:
    base = dist.Normal(torch.zeros(3), 1.0)
    stack = flow()
    assert names(stack) == ["0", "2"]
    assert len(names(stack.inv)) == 2
    assert len(names(dist.TransformedDistribution(base, [stack]))) == 2
    assert len(names(dist.TransformedDistribution(base, [stack.inv]))) == 2
    assert len(names([stack, SelfNormalizingLinear(2)])) == 3
    assert len(names({"a": stack}.values())) == 2
    assert len(names(torch.nn.ModuleDict({"prior": stack}))) == 2
    # Pyro's own stacks, and the inverses that it makes of them, which are no modules.
    pyros = ComposeTransformModule([SelfNormalizingLinear(3), SmoothLeakyReLU()])
    assert len(names(pyros)) == 1
    assert len(names(pyros.inv)) == 1
    assert len(names(dist.TransformedDistribution(base, [pyros.inv]))) == 1
    assert names(SelfNormalizingLinear(3)) == ["SelfNormalizingLinear"]


def test_report_of_an_autoguide() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    guide = AutoNormalizingFlow(model, partial(iterated, 2, self_normalizing_linear))
    guide()
    rows = report(guide).layers
    assert [row.dim for row in rows] == [4, 4]
    assert len({row.name for row in rows}) == 2


@pytest.mark.parametrize(
    "nothing", [SmoothLeakyReLU(), [], dist.Normal(0.0, 1.0), dist.transforms.Spline(3), 3]
)
def test_report_without_layers_is_an_error(nothing: object) -> None:
    with pytest.raises(ValueError, match="expected a flow with self-normalizing layers"):
        report(nothing)


@pytest.mark.parametrize("measure", [inverse_error, gradient_error])
@pytest.mark.parametrize("other", [SmoothLeakyReLU(), flow(), dist.transforms.Spline(3)])
def test_other_transforms_are_refused(measure: object, other: object) -> None:
    with pytest.raises(
        ValueError, match=r"expected a dense or convolutional .* or its inverse; got"
    ):
        measure(other)


def test_gradient_error_of_a_singular_weight_is_an_error() -> None:
    layer = linear(4)
    with torch.no_grad():
        layer.theta.copy_(-2 * torch.eye(4))  # A = 0
    with pytest.raises(torch.linalg.LinAlgError):
        gradient_error(layer)


# --- Convolutions -------------------------------------------------------------------------------

SIZE = (5, 4)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_inverse_error_of_a_convolution_is_its_definition(log_det: str, padding_mode: str) -> None:
    layer = conv(2, log_det=log_det, padding_mode=padding_mode, inverse_kernel_size=3)
    forward = kernels.matrix(layer.weight.detach(), SIZE, padding_mode)
    inverse = kernels.matrix(layer.inverse_weight(SIZE), SIZE, padding_mode)
    expected = (torch.eye(40) - inverse @ forward).norm() / math.sqrt(40)
    assert inverse_error(layer, SIZE) == pytest.approx(expected.item(), rel=EXACT)
    assert inverse_error(layer.inv, SIZE) == inverse_error(layer, SIZE)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_gradient_error_of_a_convolution_is_its_definition(log_det: str, kernel_size: int) -> None:
    layer = conv(2, log_det=log_det, kernel_size=kernel_size)
    state = copy.deepcopy(layer.state_dict())
    matrix = kernels.matrix(kernels.near_identity(layer.theta), SIZE, "zeros")
    (exact,) = torch.autograd.grad(torch.linalg.slogdet(matrix).logabsdet, layer.theta)
    if log_det == "learned":
        estimator = layer.estimator
        x = torch.zeros(1, 2, *SIZE)
        surrogate = estimator.trace_gradient(layer.theta.detach(), estimator.theta.detach(), x)
    else:
        surrogate = exact  # a reference that is made on the spot
    relative, cosine = gradient_error(layer.eval(), SIZE)
    expected = ((surrogate - exact).norm() / exact.norm()).item()
    assert relative == pytest.approx(expected, rel=EXACT, abs=EXACT)
    assert cosine <= 1 + EXACT
    assert str(layer.state_dict()) == str(state)


def test_size_of_the_latest_images_is_taken() -> None:
    layer = conv(2)
    with pytest.raises(ValueError, match="expected image_size"):
        inverse_error(layer)
    with pytest.raises(ValueError, match="expected image_size"):
        gradient_error(layer)
    layer(torch.zeros(3, 2, *SIZE))
    assert inverse_error(layer) == inverse_error(layer, SIZE)
    assert gradient_error(layer) == gradient_error(layer, SIZE)


def test_report_of_convolutions() -> None:
    layers = [conv(2), conv(2, log_det="learned"), conv(2, kernel_size=1, log_det="exact")]
    assert "–" in str(report(layers[0]))
    stack = Compose(layers)
    stack(torch.zeros(1, 2, *SIZE))
    rows = report(stack).layers
    assert [row.dim for row in rows] == [40, 40, 40]
    for row, layer in zip(rows, layers, strict=True):
        assert row.inverse_error == inverse_error(layer, SIZE)
        matrix = kernels.matrix(kernels.near_identity(layer.theta.detach()), SIZE, "zeros")
        # An estimate: the norm from above, that of the inverse from below.
        assert 0.3 < row.condition / torch.linalg.cond(matrix).item() < 5


def test_report_of_a_singular_convolution() -> None:
    layer = conv(2)
    layer(torch.zeros(1, 2, *SIZE))
    torch.nn.init.zeros_(layer.theta)
    with torch.no_grad():
        layer.theta[:, :, 1, 1] = -math.sqrt(18) * torch.eye(2)  # a = 0
    (row,) = report(layer).layers
    assert row.condition == math.inf


# --- Pairs of networks --------------------------------------------------------------------------


def test_pair_report_is_its_definitions() -> None:
    layer, x = free_form(3, log_det="learned"), torch.randn(20, 3)
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
    assert pair_report(layer.inv, x) == found


def test_pair_report_of_an_exact_inverse() -> None:
    found = pair_report(exact_pair(3), torch.randn(5, 3))
    assert max(found.reconstruction_error, found.inverse_error, found.gradient.relative) < EXACT
    assert found.gradient.cosine == pytest.approx(1.0)


def test_pair_report_of_a_conditioned_pair_in_float32() -> None:
    layer = conditional_pair().float().condition(torch.randn(6, 2, dtype=torch.float32))
    assert pair_report(layer, torch.randn(6, 3, dtype=torch.float32)).num_recovered == 6


def test_pair_report_of_a_fold() -> None:
    class Fold(nn.Module):
        """``|x|``, to which the sign is lost."""

        def forward(self, x: Tensor) -> Tensor:
            return (1 + x * x).sqrt()

    layer = SelfNormalizing(Fold(), nn.Identity(), event_shape=1)
    x = torch.tensor([[1.0], [2.0], [-3.0], [1.5]])
    found = pair_report(layer, x)
    assert (found.num_events, found.num_oriented, found.num_recovered) == (4, 3, 3)


def test_pair_report_changes_nothing() -> None:
    layer = free_form(3)
    before = copy.deepcopy(layer.state_dict())
    pair_report(layer, torch.randn(4, 3))
    assert str(layer.state_dict()) == str(before)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_pair_report_of_other_transforms() -> None:
    with pytest.raises(ValueError, match=r"expected a SelfNormalizing or its inverse; got Self.*"):
        pair_report(linear(3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"expected a dense or convolutional .*; got Self"):
        inverse_error(free_form(3))


def test_report_of_pairs() -> None:
    flow = Compose([free_form(3), SelfNormalizing(nn.Identity(), nn.Identity(), event_dim=1)])
    first, second = report(flow).layers
    assert (first.dim, second.dim) == (3, 0)
    assert math.isnan(first.condition)
    assert math.isnan(first.inverse_error)
    flow.log_abs_det_jacobian(torch.randn(4, 3), torch.randn(4, 3))
    assert report(flow).layers[0].certificate == flow.parts[0].certificate
    assert "refined" in str(report(flow))

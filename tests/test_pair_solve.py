"""The inverse of a network against Newton's method with dense Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from pyro_snf import SelfNormalizingPair
from pyro_snf.free_form import solve
from tests.pairs import (
    EXACT,
    SINGLE,
    Dense,
    Fixed,
    Perturbed,
    Recorder,
    events,
    gradients_of,
    pair_of,
    parameters_of_f,
)
from tests.registry import assert_gradients_equal, conditional_pair, exact_pair, free_form, is_close

# Of ``‖y − f(x)‖ / (‖y‖ + √D)`` in float64: the default of the layer.
TOLERANCE = torch.finfo(torch.float64).eps ** 0.75

NOT_CONVERGED = r"T\.inv did not converge for {} of {} samples: .* is {} at most"


def square() -> SelfNormalizingPair:
    """``x²``, for which numbers below 0 have no preimage, and a root."""
    return pair_of(Fixed(torch.square), Fixed(lambda y: y.abs().sqrt()), 1)


def bad_pair(dim: int, *, seed: int = 0, **options: object) -> SelfNormalizingPair:
    """g is another random network, ``−2 h`` of its outputs h: steps lead away from the solution."""
    layer, other = free_form(dim, seed=seed, **options), free_form(dim, seed=seed + 1)
    flip = nn.Linear(dim, dim)
    with torch.no_grad():
        flip.weight.copy_(-2 * torch.eye(dim))
    layer.inverse_net = nn.Sequential(other.forward_net, flip)
    return layer


# As g, they are no inverses at all: linear systems are solved densely.
ZERO, NOT_FINITE = Fixed(torch.zeros_like), Fixed(lambda y: y / 0.0)

MAKERS: dict[str, Callable[[int], SelfNormalizingPair]] = {
    "near": free_form,
    "bad": bad_pair,
    "zero": lambda dim: pair_of(free_form(dim).forward_net, ZERO, dim),
    "not finite": lambda dim: pair_of(free_form(dim).forward_net, NOT_FINITE, dim),
}


# --- Solutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("dim", [1, 2, 8, 32])
@pytest.mark.parametrize("kind", MAKERS)
def test_inverse_is_that_of_newtons_method(kind: str, dim: int, mode: str) -> None:
    layer, y = MAKERS[kind](dim).train(mode != "eval"), 2 * events(6, dim)
    expected = Dense(layer.forward_net).inv(y)
    with torch.set_grad_enabled(mode != "no_grad"), torch.inference_mode(mode == "inference_mode"):
        x = layer.inv(y.clone())
    assert is_close(x, expected, EXACT)
    assert layer.convergence.num_samples == layer.convergence.num_converged == 6
    residual = (y - layer(x.clone())).norm(dim=1) / (y.norm(dim=1) + math.sqrt(dim))
    assert residual.max() < TOLERANCE
    assert layer.convergence.largest_residual == pytest.approx(residual.max().item(), abs=1e-15)


@pytest.mark.parametrize(("kind", "linearized"), [("near", False), ("bad", True)])
def test_jacobians_are_needed_only_where_g_is_bad(kind: str, linearized: bool) -> None:
    layer, y = MAKERS[kind](8), events(6, 8)
    f = Recorder(layer.forward_net)
    with torch.no_grad():
        pair_of(f, layer.inverse_net, 8).inv(y)
    assert any(x.requires_grad for x in f.inputs) == linearized


def test_chunks_of_dense_solves_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, y = MAKERS["zero"](4), events(6, 4)
    for size in (1, 2, 5):
        monkeypatch.setattr(solve, "_MAX_NUMBERS", 16 * size)
        assert is_close(layer.inv(y.clone()), Dense(layer.forward_net).inv(y), EXACT)


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_steps_that_lead_too_far_are_halved(size: float) -> None:
    # From 0, Newton's step for sinh(x) = y is y itself, where sinh is about e^y.
    layer, y = pair_of(exact_pair(4).forward_net, ZERO, 4), size * events(6, 4)
    x = layer.inv(y)
    assert ((layer(x.detach().clone()) - y).norm(dim=1) <= EXACT * y.norm(dim=1)).all()
    assert is_close(x, exact_pair(4).inverse_net(y), EXACT)


def test_samples_do_not_depend_on_each_other() -> None:
    layer, y = bad_pair(4), events(6, 4)
    y *= torch.logspace(-4, 4, 6).unsqueeze(1)  # some take longer than others
    with torch.no_grad():
        together = layer.inv(y)
        for row, x in zip(y, together, strict=True):
            assert is_close(layer.inv(row.clone()), x, EXACT)


def passes(f: nn.Module, g: nn.Module, y: Tensor) -> list[int]:
    """The numbers of events in the passes through f, once the networks have been checked."""
    recorder = Recorder(f)
    layer = pair_of(recorder, g, len(y[0]))
    with torch.no_grad():
        layer(y)
        recorder.inputs.clear()
        layer.inv(y)
    assert layer.convergence.num_converged == len(y)
    return [len(x) for x in recorder.inputs]


def test_better_g_takes_fewer_passes_and_samples_that_have_converged_are_left_alone() -> None:
    layer, y = exact_pair(8), events(6, 8)
    counts = [
        len(passes(layer.forward_net, Perturbed(layer.inverse_net, 8, size), y))
        for size in (0.0, 1e-6, 1e-3, 0.1)
    ]
    assert counts[0] == 1  # which shows that nothing is left to do
    assert counts == sorted(set(counts))
    assert torch.equal(layer.inv(y), layer.inverse_net(y))
    layer, y = free_form(4), events(6, 4) * torch.logspace(-4, 1, 6).unsqueeze(1)
    counts = passes(layer.forward_net, layer.inverse_net, y)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.parametrize("tolerance", [0.1, 1e-3, 1e-8])
def test_iterations_end_at_the_tolerance(tolerance: float) -> None:
    found = []
    for layer in (bad_pair(8, inverse_tolerance=tolerance), bad_pair(8)):
        y = events(6, 8)
        x = layer.inv(y)
        residual = (y - layer(x.detach().clone())).norm(dim=1) / (y.norm(dim=1) + math.sqrt(8))
        assert (residual <= tolerance).all()
        found.append(residual.max())
    assert found[1] < 1e-3 * tolerance or found[0] < TOLERANCE


def test_inverse_of_data_of_any_size_and_of_steep_maps() -> None:
    for size in (1e-30, 1e-3, 1e3, 1e30):
        layer, y = free_form(3), size * events(6, 3)
        x = layer.inv(y)
        assert ((layer(x.detach().clone()) - y).norm(dim=1) <= EXACT * (y.norm(dim=1) + 1)).all()
    # The condition number is 10¹², which a tolerance of residuals does not depend on.
    network = nn.Linear(4, 4)
    with torch.no_grad():
        network.weight.copy_(torch.diag(torch.logspace(-6, 6, 4)))
    layer = pair_of(network, ZERO, 4)
    y = layer(events(6, 4)).detach()
    again = layer(layer.inv(y).detach())
    assert ((again - y).norm(dim=1) <= TOLERANCE * (y.norm(dim=1) + 2)).all()


def test_float32() -> None:
    layer, y = bad_pair(8).float(), events(6, 8).float()
    x = layer.inv(y)
    assert x.dtype == torch.float32
    expected = Dense(layer.double().forward_net).inv(y.double())
    assert is_close(x.double(), expected, SINGLE)


def test_one_pass_inverse_is_g() -> None:
    layer, y = bad_pair(3, inverse="one_pass"), events(6, 3)
    x = layer.inv(y)
    assert torch.equal(x, layer.inverse_net(y))
    assert layer.convergence is None
    x.square().sum().backward()
    assert all((p.grad != 0).any() for p in layer.inverse_net.parameters())
    assert all(p.grad is None for p in layer.forward_net.parameters())
    assert not torch.equal(layer(x), y)  # it is not cached as the inverse


# --- Events without an inverse ------------------------------------------------------------------


def test_samples_without_an_inverse_are_warned_of_and_counted() -> None:
    layer = square()
    assert layer.convergence is None
    y = torch.tensor([[4.0], [-1.0], [9.0], [-2.0], [1.0]])
    # At best x = 0, whose residual is |y|/(|y| + 1).
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(2, 5, r"0\.67")) as caught:
        x = layer.inv(y)
    assert len(caught) == 1
    assert layer.convergence[:2] == (5, 3)
    assert layer.convergence.largest_residual == pytest.approx(2 / 3)
    assert is_close(x[[0, 2, 4]], torch.tensor([[2.0], [3.0], [1.0]]), EXACT)
    assert is_close(x[[1, 3]], torch.zeros(2, 1), 1e-3)
    layer.inv(torch.tensor([[1.0], [4.0]]))
    assert layer.convergence[:2] == (2, 2)


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
def test_pair_that_has_not_converged_is_not_cached() -> None:
    layer, y = square(), torch.tensor([[4.0], [-1.0]])
    x = layer.inv(y)
    assert layer(x) is not y
    assert layer.inv(y) is not x
    assert is_close(layer(x), torch.tensor([[4.0], [0.0]]), 1e-3)
    good = y[:1]
    assert layer(layer.inv(good)) is good


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["near", "bad"])
def test_bad_row_is_nan_and_affects_no_other(kind: str, value: float) -> None:
    layer, y, others = MAKERS[kind](3), events(4, 3), [0, 2, 3]
    good = y.clone().requires_grad_()
    expected = layer.inv(good)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), good)
    y[1, 2] = value
    y.requires_grad_()
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(1, 4, "nan")):
        x = layer.inv(y)
    assert torch.isnan(x[1]).all()
    assert is_close(x[others], expected[others], EXACT)
    assert layer.convergence.num_converged == 3
    (gradient,) = torch.autograd.grad(x[others].square().sum(), y)
    assert is_close(gradient[others], expected_gradient[others], EXACT)


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@pytest.mark.parametrize("network", [NOT_FINITE, ZERO], ids=["not finite", "zero"])
def test_iterations_end_where_f_has_no_inverse(network: nn.Module) -> None:
    layer = pair_of(network, nn.Identity(), 2)
    x = layer.inv(events(3, 2))
    assert layer.convergence.num_converged == 0
    is_finite = torch.isfinite(network(torch.ones(1))).all()
    assert is_finite or torch.isnan(x).all()


def test_network_that_is_not_finite_everywhere() -> None:
    # Steps that leave the domain of a logarithm are halved until they are within.
    layer = pair_of(Fixed(torch.log), nn.ReLU(), 2)
    y = torch.tensor([[-3.0, 2.0], [0.5, 1.5]])
    # g(y) = 0 has the image −∞, from which no step leads to the solution.
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(1, 2, ".*")):
        x = layer.inv(y)
    assert is_close(x[1], y[1].exp(), EXACT)


# --- Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 8])
@pytest.mark.parametrize("kind", ["near", "bad", "zero", "frozen", "with a context"])
def test_gradient_is_that_of_a_dense_solve(kind: str, dim: int) -> None:
    cotangent, results = events(6, dim, seed=1), []
    module = conditional_pair(dim) if kind == "with a context" else MAKERS.get(kind, free_form)(dim)
    layer = module.transform if kind == "with a context" else module
    layer.requires_grad_(kind != "frozen")
    for dense in (False, True):
        y, context = events(6, dim).requires_grad_(), events(6, 2, seed=2).requires_grad_()
        given = {"context": context} if kind == "with a context" else {}
        own = module.condition(context) if given else layer
        transform = Dense(layer.forward_net, *given.values()) if dense else own
        loss = (cotangent * transform.inv(y)).sum()
        named = {name: p for name, p in parameters_of_f(layer).items() if p.requires_grad}
        results.append(gradients_of(transform, y, {**given, **named}, loss))
    assert_gradients_equal(*results)
    x = own.inv(events(6, dim))
    assert x.requires_grad == (kind != "frozen")
    if x.requires_grad:
        x.sum().backward()
    assert all(p.grad is None for p in layer.inverse_net.parameters())


def test_gradient_against_finite_differences() -> None:
    layer, y = bad_pair(2, inverse_tolerance=1e-13).with_cache(0), events(3, 2).requires_grad_()
    # gradcheck perturbs the parameters in place without changing autograd's version counter.
    inputs = (*layer.forward_net.parameters(), y)
    # The solves are exact up to their tolerance, not to the last bit.
    assert gradcheck(lambda *_: layer.inv(y), inputs, nondet_tol=1e-12)


def test_second_derivative_is_refused() -> None:
    layer, y = free_form(3), events(6, 3).requires_grad_()
    parameter = next(layer.forward_net.parameters())
    for inputs in (y, parameter):
        x = layer.inv(y.clone()).square().sum()
        (gradient,) = torch.autograd.grad(x, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="an iterative inverse has no second derivative"):
            gradient.sum().backward()

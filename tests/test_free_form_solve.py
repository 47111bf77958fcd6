"""The inverse of a network against Newton's method with dense Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from pyro_snf import SelfNormalizing, self_normalizing
from pyro_snf.free_form import solve
from pyro_snf.free_form.solve import invert
from tests.pairs import Dense, Perturbed, Recorder, gradients_of, is_close, parameters_of_f
from tests.registry import assert_gradients_equal, conditional_pair, exact_pair, free_form

# Float64, condition numbers below 10, residuals of 2e-12.
EXACT = 1e-9
# The same in float32, with residuals of 6e-6.
SINGLE = 1e-4

# Of y = f(x) in float64, as the layer has it.
TOLERANCE = torch.finfo(torch.float64).eps ** 0.75

NOT_CONVERGED = r"T\.inv did not converge for {} of {} samples: .* is {} at most"


def events(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(400 + seed))


class Zero(nn.Module):
    """No inverse at all; its Jacobian is 0."""

    def forward(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)


class NotFinite(nn.Module):
    """Nor is this."""

    def forward(self, y: Tensor) -> Tensor:
        return y / 0.0


class Square(nn.Module):
    """``x²`` in every feature: numbers below 0 have no preimage."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


class Root(nn.Module):
    """One of the two roots, the other sign aside."""

    def forward(self, y: Tensor) -> Tensor:
        return y.abs().sqrt()


def bad_pair(dim: int, *, seed: int = 0, **options: object) -> SelfNormalizing:
    """g is another random network, ``−2 h`` of its outputs h: steps lead away from the solution."""
    layer, other = free_form(dim, seed=seed, **options), free_form(dim, seed=seed + 1)
    flip = nn.Linear(dim, dim)
    with torch.no_grad():
        flip.weight.copy_(-2 * torch.eye(dim))
    layer.inverse_net = nn.Sequential(other.forward_net, flip)
    return layer


def with_inverse(network: nn.Module, dim: int = 3, **options: object) -> SelfNormalizing:
    return SelfNormalizing(free_form(dim).forward_net, network, event_shape=dim, **options)


@pytest.fixture
def without_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed point has to get there alone."""
    monkeypatch.setattr(solve, "_MAX_NEWTON_STEPS", 0)


@pytest.fixture
def without_krylov(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces of one vector solve hardly anything: dense solves take over."""
    monkeypatch.setattr(solve, "_MAX_ITERATIONS", 1)


# --- Solutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("dim", [1, 2, 8, 32])
@pytest.mark.parametrize("make", [free_form, bad_pair], ids=["near", "bad"])
def test_inverse_is_that_of_newtons_method(
    make: Callable[..., SelfNormalizing], dim: int, mode: str
) -> None:
    layer, y = make(dim).train(mode != "eval"), 2 * events(6, dim)
    expected = Dense(layer.forward_net).inv(y)
    with torch.set_grad_enabled(mode != "no_grad"), torch.inference_mode(mode == "inference_mode"):
        x = layer.inv(y.clone())
    assert is_close(x, expected, EXACT)
    assert layer.convergence.num_samples == layer.convergence.num_converged == 6
    residual = (y - layer(x.clone())).norm(dim=1) / (y.norm(dim=1) + math.sqrt(dim))
    assert residual.max() < TOLERANCE
    assert layer.convergence.largest_residual == pytest.approx(residual.max().item(), abs=1e-15)


@pytest.mark.usefixtures("without_newton")
@pytest.mark.parametrize("dim", [1, 8])
def test_fixed_point_is_enough_where_g_is_near(dim: int) -> None:
    layer, y = free_form(dim), events(6, dim)
    assert is_close(layer.inv(y), Dense(layer.forward_net).inv(y), EXACT)


@pytest.mark.usefixtures("without_newton")
def test_fixed_point_alone_does_not_get_there_with_a_bad_g() -> None:
    layer, y = bad_pair(8), events(6, 8)
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(6, 6, ".*")):
        layer.inv(y)


@pytest.mark.usefixtures("without_krylov")
@pytest.mark.parametrize("dim", [1, 2, 8])
def test_dense_solves_take_over_from_krylov_spaces(dim: int) -> None:
    layer, y = bad_pair(dim), events(6, dim)
    assert is_close(layer.inv(y), Dense(layer.forward_net).inv(y), EXACT)


@pytest.mark.usefixtures("without_krylov")
@pytest.mark.parametrize("size", [1, 2, 5])
def test_chunks_of_dense_solves_give_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, y = bad_pair(4), events(6, 4)
    expected = Dense(layer.forward_net).inv(y)
    monkeypatch.setattr(solve, "_MAX_NUMBERS", 16 * size)
    assert is_close(layer.inv(y), expected, EXACT)


@pytest.mark.parametrize("network", [Zero(), NotFinite()], ids=["zero", "not finite"])
@pytest.mark.parametrize("dim", [1, 3])
def test_inverse_without_any_help_of_g(dim: int, network: nn.Module) -> None:
    layer, y = with_inverse(network, dim), events(6, dim)
    assert is_close(layer.inv(y), Dense(layer.forward_net).inv(y), EXACT)


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_steps_that_lead_too_far_are_halved(size: float) -> None:
    # From 0, Newton's step for sinh(x) = y is y itself, where sinh is e^y: halved, it is found.
    layer = SelfNormalizing(exact_pair(4).forward_net, Zero(), event_shape=4)
    y = size * events(6, 4)
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


def test_exact_g_is_taken_as_it_is() -> None:
    # One pass, and one of f to see that nothing is left.
    layer, y = exact_pair(4), events(6, 4)
    f, g = Recorder(layer.forward_net), Recorder(layer.inverse_net)
    found = invert(f, g, y, (), tolerance=TOLERANCE)
    assert len(f.inputs) == len(g.inputs) == 1
    assert torch.equal(found.x, layer.inverse_net(y))


def test_better_g_takes_fewer_passes() -> None:
    layer, y = exact_pair(8), events(6, 8)
    passes = []
    for size in (0.0, 1e-6, 1e-3, 0.1):
        f = Recorder(layer.forward_net)
        found = invert(f, Perturbed(layer.inverse_net, 8, size), y, (), tolerance=TOLERANCE)
        assert found.converged.all()
        passes.append(len(f.inputs))
    assert passes == sorted(passes)
    assert len(set(passes)) == len(passes)


@pytest.mark.usefixtures("without_newton")
def test_samples_that_have_converged_are_left_alone() -> None:
    layer, y = free_form(4), events(6, 4)
    y *= torch.logspace(-4, 1, 6).unsqueeze(1)  # some take longer than others
    f = Recorder(layer.forward_net)
    invert(f, layer.inverse_net, y, (), tolerance=TOLERANCE)
    counts = [len(one) for one in f.inputs]
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


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e30])
def test_inverse_of_data_of_any_size(size: float) -> None:
    layer, y = free_form(3), size * events(6, 3)
    x = layer.inv(y)
    assert ((layer(x.detach().clone()) - y).norm(dim=1) <= EXACT * (y.norm(dim=1) + 1)).all()


def test_inverse_of_steep_maps() -> None:
    # Condition 10¹², which the tolerance of residuals knows nothing of, and lengths far from 1.
    scale = torch.logspace(-6, 6, 4)
    network = nn.Linear(4, 4)
    with torch.no_grad():
        network.weight.copy_(torch.diag(scale))
    x = events(6, 4)
    layer = SelfNormalizing(network, Zero(), event_shape=4)
    y = layer(x).detach()
    again = layer(layer.inv(y).detach())
    assert ((again - y).norm(dim=1) <= TOLERANCE * (y.norm(dim=1) + 2)).all()


@pytest.mark.parametrize("shape", [(), (2, 3), (4, 1)])
def test_any_batch_shape(shape: tuple[int, ...]) -> None:
    layer, y = bad_pair(3), events(1, *shape, 3)[0]
    x = layer.inv(y)
    assert x.shape == y.shape
    assert is_close(x, Dense(layer.forward_net).inv(y), EXACT)


def test_float32() -> None:
    layer, y = bad_pair(8).float(), events(6, 8).float()
    x = layer.inv(y)
    assert x.dtype == torch.float32
    expected = Dense(layer.double().forward_net).inv(y.double())
    assert is_close(x.double(), expected, SINGLE)


def test_learned_inverse_is_one_pass_through_g() -> None:
    layer, y = bad_pair(3, inverse="learned"), events(6, 3)
    x = layer.inv(y)
    assert torch.equal(x, layer.inverse_net(y))
    assert layer.convergence is None
    x.square().sum().backward()
    assert all((p.grad != 0).any() for p in layer.inverse_net.parameters())
    assert all(p.grad is None for p in layer.forward_net.parameters())
    # And is not taken for the truth.
    assert not torch.equal(layer(x), y)


# --- Where there is none ------------------------------------------------------------------------


def test_samples_without_an_inverse_are_warned_of_and_counted() -> None:
    layer = SelfNormalizing(Square(), Root(), event_shape=1)
    assert layer.convergence is None
    y = torch.tensor([[4.0], [-1.0], [9.0], [-2.0], [1.0]])
    # At best x = 0, whose residual is |y|/(|y| + 1).
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(2, 5, r"0\.67")):
        x = layer.inv(y)
    assert layer.convergence.num_samples == 5
    assert layer.convergence.num_converged == 3
    assert layer.convergence.largest_residual == pytest.approx(2 / 3)
    assert is_close(x[[0, 2, 4]], torch.tensor([[2.0], [3.0], [1.0]]), EXACT)
    assert is_close(x[[1, 3]], torch.zeros(2, 1), 1e-3)


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
def test_pair_that_has_not_converged_is_not_remembered() -> None:
    layer, y = SelfNormalizing(Square(), Root(), event_shape=1), torch.tensor([[4.0], [-1.0]])
    x = layer.inv(y)
    assert layer(x) is not y
    assert layer.inv(y) is not x
    assert is_close(layer(x), torch.tensor([[4.0], [0.0]]), 1e-3)
    good = y[:1]
    assert layer(layer.inv(good)) is good


def test_one_warning_is_enough() -> None:
    layer = SelfNormalizing(Square(), Root(), event_shape=1)
    with pytest.warns(RuntimeWarning, match="did not converge") as caught:
        layer.inv(torch.tensor([[-1.0]]))
    assert len(caught) == 1


def test_convergence_is_that_of_the_latest() -> None:
    layer = SelfNormalizing(Square(), Root(), event_shape=1)
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(1, 1, ".*")):
        layer.inv(torch.tensor([[-1.0]]))
    layer.inv(torch.tensor([[1.0], [4.0]]))
    assert layer.convergence.num_samples == layer.convergence.num_converged == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [free_form, bad_pair], ids=["near", "bad"])
def test_bad_row_is_nan_and_stops_no_other(
    make: Callable[..., SelfNormalizing], value: float
) -> None:
    layer, y = make(3), events(4, 3)
    expected = Dense(layer.forward_net).inv(y)
    y[1, 2] = value
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(1, 4, "nan")):
        x = layer.inv(y)
    assert torch.isnan(x[1]).all()
    others = [0, 2, 3]
    assert is_close(x[others], expected[others], EXACT)
    assert layer.convergence.num_converged == 3


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
def test_bad_row_has_no_share_in_the_gradients_of_others() -> None:
    layer, y = bad_pair(3), events(4, 3)
    good = y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer.inv(good).square().sum(), good)
    y[1] = math.nan
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(layer.inv(y)[[0, 2, 3]].square().sum(), y)
    assert is_close(gradient[[0, 2, 3]], expected[[0, 2, 3]], EXACT)


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@pytest.mark.parametrize("network", [NotFinite(), Zero()], ids=["not finite", "zero"])
def test_network_without_any_solution_comes_to_an_end(network: nn.Module) -> None:
    # An infinite residual is not reduced by another one.
    layer = SelfNormalizing(network, nn.Identity(), event_shape=2)
    x = layer.inv(events(3, 2))
    assert layer.convergence.num_converged == 0
    # Where nothing is known of f, nor is it of its inverse.
    assert isinstance(network, Zero) or torch.isnan(x).all()


def test_network_that_is_not_finite_everywhere() -> None:
    # Steps that leave the domain of a logarithm are halved until they are within.
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    layer = SelfNormalizing(Logarithm(), nn.ReLU(), event_shape=2)
    y = torch.tensor([[-3.0, 2.0], [0.5, 1.5]])
    # g(y) = 0 has the image −∞, and no way leads from there: it is said so, and the rest is found.
    with pytest.warns(RuntimeWarning, match=NOT_CONVERGED.format(1, 2, ".*")):
        x = layer.inv(y)
    assert is_close(x[1], y[1].exp(), EXACT)


# --- Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 8])
@pytest.mark.parametrize("make", [free_form, bad_pair], ids=["near", "bad"])
def test_gradient_is_that_of_a_dense_solve(make: Callable[..., SelfNormalizing], dim: int) -> None:
    layer, cotangent, results = make(dim), events(6, dim, seed=1), []
    for transform in (layer, Dense(layer.forward_net)):
        y = events(6, dim).requires_grad_()
        loss = (cotangent * transform.inv(y)).sum()
        results.append(gradients_of(transform, y, parameters_of_f(layer), loss))
    assert_gradients_equal(*results)


@pytest.mark.usefixtures("without_krylov")
def test_gradient_by_dense_solves() -> None:
    layer, cotangent, results = bad_pair(4), events(6, 4, seed=1), []
    for transform in (layer, Dense(layer.forward_net)):
        y = events(6, 4).requires_grad_()
        loss = (cotangent * transform.inv(y)).sum()
        results.append(gradients_of(transform, y, parameters_of_f(layer), loss))
    assert_gradients_equal(*results)


def test_gradient_to_the_context_is_that_of_a_dense_solve() -> None:
    module, cotangent, results = conditional_pair(), events(6, 3, seed=1), []
    layer = module.transform
    for oracle in (False, True):
        y, context = events(6, 3).requires_grad_(), events(6, 2, seed=2).requires_grad_()
        transform = Dense(layer.forward_net, context) if oracle else module.condition(context)
        loss = (cotangent * transform.inv(y)).sum()
        parameters = {"context": context, **parameters_of_f(layer)}
        results.append(gradients_of(transform, y, parameters, loss))
    assert_gradients_equal(*results)


def test_gradient_against_finite_differences() -> None:
    layer, y = bad_pair(2, inverse_tolerance=1e-13).with_cache(0), events(3, 2).requires_grad_()
    # gradcheck perturbs the parameters in place, past autograd's version counter.
    inputs = (*layer.forward_net.parameters(), y)
    # The solves are as exact as their tolerance, and not to the last bit.
    assert gradcheck(lambda *_: layer.inv(y), inputs, nondet_tol=1e-12)


def test_gradient_does_not_go_to_g() -> None:
    layer, y = bad_pair(3), events(6, 3)
    layer.inv(y).square().sum().backward()
    assert all(p.grad is None for p in layer.inverse_net.parameters())


def test_second_derivative_is_refused() -> None:
    layer, y = free_form(3), events(6, 3).requires_grad_()
    parameter = next(layer.forward_net.parameters())
    for inputs in (y, parameter):
        x = layer.inv(y.clone()).square().sum()
        (gradient,) = torch.autograd.grad(x, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="a refined inverse has no second derivative"):
            gradient.sum().backward()


def test_frozen_parameters_leave_a_gradient_to_y() -> None:
    layer, y = free_form(3).requires_grad_(False), events(6, 3)
    assert not layer.inv(y).requires_grad
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(layer.inv(y).square().sum(), y)
    reference = y.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        Dense(layer.forward_net).inv(reference).square().sum(), reference
    )
    assert is_close(gradient, expected, EXACT)


def test_inverse_is_trained() -> None:
    # A density model in the direction [T], whose data go through T.inv.
    layer = self_normalizing(2, [8], seed=1)
    data = events(64, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        x = layer.inv(data)
        loss = (0.5 * x.square().sum(1) + layer.log_abs_det_jacobian(x, data)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1

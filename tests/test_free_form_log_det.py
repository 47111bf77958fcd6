"""log|det J| of networks against dense Jacobians: values, and gradients by probes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import Transform

from pyro_snf import SelfNormalizing
from pyro_snf.free_form import log_det as log_det_module
from pyro_snf.free_form.linearization import linearize
from pyro_snf.free_form.log_det import estimated_log_abs_det, exact_slogdet, probe_gradient
from pyro_snf.krylov import log_quadrature
from pyro_snf.probes import PROBES, draw_probes, probe_generator
from tests.pairs import (
    Dense,
    Perturbed,
    gradients_of,
    is_close,
    jacobians,
    log_det_of,
    parameters_of_f,
    trace_surrogate,
)
from tests.registry import (
    LOG_DETS,
    LOSSES,
    REDUCTIONS,
    Reduction,
    assert_gradients_equal,
    exact_pair,
    free_form,
    relative_error,
)

# Float64, condition numbers below 10.
EXACT = 1e-9
# Of means over independent draws: what five standard errors leave out is one in two million.
STANDARD_ERRORS = 5

DIMS = [1, 2, 8, 32]

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def pair(dim: int, **options: object) -> SelfNormalizing:
    """Two blocks, each with as many hidden units as events have features, and two more."""
    return free_form(dim, width=dim + 2, num_blocks=2, **options)


def events(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(300 + seed))


def probes(kind: str, num_probes: int, *shape: int, seed: int = 0) -> Tensor:
    generator = probe_generator(seed, 0, torch.device("cpu"))
    return draw_probes(kind, num_probes, shape, generator, torch.float64)


class Fixed(nn.Module):
    """A map without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# --- Exact values -------------------------------------------------------------------------------


MODES: dict[str, Callable[[SelfNormalizing], AbstractContextManager[None]]] = {
    "eval": lambda layer: nullcontext(layer.eval()),
    "no_grad": lambda layer: torch.no_grad(),
    "frozen": lambda layer: nullcontext(layer.requires_grad_(False)),
    "inference_mode": lambda layer: torch.inference_mode(),
    "eval in inference_mode": lambda layer: torch.inference_mode(bool(layer.eval())),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_value_outside_training_is_that_of_the_jacobian(log_det: str, dim: int, mode: str) -> None:
    layer, x = pair(dim, log_det=log_det), events(5, dim)
    expected = torch.autograd.functional.jacobian(lambda x: layer(x).sum(0), x).movedim(1, 0)
    expected = torch.linalg.slogdet(expected).logabsdet
    with MODES[mode](layer):
        value = log_det_of(layer, x.clone())
    assert (value.detach() - expected).abs().max() < EXACT


@pytest.mark.parametrize("dim", DIMS)
def test_value_of_the_exact_mode_in_training(dim: int) -> None:
    layer, x = pair(dim, log_det="exact"), events(5, dim)
    value = log_det_of(layer, x)
    assert value.requires_grad
    assert (value - log_det_of(Dense(layer.forward_net), x)).abs().max() < EXACT


def test_value_of_images_and_of_sequences() -> None:
    images = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1))
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    sequences = nn.TransformerEncoderLayer(4, 2, 8, **options)
    for network, shape in [(images, (2, 3, 4)), (sequences, (3, 4))]:
        layer = SelfNormalizing(network, network, event_shape=shape).eval()
        for x in events(3, *shape):
            jacobian = torch.autograd.functional.jacobian(layer, x)
            expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), -1)).logabsdet
            assert abs(log_det_of(layer, x).item() - expected.item()) < EXACT


def test_value_does_not_depend_on_memory_layout() -> None:
    layer, x = pair(3).eval(), events(5, 3)
    expected = log_det_of(layer, x)
    for other in (x.mT.contiguous().mT, torch.cat([x, x], dim=1)[:, :3], x[:1].expand(5, 3)):
        close_to = expected if len(other.unique(dim=0)) > 1 else expected[:1].expand(5)
        assert is_close(log_det_of(layer, other), close_to, EXACT)


@pytest.mark.parametrize("dim", [1, 3])
def test_singular_jacobian_has_a_log_det_of_minus_infinity(dim: int) -> None:
    flat = nn.Linear(dim, dim)
    nn.init.zeros_(flat.weight)
    constant = Fixed(lambda x: torch.ones_like(x))
    for network in (flat, constant):
        for mode in (False, True):
            # In training, too, as an estimate; and so is one that is a sum of many.
            layer = SelfNormalizing(network, flat, event_shape=dim, value_iterations=dim)
            value = log_det_of(layer.train(mode), events(5, dim))
            assert torch.equal(value.detach(), torch.full((5,), -math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dim", [3, 32])
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("training", [False, True])
def test_bad_row_is_nan_and_spoils_no_other(
    training: bool, log_det: str, dim: int, value: float
) -> None:
    network = nn.Sequential(nn.Linear(dim, dim), Fixed(lambda x: x + x.square() / 20))
    layer = SelfNormalizing(
        network, network, event_shape=dim, log_det=log_det, value_iterations=4
    ).train(training)
    good = events(4, dim)
    bad = good.clone()
    bad[1, 0] = value
    expected, actual = log_det_of(layer, good), log_det_of(layer, bad)
    assert torch.isnan(actual[1])
    others = [0, 2, 3]
    assert is_close(actual[others], expected[others], EXACT)


def test_huge_and_tiny_maps_have_finite_values() -> None:
    for scale in (1e-200, 1e200):
        layer = SelfNormalizing(Fixed(lambda x, s=scale: s * x), nn.Linear(3, 3), event_shape=3)
        value = log_det_of(layer.eval(), events(2, 3))
        assert torch.allclose(value, torch.full((2,), 3 * math.log(scale)), rtol=EXACT)


def fold(scale: float = 1.0) -> SelfNormalizing:
    """``x²`` in the first feature, which has two preimages: det J is of the sign of it."""
    network = Fixed(lambda x: torch.cat([x[:, :1].square(), scale * x[:, 1:]], dim=1))
    return SelfNormalizing(network, network, event_shape=2)


def test_determinants_of_both_signs_are_warned_of() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [-3.0, 1.0]])
    for scale, counts in [(1.0, (2, 1)), (-1.0, (1, 2))]:
        layer = fold(scale).eval()
        message = "forward_net is not invertible: .* positive at {} events and negative at {},"
        with pytest.warns(RuntimeWarning, match=message.format(*counts)):
            value = log_det_of(layer, x)
        # And the value is what it is.
        assert torch.allclose(value, (2 * x[:, 0]).abs().log(), rtol=EXACT)


def test_determinants_of_one_sign_or_none_are_not_warned_of() -> None:
    # pytest makes an error of every warning. A reflection is as good a bijection as any.
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [math.nan, 1.0]])
    for scale in (1.0, -1.0):
        log_det_of(fold(scale).eval(), x)


# --- Chunks, copies, derivatives of any order ---------------------------------------------------


def second_derivatives(transform: Transform, layer: SelfNormalizing, x: Tensor) -> list[Tensor]:
    """Value, gradients, and the gradients of the gradients' squares."""
    x = x.clone().requires_grad_()
    inputs = [x, *layer.forward_net.parameters()]
    value = log_det_of(transform, x)
    # The last bias has none, and others no second one.
    first = torch.autograd.grad(
        value.square().sum(), inputs, create_graph=True, materialize_grads=True
    )
    total = sum(one.square().sum() for one in first)
    second = torch.autograd.grad(total, inputs, materialize_grads=True)
    return [value, *first, *second]


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_second_derivatives_outside_training(dim: int) -> None:
    layer, x = pair(dim).eval(), events(4, dim)
    actual = second_derivatives(layer, layer, x)
    expected = second_derivatives(Dense(layer.forward_net), layer, x)
    for one, other in zip(actual, expected, strict=True):
        assert is_close(one, other, EXACT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_chunks_give_the_same(size: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = pair(3, log_det="exact", reconstruction_weight=0.0).train(training), events(7, 3)
    expected = second_derivatives(layer, layer, x)
    monkeypatch.setattr(log_det_module, "_MAX_NUMBERS", size * 9)
    for one, other in zip(second_derivatives(layer, layer, x), expected, strict=True):
        assert is_close(one, other, EXACT)
    with torch.no_grad():
        assert is_close(log_det_of(layer, x), expected[0], EXACT)


def test_chunk_is_recorded_again_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs of all chunks together would take up the memory that chunks are to save.
    alive: list[int] = []

    def counted(x: Tensor) -> Tensor:
        alive.append(len(x))
        return x + 0.1 * x.sin()

    layer, x = SelfNormalizing(Fixed(counted), nn.Linear(3, 3), event_shape=3).eval(), events(7, 3)
    layer(x)
    monkeypatch.setattr(log_det_module, "_MAX_NUMBERS", 2 * 9)
    monkeypatch.setattr(log_det_module, "_ROWS", 1)
    x.requires_grad_()
    _, value = exact_slogdet(layer.forward_net, x, (), ())
    alive.clear()
    value.sum().backward()
    assert set(alive) == {2, 1}
    assert sum(alive) >= 7


@pytest.mark.parametrize("rows", [1, 3, 4, 10, 1000])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_copies_of_a_small_batch_give_the_same(
    dim: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = pair(dim).eval(), events(2, dim)
    expected = log_det_of(Dense(layer.forward_net), x)
    monkeypatch.setattr(log_det_module, "_ROWS", rows)
    assert is_close(log_det_of(layer, x), expected, EXACT)
    with torch.no_grad():
        assert is_close(log_det_of(layer, x), expected, EXACT)


@pytest.mark.parametrize("num_copies", [1, 2, 3, 4, 5, 7])
def test_jacobian_of_copies(num_copies: int) -> None:
    layer, x = pair(5), events(3, 5)
    near = linearize(layer.forward_net, x, num_copies=num_copies)
    expected = jacobians(layer.forward_net, x)
    assert is_close(near.jacobian(num_copies=num_copies), expected, EXACT)


@pytest.mark.parametrize("num_probes", [None, 1, 3])
def test_products_are_those_of_the_jacobian(num_probes: int | None) -> None:
    layer, x = pair(5), events(4, 5)
    near, jacobian = linearize(layer.forward_net, x), jacobians(layer.forward_net, x).detach()
    vectors = events(4, 5, seed=1) if num_probes is None else events(num_probes, 4, 5, seed=1)
    for _ in range(2):  # the graph is kept
        expected = torch.einsum("bij,...bj->...bi", jacobian, vectors)
        assert is_close(near.product(vectors), expected, EXACT)
        expected = torch.einsum("bji,...bj->...bi", jacobian, vectors)
        assert is_close(near.transposed(vectors), expected, EXACT)
    with torch.inference_mode():
        expected = torch.einsum("bij,...bj->...bi", jacobian, vectors)
        assert is_close(linearize(layer.forward_net, x).product(vectors), expected, EXACT)


def test_exact_mode_against_finite_differences() -> None:
    layer = pair(2, log_det="exact", reconstruction_weight=0.0).with_cache(0)
    x = events(3, 2).requires_grad_()
    # gradcheck perturbs the parameters in place, past autograd's version counter.
    assert gradcheck(lambda *_: log_det_of(layer, x), (*layer.forward_net.parameters(), x))


# --- Probes: the mean of many, in one pass over as many copies of an event -----------------------


def gradients_of_copies(
    f: nn.Module,
    g: nn.Module,
    x: Tensor,
    kind: str,
    *,
    count: int = 10_000,
    num_probes: int = 1,
    max_iterations: int = 0,
    seed: int = 0,
) -> Tensor:
    """Draws of the surrogate's gradient in the event x, shape ``(count, D)``."""
    copies = x.expand(count, -1).contiguous().requires_grad_()
    near = linearize(f, copies, keep_graph=True)
    back = linearize(g, near.output)
    surrogate, _ = probe_gradient(
        near,
        back,
        probes(kind, num_probes, *copies.shape, seed=seed),
        tolerance=EXACT,
        max_iterations=max_iterations,
    )
    (found,) = torch.autograd.grad(surrogate.sum(), copies)
    return found


def exact_gradient(f: nn.Module, x: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Of ``log|det J|`` in the event x, or ``tr(M ∂J)`` with another matrix than J⁻¹."""
    x = x.unsqueeze(0).requires_grad_()
    jacobian = jacobians(f, x)
    inverse = torch.linalg.inv(jacobian) if inverse is None else inverse
    (found,) = torch.autograd.grad(trace_surrogate(jacobian, inverse).sum(), x)
    return found[0]


def deviation(draws: Tensor, expected: Tensor) -> float:
    """Of the mean, in standard errors, at most."""
    error = draws.std(0) / math.sqrt(len(draws))
    return ((draws.mean(0) - expected).abs() / error).max().item()


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("dim", [2, 8, 32])
def test_mean_of_refined_gradients_is_the_exact_one(dim: int, kind: str) -> None:
    layer, x = pair(dim), events(1, dim)[0]
    f, g = layer.forward_net, layer.inverse_net
    draws = gradients_of_copies(f, g, x, kind, max_iterations=min(dim, 12))
    expected = exact_gradient(f, x)
    assert deviation(draws, expected) < STANDARD_ERRORS
    # The errors are small enough to tell: a tenth of the length would be seen.
    error = draws.std(0).norm() / math.sqrt(len(draws))
    assert STANDARD_ERRORS * error < 0.1 * math.sqrt(dim) * expected.norm()


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("dim", [2, 8, 32])
def test_mean_of_learned_gradients_is_that_of_the_other_jacobian(dim: int, kind: str) -> None:
    # tr(J_g ∂J_f), whatever g is; and that is another gradient.
    layer, other, x = pair(dim), pair(dim, seed=1), events(1, dim)[0]
    f, g = layer.forward_net, other.forward_net
    draws = gradients_of_copies(f, g, x, kind)
    assert deviation(draws, exact_gradient(f, x)) > STANDARD_ERRORS
    inverse = jacobians(g, f(x.unsqueeze(0)))
    assert deviation(draws, exact_gradient(f, x, inverse)) < STANDARD_ERRORS


@pytest.mark.parametrize("num_probes", [2, 5])
def test_more_probes_have_less_noise(num_probes: int) -> None:
    layer, x = pair(8), events(1, 8)[0]
    f, g = layer.forward_net, layer.inverse_net
    spread = [
        gradients_of_copies(f, g, x, "gaussian", count=4000, num_probes=count).std(0).norm()
        for count in (1, num_probes)
    ]
    assert spread[1].item() == pytest.approx(spread[0].item() / math.sqrt(num_probes), rel=0.1)


@pytest.mark.parametrize("dim", [1, 2, 8, 32])
def test_orthogonal_probes_of_full_number_have_no_noise(dim: int) -> None:
    layer, other, x = pair(dim), pair(dim, seed=1), events(1, dim)[0]
    f, g = layer.forward_net, other.forward_net
    inverse = jacobians(g, f(x.unsqueeze(0)))
    options = {"count": 3, "num_probes": dim}
    draws = gradients_of_copies(f, g, x, "orthogonal", **options)
    assert is_close(draws, exact_gradient(f, x, inverse).expand_as(draws), EXACT)
    draws = gradients_of_copies(f, g, x, "orthogonal", max_iterations=dim, **options)
    assert is_close(draws, exact_gradient(f, x).expand_as(draws), EXACT)


@pytest.mark.parametrize("size", [0.01, 0.1, 0.3])
def test_bias_falls_with_the_iterations(size: float) -> None:
    # g is off by 1 %, 10 % and 30 %. 200 draws with D probes each: what noise is left is that of
    # the residuals, and falls with them.
    dim = 8
    layer, x = exact_pair(dim), events(1, dim)[0]
    f, g = layer.forward_net, Perturbed(layer.inverse_net, dim, size)
    expected, errors = exact_gradient(f, x), []
    for iterations in (0, 1, 2, 3, 4, dim):
        draws = gradients_of_copies(
            f, g, x, "orthogonal", count=200, num_probes=dim, max_iterations=iterations
        )
        errors.append(relative_error(draws.mean(0), expected))
    assert 0.2 * size < errors[0] < 5 * size
    # Two and more iterations: one can but scale J_gᵀ v, by about 1.
    factor = max(2 * size, 0.05)
    for before, after in itertools.pairwise(errors[1:-1]):
        assert after < max(factor * before, EXACT)
    assert errors[-1] < EXACT


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_residuals_are_those_of_the_systems(iterations: int) -> None:
    layer, x = exact_pair(5), events(4, 5)
    f, g = layer.forward_net, Perturbed(layer.inverse_net, 5, 0.2)
    vectors = probes("gaussian", 2, 4, 5)
    near = linearize(f, x)
    back = linearize(g, near.output)
    surrogate, residual = probe_gradient(
        near, back, vectors, tolerance=EXACT, max_iterations=iterations
    )
    assert surrogate.shape == (4,)
    assert residual.shape == (2, 4)
    if iterations == 0:
        matrix = torch.eye(5) - (back.jacobian() @ near.jacobian()).mT
        rest = torch.einsum("bij,kbj->kbi", matrix, vectors)
        assert is_close(residual, rest.norm(dim=2) / vectors.norm(dim=2), EXACT)
    else:
        assert (residual < 0.2 ** (iterations - 1)).all()


def test_iterations_end_at_the_tolerance() -> None:
    layer, x = exact_pair(8), events(4, 8)
    f, g = layer.forward_net, Perturbed(layer.inverse_net, 8, 0.1)
    near = linearize(f, x)
    back = linearize(g, near.output)
    vectors = probes("gaussian", 1, 4, 8)
    for tolerance in (0.5, 1e-2, 1e-4):
        _, residual = probe_gradient(near, back, vectors, tolerance=tolerance, max_iterations=8)
        assert (residual <= tolerance * (1 + EXACT)).all()
        assert (residual > 1e-4 * tolerance).any()  # and no later


# --- Values in training -------------------------------------------------------------------------


def test_estimate_is_exact_with_enough_iterations() -> None:
    # And by the Jacobian itself where that takes no more products.
    layer, x = pair(8), events(5, 8)
    near, expected = linearize(layer.forward_net, x), log_det_of(Dense(layer.forward_net), x)
    for iterations, kind, num_probes in [(8, "orthogonal", 8), (4, "gaussian", 1)]:
        vectors = probes(kind, num_probes, 5, 8)
        actual = estimated_log_abs_det(near, vectors, max_iterations=iterations)
        assert actual.shape == (5,)
        assert is_close(actual, expected.detach(), EXACT)


def test_estimate_of_lanczos_with_a_whole_basis_is_exact() -> None:
    layer, x = pair(8), events(5, 8)
    near, expected = linearize(layer.forward_net, x), log_det_of(Dense(layer.forward_net), x)
    values = [
        log_quadrature(near.product, near.transposed, vectors, max_iterations=8)
        for vectors in probes("orthogonal", 8, 5, 8)
    ]
    assert is_close(torch.stack(values).mean(0), expected.detach(), EXACT)


@pytest.mark.parametrize("kind", PROBES)
def test_estimate_is_an_upper_bound_that_falls_with_the_iterations(kind: str) -> None:
    dim, count = 32, 2000
    layer = pair(dim)
    x = events(1, dim).expand(count, dim)
    near, expected = linearize(layer.forward_net, x), log_det_of(Dense(layer.forward_net), x[:1])
    vectors = probes(kind, 1, count, dim)
    estimates = [
        estimated_log_abs_det(near, vectors, max_iterations=iterations) for iterations in (1, 2, 4)
    ]
    for before, after in itertools.pairwise(estimates):  # of the same probes, for each of them
        assert (after <= before + EXACT).all()
    errors = [estimate.std() / math.sqrt(count) for estimate in estimates]
    bias = [(one.mean() - expected).item() for one in estimates]
    assert bias[0] > STANDARD_ERRORS * errors[0]
    assert bias[0] > 5 * bias[1]
    assert abs(bias[2]) < STANDARD_ERRORS * errors[2]


@pytest.mark.parametrize("iterations", [1, 3])
def test_estimate_is_the_mean_of_those_by_single_probes(iterations: int) -> None:
    layer, x = pair(32), events(5, 32) * torch.linspace(0.1, 3, 5).unsqueeze(1)
    near, vectors = linearize(layer.forward_net, x), probes("gaussian", 3, 5, 32)
    single = [
        estimated_log_abs_det(near, one.unsqueeze(0), max_iterations=iterations) for one in vectors
    ]
    actual = estimated_log_abs_det(near, vectors, max_iterations=iterations)
    assert is_close(actual, torch.stack(single).mean(0), EXACT)


# --- Gradients of the layer ---------------------------------------------------------------------

#: Layers whose surrogate is exact: by g, or by iterations; the penalty trains g alone.
EXACT_LAYERS: dict[str, Callable[[], SelfNormalizing]] = {
    "learned": lambda: exact_pair(3, log_det="learned", num_probes=3, probe="orthogonal"),
    "refined": lambda: exact_pair(3, num_probes=3, probe="orthogonal"),
    "refined by iterations": lambda: free_form(
        3,
        num_probes=3,
        probe="orthogonal",
        max_iterations=3,
        tolerance=1e-12,
        reconstruction="inverse",
    ),
    "exact": lambda: free_form(3, log_det="exact", reconstruction="inverse"),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_LOSS
@pytest.mark.parametrize("kind", EXACT_LAYERS)
def test_exact_surrogate_gives_the_exact_gradient(
    kind: str, loss: Callable[[Transform, Tensor], Tensor], reduction: str
) -> None:
    layer = EXACT_LAYERS[kind]()
    reduce: Reduction = REDUCTIONS[reduction]
    results = []
    for transform in (layer, Dense(layer.forward_net)):
        x = events(7, 3).requires_grad_()
        value = reduce(loss(transform, x))
        results.append(gradients_of(transform, x, parameters_of_f(layer), value))
    assert_gradients_equal(*results)


@pytest.mark.parametrize("shape", [(), (2, 3), (4, 1)])
@pytest.mark.parametrize("kind", EXACT_LAYERS)
def test_exact_surrogate_with_any_batch_shape(kind: str, shape: tuple[int, ...]) -> None:
    layer, results = EXACT_LAYERS[kind](), []
    for transform in (layer, Dense(layer.forward_net)):
        x = events(1, *shape, 3)[0].requires_grad_()
        value = (
            log_det_of(transform, x) * torch.linspace(-1, 2, max(1, math.prod(shape))).view(shape)
        ).sum()
        found = torch.autograd.grad(
            value, [x, *layer.forward_net.parameters()], materialize_grads=True
        )
        results.append(found)
    for actual, expected in zip(*results, strict=True):
        assert is_close(actual, expected, EXACT)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_gradient_outside_training_is_exact_whatever_g_is(log_det: str) -> None:
    layer = free_form(3, log_det=log_det)
    nn.init.constant_(layer.inverse_net.blocks[0][0].weight, 5.0)
    layer.eval()
    results = []
    for transform in (layer, Dense(layer.forward_net)):
        x = events(7, 3).requires_grad_()
        loss = LOSSES[0](transform, x).sum()
        results.append(gradients_of(transform, x, parameters_of_f(layer), loss))
    assert_gradients_equal(*results)
    assert all(p.grad is None for p in layer.inverse_net.parameters())


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_second_derivative_of_a_surrogate_is_refused(log_det: str) -> None:
    layer, x = free_form(3, log_det=log_det), events(5, 3).requires_grad_()
    for inputs in (x, next(layer.forward_net.parameters())):
        value = log_det_of(layer, x.clone()).sum()
        (gradient,) = torch.autograd.grad(value, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("log_det", ["refined", "learned"])
@pytest.mark.parametrize("kind", PROBES)
def test_certificate_is_the_error_of_the_surrogate(kind: str, log_det: str) -> None:
    dim, size = 6, 0.2
    pair_of = exact_pair(dim)
    layer = SelfNormalizing(
        pair_of.forward_net,
        Perturbed(pair_of.inverse_net, dim, size),
        event_shape=dim,
        log_det=log_det,
        probe=kind,
        num_probes=dim,
        max_iterations=2,
    )
    assert math.isnan(layer.certificate)
    log_det_of(layer, events(500, dim))
    if log_det == "refined":
        assert 0 < layer.certificate < size / 2
    else:
        # ‖I − J_f J_g‖_F/√D: J_f J_g is similar to 1 + εN, and no more than that.
        x = events(500, dim)
        product = jacobians(layer.inverse_net, layer(x)) @ jacobians(layer.forward_net, x)
        error = (torch.eye(dim) - product).square().sum((1, 2)).mean() / dim
        # Gaussian probes are of random lengths, which the residuals are divided by.
        tolerance = EXACT if kind == "orthogonal" else 0.05
        assert layer.certificate == pytest.approx(error.sqrt().item(), rel=tolerance)
    assert (
        SelfNormalizing(
            nn.Linear(3, 3), nn.Linear(3, 3), event_shape=3, log_det="exact"
        ).certificate
        is None
    )

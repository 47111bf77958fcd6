"""log|det J| of networks against dense Jacobians: values, and gradients by probes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_snf import SelfNormalizingPair
from pyro_snf.free_form import log_det as log_det_module
from pyro_snf.free_form.linearization import linearize
from pyro_snf.free_form.log_det import ValueEstimate, exact_slogdet, probe_gradient
from pyro_snf.probes import PROBES, draw_probes, probe_generator
from tests.pairs import (
    EXACT,
    STANDARD_ERRORS,
    Dense,
    Fixed,
    Perturbed,
    events,
    gradients_of,
    jacobians,
    pair_of,
    parameters_of_f,
    trace_surrogate,
)
from tests.registry import (
    LOG_DETS,
    LOSSES,
    REDUCTIONS,
    assert_gradients_equal,
    exact_pair,
    free_form,
    is_close,
    log_det_of,
    relative_error,
)

DIMS = [1, 2, 8, 32]
SURROGATES = ["refined", "learned"]

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def pair(dim: int, **options: object) -> SelfNormalizingPair:
    """Two blocks, each with as many hidden units as events have features, and two more."""
    return free_form(dim, width=dim + 2, num_blocks=2, **options)


def probes(kind: str, num_probes: int, *shape: int, seed: int = 0) -> Tensor:
    generator = probe_generator(seed, 0, torch.device("cpu"))
    return draw_probes(kind, num_probes, shape, generator, torch.float64)


# --- Exact values -------------------------------------------------------------------------------


MODES: dict[str, Callable[[SelfNormalizingPair], AbstractContextManager[None]]] = {
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


def test_value_does_not_depend_on_memory_layout_or_size() -> None:
    layer, x = pair(3).eval(), events(5, 3)
    expected = log_det_of(layer, x)
    for other in (x.mT.contiguous().mT, torch.cat([x, x], dim=1)[:, :3]):
        assert is_close(log_det_of(layer, other), expected, EXACT)
    value = log_det_of(layer, x[:1].expand(5, 3))
    assert is_close(value, expected[:1].expand(5), EXACT)
    for scale in (1e-200, 1e200):
        layer = pair_of(Fixed(partial(torch.mul, scale)), nn.Linear(3, 3)).eval()
        expected = torch.full((5,), 3 * math.log(scale))
        assert torch.allclose(log_det_of(layer, x), expected, rtol=EXACT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim", [1, 3])
def test_singular_jacobian_has_a_log_det_of_minus_infinity(dim: int, training: bool) -> None:
    flat = nn.Linear(dim, dim)
    nn.init.zeros_(flat.weight)
    for network in (copy.deepcopy(flat), Fixed(torch.ones_like)):
        layer = pair_of(network, flat, dim, lanczos_steps=dim).train(training)
        value = log_det_of(layer, events(5, dim))
        assert torch.equal(value.detach(), torch.full((5,), -math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dim", [3, 32])
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("training", [False, True])
def test_bad_row_is_nan_alone(training: bool, log_det: str, dim: int, value: float) -> None:
    network = nn.Sequential(nn.Linear(dim, dim), Fixed(lambda x: x + x.square() / 20))
    options = {} if log_det == "exact" else {"lanczos_steps": 4}
    layer = pair_of(network, copy.deepcopy(network), dim, log_det=log_det, **options).train(
        training
    )
    good, others = events(4, dim), [0, 2, 3]
    bad = good.clone()
    bad[1, 0] = value
    expected, actual = log_det_of(layer, good), log_det_of(layer, bad)
    assert torch.isnan(actual[1])
    assert is_close(actual[others], expected[others], EXACT)


@pytest.mark.parametrize(("scale", "counts"), [(1.0, (2, 1)), (-1.0, (1, 2))])
def test_determinants_of_both_signs_are_warned_of(scale: float, counts: tuple[int, int]) -> None:
    # x² in the first feature has two preimages: the sign of det J is that of the feature.
    network = Fixed(lambda x: torch.cat([x[:, :1].square(), scale * x[:, 1:]], dim=1))
    layer = pair_of(network, nn.Identity(), 2).eval()
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [-3.0, 1.0]])
    message = "forward_net is not invertible: .* positive at {} events and negative at {},"
    with pytest.warns(RuntimeWarning, match=message.format(*counts)):
        value = log_det_of(layer, x)
    assert torch.allclose(value, (2 * x[:, 0]).abs().log(), rtol=EXACT)
    # One sign, 0 and NaN are not warned of: pytest would make an error of a warning.
    x[2] = torch.tensor([0.0, 1.0])
    log_det_of(layer, torch.cat([x, torch.tensor([[math.nan, 1.0]])]))


# --- Chunks, copies, derivatives of any order ---------------------------------------------------


def derivatives(transform: Transform, layer: SelfNormalizingPair, x: Tensor) -> list[Tensor]:
    """Value, gradients, and the gradients of the gradients' squares."""
    x = x.clone().requires_grad_()
    inputs = [x, *layer.forward_net.parameters()]
    value = log_det_of(transform, x)
    # The last bias has no gradient, and others have no second one.
    options = {"materialize_grads": True}
    first = torch.autograd.grad(value.square().sum(), inputs, create_graph=True, **options)
    total = sum(one.square().sum() for one in first)
    return [value, *first, *torch.autograd.grad(total, inputs, **options)]


#: Numbers of features, and sizes of chunks: Jacobians of a few events at a time, or copies of a
#: small batch for a few rows of each Jacobian at a time.
CHUNKS: list[tuple[int, dict[str, int]]] = [
    *[(dim, {}) for dim in (1, 2, 5)],
    *[(3, {"_MAX_NUMBERS": size * 9}) for size in (1, 2, 3, 7)],
    *[(dim, {"_ROWS": rows}) for dim in (1, 2, 5) for rows in (1, 8, 15, 30, 1000)],
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dim", "chunks"), CHUNKS)
def test_exact_log_det_has_second_derivatives(
    dim: int, chunks: dict[str, int], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = pair(dim, log_det="exact", reconstruction={"weight": 0.0}).train(training)
    x = events(7, dim)
    expected = derivatives(Dense(layer.forward_net), layer, x)
    for name, value in chunks.items():
        monkeypatch.setattr(log_det_module, name, value)
    for one, other in zip(derivatives(layer, layer, x), expected, strict=True):
        assert is_close(one, other, EXACT)
    with torch.no_grad():
        assert is_close(log_det_of(layer, x), expected[0], EXACT)


def test_chunk_is_recorded_again_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs of all chunks together would take the memory that chunks are to save.
    alive: list[int] = []

    def counted(x: Tensor) -> Tensor:
        alive.append(len(x))
        return x + 0.1 * x.sin()

    x = events(7, 3).requires_grad_()
    monkeypatch.setattr(log_det_module, "_MAX_NUMBERS", 2 * 9)
    monkeypatch.setattr(log_det_module, "_ROWS", 1)
    _, value = exact_slogdet(counted, x, (), ())
    alive.clear()
    value.sum().backward()
    assert set(alive) == {2, 1}
    assert sum(alive) >= 7


@pytest.mark.parametrize("num_probes", [None, 1, 3])
def test_products_are_those_of_the_jacobian(num_probes: int | None) -> None:
    layer, x = pair(5), events(4, 5)
    near, jacobian = linearize(layer.forward_net, x), jacobians(layer.forward_net, x).detach()
    vectors = events(4, 5, seed=1) if num_probes is None else events(num_probes, 4, 5, seed=1)
    expected = torch.einsum("bij,...bj->...bi", jacobian, vectors)
    transposed = torch.einsum("bji,...bj->...bi", jacobian, vectors)
    for _ in range(2):  # the graph is kept
        assert is_close(near.jvp(vectors), expected, EXACT)
        assert is_close(near.vjp(vectors), transposed, EXACT)
    with torch.inference_mode():
        assert is_close(linearize(layer.forward_net, x).jvp(vectors), expected, EXACT)


# --- Probes: the mean of many, in one pass over as many copies of an event -----------------------


def gradients_of_copies(
    f: nn.Module, g: nn.Module, x: Tensor, kind: str, *, count: int = 10_000, **options: int
) -> Tensor:
    """Draws of the surrogate's gradient in the event x, shape ``(count, D)``."""
    copies = x.expand(count, -1).contiguous().requires_grad_()
    near = linearize(f, copies, keep_graph=True)
    surrogate = probe_gradient(
        near,
        linearize(g, near.output),
        probes(kind, options.get("num_probes", 1), *copies.shape),
        tolerance=EXACT,
        krylov_steps=options.get("krylov_steps", 0),
    ).surrogate
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
def test_mean_is_the_exact_gradient_or_that_of_the_other_jacobian(dim: int, kind: str) -> None:
    layer, other, x = pair(dim), pair(dim, seed=1), events(1, dim)[0]
    f, g = layer.forward_net, layer.inverse_net
    draws = gradients_of_copies(f, g, x, kind, krylov_steps=min(dim, 12))
    expected = exact_gradient(f, x)
    assert deviation(draws, expected) < STANDARD_ERRORS
    # The errors are small enough to show a difference of a tenth of the length.
    error = draws.std(0).norm() / math.sqrt(len(draws))
    assert STANDARD_ERRORS * error < 0.1 * math.sqrt(dim) * expected.norm()
    # Without Krylov steps it is tr(J_g ∂J_f), whatever g is; and that is another gradient.
    g = other.forward_net
    draws = gradients_of_copies(f, g, x, kind)
    assert deviation(draws, expected) > STANDARD_ERRORS
    inverse = jacobians(g, f(x.unsqueeze(0)))
    assert deviation(draws, exact_gradient(f, x, inverse)) < STANDARD_ERRORS


def test_more_probes_have_less_noise() -> None:
    layer, x = pair(8), events(1, 8)[0]
    f, g = layer.forward_net, layer.inverse_net
    one, two, five = (
        gradients_of_copies(f, g, x, "gaussian", count=4000, num_probes=count).std(0).norm().item()
        for count in (1, 2, 5)
    )
    assert (two, five) == pytest.approx((one / math.sqrt(2), one / math.sqrt(5)), rel=0.1)


@pytest.mark.parametrize("dim", DIMS)
def test_orthogonal_probes_of_full_number_have_no_noise(dim: int) -> None:
    layer, other, x = pair(dim), pair(dim, seed=1), events(1, dim)[0]
    f, g = layer.forward_net, other.forward_net
    for steps, inverse in ((0, jacobians(g, f(x.unsqueeze(0)))), (dim, None)):
        options = {"count": 3, "num_probes": dim, "krylov_steps": steps}
        draws = gradients_of_copies(f, g, x, "orthogonal", **options)
        assert is_close(draws, exact_gradient(f, x, inverse).expand_as(draws), EXACT)


@pytest.mark.parametrize("size", [0.01, 0.1, 0.3])
def test_bias_falls_with_the_krylov_steps(size: float) -> None:
    # The relative error of g is 1 %, 10 % and 30 %. 200 draws with D probes each: what noise is
    # left is that of the residuals, and falls with them.
    dim = 8
    layer, x = exact_pair(dim), events(1, dim)[0]
    f, g = layer.forward_net, Perturbed(layer.inverse_net, dim, size)
    expected, errors = exact_gradient(f, x), []
    for steps in (0, 1, 2, 3, 4, dim):
        draws = gradients_of_copies(
            f, g, x, "orthogonal", count=200, num_probes=dim, krylov_steps=steps
        )
        errors.append(relative_error(draws.mean(0), expected))
    assert 0.2 * size < errors[0] < 5 * size
    # From the second step on: the first can only scale J_gᵀ v, by about 1.
    factor = max(2 * size, 0.05)
    for before, after in itertools.pairwise(errors[1:-1]):
        assert after < max(factor * before, EXACT)
    assert errors[-1] < EXACT


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-4])
def test_krylov_steps_end_at_the_tolerance(tolerance: float) -> None:
    layer, x = exact_pair(8), events(4, 8)
    g = Perturbed(layer.inverse_net, 8, 0.1)
    layer = pair_of(layer.forward_net, g, 8, tolerance=tolerance, krylov_steps=8)
    log_det_of(layer, x)
    assert 1e-4 * tolerance < layer.error_estimate <= tolerance * (1 + EXACT)


# --- Values in training -------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", SURROGATES)
@pytest.mark.parametrize("num_probes", [1, 8])
def test_value_is_exact_with_enough_lanczos_steps(num_probes: int, log_det: str) -> None:
    # As many products as the Jacobian has columns.
    options = {"lanczos_steps": 4, "probe": "gaussian", "num_probes": num_probes}
    layer, x = pair(8, log_det=log_det, **options), events(6, 8)
    value, expected = log_det_of(layer, x), log_det_of(Dense(layer.forward_net), x)
    assert (value - expected).abs().max() < EXACT


@pytest.mark.parametrize("log_det", SURROGATES)
@pytest.mark.parametrize("kind", PROBES)
def test_value_is_an_upper_estimate_that_falls_with_the_steps(kind: str, log_det: str) -> None:
    dim, count = 32, 2000
    x = events(1, dim).expand(count, dim)
    options = {"probe": kind, "log_det": log_det, "seed": 0}
    layers = [pair(dim, lanczos_steps=steps, **options) for steps in (1, 2, 4)]
    expected = log_det_of(Dense(layers[0].forward_net), x[:1])
    estimates = [log_det_of(layer, x).detach() for layer in layers]
    for before, after in itertools.pairwise(estimates):  # of the same probes, for each of them
        assert (after <= before + EXACT).all()
    errors = [estimate.std() / math.sqrt(count) for estimate in estimates]
    bias = [(one.mean() - expected).item() for one in estimates]
    assert bias[0] > STANDARD_ERRORS * errors[0]
    assert bias[0] > 5 * bias[1]
    assert abs(bias[2]) < STANDARD_ERRORS * errors[2]


@pytest.mark.parametrize("steps", [1, 3])
def test_estimate_is_the_mean_of_those_by_single_probes(steps: int) -> None:
    layer, x = pair(32), events(5, 32) * torch.linspace(0.1, 3, 5).unsqueeze(1)
    near, vectors = linearize(layer.forward_net, x), probes("gaussian", 3, 5, 32)
    estimates = [
        ValueEstimate(near, some, lanczos_steps=steps) for some in (vectors, *vectors.split(1))
    ]
    actual, *single = (one.value(one.numbers, near.output) for one in estimates)
    assert is_close(actual, torch.stack(single).mean(0), EXACT)


# --- Gradients of the layer ---------------------------------------------------------------------

_ALL_PROBES = {"num_probes": 3, "probe": "orthogonal"}


def bad_in_eval_mode(log_det: str) -> SelfNormalizingPair:
    layer = free_form(3, log_det=log_det)
    nn.init.constant_(layer.inverse_net.blocks[0][0].weight, 5.0)
    return layer.eval()


#: Layers whose gradient is exact: by g or by Krylov steps, the penalty training g alone; or outside
#: training, whatever g is.
EXACT_LAYERS: dict[str, Callable[[], SelfNormalizingPair]] = {
    "learned": lambda: exact_pair(log_det="learned", **_ALL_PROBES),
    "refined": lambda: exact_pair(**_ALL_PROBES),
    "refined by Krylov steps": lambda: free_form(
        krylov_steps=3, tolerance=1e-12, reconstruction={"trains": "inverse"}, **_ALL_PROBES
    ),
    "exact": lambda: free_form(log_det="exact", reconstruction={"trains": "inverse"}),
    **{f"{name} in eval mode": partial(bad_in_eval_mode, name) for name in LOG_DETS},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_LOSS
@pytest.mark.parametrize("kind", EXACT_LAYERS)
def test_gradient_is_the_exact_one(kind: str, loss: Callable, reduction: str) -> None:
    layer, results = EXACT_LAYERS[kind](), []
    for transform in (layer, Dense(layer.forward_net)):
        x = events(2, 4, 3).requires_grad_()
        value = REDUCTIONS[reduction](loss(transform, x))
        results.append(gradients_of(transform, x, parameters_of_f(layer), value))
    assert_gradients_equal(*results)


@pytest.mark.parametrize("log_det", SURROGATES)
def test_second_derivative_of_a_surrogate_is_refused(log_det: str) -> None:
    layer, x = free_form(3, log_det=log_det), events(5, 3).requires_grad_()
    for inputs in (x, next(layer.forward_net.parameters())):
        value = log_det_of(layer, x.clone()).sum()
        (gradient,) = torch.autograd.grad(value, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("kind", PROBES)
def test_error_estimate_of_learned_is_the_error_of_the_jacobian(kind: str) -> None:
    dim, x = 6, events(500, 6)
    layer = exact_pair(dim)
    f, g = layer.forward_net, Perturbed(layer.inverse_net, dim, 0.2)
    estimates = {}
    for log_det in SURROGATES:
        layer = pair_of(f, g, dim, log_det=log_det, probe=kind, num_probes=dim)
        assert math.isnan(layer.error_estimate)
        log_det_of(layer, x)
        estimates[log_det] = layer.error_estimate
    # ‖I − J_f J_g‖_F/√D: J_f J_g is similar to 1 + εN.
    product = jacobians(g, f(x)) @ jacobians(f, x)
    error = (torch.eye(dim) - product).square().sum((1, 2)).mean() / dim
    # Gaussian probes are of random lengths, which the residuals are divided by.
    tolerance = EXACT if kind == "orthogonal" else 0.05
    assert estimates["learned"] == pytest.approx(error.sqrt().item(), rel=tolerance)
    assert 0 < estimates["refined"] < 0.1
    layer = pair_of(f, Perturbed(g, dim, 0.5), dim, log_det="refined", probe=kind)
    log_det_of(layer, x)
    assert 0 < layer.error_estimate < 0.15  # the default tolerance
    assert pair_of(f, g, dim, log_det="exact").error_estimate is None

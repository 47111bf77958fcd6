"""Gradients against oracles: autograd's exact ones, finite differences, the paper by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Transform

from pyro_snf import Compose, SelfNormalizingLinear, SmoothLeakyReLU
from pyro_snf.maps import Dense
from tests.registry import (
    LOG_DETS,
    LOSSES,
    REDUCTIONS,
    assert_gradients_equal,
    density_by_inverse,
    density_by_transform,
    linear,
    nudge_inverses,
    randomize,
    relative_error,
    shared_gradients,
)

MATRIX = Dense().weight

pytestmark = pytest.mark.usefixtures("few_rows")

# With R exact, surrogate and exact gradients differ by rounding alone: float64, condition below 3.
EXACT = 1e-9

DIMS = [1, 2, 5, 64]
SURROGATES = ["refined", "learned"]

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_LOSS
@pytest.mark.parametrize("log_det", SURROGATES)
@pytest.mark.parametrize("dim", DIMS)
def test_exact_inverse_gives_the_exact_gradient(
    dim: int, log_det: str, loss: Callable[[Transform, Tensor], Tensor], reduction: str
) -> None:
    gradients = []
    for mode in (log_det, "exact"):
        layer = linear(dim, log_det=mode)
        x = torch.randn(7, dim, generator=torch.Generator().manual_seed(3)).requires_grad_()
        REDUCTIONS[reduction](loss(layer, x)).backward()
        gradients.append({**shared_gradients(layer), "x": x.grad})
    assert_gradients_equal(*gradients)


@pytest.mark.parametrize("inverse", ["iterative", "exact"])
@pytest.mark.parametrize("log_det", SURROGATES)
def test_exact_inverse_gives_the_exact_gradient_in_a_stack(log_det: str, inverse: str) -> None:
    gradients = []
    for options in ({"log_det": log_det, "inverse": inverse}, {"log_det": "exact"}):
        layers = [SelfNormalizingLinear(4, **options) for _ in range(2)]
        stack = Compose([layers[0], SmoothLeakyReLU(0.3, learnable=True), layers[1]])
        randomize(stack)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
        total = density_by_inverse(stack, x).mean() - 0.7 * density_by_transform(stack, x).sum()
        total.backward()
        found = {name: p.grad for name, p in stack.named_parameters() if "log_det" not in name}
        gradients.append(found)
    assert_gradients_equal(*gradients)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_gradient_outside_training_is_exact_whatever_r_is(log_det: str) -> None:
    layer, exact = linear(5, log_det=log_det), linear(5, log_det="exact")
    nudge_inverses(layer, 1.0)
    x = torch.randn(6, 5)
    for module in (layer.eval(), exact):
        density_by_inverse(module, x).sum().backward()
    assert_gradients_equal(shared_gradients(layer), shared_gradients(exact))


def test_gradient_error_falls_with_the_error_of_the_inverse() -> None:
    # The surrogate is linear in R: half the error of R, half the error of the gradient.
    exact = linear(8, log_det="exact")
    x = torch.randn(16, 8)
    density_by_inverse(exact, x).mean().backward()
    errors = []
    for size in (0.2, 0.1, 0.05):
        layer = linear(8, log_det="learned", reconstruction_weight=0.0)
        nudge_inverses(layer, size)
        density_by_inverse(layer, x).mean().backward()
        errors.append(relative_error(layer.theta.grad, exact.theta.grad))
    assert errors[0] == pytest.approx(2 * errors[1], rel=EXACT)
    assert errors[1] == pytest.approx(2 * errors[2], rel=EXACT)
    assert errors[2] > 1e-4


# --- Inside SVI ---------------------------------------------------------------------------------


DATA = torch.randn(12, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

Program = Callable[[], None]


def vectors(loc: Tensor, scale: float = 1.0) -> dist.Distribution:
    return dist.Normal(loc, scale).to_event(1)


def flow(transform: Transform, loc: Tensor) -> dist.Distribution:
    return dist.TransformedDistribution(vectors(loc), [transform])


def on_batches(site: Callable[[Tensor], object]) -> Program:
    """A program with a site for subsampled data."""

    def program() -> None:
        with pyro.plate("data", len(DATA), subsample_size=5) as index:
            site(DATA[index])

    return program


def observe(z: Tensor, data: Tensor) -> None:
    pyro.sample("y", vectors(z, 0.5), obs=data)


def global_latent(layer: Transform) -> tuple[Program, Program]:
    """A latent vector shared by subsampled data."""

    def model() -> None:
        z = pyro.sample("z", vectors(torch.zeros(3)))
        on_batches(lambda data: observe(z, data))()

    return model, lambda: pyro.sample("z", flow(layer, torch.zeros(3)))


def local_latents(layer: Transform) -> tuple[Program, Program]:
    """A latent vector for each of the subsampled data: the log-determinant is scaled by 12/5."""
    model = on_batches(lambda data: observe(pyro.sample("z", vectors(torch.zeros(3))), data))
    return model, on_batches(lambda data: pyro.sample("z", flow(layer, data)))


def scaled(layer: Transform) -> tuple[Program, Program]:
    """Everything under ``poutine.scale``, as for annealing."""
    model, guide = local_latents(layer)
    return poutine.scale(model, scale=0.1), poutine.scale(guide, scale=0.1)


def prior(layer: Transform) -> tuple[Program, Program]:
    """The layer in the model, as a prior, in the direction ``[T.inv]``."""
    zeros = torch.zeros(3)
    model = on_batches(lambda data: observe(pyro.sample("z", flow(layer.inv, zeros)), data))
    return model, on_batches(lambda data: pyro.sample("z", vectors(data, 0.5)))


def observed(layer: Transform) -> tuple[Program, Program]:
    """A density model of subsampled data; the guide is empty."""
    zeros = torch.zeros(3)
    model = on_batches(lambda data: pyro.sample("y", flow(layer.inv, zeros), obs=data))
    return model, lambda: None


PROGRAMS = [global_latent, local_latents, scaled, prior, observed]


ELBOS = {
    "one particle": Trace_ELBO,
    "vectorized particles": partial(
        Trace_ELBO, num_particles=4, vectorize_particles=True, max_plate_nesting=1
    ),
}


def elbo_gradients(
    model: Program, guide: Program, layer: nn.Module, elbo: Trace_ELBO
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients at a given seed."""
    pyro.set_rng_seed(0)
    loss = elbo.differentiable_loss(model, guide)
    loss.backward()
    return loss.detach(), shared_gradients(layer)


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("log_det", SURROGATES)
def test_elbo_gradient_is_the_exact_one(
    log_det: str, program: Callable[[Transform], tuple[Program, Program]], elbo: str
) -> None:
    layers = [linear(3, log_det=mode) for mode in (log_det, "exact")]
    results = [elbo_gradients(*program(layer), layer, ELBOS[elbo]()) for layer in layers]
    (loss, gradients), (exact_loss, exact_gradients) = results
    assert_gradients_equal(gradients, exact_gradients)
    if log_det == "refined":
        assert loss.item() == pytest.approx(exact_loss.item(), rel=EXACT)


def test_plate_scales_the_log_det_gradient() -> None:
    # The oracle of the oracle: 5 of 12 samples, so the entropy's gradient counts 12/5 times 5.
    layer, flat = linear(3, bias=False), vectors(torch.zeros(3)).mask(False)
    model = on_batches(lambda data: pyro.sample("z", flat))
    _, gradients = elbo_gradients(model, local_latents(layer)[1], layer, Trace_ELBO())
    # loss = E[log q] = const − 12 log|det W|: whatever was sampled.
    expected = -12 / math.sqrt(3) * torch.linalg.inv(MATRIX(layer.theta)).mT
    assert relative_error(gradients["theta"], expected.detach()) < EXACT
    assert relative_error(gradients["log_scale"], torch.full((3,), -12.0)) < EXACT


# --- Second order and finite differences --------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 4])
@EVERY_LOSS
def test_exact_mode_against_finite_differences(
    loss: Callable[[Transform, Tensor], Tensor], dim: int
) -> None:
    layer = linear(dim, log_det="exact").with_cache(0)
    x = torch.randn(3, dim, requires_grad=True)
    # gradcheck perturbs the parameters in place, past autograd's version counter.
    assert gradcheck(lambda *_: loss(layer, x), (*layer.parameters(), x))


@pytest.mark.parametrize(
    ("log_det", "inverse"), [("refined", "iterative"), ("refined", "exact"), ("exact", "exact")]
)
def test_inverse_has_second_derivatives(log_det: str, inverse: str) -> None:
    layer = linear(3, log_det=log_det, inverse=inverse).with_cache(0)
    nudge_inverses(layer, 0.01)
    y = torch.randn(2, 3, requires_grad=True)
    inputs = (*layer.parameters(), y)
    assert gradcheck(lambda *_: layer.inv(y), inputs)
    assert gradgradcheck(lambda *_: layer.inv(y), inputs)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_exact_mode_has_second_derivatives(mode: str) -> None:
    # It is what the error above advises.
    layer = linear(3, log_det="exact").train(mode == "train").with_cache(0)
    x = torch.randn(2, 3)
    value = layer.log_abs_det_jacobian(x, layer(x)).sum()
    (gradient,) = torch.autograd.grad(value, layer.theta, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), layer.theta)
    matrix = MATRIX(layer.theta).detach().requires_grad_()
    expected_gradient = torch.linalg.inv(matrix).mT * 2 / math.sqrt(3)
    (expected,) = torch.autograd.grad(expected_gradient.square().sum(), matrix)
    assert relative_error(second, expected / math.sqrt(3)) < EXACT


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_score_of_the_data_is_differentiable_in_the_parameters(log_det: str) -> None:
    # Score matching and Stein discrepancies: the log-det is no function of x, so no surrogate is
    # differentiated twice.
    scores = []
    for mode in (log_det, "exact"):
        layer = linear(4, log_det=mode)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
        log_prob = density_by_inverse(layer, x).sum()
        (score,) = torch.autograd.grad(log_prob, x, create_graph=True)
        score.square().sum().backward()
        gradients = {"theta": layer.theta.grad, "log_scale": layer.log_scale.grad, "x": x.grad}
        scores.append(gradients)
    assert_gradients_equal(*scores)


# --- Backward after the parameters have moved: an error, never a wrong number -------------------


@pytest.mark.parametrize("how", ["no_grad", "optimizer"])
@pytest.mark.parametrize("part", ["T", "T.inv", "log_abs_det_jacobian"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_backward_after_a_change_is_right_or_an_error(log_det: str, part: str, how: str) -> None:
    def value(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
        if part == "log_abs_det_jacobian":
            return layer.log_abs_det_jacobian(x, layer(x)).sum()
        return (layer(x) if part == "T" else layer.inv(x)).square().sum()

    layer, x = linear(3, log_det=log_det), torch.randn(4, 3)
    (expected,) = torch.autograd.grad(value(layer, x), layer.theta)
    layer.clear_cache()
    stale = value(layer, x)
    if how == "no_grad":
        with torch.no_grad():
            layer.theta.mul_(1.5)
    else:
        layer.theta.grad = torch.ones_like(layer.theta)
        torch.optim.SGD([layer.theta], lr=0.3).step()
    value(layer, x.clone())  # brings R, the factors and the caches up to date
    gradient = None
    try:
        (gradient,) = torch.autograd.grad(stale, layer.theta)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    assert gradient is None or relative_error(gradient, expected) < EXACT


# --- The paper's formulas, with R ≠ W⁻¹ ---------------------------------------------------------


def learned_layer(reconstruction: str, mixture: float, weight: float) -> SelfNormalizingLinear:
    layer = linear(
        4,
        log_det="learned",
        reconstruction=reconstruction,
        mixture=mixture,
        reconstruction_weight=weight,
    )
    nudge_inverses(layer, 0.5)
    return layer


def penalty_by_hand(
    layer: SelfNormalizingLinear, x: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """``Σᵢ wᵢ ∂Eᵢ`` in A and in R, DESIGN's formulas; x and h are rows, and constants."""
    matrix, inverse = weight_pair(layer)
    h = x @ matrix.mT
    error = h @ inverse.mT - x  # x̂ − x
    grad_matrix = 2 * (weights[:, None] * error @ inverse).mT @ x
    grad_inverse = 2 * (weights[:, None] * error).mT @ h
    reconstruction = layer.log_det.reconstruction
    if reconstruction == "inverse":
        return torch.zeros_like(grad_matrix), grad_inverse
    if reconstruction == "symmetric":  # ½E + ½‖h − ARh‖²
        back = h @ inverse.mT
        error = back @ matrix.mT - h
        grad_matrix = grad_matrix + 2 * (weights[:, None] * error).mT @ back
        grad_inverse = grad_inverse + 2 * (weights[:, None] * error @ matrix).mT @ h
        return grad_matrix / 2, grad_inverse / 2
    return grad_matrix, grad_inverse


def weight_pair(layer: SelfNormalizingLinear) -> tuple[Tensor, Tensor]:
    matrix = MATRIX(layer.theta.detach())
    return matrix, MATRIX(layer.log_det.theta.detach())


LEARNED = pytest.mark.parametrize("reconstruction", ["both", "inverse", "symmetric"])
MIXTURE = pytest.mark.parametrize("mixture", [0.0, 0.5, 0.8])


@LEARNED
@MIXTURE
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_paper_formulas_forward(reconstruction: str, mixture: float, sign: float) -> None:
    layer = learned_layer(reconstruction, mixture, weight=0.7)
    share, penalty_share = mixture / (1 - mixture), 0.7 / (1 - mixture)
    x = torch.randn(6, 4, requires_grad=True)
    cotangent_y = torch.randn(6, 4)
    cotangent_log_det = sign * torch.rand(6)

    y = layer(x)
    log_det = layer.log_abs_det_jacobian(x, y)
    ((cotangent_y * y).sum() + (cotangent_log_det * log_det).sum()).backward()

    matrix, inverse = weight_pair(layer)
    rows, scale = x.detach(), layer.log_scale.detach().exp()
    h = rows @ matrix.mT
    delta_h = cotangent_y * scale  # δ_z, through the diagonal
    delta_x = delta_h @ matrix  # Aᵀ δ_h
    total = cotangent_log_det.sum()
    penalty_matrix, penalty_inverse = penalty_by_hand(layer, rows, cotangent_log_det.abs())
    grad_matrix = delta_h.mT @ rows + total * inverse.mT + penalty_share * penalty_matrix
    grad_inverse = share * (-delta_x.mT @ h - total * matrix.mT) + penalty_share * penalty_inverse

    root = math.sqrt(4)
    assert relative_error(layer.theta.grad, grad_matrix / root) < EXACT
    assert relative_error(layer.log_det.theta.grad, grad_inverse / root) < EXACT
    assert relative_error(layer.bias.grad, cotangent_y.sum(0)) < EXACT
    assert relative_error(layer.log_scale.grad, (delta_h * h).sum(0) + total) < EXACT
    # The penalty takes x for a constant: samplers and encoders see the true gradient.
    assert relative_error(x.grad, delta_x) < EXACT


@LEARNED
@MIXTURE
def test_paper_formulas_inverse(reconstruction: str, mixture: float) -> None:
    # x = A⁻¹h exactly; ∂A = −v xᵀ with Aᵀv = x̄; the map of p^g is x = Rh, so ∂R = x̄ hᵀ.
    layer = learned_layer(reconstruction, mixture, weight=0.7)
    share, penalty_share = mixture / (1 - mixture), 0.7 / (1 - mixture)
    y = torch.randn(6, 4, requires_grad=True)
    cotangent_x = torch.randn(6, 4)
    cotangent_log_det = torch.rand(6)

    x = layer.inv(y)
    log_det = layer.inv.log_abs_det_jacobian(y, x)
    ((cotangent_x * x).sum() + (cotangent_log_det * log_det).sum()).backward()

    matrix, inverse = weight_pair(layer)
    scale = layer.log_scale.detach().exp()
    h = (y.detach() - layer.bias.detach()) / scale
    rows = torch.linalg.solve(matrix, h.mT).mT
    adjoint = torch.linalg.solve(matrix.mT, cotangent_x.mT).mT
    total = -cotangent_log_det.sum()  # ladj of the inverse is the negative
    penalty_matrix, penalty_inverse = penalty_by_hand(layer, rows, cotangent_log_det)
    grad_matrix = -adjoint.mT @ rows + total * inverse.mT + penalty_share * penalty_matrix
    grad_inverse = (
        share * (cotangent_x.mT @ h - total * matrix.mT) + penalty_share * penalty_inverse
    )

    root = math.sqrt(4)
    assert relative_error(layer.theta.grad, grad_matrix / root) < EXACT
    assert relative_error(layer.log_det.theta.grad, grad_inverse / root) < EXACT
    assert relative_error(layer.bias.grad, -(adjoint / scale).sum(0)) < EXACT
    assert relative_error(y.grad, adjoint / scale) < EXACT


@LEARNED
@pytest.mark.parametrize("factor", [2.0, 0.1, -0.3])
def test_scaling_a_loss_scales_its_gradient(reconstruction: str, factor: float) -> None:
    # By c what maximizes or minimizes the density, by |c| the penalty, that is always minimized.
    def gradient(weight: float, scale: float) -> Tensor:
        layer = learned_layer(reconstruction, 0.5, weight)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
        (scale * density_by_inverse(layer, x).mean()).backward()
        return torch.cat([layer.theta.grad.flatten(), layer.log_det.theta.grad.flatten()])

    without = gradient(0.0, 1.0)
    penalty = gradient(0.7, 1.0) - without
    assert penalty.norm() > 0
    assert relative_error(gradient(0.7, factor), factor * without + abs(factor) * penalty) < EXACT


@pytest.mark.parametrize("log_det", ["refined", "exact"])
@pytest.mark.parametrize("factor", [2.0, 0.1, -0.3])
def test_scaling_a_loss_scales_its_gradient_without_a_penalty(log_det: str, factor: float) -> None:
    gradients, x = [], torch.randn(5, 4)
    for scale in (1.0, factor):
        layer = linear(4, log_det=log_det)
        (scale * density_by_inverse(layer, x).mean()).backward()
        gradients.append(layer.theta.grad)
    assert relative_error(gradients[1], factor * gradients[0]) < EXACT


def test_mixture_zero_trains_r_by_the_penalty_alone() -> None:
    gradients = []
    for weight in (0.0, 1.0):
        layer = learned_layer("both", 0.0, weight)
        density_by_inverse(layer, torch.randn(5, 4)).sum().backward()
        gradients.append(layer.log_det.theta.grad)
    assert gradients[0] is None or not gradients[0].any()
    assert gradients[1].any()


def test_one_pass_inverse_trains_r() -> None:
    # inverse="one_pass": x = R h is a map of its own; A is no part of it.
    layer = linear(4, log_det="learned", inverse="one_pass")
    nudge_inverses(layer, 0.5)
    y, cotangent = torch.randn(5, 4), torch.randn(5, 4)
    (cotangent * layer.inv(y)).sum().backward()
    h = (y - layer.bias.detach()) / layer.log_scale.detach().exp()
    _, inverse = weight_pair(layer)
    assert relative_error(layer.inv(y).detach(), h @ inverse.mT) < EXACT
    assert relative_error(layer.log_det.theta.grad, cotangent.mT @ h / math.sqrt(4)) < EXACT
    assert layer.theta.grad is None or not layer.theta.grad.any()

"""Pairs of networks as layers: the paper's objective, the penalty, states, and bad input."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pyro_snf import (
    GECO,
    Compose,
    ResidualMLP,
    SelfNormalizing,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    self_normalizing,
)
from tests.pairs import Dense, Recorder, is_close, log_det_of, parameters_of_f
from tests.registry import (
    COPIES,
    LOG_DETS,
    assert_gradients_equal,
    conv,
    density_by_inverse,
    density_loss,
    exact_pair,
    free_form,
    linear,
    nudge_inverses,
    randomize,
    relative_error,
    rising_weight,
    standard_normal,
)
from tests.test_gradients import ELBOS, PROGRAMS, elbo_gradients

# Float64, condition numbers below 10.
EXACT = 1e-9
# The same operations on the same numbers, at other addresses.
SAME = 1e-12
# Of means over independent draws: what five standard errors leave out is one in two million.
STANDARD_ERRORS = 5
# Posterior moments after 400 steps of Adam with a falling rate and 16 particles: what is left is
# the noise of the last steps. 0.014 and 0.029 were seen with four seeds.
MEAN = 0.03
COVARIANCE = 0.05
# Of a density's integral by 200 × 200 points on a square that holds almost all of it.
INTEGRAL = 1e-4

SURROGATES = ["refined", "learned"]


def events(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(500 + seed))


def bad_pair(dim: int = 3, **options: object) -> SelfNormalizing:
    """A random pair whose g is off by some 30 %."""
    layer = free_form(dim, **options)
    nudge_inverses(layer, 0.5)
    return layer


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Those of all parameters, 0 where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in layer.named_parameters()
    }


# --- The layers for linear maps and for convolutions agree with it -------------------------------


def scaled_linear(log_scale: Tensor, **options: object) -> SelfNormalizingLinear:
    """A random layer with ``R ≠ A⁻¹`` and these scales."""
    layer = linear(len(log_scale), log_det="learned", bias=False, **options)
    nudge_inverses(layer, 0.5)
    with torch.no_grad():
        layer.log_scale.copy_(log_scale)
    return layer


def linear_pair(layer: SelfNormalizingLinear, **options: object) -> SelfNormalizing:
    """The same maps, ``W x`` and ``R diag(e^−s) y``, with as many orthogonal probes as features."""
    dim = layer.input_dim
    f, g = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
    with torch.no_grad():
        f.weight.copy_(layer.weight)
        g.weight.copy_(layer.inverse_weight)
    options = {"log_det": "learned", "num_probes": dim, "probe": "orthogonal", **options}
    return SelfNormalizing(f, g, event_shape=dim, **options)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("reconstruction", ["both", "inverse"])
@pytest.mark.parametrize(("mixture", "weight"), [(0.0, 0.0), (0.0, 0.7), (0.5, 0.7)])
def test_expected_gradient_is_that_of_the_linear_layer(
    mixture: float, weight: float, reconstruction: str, scaled: bool
) -> None:
    log_scale = torch.linspace(-0.5, 0.7, 4) if scaled else torch.zeros(4)
    options = {"reconstruction": reconstruction}
    layer = scaled_linear(log_scale, mixture=mixture, reconstruction_weight=weight, **options)
    # There the objective is divided by 1 − m, the penalty's share of it included.
    pair = linear_pair(layer, reconstruction_weight=weight / (1 - mixture), **options)
    x, cotangent = events(6, 4), torch.linspace(-1, 2, 6)
    for transform in (layer, pair):
        loss = cotangent * density_by_inverse(transform, x) + transform(x).square().sum(1)
        loss.sum().backward()
    # W = diag(e^s) (I + Θ/√D), and likewise R.
    scale = log_scale.exp()
    expected = scale.unsqueeze(1) * pair.forward_net.weight.grad / 2
    assert relative_error(layer.theta.grad, expected) < EXACT
    if mixture == 0:  # else R has a share of log p^g
        actual, expected = layer.estimator.theta.grad, pair.inverse_net.weight.grad
        if weight == 0:
            assert actual is None or not actual.any()
            assert expected is None
        else:
            assert relative_error(actual, expected / scale / 2) < EXACT


def test_gradient_of_the_linear_layer_is_the_mean_of_one_probe() -> None:
    layer = scaled_linear(torch.zeros(4), mixture=0.0, reconstruction_weight=0.0)
    pair = linear_pair(layer, num_probes=1, reconstruction_weight=0.0)
    x = events(20_000, 4)
    for transform in (layer, pair):
        transform.log_abs_det_jacobian(x, transform(x)).mean().backward()
    # A probe of length √D has entries of J_gᵀ v vᵀ of the size of J_g's rows.
    error = pair.inverse_net.weight.detach().norm() / math.sqrt(len(x))
    deviation = (pair.forward_net.weight.grad / 2 - layer.theta.grad).abs().max()
    assert deviation < STANDARD_ERRORS * error
    assert layer.theta.grad.norm() > 10 * STANDARD_ERRORS * error


@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_expected_gradient_is_that_of_the_convolution(weight: float, padding_mode: str) -> None:
    layer = conv(
        2,
        log_det="learned",
        bias=False,
        inverse_kernel_size=3,
        padding_mode=padding_mode,
        mixture=0.0,
        reconstruction_weight=weight,
    )
    nudge_inverses(layer, 0.5)
    nn.init.zeros_(layer.log_scale)
    options = {"padding": 1, "padding_mode": padding_mode, "bias": False}
    f, g = nn.Conv2d(2, 2, 3, **options), nn.Conv2d(2, 2, 3, **options)
    with torch.no_grad():
        f.weight.copy_(layer.weight)
        g.weight.copy_(layer.estimator.kernel())
    pair = SelfNormalizing(
        f,
        g,
        event_shape=(2, 4, 5),
        log_det="learned",
        num_probes=40,
        probe="orthogonal",
        reconstruction_weight=weight,
    )
    x, cotangent = events(3, 2, 4, 5), torch.linspace(-1, 2, 3)
    for transform in (layer, pair):
        (cotangent * density_by_inverse(transform, x)).sum().backward()
    scale = (2 * 3 * 3) ** -0.5  # a = δ + θ/√(C kh kw)
    assert relative_error(layer.theta.grad, scale * f.weight.grad) < EXACT
    if weight > 0:
        assert relative_error(layer.estimator.theta.grad, scale * g.weight.grad) < EXACT


# --- Inside SVI ---------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("log_det", SURROGATES)
def test_elbo_gradient_is_the_exact_one(
    log_det: str, program: Callable[..., tuple[Callable, Callable]], elbo: str
) -> None:
    # Subsampled plates, scales, particles; the layer as guide, prior and density.
    results = []
    for mode in (log_det, "exact"):
        layer = exact_pair(3, log_det=mode, num_probes=3, probe="orthogonal", value_iterations=3)
        loss, found = elbo_gradients(*program(layer), layer, ELBOS[elbo]())
        named = {name: one for name, one in found.items() if name.startswith("forward_net")}
        results.append((loss, named))
    (loss, actual), (exact_loss, expected) = results
    assert_gradients_equal(actual, expected)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=EXACT)


# --- The penalty --------------------------------------------------------------------------------


def total_gradients(
    pair: SelfNormalizing, x: Tensor, cotangent: Tensor, **options: object
) -> dict[str, Tensor]:
    """Of ``Σ c log|det J|`` by a layer of the pair's networks, the penalty's included."""
    layer = SelfNormalizing(
        pair.forward_net, pair.inverse_net, event_shape=pair.event_shape, **options
    )
    layer.zero_grad()
    (cotangent * log_det_of(layer, x)).sum().backward()
    return gradients(layer)


def penalty_gradients(
    pair: SelfNormalizing, x: Tensor, cotangent: Tensor, weight: object = 0.7, **options: object
) -> dict[str, Tensor]:
    """What the penalty adds to them: probes are those of the seed, whatever λ is."""
    without = total_gradients(pair, x, cotangent, reconstruction_weight=0.0, **options)
    total = total_gradients(pair, x, cotangent, reconstruction_weight=weight, **options)
    return {name: total[name] - without[name] for name in total}


def autograd_gradients(pair: SelfNormalizing, loss: Tensor) -> dict[str, Tensor]:
    named = dict(pair.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Of differences of gradients of order 10.
        assert is_close(actual[name], gradient, EXACT), name


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("reconstruction", ["both", "inverse"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_penalty_is_the_reconstruction_error(
    log_det: str, reconstruction: str, needs_gradient: bool
) -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.linspace(-1, 2, 6)
    options = {"log_det": log_det, "reconstruction": reconstruction}
    given = x.clone().requires_grad_(needs_gradient)
    actual = penalty_gradients(pair, given, cotangent, **options)
    latent = pair.forward_net(x)
    if reconstruction == "inverse":
        latent = latent.detach()
    error = (pair.inverse_net(latent) - x).square().sum(1)
    # Scaled with the log-determinant, and minimized whatever becomes of that.
    expected = autograd_gradients(pair, 0.7 * (cotangent.abs() * error).sum())
    assert_same(actual, expected)
    trained = {name.split(".")[0] for name, one in actual.items() if one.norm() > 1e-6}
    assert trained == {"inverse_net", *(["forward_net"] if reconstruction == "both" else [])}


@pytest.mark.parametrize("reconstruction", ["both", "inverse"])
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("latents", ["noise", "base", "noise and base"])
def test_penalty_of_other_latents(latents: str, log_det: str, reconstruction: str) -> None:
    pair, x, cotangent = bad_pair(), events(40, 3), torch.linspace(-1, 2, 40)
    recorder = Recorder(pair.inverse_net)
    options = {"log_det": log_det, "reconstruction": reconstruction}
    options["latent_noise"] = 0.1 if "noise" in latents else 0.0
    options["base"] = dist.Normal(5 * torch.ones(3), 0.1).to_event(1) if "base" in latents else None
    recorded = SelfNormalizing(
        pair.forward_net, recorder, event_shape=3, reconstruction_weight=0.7, **options
    )
    log_det_of(recorded, x)
    clean = pair.forward_net(x).detach()
    # What g was given besides: first the networks are checked, then comes the data's own latent.
    others = [one for one in recorder.inputs if one.shape == x.shape][1:]
    assert len(others) == ("noise" in latents) + ("base" in latents)
    if "noise" in latents:
        noise = (others[0] - clean) / 0.1
        assert noise.abs().max() < 5
        assert 0.7 < noise.std() < 1.3
    if "base" in latents:
        assert (others[-1] - 5).abs().max() < 0.5
        assert len(others[-1].unique()) == 120
    if len(others) == 2:  # by random numbers of their own
        assert ((others[1] - 5) / 0.1 - noise).abs().max() > 1

    errors = (pair.inverse_net(clean) - x).square().sum(1)
    if reconstruction == "both":
        errors = (pair.inverse_net(pair.forward_net(x)) - x).square().sum(1)
    expected = autograd_gradients(pair, 0.7 * (cotangent.abs() * errors).sum())
    for other in others:
        error = (pair.forward_net(pair.inverse_net(other)) - other).square().sum(1)
        found = autograd_gradients(pair, 0.7 * (cotangent.abs() * error).sum())
        for name, one in found.items():
            if reconstruction == "both" or name.startswith("inverse_net"):
                expected[name] = expected[name] + one
    assert_same(penalty_gradients(pair, x, cotangent, **options), expected)


@pytest.mark.parametrize("reconstruction", ["both", "inverse"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_penalty_around_the_data(log_det: str, reconstruction: str) -> None:
    pair, x, cotangent = bad_pair(), events(40, 3), torch.linspace(-1, 2, 40)
    recorder = Recorder(pair.forward_net)
    options = {"log_det": log_det, "reconstruction": reconstruction, "data_noise": 0.1}
    log_det_of(
        SelfNormalizing(
            recorder, pair.inverse_net, event_shape=3, reconstruction_weight=0.7, **options
        ),
        x,
    )
    other = recorder.inputs[-1]
    noise = (other - x) / 0.1
    assert noise.abs().max() < 5
    assert 0.7 < noise.std() < 1.3

    latents = [pair.forward_net(one) for one in (x, other)]
    if reconstruction == "inverse":
        latents = [latent.detach() for latent in latents]
    error = sum(
        (pair.inverse_net(latent) - one).square().sum(1)
        for latent, one in zip(latents, (x, other), strict=True)
    )
    expected = autograd_gradients(pair, 0.7 * (cotangent.abs() * error).sum())
    assert_same(penalty_gradients(pair, x, cotangent, **options), expected)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_tolerance_leaves_f_alone_where_the_error_is_small(
    log_det: str, needs_gradient: bool
) -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.linspace(-1, 2, 6)
    latent = pair.forward_net(x)
    for_g = (pair.inverse_net(latent.detach()) - x).square().sum(1)
    for_both = (pair.inverse_net(latent) - x).square().sum(1)
    root_mean_squares = (for_both.detach() / 3).sqrt()
    tolerance = root_mean_squares.median().item() * (1 + EXACT)  # which is one of the errors
    error = torch.where(root_mean_squares > tolerance, for_both, for_g)
    expected = autograd_gradients(pair, 0.7 * (cotangent.abs() * error).sum())
    actual = penalty_gradients(
        pair,
        x.clone().requires_grad_(needs_gradient),
        cotangent,
        log_det=log_det,
        reconstruction_tolerance=tolerance,
    )
    assert_same(actual, expected)


def test_latents_train_g_alone_where_there_is_a_tolerance() -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.ones(6)
    options = {"latent_noise": 0.3, "base": standard_normal(3), "reconstruction_tolerance": 1e3}
    actual = penalty_gradients(pair, x, cotangent, **options)
    trained = {name.split(".")[0] for name, one in actual.items() if one.norm() > 1e-6}
    assert trained == {"inverse_net"}


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_latents_are_a_function_of_the_seed_and_the_step(log_det: str) -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.ones(6)
    options = {"log_det": log_det, "reconstruction_weight": 1.0}
    for other in ({"data_noise": 0.3}, {"latent_noise": 0.3}, {"base": standard_normal(3)}):
        state = torch.get_rng_state()
        first, again, elsewhere = (
            total_gradients(pair, x, cotangent, seed=seed, **other, **options) for seed in (1, 1, 2)
        )
        assert torch.equal(torch.get_rng_state(), state)
        for name, one in first.items():
            assert is_close(again[name], one, SAME), name
            assert name.startswith("forward_net") or not torch.equal(elsewhere[name], one), name
        # The next ones are others.
        layer = SelfNormalizing(
            pair.forward_net, Recorder(pair.inverse_net), event_shape=3, **other, **options
        )
        for _ in range(2):
            log_det_of(layer, x.clone())
        latents = [one for one in layer.inverse_net.inputs if one.shape == x.shape]
        assert len({one.sum().item() for one in latents}) == 3  # that of the data twice


@pytest.mark.parametrize("reconstruction", ["both", "inverse"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_data_get_no_gradient_of_the_penalty(log_det: str, reconstruction: str) -> None:
    pair, found = bad_pair(), []
    for weight in (0.0, 10.0):
        layer = SelfNormalizing(
            pair.forward_net,
            pair.inverse_net,
            event_shape=3,
            log_det=log_det,
            reconstruction=reconstruction,
            reconstruction_weight=weight,
            data_noise=0.3,
            latent_noise=0.3,
            base=standard_normal(3),
        )
        x = events(6, 3).requires_grad_()
        density_by_inverse(layer, x).sum().backward()
        found.append(x.grad)
    assert is_close(*found, EXACT)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_penalty_never_changes_the_value(log_det: str) -> None:
    pair, x, values = bad_pair(), events(6, 3), []
    for options in (
        {"reconstruction_weight": 0.0},
        {"reconstruction_weight": 100.0},
        {"reconstruction_weight": 100.0, "latent_noise": 1.0, "base": standard_normal(3)},
        {"reconstruction_weight": 100.0, "data_noise": 1.0, "reconstruction_tolerance": 0.1},
        {"reconstruction_weight": GECO(0.1, weight=100.0)},
        {"reconstruction_weight": rising_weight, "reconstruction": "inverse"},
    ):
        options = {"log_det": log_det, "event_shape": 3, **options}
        values.append(log_det_of(SelfNormalizing(pair.forward_net, pair.inverse_net, **options), x))
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("factor", [2.0, 0.1, -0.3])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_scaling_a_loss_scales_its_gradient(log_det: str, factor: float) -> None:
    # By c what maximizes or minimizes the density, by |c| the penalty, that is always minimized.
    pair, x, ones = bad_pair(), events(6, 3), torch.ones(6)
    without = total_gradients(pair, x, ones, log_det=log_det, reconstruction_weight=0.0)
    penalty = penalty_gradients(pair, x, ones, log_det=log_det)
    total = total_gradients(pair, x, factor * ones, log_det=log_det, reconstruction_weight=0.7)
    for name, one in total.items():
        expected = factor * without[name] + abs(factor) * penalty[name]
        assert is_close(one, expected, EXACT), name


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_without_a_penalty_g_is_not_trained(log_det: str) -> None:
    layer = bad_pair(log_det=log_det, reconstruction_weight=0.0)
    density_loss(layer, events(6, 3)).backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.inverse_net.parameters())


# --- λ under control, or on a schedule ----------------------------------------------------------


def step(layer: SelfNormalizing) -> None:
    """What an optimizer does."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.99)


@pytest.mark.parametrize(("tolerance", "direction"), [(1e-6, 1), (10.0, -1)])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_controller_moves_both_ways_and_once_a_step(
    log_det: str, tolerance: float, direction: int
) -> None:
    controller = GECO(tolerance)
    layer, weights = bad_pair(log_det=log_det, reconstruction_weight=controller), []
    for _ in range(3):
        for seed in range(3):  # more log-determinants of the same parameters
            density_loss(layer, events(6, 3, seed=seed))
            weights.append(controller.weight.item())
        step(layer)
    assert weights[0::3] == weights[1::3] == weights[2::3]
    assert weights[0::3] == sorted(weights[0::3], reverse=direction < 0)
    assert len(set(weights)) == 3


def test_controller_sees_the_mean_square_error_of_an_element_of_the_data() -> None:
    controller = GECO(0.01, decay=0.0)
    layer, x = bad_pair(reconstruction_weight=controller, latent_noise=3.0), events(6, 3)
    log_det_of(layer, x)
    expected = (layer.inverse_net(layer.forward_net(x)) - x).square().mean().item()
    assert controller.mean_square_error.item() == pytest.approx(expected, rel=EXACT)


def test_controlled_weight_is_that_of_the_penalty() -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.ones(6)
    controller = GECO(0.01, weight=0.7, rate=1e-15)
    actual = penalty_gradients(pair, x, cotangent, controller)
    assert_same(actual, penalty_gradients(pair, x, cotangent, 0.7))


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen"])
def test_nothing_moves_outside_training(how: str) -> None:
    calls: list[int] = []
    for weight in (GECO(0.01), lambda step: calls.append(step) or 1.0):
        layer = bad_pair(reconstruction_weight=weight).train(how != "eval")
        layer.requires_grad_(how != "frozen")
        before = copy.deepcopy(layer.state_dict())
        with torch.set_grad_enabled(how != "no_grad"):
            density_loss(layer, events(6, 3))
        for name, value in layer.state_dict().items():
            same = torch.equal if isinstance(value, Tensor) else _same_state
            assert same(value, before[name]), name
    assert not calls


def _same_state(one: dict[str, object], other: dict[str, object]) -> bool:
    # The certificate is a NaN before the first step, which is not equal to itself.
    return repr(one) == repr(other)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_schedule_counts_the_changes_of_the_parameters(log_det: str) -> None:
    calls: list[int] = []
    layer = bad_pair(log_det=log_det, reconstruction_weight=lambda step: calls.append(step) or 1.0)
    for _ in range(4):
        for _ in range(2):
            density_loss(layer, events(6, 3))
        step(layer)
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3]


def test_scheduled_weight_is_that_of_the_penalty() -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.ones(6)
    actual = penalty_gradients(pair, x, cotangent, lambda step: 0.7 - step)
    assert_same(actual, penalty_gradients(pair, x, cotangent, 0.7))
    # 0 is as good as none, and a number of torch's as good as one of Python's.
    nothing = penalty_gradients(pair, x, cotangent, lambda step: 0)
    assert all(is_close(one, torch.zeros_like(one), SAME) for one in nothing.values())
    actual = penalty_gradients(pair, x, cotangent, lambda step: torch.tensor(0.7))
    assert_same(actual, penalty_gradients(pair, x, cotangent, 0.7))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_schedule_that_gives_no_weight_is_an_error(value: float) -> None:
    layer = bad_pair(reconstruction_weight=lambda step: value if step == 1 else 1.0)
    density_loss(layer, events(6, 3))
    step(layer)
    message = rf"expected reconstruction_weight\(1\) to be a number >= 0; got {value}"
    with pytest.raises(ValueError, match=message):
        density_loss(layer, events(6, 3))


# --- The value in training ----------------------------------------------------------------------


def test_learned_value_is_exactly_zero() -> None:
    layer = bad_pair(log_det="learned", value_iterations=0)
    value = log_det_of(layer, events(6, 3))
    assert value.requires_grad
    assert torch.equal(value, torch.zeros(6))


@pytest.mark.parametrize("log_det", SURROGATES)
def test_value_is_exact_with_enough_iterations(log_det: str) -> None:
    options = {"num_probes": 8, "probe": "orthogonal", "value_iterations": 8}
    layer, x = bad_pair(8, log_det=log_det, **options), events(6, 8)
    value, expected = log_det_of(layer, x), log_det_of(Dense(layer.forward_net), x)
    assert (value - expected).abs().max() < EXACT


@pytest.mark.parametrize("log_det", SURROGATES)
def test_value_with_few_iterations_is_an_upper_estimate(log_det: str) -> None:
    count, dim = 2000, 32
    x = events(1, dim).expand(count, dim)
    means, errors = [], []
    for iterations in (1, 4):
        layer = free_form(dim, width=dim, log_det=log_det, value_iterations=iterations)
        value = log_det_of(layer, x).detach()
        means.append(value.mean().item())
        errors.append(value.std().item() / math.sqrt(count))
    expected = log_det_of(layer.eval(), x[:1]).item()
    assert means[0] - expected > STANDARD_ERRORS * errors[0]
    assert abs(means[1] - expected) < STANDARD_ERRORS * errors[1]


@pytest.mark.parametrize("log_det", SURROGATES)
def test_value_of_the_same_parameters_is_the_same(log_det: str) -> None:
    layer = free_form(32, width=32, log_det=log_det, value_iterations=2)
    base = standard_normal(32)
    for part in (layer, layer.inv):
        flow = dist.TransformedDistribution(base, [part])
        y = flow.rsample((5,))
        assert is_close(flow.log_prob(y), flow.log_prob(y.clone()), 1e-8)  # by way of the inverse
    x = events(6, 32)
    values = [log_det_of(layer, x.clone()).detach() for _ in range(2)]
    assert torch.equal(*values)
    step(layer)
    # The probes are new ones then: the error is another, too.
    errors = [value - log_det_of(layer.eval(), x).detach() for value in values]
    layer.train()
    errors.append(log_det_of(layer, x).detach() - log_det_of(layer.eval(), x).detach())
    assert (errors[2] - errors[0]).norm() > 0.1 * errors[0].norm()


@pytest.mark.parametrize("log_det", SURROGATES)
def test_gradients_of_the_same_parameters_are_by_new_probes(log_det: str) -> None:
    layer, x, found = bad_pair(log_det=log_det, num_probes=1), events(6, 3), []
    for _ in range(2):
        layer.zero_grad()
        log_det_of(layer, x).sum().backward()
        found.append(layer.forward_net.blocks[0][0].weight.grad.clone())
    assert not torch.equal(*found)


# --- What is remembered, and how it dies --------------------------------------------------------


def test_one_pass_of_each_network_a_step() -> None:
    pair = bad_pair()
    f, g = Recorder(pair.forward_net), Recorder(pair.inverse_net)
    layer = SelfNormalizing(f, g, event_shape=3)
    for use in (lambda x: density_loss(layer, x), lambda x: log_det_of(layer, x).sum()):
        use(events(6, 3))
        f.inputs.clear()
        g.inputs.clear()
        use(events(6, 3)).backward()
        assert len(f.inputs) == len(g.inputs) == 1


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_log_dets_alone_can_be_differentiated_again_and_again(log_det: str) -> None:
    # No gradient passes y then: the pair whose graph is used up must die all the same.
    layer, x, counts = bad_pair(log_det=log_det), events(6, 3), []
    for _ in range(3):
        layer.zero_grad()
        log_det_of(layer, x).sum().backward()
        counts.append(gradients(layer))
    y = layer(x)
    layer.log_abs_det_jacobian(x, y).sum().backward()
    layer.log_abs_det_jacobian(x, layer(x)).sum().backward()


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_several_losses_of_one_pass(log_det: str) -> None:
    layer, x = bad_pair(log_det=log_det), events(6, 3)
    y = layer(x)
    total = layer.log_abs_det_jacobian(x, y).sum() - y.square().sum()
    total = total + layer.log_abs_det_jacobian(x, y).mean()
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.forward_net.parameters())


@pytest.mark.parametrize("how", ["in place", "past the counter", "replaced"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_log_det_after_a_change_of_the_parameters(log_det: str, how: str) -> None:
    # y is remembered with the graph that it was computed by: it must not be taken for the new one.
    layer, x = (
        free_form(log_det=log_det, reconstruction="inverse", value_iterations=3),
        events(6, 3),
    )
    parameter = layer.forward_net.blocks[0][2].weight
    y = layer(x)
    with torch.no_grad():
        if how == "in place":
            parameter.mul_(-1)
        elif how == "past the counter":
            parameter.data.mul_(-1)
        else:
            parameter.data = -parameter.data
    expected = log_det_of(Dense(layer.forward_net), x)
    if how == "in place":  # of the other two, the pair's own state alone can tell
        value = layer.log_abs_det_jacobian(x, y)
        value.sum().backward()  # by no graph that has been written to
        assert log_det == "learned" or is_close(value, expected, EXACT)
    fresh = layer(x)
    assert is_close(fresh, layer.forward_net(x), EXACT)
    value = layer.log_abs_det_jacobian(x, fresh)
    assert log_det == "learned" or is_close(value, expected, EXACT)
    (value + fresh.sum(1)).sum().backward()


@pytest.mark.parametrize("inverse", ["refined", "learned"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_layer_is_freed_with_its_last_reference(log_det: str, inverse: str) -> None:
    # A remembered pair has a graph, and a graph must not hold the layer that remembers it.
    layer, x = bad_pair(log_det=log_det, inverse=inverse), events(6, 3)
    loss = density_loss(layer, x) + layer.inv(x).sum()
    loss.backward()
    layer.log_abs_det_jacobian(x, layer.inv(x))
    y = layer(x)
    value = layer.log_abs_det_jacobian(x, y)
    references = [weakref.ref(one) for one in (layer, layer.forward_net, layer.estimator)]
    del layer, loss, value, y
    gc.collect()
    assert [one() for one in references] == [None, None, None]


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_graphs_do_not_pile_up(log_det: str) -> None:
    # Without the garbage collector's help: of a step's tensors nothing is left after the next one.
    layer, references = bad_pair(log_det=log_det), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    gc.collect()
    gc.disable()
    try:
        for index in range(3):
            x = events(6, 3, seed=index)
            y = layer(x)
            loss = y.square().sum() - layer.log_abs_det_jacobian(x, y).sum()
            loss = loss + layer.inv(events(6, 3)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            references.append([weakref.ref(one) for one in (x, y, loss)])
    finally:
        gc.enable()
    assert [one() for one in references[0] + references[1]] == [None] * 6


def test_copy_of_a_layer_holds_no_tensors_of_old() -> None:
    layer = free_form(8, width=64)
    small, x = len(pickle.dumps(layer)), events(5000, 8)
    log_det_of(layer, x)
    layer.inv(x)
    assert len(pickle.dumps(layer)) < 1.1 * small


# --- Saving and resuming ------------------------------------------------------------------------


RUNS: dict[str, Callable[[], SelfNormalizing]] = {
    "refined": lambda: self_normalizing(2, [6], num_blocks=1, value_iterations=1, seed=3),
    "learned GECO": lambda: self_normalizing(
        2, [6], num_blocks=1, log_det="learned", num_probes=2, reconstruction_weight=GECO(0.01)
    ),
    "exact, a schedule and other latents": lambda: self_normalizing(
        2,
        [6],
        num_blocks=1,
        log_det="exact",
        reconstruction_weight=rising_weight,
        latent_noise=0.1,
        base=standard_normal(2),
    ),
}


def run(layer: SelfNormalizing, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for index in steps:
        loss = density_loss(layer, 2 * events(8, 2, seed=index).cumsum(-1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("make_copy", ["state_dict", *COPIES], ids=str)
@pytest.mark.parametrize("steps", [0, 4])
def test_resumed_run_is_the_same_bit_for_bit(
    steps: int, make_copy: str | Callable[[SelfNormalizing], SelfNormalizing], kind: str
) -> None:
    layer = RUNS[kind]()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    run(layer, optimizer, range(steps))
    if isinstance(make_copy, str):
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        resumed = RUNS[kind]()
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        resumed = make_copy(layer)
    resumed_optimizer = torch.optim.Adam(resumed.parameters(), lr=0.02)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    expected = run(layer, optimizer, range(steps, steps + 4))
    torch.randn(5)  # the global stream is no part of it
    assert run(resumed, resumed_optimizer, range(steps, steps + 4)) == expected
    states = [one.estimator.get_extra_state() for one in (layer, resumed)]
    assert _same_state(*states)
    assert states[0]["num_steps"] == states[0]["num_draws"] == steps + 4
    for one, other in zip(layer.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_seed_comes_with_the_state() -> None:
    layer, other = bad_pair(seed=3), bad_pair(seed=4)
    other.load_state_dict(layer.state_dict())
    x, found = events(6, 3), []
    for each in (layer, other):
        log_det_of(each, x).sum().backward()
        found.append(gradients(each))
    assert all(torch.equal(found[1][name], one) for name, one in found[0].items())


def test_certificate_comes_with_the_state() -> None:
    layer, other = bad_pair(log_det="learned"), bad_pair(log_det="learned", seed=1)
    log_det_of(layer, events(6, 3))
    other.load_state_dict(layer.state_dict())
    assert other.certificate == pytest.approx(layer.certificate, rel=1e-6)
    assert 0.01 < layer.certificate < 1


# --- Lower precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, log_det: str) -> None:
    options = {"log_det": log_det, "latent_noise": 0.1, "base": standard_normal(4)}
    reference, layer, x = free_form(4), free_form(4, **options).to(dtype), events(6, 4)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps  # a dozen roundings of numbers of size 1 to 3
    assert is_close(y.double(), reference(x), tolerance)
    again = layer.inv(y.detach().clone())
    assert again.dtype == dtype
    assert is_close(again.double(), x, tolerance)
    value = layer.log_abs_det_jacobian(x.to(dtype), y)
    assert value.dtype == torch.float32
    (y.float().square().sum() - value.sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert torch.isfinite(parameter.grad).all(), name
    with torch.no_grad():
        value = layer.log_abs_det_jacobian(x.to(dtype), y)
    assert value.dtype == torch.float32
    expected = log_det_of(reference.eval(), x)
    assert is_close(value.double(), expected, tolerance)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_float32(log_det: str) -> None:
    layer, exact = free_form(4, log_det=log_det), free_form(4, log_det="exact")
    randomize(exact)
    x = events(6, 4)
    expected = log_det_of(exact.eval(), x)
    layer.float()
    value = log_det_of(layer, x.float())
    assert value.dtype == torch.float32
    assert is_close(log_det_of(layer.eval(), x.float()).double(), expected, 1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_autocast(log_det: str, training: bool) -> None:
    layer, x = free_form(4, log_det=log_det).float().train(training), events(6, 4).float()
    with torch.no_grad():
        expected, log_det_value = layer(x), log_det_of(layer, x)
    layer.clear_cache()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        value = layer.log_abs_det_jacobian(x, y)
        again = layer.inv(y.detach().clone().float())
        low = layer(x.bfloat16())
        with torch.no_grad():
            # What is not cast is not rounded.
            exact = layer.log_abs_det_jacobian(x, y)
            assert is_close(layer(layer.inv(expected)).float(), expected, 0.1)
    assert is_close(y.float(), expected, 0.1)
    assert is_close(low.float(), expected, 0.1)
    assert is_close(again.float(), x, 0.1)
    assert value.dtype == exact.dtype == torch.float32
    assert is_close(exact, log_det_value, 1e-4)
    (y.float().square().sum() - value.sum() + again.sum()).backward()
    for name, parameter in layer.named_parameters():
        if parameter.grad is None:
            assert not training
            assert name.startswith("inverse_net")
        else:
            assert parameter.grad.dtype == torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name


# --- Networks of all kinds ----------------------------------------------------------------------


class _Smooth(torch.autograd.Function):
    """``x + 0.3 tanh x``, with a backward pass of its own, and nothing for forward mode."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + 0.3 * x.tanh()

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * (1 + 0.3 * (1 - x.tanh().square()))


class _SmoothOnce(_Smooth):
    """The same, with a backward pass that has none itself."""

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return _Smooth.backward(ctx, cotangent)


class Activated(nn.Module):
    """A dense layer near the identity, before a function; or a block of it beside the input."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], *, dim: int = 3, residual: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(dim) + 0.1 * events(dim, dim))
        self.function = function
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        result = self.function(self.linear(x))
        return x + 0.3 * result if self.residual else result


class Attention(nn.Module):
    """Torch's fused attention among the three tokens of an event."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.back = nn.Linear(4, 12), nn.Linear(4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(F.scaled_dot_product_attention(*self.project(x).chunk(3, -1)))


def transformer(dropout: float = 0.0) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True, norm_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.3)
    return layer


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3))


def pooled() -> nn.Module:
    """A U-Net in small, with normalization in groups."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a function without forward mode": (lambda: Activated(_Smooth.apply), (3,)),
    "such a function in a residual block": (lambda: Activated(_Smooth.apply, residual=True), (3,)),
    "attention": (Attention, (3, 4)),
    "a transformer's block": (transformer, (3, 4)),
    "layer normalization": (lambda: Skip(normalized()), (3,)),
    "a U-Net": (lambda: Skip(pooled()), (2, 4, 4)),
    "dropout of nothing": (lambda: Skip(nn.Sequential(normalized(), nn.Dropout(0.0))), (3,)),
}


class Skip(nn.Module):
    """``x + 0.2 h(x)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.network(x)


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_all_kinds(kind: str, log_det: str) -> None:
    make, shape = NETWORKS[kind]
    f, g, x = make(), make(), events(5, *shape)
    dim = math.prod(shape)
    layer = SelfNormalizing(
        f,
        g,
        event_shape=shape,
        log_det=log_det,
        num_probes=dim,
        probe="orthogonal",
        max_iterations=dim,
        tolerance=1e-12,
        reconstruction="inverse",
        value_iterations=dim,
    )
    # In training: value and gradient are exact, but for the gradient of "learned".
    y = layer(x)
    value = layer.log_abs_det_jacobian(x, y)
    (y.square().sum() - value.sum()).backward()
    actual = {name: p.grad for name, p in parameters_of_f(layer).items()}
    layer.zero_grad()
    layer.eval()
    assert is_close(y, layer(x), EXACT)
    expected = log_det_of(layer, x)
    assert is_close(value, expected, EXACT)
    (layer(x).square().sum() - expected.sum()).backward()
    if log_det != "learned":
        for name, p in parameters_of_f(layer).items():
            assert is_close(actual[name], p.grad, 1e-7), name
    # And otherwise.
    for one, logarithm in zip(x, expected, strict=True):
        jacobian = torch.autograd.functional.jacobian(layer, one).reshape(dim, dim)
        assert is_close(logarithm, torch.linalg.slogdet(jacobian).logabsdet, EXACT)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert is_close(log_det_of(layer, x.clone()), expected, EXACT)
            assert is_close(layer.inv(layer(x).clone()), x, 1e-7)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_inverse_net_need_not_be_differentiable_twice(log_det: str) -> None:
    # Nor need it be good for anything: Newton's method does with dense Jacobians then.
    f, g = Activated(_Smooth.apply), Activated(_SmoothOnce.apply)
    layer, x = SelfNormalizing(f, g, event_shape=3, log_det=log_det), events(5, 3)
    density_loss(layer, x).backward()
    assert all((p.grad != 0).any() for p in layer.parameters())
    assert is_close(layer.inv(layer(x).detach().clone()), x, EXACT)


def test_parameters_are_not_needed() -> None:
    # Pairs of fixed maps: nothing is trained, and everything is exact.
    layer, x = SelfNormalizing(nn.Softsign(), nn.Identity(), event_shape=2), events(5, 2)
    expected = -2 * (1 + x.abs()).log().sum(1)
    assert is_close(log_det_of(layer, x), expected, EXACT)
    assert is_close(layer.inv(layer(x).clone()), x, EXACT)
    assert layer(x.float()).dtype == torch.float32


def test_g_alone_can_be_trained() -> None:
    layer, x = bad_pair(), events(6, 3)
    layer.forward_net.requires_grad_(False)
    density_loss(layer, x).backward()
    assert all(p.grad is None for p in layer.forward_net.parameters())
    assert all((p.grad != 0).any() for p in layer.inverse_net.parameters())


def test_networks_may_share_parameters() -> None:
    # Tied weights: g is f with the other sign, say.
    network = ResidualMLP(3, [4])
    layer = SelfNormalizing(network, network, event_shape=3)
    density_loss(layer, events(6, 3)).backward()
    assert len(list(layer.parameters())) == len(list(network.parameters()))
    assert torch.isfinite(network.blocks[0][2].weight.grad).all()


# --- Networks that will not do ------------------------------------------------------------------


def hidden_dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True)


def hidden_batch_statistics(x: Tensor) -> Tensor:
    return x - x.mean(0)


RANDOM = "to map an event always alike, for a flow is one map; got "
MIXED = "to map each event for itself; got "

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)),
        RANDOM + r"NAME\.1, Dropout\(p=0\.1, inplace=False\), in training mode",
    ),
    "dropout of channels": (lambda: nn.Dropout1d(0.1), RANDOM + r"NAME, Dropout1d\(p=0\.1"),
    "alpha dropout": (lambda: nn.AlphaDropout(0.1), RANDOM + r"NAME, AlphaDropout\(p=0\.1"),
    "random slopes": (lambda: nn.RReLU(), RANDOM + "NAME, RReLU"),
    "dropout in a start as the identity": (
        lambda: ResidualMLP(3, [4], activation=lambda: nn.Dropout(0.5)),
        RANDOM + r"NAME\.blocks\.0\.1, Dropout",
    ),
    "batch normalization": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        MIXED + r"NAME\.1, BatchNorm1d\(3, .* put it into eval\(\) mode",
    ),
    "batch normalization without statistics": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
        MIXED + "NAME, BatchNorm1d",
    ),
    "hidden dropout": (
        lambda: Activated(hidden_dropout),
        RANDOM + "another output the second time: is there dropout",
    ),
    "noise": (lambda: Activated(lambda x: x + torch.randn_like(x)), RANDOM + "another output"),
    "hidden statistics": (
        lambda: Activated(hidden_batch_statistics),
        MIXED + "another output where other events were in the batch",
    ),
}


@pytest.mark.parametrize("which", ["forward_net", "inverse_net"])
@pytest.mark.parametrize("kind", REFUSED)
def test_random_and_mixing_networks_are_refused(kind: str, which: str) -> None:
    make, message = REFUSED[kind]
    networks = {"forward_net": nn.Linear(3, 3), "inverse_net": nn.Linear(3, 3), which: make()}
    layer, x = SelfNormalizing(**networks, event_shape=3), events(6, 3)
    state = torch.get_rng_state()
    for use in (layer, layer.inv, lambda x: layer.log_abs_det_jacobian(x, x)):
        for _ in range(2):  # nobody gets past it by asking again
            with pytest.raises(
                ValueError, match=f"expected {which} " + message.replace("NAME", which)
            ):
                use(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_with_dropout_is_refused() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x)[0]

    layer = SelfNormalizing(Attending(), transformer(), event_shape=(3, 4))
    with pytest.raises(ValueError, match="expected forward_net " + RANDOM):
        layer(events(5, 3, 4))
    layer = SelfNormalizing(transformer(), transformer(0.1), event_shape=(3, 4))
    with pytest.raises(ValueError, match=r"expected inverse_net .* inverse_net\.dropout"):
        layer(events(5, 3, 4))


@pytest.mark.parametrize("training", [False, True])
def test_what_is_at_rest_in_eval_mode_will_do_there(training: bool) -> None:
    for make in (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.RReLU()),
    ):
        layer, x = SelfNormalizing(make(), make(), event_shape=3), events(6, 3)
        layer.eval()
        if training:  # the layer is trained, and its networks' parts stay as they are
            layer.train()
            layer.forward_net[1].eval()
            layer.inverse_net[1].eval()
        y = layer(x)
        value = layer.log_abs_det_jacobian(x, y)
        (y.sum() - value.sum()).backward()
        if not training:
            for one, logarithm in zip(x, value, strict=True):
                jacobian = torch.autograd.functional.jacobian(layer, one)
                assert is_close(logarithm, torch.linalg.slogdet(jacobian).logabsdet, EXACT)
        layer.train()
        with pytest.raises(ValueError, match="expected forward_net to map"):
            layer(x)


def test_batch_statistics_are_as_they_were_when_refused() -> None:
    network = nn.BatchNorm1d(3)
    layer = SelfNormalizing(network, nn.Linear(3, 3), event_shape=3)
    with pytest.raises(ValueError, match="statistics of the batch"):
        layer(events(6, 3))
    assert torch.equal(network.running_mean, torch.zeros(3))
    assert network.num_batches_tracked == 0


@pytest.mark.parametrize("count", [1, 2, 20])
def test_networks_are_checked_whatever_the_batch(count: int) -> None:
    for function, message in [(hidden_dropout, RANDOM), (hidden_batch_statistics, MIXED)]:
        layer = SelfNormalizing(Activated(function), nn.Linear(3, 3), event_shape=3)
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(count, 3))


def test_check_is_of_one_batch_and_of_each_mode() -> None:
    f, g = Recorder(ResidualMLP(3, [4])), ResidualMLP(3, [4])
    layer, x = SelfNormalizing(f, g, event_shape=3), events(100, 3)
    layer(x)
    assert all(len(one) <= 16 for one in f.inputs[:-1])  # it costs nothing
    for mode in (True, False):
        layer.train(mode)
        layer(x.clone())
        f.inputs.clear()
        layer(x.clone())
        assert len(f.inputs) == 1


def test_check_passes_over_what_is_not_finite() -> None:
    layer, x = free_form(), events(6, 3)
    x[0] = math.nan
    x[1, 0] = math.inf
    y = layer(x)
    assert is_close(y[2:], layer.forward_net(x[2:]), EXACT)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_function_that_is_differentiable_once_is_refused_where_gradients_are_recorded(
    log_det: str, residual: bool
) -> None:
    # Torch may lose such a derivative without an error: a wrong gradient, and nobody is told.
    f, g = Activated(_SmoothOnce.apply, residual=residual), Activated(_Smooth.apply)
    layer, x = SelfNormalizing(f, g, event_shape=3, log_det=log_det), events(5, 3)
    with pytest.raises(ValueError, match="expected forward_net to be twice differentiable"):
        layer(x)
    # The value and the inverse take the first derivative alone.
    layer.eval()
    reference = Activated(_Reference(), residual=residual)
    reference.load_state_dict(f.state_dict())
    with torch.no_grad():
        expected = log_det_of(Dense(reference), x)
        assert is_close(log_det_of(layer, x), expected, EXACT)
        assert is_close(layer.inv(layer(x).clone()), x, EXACT)
    with pytest.raises(ValueError, match="expected forward_net to be twice differentiable"):
        log_det_of(layer, x)


class _Reference(nn.Module):
    """The same function by torch's own operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * x.tanh()


def test_function_whose_backward_fails_is_refused_in_training() -> None:
    class NoSecond(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise NotImplementedError("no second derivative of this")
            return 2 * cotangent

    layer = SelfNormalizing(Activated(NoSecond.apply), nn.Linear(3, 3), event_shape=3)
    message = "expected forward_net to be twice differentiable.*got: no second derivative of this"
    with pytest.raises(ValueError, match=message):
        layer(events(5, 3))


@pytest.mark.parametrize("which", ["forward_net", "inverse_net"])
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: nn.Linear(3, 4), r"\(12, 4\)"),
        (lambda: nn.Flatten(0), r"\(36,\)"),
        (lambda: nn.Linear(3, 1), r"\(12, 1\)"),
        (lambda: Activated(lambda x: (x, x)), "tuple"),
        (lambda: Activated(lambda x: None), "NoneType"),
    ],
    ids=["more", "flat", "fewer", "tuple", "nothing"],
)
def test_networks_of_another_output_are_refused(
    make: Callable[[], nn.Module], got: str, which: str
) -> None:
    networks = {"forward_net": nn.Linear(3, 3), "inverse_net": nn.Linear(3, 3), which: make()}
    layer = SelfNormalizing(**networks, event_shape=3)
    message = rf"expected {which} to map a batch .* of the same shape \(12, 3\); got {got}"
    for use in (layer, layer.inv, lambda x: layer.log_abs_det_jacobian(x, x)):
        with pytest.raises(ValueError, match=message):
            use(events(6, 3))


# --- Options and inputs -------------------------------------------------------------------------


OPTIONS = [
    ("log_det", "approximate", r"expected log_det to be one of .*'refined'.*; got 'approximate'"),
    ("log_det", None, "expected log_det to be one of .*; got None"),
    ("inverse", "exact", "expected inverse to be one of .*; got 'exact'"),
    ("reconstruction", "symmetric", "expected reconstruction to be one of .*; got 'symmetric'"),
    ("num_probes", 0, "expected num_probes, an integer >= 1; got 0"),
    ("num_probes", 2.5, r"expected num_probes, an integer >= 1; got 2\.5"),
    ("num_probes", True, "expected num_probes, an integer >= 1; got True"),
    ("probe", "uniform", r"expected probe to be one of .*'rademacher'.*; got 'uniform'"),
    ("tolerance", 0.0, r"expected tolerance in \(0, 1\); got 0\.0"),
    ("tolerance", 1.0, r"expected tolerance in \(0, 1\); got 1\.0"),
    ("tolerance", math.nan, r"expected tolerance in \(0, 1\); got nan"),
    ("max_iterations", 0, "expected max_iterations, an integer >= 1; got 0"),
    ("max_iterations", 1.5, r"expected max_iterations, an integer >= 1; got 1\.5"),
    ("value_iterations", -1, "expected value_iterations, an integer >= 0; got -1"),
    ("value_iterations", 2.0, r"expected value_iterations, an integer >= 0; got 2\.0"),
    ("seed", -1, "expected seed, an integer >= 0; got -1"),
    ("seed", 1.5, r"expected seed, an integer >= 0; got 1\.5"),
    ("reconstruction_weight", -1.0, r"expected reconstruction_weight >= 0, .*; got -1\.0"),
    ("reconstruction_weight", math.nan, "expected reconstruction_weight >= 0, .*; got nan"),
    ("reconstruction_weight", math.inf, "expected reconstruction_weight >= 0, .*; got inf"),
    ("reconstruction_weight", "1", "expected reconstruction_weight >= 0, .*; got '1'"),
    ("reconstruction_tolerance", -0.1, r"expected reconstruction_tolerance >= 0; got -0\.1"),
    ("reconstruction_tolerance", math.nan, "expected reconstruction_tolerance >= 0; got nan"),
    ("data_noise", -0.1, r"expected data_noise >= 0; got -0\.1"),
    ("data_noise", math.inf, "expected data_noise >= 0; got inf"),
    ("latent_noise", -0.1, r"expected latent_noise >= 0; got -0\.1"),
    ("latent_noise", math.inf, "expected latent_noise >= 0; got inf"),
    ("latent_noise", math.nan, "expected latent_noise >= 0; got nan"),
    ("base", 1.0, r"expected base, a distribution or None; got 1\.0"),
    ("base", dist.Normal, "expected base, a distribution or None; got <class"),
    ("inverse_tolerance", 0.0, r"expected inverse_tolerance in \(0, 1\), or None; got 0\.0"),
    ("inverse_tolerance", 1.0, r"expected inverse_tolerance in \(0, 1\), or None; got 1\.0"),
    ("event_shape", 0, "expected event_shape, integers >= 1; got 0"),
    ("event_shape", (3, -1), r"expected event_shape, integers >= 1; got \(3, -1\)"),
    ("event_shape", (), r"expected event_shape, integers >= 1; got \(\)"),
    ("event_shape", 2.0, r"expected event_shape, integers >= 1; got 2\.0"),
    ("event_shape", "3", "expected event_shape, integers >= 1; got '3'"),
    ("event_shape", None, r"expected one of event_shape and event_dim; got \(None, None\)"),
    ("event_dim", 1, r"expected one of event_shape and event_dim; got \(3, 1\)"),
]


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize(("option", "value", "message"), OPTIONS)
def test_option_is_checked_at_construction(
    option: str, value: object, message: str, log_det: str
) -> None:
    # Also where the method chosen has no use for it: a slip is a slip.
    options = {"event_shape": 3, "log_det": log_det, option: value}
    with pytest.raises(ValueError, match=message):
        SelfNormalizing(nn.Linear(3, 3), nn.Linear(3, 3), **options)


@pytest.mark.parametrize("event_dim", [0, -1, 1.0, True])
def test_event_dim_is_checked(event_dim: object) -> None:
    message = f"expected event_dim, an integer >= 1; got {event_dim}"
    with pytest.raises(ValueError, match=message):
        SelfNormalizing(nn.Linear(3, 3), nn.Linear(3, 3), event_dim=event_dim)


@pytest.mark.parametrize("which", ["forward_net", "inverse_net"])
@pytest.mark.parametrize("value", [torch.tanh, None, nn.Linear])
def test_networks_must_be_modules(value: object, which: str) -> None:
    networks = {"forward_net": nn.Linear(3, 3), "inverse_net": nn.Linear(3, 3), which: value}
    message = rf"expected {which}, a torch\.nn\.Module; got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message):
        SelfNormalizing(**networks, event_shape=3)


def test_options_are_keyword_only_and_known() -> None:
    with pytest.raises(TypeError):
        SelfNormalizing(nn.Linear(3, 3), nn.Linear(3, 3), 3)
    with pytest.raises(TypeError, match="momentum"):
        self_normalizing(3, momentum=0.9)


@pytest.mark.parametrize("log_det", SURROGATES)
def test_more_orthogonal_probes_than_features_are_refused(log_det: str) -> None:
    for options in ({"event_shape": 2}, {"event_dim": 1}):
        layer = SelfNormalizing(
            nn.Linear(2, 2),
            nn.Linear(2, 2),
            log_det=log_det,
            num_probes=3,
            probe="orthogonal",
            **options,
        )
        with pytest.raises(ValueError, match="expected num_probes <= D = 2; got 3"):
            log_det_of(layer, events(5, 2))
        log_det_of(layer.eval(), events(5, 2))  # where no probes are drawn


def test_base_of_another_event_shape_is_refused() -> None:
    for base, got in [(standard_normal(2), r"\(2,\)"), (dist.Normal(0.0, 1.0), r"\(\)")]:
        layer = free_form(base=base)
        message = rf"expected a base of events of shape \(3,\); got {got}"
        with pytest.raises(ValueError, match=message):
            log_det_of(layer, events(5, 3))


def uses(layer: SelfNormalizing) -> list[Callable[[Tensor], Tensor]]:
    return [layer, layer.inv, lambda x: layer.log_abs_det_jacobian(x, x)]


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 1), (3, 5, 2), ()])
def test_wrong_shape_names_layer_expected_and_got(shape: tuple[int, ...]) -> None:
    message = r"SelfNormalizing\(\(3,\), .*expected .*shape \(\.\.\., 3\); got "
    for use in uses(free_form()):
        with pytest.raises(ValueError, match=message + re.escape(str(shape))):
            use(torch.zeros(shape))


def test_too_few_dimensions_name_layer_expected_and_got() -> None:
    layer = SelfNormalizing(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), event_dim=3)
    message = r"SelfNormalizing\(event_dim=3, .*expected at least 3 dimensions; got \(2, 4\)"
    for use in uses(layer):
        with pytest.raises(ValueError, match=message):
            use(torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_input_is_refused(shape: tuple[int, ...]) -> None:
    for use in uses(free_form()):
        with pytest.raises(ValueError, match="non-empty tensor.*got " + re.escape(str(shape))):
            use(torch.zeros(shape))


@pytest.mark.parametrize("options", [{"event_shape": 3}, {"event_dim": 1}])
def test_input_that_is_not_floating_is_refused(options: dict[str, int]) -> None:
    layer = SelfNormalizing(nn.Linear(3, 3), nn.Linear(3, 3), **options)
    for value, got in [
        (torch.ones(2, 3, dtype=torch.int64), r"torch\.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), r"torch\.complex64"),
    ]:
        for use in uses(layer):
            with pytest.raises(ValueError, match=f"expected a floating-point tensor; got {got}"):
                use(value)


@pytest.mark.parametrize("options", [{"event_shape": 3}, {"event_dim": 1}])
@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], 1.0, None])
def test_input_that_is_no_tensor_is_refused(value: object, options: dict[str, int]) -> None:
    layer = SelfNormalizing(nn.Linear(3, 3), nn.Linear(3, 3), **options)
    message = f"expected a floating-point tensor; got {type(value).__name__}"
    for use in uses(layer):
        with pytest.raises(ValueError, match=message):
            use(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    message = rf"SelfNormalizing.*expected dtype torch\.float64; got {dtype}"
    for use in uses(free_form()):
        with pytest.raises(ValueError, match=message):
            use(torch.ones(2, 3, dtype=dtype))


def test_repr_names_the_shape_and_the_value_in_training() -> None:
    for options, expected in [
        ({"event_shape": 3}, r"\(3,\), log_det='refined'"),
        ({"event_shape": (2, 3)}, r"\(2, 3\), log_det="),
        ({"event_dim": 2}, "event_dim=2, log_det="),
        ({"event_dim": 1, "log_det": "learned", "value_iterations": 0}, "training value: 0"),
        ({"event_dim": 1, "log_det": "learned", "value_iterations": 2}, "training value: estimate"),
        ({"event_dim": 1, "value_iterations": 0}, "training value: 0"),
        ({"event_dim": 1, "log_det": "exact"}, "training value: exact"),
    ]:
        layer = SelfNormalizing(nn.Linear(3, 3), nn.Linear(3, 3), **options)
        assert re.search(expected, repr(layer))


# --- Inside Pyro --------------------------------------------------------------------------------


class Conjugate:
    """``z ~ N(0, I)``, ``y | z ~ N(Bz, σ²I)``: the posterior is Gaussian, and not diagonal."""

    def __init__(self, dim: int = 4, observations: int = 6, noise: float = 0.7) -> None:
        self.dim, self.noise = dim, noise
        self.matrix, data = events(observations, dim), 2 * events(1, observations, seed=1)[0]
        self.data = data
        precision = torch.eye(dim) + self.matrix.mT @ self.matrix / noise**2
        self.covariance = torch.linalg.inv(precision)
        self.mean = self.covariance @ self.matrix.mT @ data / noise**2

    def __call__(self) -> None:
        z = pyro.sample("z", standard_normal(self.dim))
        mean = (z.unsqueeze(-2) * self.matrix).sum(-1)
        pyro.sample("y", dist.Normal(mean, self.noise).to_event(1), obs=self.data)


def affine_pair(dim: int, **options: object) -> SelfNormalizing:
    """Two affine maps that start as multiples of the identity."""
    f, g = nn.Linear(dim, dim), nn.Linear(dim, dim)
    with torch.no_grad():
        for network, scale in [(f, 0.3), (g, 1 / 0.3)]:
            network.weight.copy_(scale * torch.eye(dim))
            network.bias.zero_()
    return SelfNormalizing(f, g, event_shape=dim, **options)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_posterior_of_a_conjugate_model_is_recovered(log_det: str) -> None:
    problem = Conjugate()
    options = {"log_det": log_det, "reconstruction_weight": 1.0}
    guide = AutoNormalizingFlow(problem, lambda dim: affine_pair(dim, **options))
    guide()
    steps = 400
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(problem, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step()
    network = guide.transform.forward_net
    weight = network.weight.detach()
    assert (network.bias - problem.mean).abs().max() < MEAN
    assert (weight @ weight.mT - problem.covariance).abs().max() < COVARIANCE


def banana(count: int, seed: int = 0) -> Tensor:
    """``x₁ ~ N(0, 1)``, ``x₂ = (x₁² − 1)/2 + 0.3 ε``."""
    first, noise = events(2, count, seed=seed)
    return torch.stack([first, (first.square() - 1) / 2 + 0.3 * noise], dim=1)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_density_model_learns_what_is_not_gaussian(log_det: str) -> None:
    torch.manual_seed(3)
    layer = self_normalizing(2, [32], log_det=log_det, reconstruction_weight=10.0)
    density = dist.TransformedDistribution(standard_normal(2), [layer.inv])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / 250))
    for index in range(250):
        loss = -density.log_prob(banana(128, seed=index)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    unseen = banana(2000, seed=-1)
    with torch.no_grad():
        score = density.log_prob(unseen).mean().item()
        best = -math.log(2 * math.pi) - 1 - math.log(0.3)  # the entropy's negative
        gaussian = dist.MultivariateNormal(unseen.mean(0), unseen.mT.cov())
        # Most of what a Gaussian leaves; 0.82 to 0.90 were seen with four seeds.
        baseline = gaussian.log_prob(unseen).mean().item()
        assert score - baseline > 0.7 * (best - baseline)
        assert score < best + 0.05

        # It is a density: it integrates to 1.
        axes = torch.linspace(-5, 5, 200), torch.linspace(-3, 10, 200)
        grid = torch.cartesian_prod(*axes)
        cell = (10 / 199) * (13 / 199)
        assert density.log_prob(grid).exp().sum().item() * cell == pytest.approx(1, abs=INTEGRAL)

        # And samples, through the inverse, are of that density.
        samples = density.sample((2000,))
        assert layer.convergence.num_converged == 2000
        assert is_close(samples.mean(0), torch.zeros(2), 0.15)
        moment = (samples[:, 0].square() * samples[:, 1]).mean()
        assert moment.item() == pytest.approx(1.0, abs=0.4)  # E[x₁² (x₁² − 1)/2] = 1


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_parameters_are_registered(direction: str) -> None:
    controller = GECO(0.1)
    layer = bad_pair(reconstruction_weight=controller)
    pyro.module("flow", layer if direction == "T" else layer.inv)
    registered = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    networks = (layer.forward_net, layer.inverse_net)
    assert registered == {id(p) for network in networks for p in network.parameters()}


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_parameter_store_into_a_fresh_layer(log_det: str, tmp_path: Path) -> None:
    problem = Conjugate(dim=3)

    def guide_of(layer: SelfNormalizing) -> Callable[[], None]:
        def guide() -> None:
            pyro.module("flow", layer)
            pyro.sample("z", dist.TransformedDistribution(standard_normal(3), [layer]))

        return guide

    def train(layer: SelfNormalizing, steps: int) -> list[float]:
        svi = SVI(problem, guide_of(layer), ClippedAdam({"lr": 0.02}), Trace_ELBO())
        return [svi.step() for _ in range(steps)]

    layer = self_normalizing(3, [4], log_det=log_det)
    train(layer, 5)
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    fresh, x = self_normalizing(3, [4], log_det=log_det), events(5, 3)
    assert not torch.equal(fresh(x), layer(x))
    pyro.get_param_store().load(str(tmp_path / "store"))
    pyro.module("flow", fresh, update_module_params=True)
    assert torch.equal(fresh(x), layer(x))
    with torch.no_grad():
        assert torch.equal(log_det_of(fresh, x.clone()), log_det_of(layer, x.clone()))
    assert all(map(math.isfinite, train(fresh, 3)))


def test_stack_of_pairs_and_other_layers() -> None:
    parts = [
        exact_pair(3, num_probes=3, probe="orthogonal"),
        SmoothLeakyReLU(0.3, learnable=True),
        linear(3, log_det="exact"),
        exact_pair(3, seed=1, log_det="learned", num_probes=3, probe="orthogonal").inv,
    ]
    results = []
    for exact in (False, True):
        stack = Compose(parts)
        stack.train(not exact)
        stack.zero_grad()
        x = events(6, 3).requires_grad_()
        density_by_inverse(stack, x).mean().backward()
        found = {name: one for name, one in gradients(stack).items() if "inverse_net" not in name}
        results.append({"x": x.grad, **found})
    assert_gradients_equal(*results)
    y = stack(events(6, 3)).detach().clone()
    assert is_close(stack(stack.inv(y).detach()), y, EXACT)


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize("part", ["log-det", "inverse"])
def test_trace_is_refused(part: str) -> None:
    # Its derivatives would be constants: the first step's, at every step.
    layer, data = free_form(), events(6, 3)
    transform = layer.inv if part == "log-det" else layer

    def model() -> None:
        pyro.module("flow", layer)
        with pyro.plate("data", 6):
            pyro.sample(
                "x", dist.TransformedDistribution(standard_normal(3), [transform]), obs=data
            )

    with pytest.raises(RuntimeError, match=r"torch\.jit cannot trace the derivatives of a network"):
        JitTrace_ELBO(ignore_jit_warnings=True).loss_and_grads(model, lambda: None)
    layer.requires_grad_(False)
    traced = torch.jit.trace(lambda x: layer(x), data, check_trace=False)
    assert is_close(traced(data), layer(data), EXACT)  # T(x) takes none

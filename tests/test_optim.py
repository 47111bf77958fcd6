"""NaturalGradient: its independence of coordinates, its convergence, its state, its errors."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.distributions import transforms
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence

from pyro_snf import (
    AutoSelfNormalizingFlow,
    Exact,
    Learned,
    low_rank_autoregressive,
    self_normalizing_pair,
)
from pyro_snf.natural_step import SignalShare
from pyro_snf.optim import NaturalGradient
from tests.registry import all_equal, is_close
from tests.test_guides import parameters_of

# The loss in nats above its optimum, after the steps of a test: the path gradient's noise vanishes.
CONVERGED = 1e-3
# With an autoregressive map, Adam's last steps are in it.
NEARLY_CONVERGED = 2e-2
# With gradient="total", all the noise of the latest hundred steps is in it: 0.01 to 0.09 measured.
NOISY = 0.2
# A run repeated in other coordinates, of condition number 10⁶: rounding of 10⁻¹⁶ becomes 10⁻¹⁰ in
# the coordinates of z, and grows over 60 steps, of which none is chaotic.
MOVED = 1e-5
# The same with one secant step after the other, which forget what they have seen: 10⁻⁹ measured.
MOVED_BY_SECANTS = 1e-7
# Of the mean of 4,000 draws, or of a hundred losses: five standard errors.
SAMPLED = 0.1


def elbo(num_particles: int = 8) -> infer.Trace_ELBO:
    vectorize = num_particles > 1
    return infer.Trace_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=vectorize)


def train(
    model: Any, guide: Any, optim: NaturalGradient, num_steps: int, num_particles: int = 8
) -> list[float]:
    """The losses."""
    if not pyro.settings.get("module_local_params"):
        svi = infer.SVI(model, guide, optim, elbo(num_particles))
        return [svi.step() for _ in range(num_steps)]
    losses = []  # SVI does not know parameters that modules own
    for _ in range(num_steps):
        loss = elbo(num_particles).differentiable_loss(model, guide)
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


def fitted(model: Any, num_steps: int, num_layers: int = 1, **options: Any) -> Any:
    """A guide that has been trained."""
    guide = AutoSelfNormalizingFlow(model, num_layers, **options)
    train(model, guide, NaturalGradient(guide, num_steps), num_steps)
    return guide


@torch.no_grad()
def loss_of(model: Any, guide: Any, num_particles: int = 1000) -> float:
    return elbo(num_particles).loss(model, guide)


class Raw:
    """A Gaussian posterior in raw units: scales from 10⁻³ to 10³, correlated, far from 0.

    :param far: how far, in deviations.
    :param spread: the power of 10, for both the greatest and the least scale.
    """

    def __init__(self, dim: int, far: float = 1e3, spread: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(3)
        mixing = torch.eye(dim) + torch.randn(dim, dim, generator=generator) / math.sqrt(dim)
        scales = torch.logspace(-spread, spread, dim)
        self.dim = dim
        self.root = torch.linalg.cholesky(scales[:, None] * (mixing @ mixing.mT) * scales)
        self.loc = far * scales * torch.randn(dim, generator=generator)

    def __call__(self) -> None:
        pyro.sample("x", self.distribution())

    def distribution(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.root)

    def start(self) -> dict[str, Any]:
        """The option of a guide that starts at 0."""
        return {"init_loc_fn": init_to_value(values={"x": torch.zeros(self.dim)})}

    def divergence(self, guide: Any) -> float:
        """From a guide of one layer."""
        layer = guide.last_layer
        covariance = (layer.weight @ layer.weight.mT).detach()
        found = dist.MultivariateNormal(layer.bias.detach(), covariance)
        return kl_divergence(found, self.distribution()).item()


def easy() -> Raw:
    """One for which 60 steps are enough."""
    return Raw(2, far=1.0, spread=1.0)


# --- Coordinates --------------------------------------------------------------------------------


class Moved:
    """A posterior of z, not Gaussian, in the coordinates ``x = B z + c``."""

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        dim = len(shift)
        generator = torch.Generator().manual_seed(5)
        self.matrix, self.shift = matrix, shift
        self.inverse = torch.linalg.inv(matrix)
        self.log_det = torch.linalg.slogdet(matrix).logabsdet
        self.design = torch.randn(2 * dim, dim, generator=generator) / 2
        self.data = 3 * torch.randn(2 * dim, generator=generator)

    def __call__(self) -> None:
        dim = len(self.shift)
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        z = ((x - self.shift).unsqueeze(-2) * self.inverse).sum(-1)
        residual = (z.unsqueeze(-2) * self.design).sum(-1) - self.data
        log_density = -1.5 * residual.square().log1p().sum(-1) - 0.5 * z.square().sum(-1)
        pyro.factor("density", log_density - self.log_det)

    def guide(self, num_layers: int) -> Any:
        """One that starts at z = 0.1 times a standard normal."""
        guide = AutoSelfNormalizingFlow(self, num_layers)
        guide()
        layer, weight = guide.last_layer, 0.1 * self.matrix
        scale = weight.norm(dim=-1)
        with torch.no_grad():
            layer.log_scale.copy_(scale.log())
            eye = torch.eye(len(weight))
            layer.theta.copy_(math.sqrt(len(weight)) * (weight / scale[:, None] - eye))
            layer.bias.copy_(self.shift)
        layer.refactorize()
        return guide


def coordinates_of(dim: int) -> list[tuple[Tensor, Tensor]]:
    """The plain ones, and some of condition number 10⁶."""
    left, right = (torch.linalg.qr(torch.randn(dim, dim)).Q for _ in range(2))
    return [
        (torch.eye(dim), torch.zeros(dim)),
        ((left * torch.logspace(-3, 3, dim)) @ right, 10 * torch.randn(dim)),
    ]


@pytest.mark.parametrize(("dim", "num_layers"), [(5, 1), (5, 2), (30, 1)])
def test_units_and_correlations_do_not_matter(dim: int, num_layers: int) -> None:
    # With 8 particles, steps are relative ones at D = 5, and secant steps at D = 30.
    losses = []
    for matrix, shift in coordinates_of(dim):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        model = Moved(matrix, shift)
        guide = model.guide(num_layers)
        optim = NaturalGradient(guide, 60)
        losses.append(torch.tensor(train(model, guide, optim, 60)))
    assert optim.trains_all_layers
    assert is_close(*losses, MOVED)
    assert losses[0][-10:].mean() < losses[0][0] - dim  # and something was learned


def test_units_and_correlations_do_not_matter_when_all_layers_begin_to_train() -> None:
    # h is rotated then, so that V⁻¹ W is triangular: of the first W, which is BV in x = B z + c.
    # The layers before the dense one see the same h in all coordinates.
    runs = []
    for matrix, shift in coordinates_of(30):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        model = Moved(matrix, shift)
        guide = model.guide(2)
        layer = guide.last_layer
        optim = NaturalGradient(guide, 60)
        losses, num_before = [], 0
        while not optim.trains_all_layers:
            losses += train(model, guide, optim, 1)
            num_before += 1
        rotated = model.inverse @ layer.weight.detach()
        losses += train(model, guide, optim, 60 - num_before)
        assert optim.num_calls == 60
        runs.append((num_before, torch.tensor(losses), rotated, guide.transform.parts[0]))
    (num_before, losses, rotated, before), other = runs
    assert num_before == other[0] < 30
    assert is_close(losses, other[1], MOVED_BY_SECANTS)
    # The first W is 0.1 B.
    assert is_close(rotated, other[2], MOVED_BY_SECANTS)
    assert rotated.triu(1).abs().max() < MOVED_BY_SECANTS
    assert (rotated.diagonal() > 0).all()
    # These have been trained, and alike. (They do not start at 0 everywhere.)
    trained = parameters_of(before)
    assert all(
        is_close(*pair, MOVED_BY_SECANTS)
        for pair in zip(trained, parameters_of(other[3]), strict=True)
    )
    assert not all_equal(trained, parameters_of(model.guide(2).transform.parts[0]))
    assert losses[-10:].mean() < losses[0] - 30


# --- Convergence --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "num_steps", "gradient"),
    [(1, 80, "path"), (4, 100, "path"), (4, 100, "total"), (28, 200, "total")],
)
def test_gaussian_posterior_from_far_away(dim: int, num_steps: int, gradient: str) -> None:
    model = Raw(dim)
    guide = fitted(model, num_steps, gradient=gradient, **model.start())
    assert model.divergence(guide) < CONVERGED


@pytest.mark.parametrize(("num_layers", "gradient"), [(2, "total"), (3, "path")])
def test_gaussian_posterior_by_deeper_guides(num_layers: int, gradient: str) -> None:
    model = Raw(4)
    guide = fitted(model, 180, num_layers, gradient=gradient, **model.start())
    assert loss_of(model, guide) < (NOISY if gradient == "total" else NEARLY_CONVERGED)


def test_total_gradient_stays_at_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    # The dense layer follows the path derivative, which has no noise there.
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(50), 0.1).to_event(1))

    monkeypatch.setattr(SignalShare, "value", 0.3)
    guide = AutoSelfNormalizingFlow(model, 2, gradient="total")
    guide()
    before = torch.linalg.slogdet(guide.last_layer.weight).logabsdet.item()
    optim = NaturalGradient(guide)
    optim.trains_all_layers = True
    train(model, guide, optim, 1, 2000)
    after = torch.linalg.slogdet(guide.last_layer.weight).logabsdet.item()
    assert abs(after - before) / 50 < 1e-6


@pytest.mark.parametrize(("num_particles", "num_steps"), [(1, 300), (3, 120), (64, 30)])
def test_other_numbers_of_particles(num_particles: int, num_steps: int) -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 1, **model.start())
    optim = NaturalGradient(guide, num_steps)
    train(model, guide, optim, num_steps, num_particles)
    # The dense layer makes a step of at least eight samples.
    assert optim.num_dense_steps == num_steps // {1: 8, 3: 3, 64: 1}[num_particles]
    assert model.divergence(guide) < NEARLY_CONVERGED


def test_exact_log_dets() -> None:
    model = easy()
    guide = fitted(model, 60, log_det="exact", **model.start())
    assert model.divergence(guide) < NEARLY_CONVERGED


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    model = easy()
    guide = fitted(model, 100, 2, **model.start())
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float32}
    assert loss_of(model, guide) < NEARLY_CONVERGED


def skewed() -> None:
    """Two numbers, one of which is the logarithm of the other's scale."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, (0.7 * log_scale).exp()))


def test_autoregressive_map_is_trained() -> None:
    # Measured: 0.40 and 0.02 to 0.05.
    losses = []
    for num_layers, num_steps in ((1, 40), (2, 200)):
        pyro.clear_param_store()
        losses.append(loss_of(skewed, fitted(skewed, num_steps, num_layers), 4000))
    assert losses[0] > 0.3
    assert losses[1] < 0.08


def test_phase_of_the_other_layers() -> None:
    guide = AutoSelfNormalizingFlow(skewed)
    guide()
    optim = NaturalGradient(guide, 100)
    before = [parameter.clone() for parameter in guide.transform.parts[0].parameters()]
    svi = infer.SVI(skewed, guide, optim, elbo())
    while not optim.trains_all_layers:
        svi.step()
        assert all_equal(before, list(guide.transform.parts[0].parameters()))
    assert optim.num_calls <= 40  # at 40 % of the steps, if it was not calm before
    svi.step()
    assert not all_equal(before, list(guide.transform.parts[0].parameters()))


def test_nothing_else_is_trained_at_the_posterior() -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 2, **model.start())
    optim = NaturalGradient(guide, 200)
    svi = infer.SVI(model, guide, optim, elbo())
    for _ in range(200):
        svi.step()
    assert optim.is_at_posterior
    assert not optim.trains_all_layers


@pytest.mark.parametrize("num_steps", [None, 100])
def test_phase_begins_with_one_rotation(num_steps: int | None) -> None:
    guide = AutoSelfNormalizingFlow(skewed)
    guide()
    layer = guide.last_layer
    start = layer.weight.detach().clone()
    optim = NaturalGradient(guide, num_steps)
    svi = infer.SVI(skewed, guide, optim, elbo())
    rotations = []
    original = type(layer).rotate_input

    def recorded(self: Any, start: Tensor) -> None:
        before = self.weight.detach()
        original(self, start)
        rotations.append((start, before, self.weight.detach()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "rotate_input", recorded)
        for _ in range(50):
            svi.step()
    assert optim.trains_all_layers
    ((first, before, after),) = rotations
    assert torch.equal(first, start)
    assert is_close(after @ after.mT, before @ before.mT)
    assert layer.num_refactorizations == 1


def test_rates_decay_in_the_second_half() -> None:
    guide = AutoSelfNormalizingFlow(skewed)
    optim = NaturalGradient(guide, 10)
    decays = []
    for _ in range(12):
        decays.append(optim.decay)
        optim.num_calls += 1
    expected = [1.0] * 6 + [10 ** (-2 * share) for share in (0.2, 0.4, 0.6, 0.8, 1.0)] + [0.01]
    assert decays == pytest.approx(expected)
    optim = NaturalGradient(guide)
    optim.num_calls = 1000
    assert optim.decay == 1.0
    optim.start_decay(10)
    optim.num_calls = 1005
    assert optim.decay == pytest.approx(0.1)


def test_noise_of_subsampled_data_is_averaged() -> None:
    data = 5 + torch.randn(200)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 100.0))
        with pyro.plate("data", 200, subsample_size=20) as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=data[index])

    guide = fitted(model, 120)
    # The noise of a step is that of 20 rows, ten times the variance of the posterior.
    scale = 200**-0.5
    assert guide.median()["mean"].item() == pytest.approx(data.mean().item(), abs=2 * scale)
    assert math.log(guide.last_layer.weight.item() / scale) == pytest.approx(0, abs=0.5)


# --- Gradients that are not finite --------------------------------------------------------------


def exploding() -> None:
    """Counts of around 3, whose rates are infinite over much of the guide's start."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1000.0).to_event(1))
    design = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    log_rate = (weights.unsqueeze(-2) * design).sum(-1)
    with pyro.plate("counts", 3):
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=torch.tensor([2.0, 3.0, 5.0]))


def test_gradients_whose_squares_overflow_are_not_finite() -> None:
    # Their products would be infinite, and the cosine between two of them NaN.
    scale = 1.0

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("factor", scale * x.sum(-1))

    guide = AutoSelfNormalizingFlow(model, 1)
    optim = NaturalGradient(guide, 100)
    train(model, guide, optim, 2)
    location = optim._last_bias.clone()
    for size in (1e200, 1e160):
        scale = size
        train(model, guide, optim, 1)
        assert torch.equal(guide.last_layer.bias, location)
    assert optim.num_dense_steps == 2
    scale = 1e100
    train(model, guide, optim, 2)
    assert optim.num_dense_steps == 4
    assert math.isfinite(optim._trust)
    assert torch.isfinite(guide.last_layer.weight).all()


@pytest.mark.filterwarnings("ignore:Encountered")
@pytest.mark.parametrize("num_layers", [1, 2])
def test_exploding_likelihood(num_layers: int) -> None:
    guide = AutoSelfNormalizingFlow(exploding, num_layers, init_scale=500.0)
    losses = train(exploding, guide, NaturalGradient(guide, 200), 200)
    assert not math.isfinite(losses[0])
    assert all(torch.isfinite(parameter).all() for parameter in guide.parameters())
    assert all(map(math.isfinite, losses[120:]))
    draws = guide.sample_posterior(4000)["weights"]
    # By quadrature: the posterior is about normal, of this mode.
    assert (draws.mean(0) - torch.tensor([0.6, 0.48])).abs().max() < 0.25


def test_recovery_returns_to_the_last_location_and_narrows() -> None:
    is_bad = False

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.full([3], 40.0), 0.1).to_event(1))
        if is_bad:
            scale = (x - x.detach()).sum(-1).abs().sqrt() + 1  # its slope is infinite
            pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

    guide = AutoSelfNormalizingFlow(
        model, 2, init_loc_fn=init_to_value(values={"x": torch.zeros(3)})
    )
    optim = NaturalGradient(guide, 100)
    svi = infer.SVI(model, guide, optim, elbo())
    svi.step()
    last_location = guide.last_layer.bias.clone()
    svi.step()
    weight, location = guide.last_layer.weight.clone(), guide.last_layer.bias.clone()
    others = [parameter.clone() for parameter in guide.transform.parts[0].parameters()]
    is_bad = True
    svi.step()
    assert not torch.equal(last_location, location)
    assert torch.equal(guide.last_layer.bias, last_location)
    assert is_close(guide.last_layer.weight, 0.7 * weight)
    assert all_equal(others, list(guide.transform.parts[0].parameters()))
    is_bad = False
    svi.step()
    assert all(torch.isfinite(parameter).all() for parameter in guide.parameters())
    assert not torch.equal(guide.last_layer.bias, last_location)


def test_recovery_before_the_first_step_narrows() -> None:
    guide = AutoSelfNormalizingFlow(skewed, 1)
    guide()
    location, weight = guide.last_layer.bias.clone(), guide.last_layer.weight.clone()
    NaturalGradient(guide).recover()
    assert torch.equal(guide.last_layer.bias, location)
    assert is_close(guide.last_layer.weight, 0.7 * weight)


def test_recovery_forgets_the_gradients_of_the_particles_before_the_error() -> None:
    calls = [0]

    def model() -> None:
        skewed()
        calls[0] += 1
        if calls[0] == 5:
            raise torch.linalg.LinAlgError("not positive definite")

    guide = AutoSelfNormalizingFlow(model)
    guide()
    calls[0] = 0
    optim = NaturalGradient(guide)
    svi = infer.SVI(model, guide, optim, infer.Trace_ELBO(num_particles=8))
    with pytest.raises(torch.linalg.LinAlgError):
        svi.step()
    optim.recover()
    assert not any(one.grad is not None and one.grad.any() for one in guide.parameters())


# --- State --------------------------------------------------------------------------------------


@contextmanager
def local_parameters(is_local: bool) -> Iterator[None]:
    with pyro.settings.context(module_local_params=is_local):
        yield


def resumed_from(
    guide: Any,
    num_steps: int,
    guide_state: dict[str, Any],
    random_state: Any,
    restore: Callable[[NaturalGradient], object],
) -> NaturalGradient:
    """A new guide's optimizer, all three of them in the states that were saved."""
    guide.load_state_dict(guide_state)
    guide()  # creation draws numbers
    optim = NaturalGradient(guide, num_steps)
    restore(optim)
    pyro.util.set_rng_state(random_state)
    return optim


@pytest.mark.parametrize(
    ("num_particles", "num_layers", "is_local"),
    [(1, 1, False), (1, 2, False), (3, 2, False), (8, 2, False), (64, 2, False), (8, 2, True)],
)
def test_resumed_run_repeats_bit_for_bit(
    num_particles: int, num_layers: int, is_local: bool, tmp_path: Path
) -> None:
    # Of 24 steps, all layers are trained from 10 on at the latest. At 13, there are 5 samples that
    # wait for a step, with one particle, and 3 with three.
    model = easy()
    with local_parameters(is_local):
        guide = AutoSelfNormalizingFlow(model, num_layers, **model.start())
        optim = NaturalGradient(guide, 24)
        train(model, guide, optim, 13, num_particles)
        assert optim.trains_all_layers
        optim.save(str(tmp_path / "optim"))
        state, random_state = copy.deepcopy(guide.state_dict()), pyro.util.get_rng_state()
        expected = train(model, guide, optim, 11, num_particles)
        pyro.clear_param_store()
        other = AutoSelfNormalizingFlow(model, num_layers, **model.start())
        resumed = resumed_from(
            other, 24, state, random_state, lambda optim: optim.load(str(tmp_path / "optim"))
        )
        assert train(model, other, resumed, 11, num_particles) == expected
    assert all_equal(parameters_of(other), parameters_of(guide))


def test_run_resumed_before_all_layers_are_trained() -> None:
    # The rotation to come depends on the first W, which is a part of the state.
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 2, **model.start())
    optim = NaturalGradient(guide, 60)
    train(model, guide, optim, 8)
    assert not optim.trains_all_layers
    states = copy.deepcopy((guide.state_dict(), optim.get_state()))
    random_state = pyro.util.get_rng_state()
    expected = train(model, guide, optim, 30)
    assert optim.trains_all_layers
    pyro.clear_param_store()
    other = AutoSelfNormalizingFlow(model, 2, **model.start())
    resumed = resumed_from(
        other, 60, states[0], random_state, lambda optim: optim.set_state(states[1])
    )
    assert train(model, other, resumed, 30) == expected


def test_state_is_that_of_the_moment() -> None:
    guide = AutoSelfNormalizingFlow(skewed)
    optim = NaturalGradient(guide, 40)
    train(skewed, guide, optim, 20)
    state, guide_state = copy.deepcopy((optim.get_state(), guide.state_dict()))
    assert state["adams"]
    train(skewed, guide, optim, 10)
    changed = optim.get_state()
    assert changed["num_calls"] == 30
    optim.set_state(state)
    guide.load_state_dict(guide_state)
    restored = optim.get_state()
    assert restored.keys() == state.keys()
    assert restored["shares"] == state["shares"]
    assert restored["num_calls"] == 20
    for name in ("_trust", "_num_calm", "trains_all_layers", "_decay_start", "_decay_steps"):
        assert restored[name] == state[name]
    assert torch.equal(restored["_last"].mean, state["_last"].mean)
    assert torch.equal(restored["_last_bias"], state["_last_bias"])


def test_plain_loop_is_svi() -> None:
    model = easy()
    runs = []
    for is_plain in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoSelfNormalizingFlow(model, 2, **model.start())
        guide()
        optim = NaturalGradient(guide, 60)
        if is_plain:
            for _ in range(60):
                elbo().differentiable_loss(model, guide).backward()
                optim.step()
        else:
            train(model, guide, optim, 60)
        assert optim.trains_all_layers
        runs.append(parameters_of(guide))
    assert all(map(is_close, *runs))  # the two losses differ by rounding


@pytest.mark.parametrize("num_particles", [1, 3])
def test_plain_loop_of_few_particles_is_svi(num_particles: int) -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 1, **model.start())
    optim = NaturalGradient(guide, 60)
    for _ in range(24):
        elbo(num_particles).differentiable_loss(model, guide).backward()
        optim.step()
    assert optim.num_dense_steps == {1: 3, 3: 8}[num_particles]


def test_step_and_zero_grad_leave_no_gradients() -> None:
    guide = AutoSelfNormalizingFlow(skewed)
    optim = NaturalGradient(guide)
    elbo().differentiable_loss(skewed, guide).backward()
    optim.step()
    assert all(parameter.grad is None for parameter in guide.parameters())
    optim.trains_all_layers = True
    elbo().differentiable_loss(skewed, guide).backward()
    first = parameters_of(guide.transform.parts[0])
    optim.zero_grad()
    assert all(parameter.grad is None for parameter in guide.parameters())
    optim.step()  # of the samples, which zero_grad() leaves where they are
    assert optim.num_dense_steps == 2
    assert all_equal(parameters_of(guide.transform.parts[0]), first)


# --- Which parameters ---------------------------------------------------------------------------


DATA = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)


def with_parameter() -> None:
    """The evidence is greatest where the mean is that of the data."""
    mean = pyro.param("mean", torch.tensor(0.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=DATA)


class WithParameter(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.mean = PyroParam(torch.tensor(0.0))

    def forward(self) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA)


def test_parameters_of_the_model_are_trained() -> None:
    guide = AutoSelfNormalizingFlow(with_parameter)
    train(with_parameter, guide, NaturalGradient(guide, 150, lr=0.1), 150)
    assert pyro.param("mean").item() == pytest.approx(2.5, abs=SAMPLED)


def test_parameters_of_a_module_that_is_the_model_are_trained() -> None:
    model = WithParameter()
    guide = AutoSelfNormalizingFlow(model)
    train(model, guide, NaturalGradient(guide, 150, lr=0.1), 150)
    assert model.mean.item() == pytest.approx(2.5, abs=SAMPLED)


def test_parameters_that_the_model_owns_are_trained() -> None:
    with local_parameters(True):
        model = WithParameter()
        guide = AutoSelfNormalizingFlow(model)
        guide()
        optim = NaturalGradient(guide, 80, lr=0.2)
        for _ in range(80):
            elbo().differentiable_loss(model, guide).backward()
            optim([*guide.parameters(), *model.parameters()])
            optim.zero_grad()
            model.zero_grad()
        assert model.mean.item() == pytest.approx(2.5, abs=SAMPLED)


def test_run_with_parameters_of_the_model_resumed() -> None:
    guide = AutoSelfNormalizingFlow(with_parameter)
    optim = NaturalGradient(guide, 40)
    train(with_parameter, guide, optim, 22)
    states = copy.deepcopy((guide.state_dict(), optim.get_state()))
    mean, random_state = pyro.param("mean").detach().clone(), pyro.util.get_rng_state()
    expected = train(with_parameter, guide, optim, 18)
    pyro.clear_param_store()
    pyro.param("mean", mean)
    other = AutoSelfNormalizingFlow(with_parameter)
    resumed = resumed_from(
        other, 40, states[0], random_state, lambda optim: optim.set_state(states[1])
    )
    assert train(with_parameter, other, resumed, 18) == expected


def test_last_layer_frozen() -> None:
    guide = AutoSelfNormalizingFlow(skewed, init_scale=1.0)
    guide()
    guide.last_layer.requires_grad_(False)
    before, after = parameters_of(guide), guide.parameters()
    optim = NaturalGradient(guide, 20)
    train(skewed, guide, optim, 20)
    is_same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert is_same == [False] * 4 + [True] * 3
    assert optim.num_dense_steps == 0


def test_last_layer_frozen_and_no_number_of_steps() -> None:
    guide = AutoSelfNormalizingFlow(skewed, init_scale=1.0)
    guide()
    guide.last_layer.requires_grad_(False)
    before = parameters_of(guide)
    train(skewed, guide, NaturalGradient(guide), 50)
    assert not all_equal(before, parameters_of(guide))


@pytest.mark.parametrize("name", ["bias", "log_scale"])
def test_frozen_parameter_of_the_last_layer_stays(name: str) -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 1, **model.start())
    guide()
    layer = guide.last_layer
    getattr(layer, name).requires_grad_(False)
    before = {key: value.detach().clone() for key, value in layer.named_parameters()}
    optim = NaturalGradient(guide, 20)
    train(model, guide, optim, 20)
    # Nothing is recorded then: Adam trains the others.
    assert optim.num_dense_steps == 0
    for key, value in layer.named_parameters():
        assert torch.equal(value, before[key]) == (key == name)


def test_other_layers_frozen() -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 2, **model.start())
    guide()
    guide.transform.parts[0].requires_grad_(False)
    before = parameters_of(guide)[:4]
    train(model, guide, NaturalGradient(guide, 60), 60)
    assert all_equal(parameters_of(guide)[:4], before)
    assert loss_of(model, guide) < NEARLY_CONVERGED


@pytest.mark.parametrize("is_local", [False, True], ids=["param store", "local"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_optimizer_before_and_after_the_first_call(when: str, is_local: bool) -> None:
    model = easy()
    with local_parameters(is_local):
        guide = AutoSelfNormalizingFlow(model, 1, **model.start())
        if when == "after":
            guide()
        optim = NaturalGradient(guide, 60)
        if when == "before":
            guide()
        train(model, guide, optim, 60)
        assert model.divergence(guide) < NEARLY_CONVERGED


@pytest.mark.parametrize("is_local", [False, True], ids=["param store", "local"])
def test_second_guide_in_a_process(is_local: bool) -> None:
    # Of the same name: it goes on from the values in the store, for which its R is not made.
    model = easy()
    with local_parameters(is_local):
        first = AutoSelfNormalizingFlow(model, 1, **model.start())
        train(model, first, NaturalGradient(first, 30), 30)
        before = parameters_of(first)
        second = AutoSelfNormalizingFlow(model, 1, **model.start())
        train(model, second, NaturalGradient(second, 60), 60)
        assert model.divergence(second) < NEARLY_CONVERGED
        assert all_equal(before, parameters_of(first)) == is_local
        weight, layer = second.last_layer.weight, second.last_layer
        assert is_close(layer.inverse_weight @ weight, torch.eye(2), 1e-6)


def test_second_optimizer_goes_on() -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 1, **model.start())
    for _ in range(2):
        train(model, guide, NaturalGradient(guide, 60), 60)
    assert model.divergence(guide) < NEARLY_CONVERGED


def test_guide_without_its_optimizer_trains_by_another() -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 1, **model.start())
    optim = NaturalGradient(guide, 20)
    train(model, guide, optim, 20)
    del optim
    gc.collect()
    before = parameters_of(guide)
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo())
    svi.step()
    assert not any(map(torch.equal, before, parameters_of(guide)))


def test_losses_can_be_evaluated_in_between() -> None:
    model = easy()
    guide = AutoSelfNormalizingFlow(model, 1, **model.start())
    optim = NaturalGradient(guide, 60)
    svi = infer.SVI(model, guide, optim, elbo())
    for step in range(60):
        svi.step()
        if step % 10 == 0:
            svi.evaluate_loss()
            guide.median()
            guide.eval().sample_posterior(3)
            guide.train()
    assert model.divergence(guide) < NEARLY_CONVERGED


@pytest.mark.parametrize(
    ("activation", "bound"),
    [
        (low_rank_autoregressive, 0.6),
        (transforms.affine_coupling, 0.4),
        (self_normalizing_pair, 0.3),
        (transforms.planar, 0.9),  # no inverse
        (transforms.spline_coupling, 0.9),  # starts at random, far from the identity
    ],
)
@pytest.mark.filterwarnings("ignore:forward_net is not invertible")  # a fold of one step
def test_total_gradients_do_not_run_away(
    activation: Callable[[int], dist.Transform], bound: float
) -> None:
    # −ELBO of a Gaussian is 0.6. Heavy-tailed gradients that are cut widen the guide: to 1e4 nats.
    def banana() -> None:
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("second", dist.Normal(first.square(), 0.5))

    pyro.set_rng_seed(0)
    guide = AutoSelfNormalizingFlow(banana, activation=activation, gradient="total")
    losses = train(banana, guide, NaturalGradient(guide, 500), 500)
    assert np.mean(losses[-100:]) < bound
    assert max(losses) < 100


def test_total_gradients_in_raw_units() -> None:
    def banana() -> None:
        first = pyro.sample("first", dist.Normal(3e4, 1e3))
        pyro.sample("second", dist.Normal(((first - 3e4) / 1e3).square() * 1e-3, 5e-4))

    pyro.set_rng_seed(0)
    guide = AutoSelfNormalizingFlow(banana, activation=transforms.affine_coupling)
    losses = train(banana, guide, NaturalGradient(guide, 500), 500)
    assert np.mean(losses[-100:]) < 0.5  # 11 where what starts near the identity is trained at once


def test_total_gradients_of_a_long_tail() -> None:
    def model() -> None:  # of log x, with gradients of exp(log x) on one side
        pyro.sample("x", dist.Gamma(0.2, 1.0).expand([4]).to_event(1))

    pyro.set_rng_seed(0)
    guide = AutoSelfNormalizingFlow(model, gradient="total")
    losses = train(model, guide, NaturalGradient(guide, 500), 500)
    assert np.mean(losses[-100:]) < 2  # 22 at the end, and 1e13 before, where nothing is cut


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [AutoNormal(skewed), skewed], ids=["AutoNormal", "function"])
def test_other_guides_are_an_error(guide: Any) -> None:
    with pytest.raises(TypeError, match="expected an AutoSelfNormalizingFlow, for other guides"):
        NaturalGradient(guide)


class Weighted(Exact):
    """A method with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("log_det", ["learned", Learned(), Weighted()])
def test_log_dets_with_parameters_are_an_error(log_det: Any) -> None:
    guide = AutoSelfNormalizingFlow(skewed, log_det=log_det)
    assert not NaturalGradient.is_for(guide)
    message = "expected a guide whose log_det has no parameters to train, as 'learned' has; got"
    with pytest.raises(ValueError, match=message):
        NaturalGradient(guide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({"lr": lr}, f"expected lr > 0; got {lr!r}")
            for lr in (0, -1e-2, math.nan, math.inf, "a")
        ],
        *[
            ({"num_steps": number}, f"expected num_steps, an integer >= 1; got {number!r}")
            for number in (0, -1, 2.5, True)
        ],
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NaturalGradient(AutoSelfNormalizingFlow(skewed), **options)


def test_bad_decay() -> None:
    optim = NaturalGradient(AutoSelfNormalizingFlow(skewed))
    with pytest.raises(ValueError, match="expected num_steps, an integer >= 1; got 0"):
        optim.start_decay(0)

"""Inside Pyro: SVI and its optimizers, autoguides, the parameter store, the jit, samplers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import iterated
from pyro.infer import (
    ELBO,
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoContinuous, AutoNormalizingFlow
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule
from pyro.optim import Adam, ClippedAdam
from torch import Tensor
from torch.distributions import ReshapeTransform, Transform

from pyro_snf import (
    Compose,
    Refined,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    self_normalizing_linear,
)
from pyro_snf.diagnostics import inverse_error, report
from tests.registry import (
    LOG_DETS,
    assert_gradients_equal,
    conv,
    linear,
    nudge_inverses,
    relative_error,
)

# Float64, the same operations in another order.
EXACT = 1e-9
# A tracked R after 50 steps at usual rates: the default tolerance is 0.02, and a check sees the
# error along one direction.
TRACKED = 0.06
# Posterior moments after 600 steps of Adam with a falling rate and 16 particles: what is left is
# the noise of the last steps, about rate/√particles.
MEAN = 0.03
COVARIANCE = 0.05


class Conjugate:
    """``z ~ N(0, I)``, ``y | z ~ N(Bz, σ²I)``: the posterior is Gaussian, and not diagonal."""

    def __init__(self, dim: int = 4, observations: int = 6, noise: float = 0.7) -> None:
        generator = torch.Generator().manual_seed(17)
        self.dim, self.noise = dim, noise
        self.matrix = torch.randn(observations, dim, generator=generator, dtype=torch.float64)
        self.data = 2 * torch.randn(observations, generator=generator, dtype=torch.float64)
        precision = torch.eye(dim, dtype=torch.float64) + self.matrix.mT @ self.matrix / noise**2
        self.covariance = torch.linalg.inv(precision)
        self.mean = self.covariance @ self.matrix.mT @ self.data / noise**2
        evidence = noise**2 * torch.eye(observations, dtype=torch.float64)
        evidence = evidence + self.matrix @ self.matrix.mT
        zeros = torch.zeros(observations, dtype=torch.float64)
        self.log_evidence = dist.MultivariateNormal(zeros, evidence).log_prob(self.data).item()

    def __call__(self) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(self.dim), 1.0).to_event(1))
        mean = (z.unsqueeze(-2) * self.matrix).sum(-1)
        pyro.sample("y", dist.Normal(mean, self.noise).to_event(1), obs=self.data)

    def optimal(self, **options: object) -> SelfNormalizingLinear:
        """The layer that maps N(0, I) to the posterior: ``W = chol Σ``, ``b = μ``."""
        layer = SelfNormalizingLinear(self.dim, **options)
        root = torch.linalg.cholesky(self.covariance)
        with torch.no_grad():
            layer.theta.copy_(math.sqrt(self.dim) * (root - torch.eye(self.dim)))
            layer.bias.copy_(self.mean)
        layer.refactorize()
        return layer


@pytest.fixture
def conjugate() -> Conjugate:
    return Conjugate()


def flow_guide(layer: Transform, dim: int) -> Callable[[], None]:
    """A guide written by hand."""

    def guide() -> None:
        pyro.module("flow", layer)
        base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [layer]))

    return guide


# --- SVI ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", [Adam, ClippedAdam])
def test_tracked_inverse_follows_svi(
    optimizer: Callable[[dict], object], dtype: torch.dtype
) -> None:
    # ClippedAdam writes to parameter.data: autograd's version counter stays where it was.
    torch.set_default_dtype(dtype)
    data = torch.randn(30, 5)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.StudentT(3.0, z, 0.5).to_event(1), obs=data)

    guide = AutoNormalizingFlow(
        model,
        partial(
            iterated, 2, self_normalizing_linear, init_scale=0.3, log_det=Refined(num_probes=2)
        ),
    )
    svi = SVI(model, guide, optimizer({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step() for _ in range(50)]
    assert sum(losses[-10:]) < sum(losses[:10])
    layers = [part for part in guide.modules() if isinstance(part, SelfNormalizingLinear)]
    assert len(layers) == 2
    for layer, row in zip(layers, report(guide).layers, strict=True):
        assert layer.theta.norm() > 0.1  # the layer itself was trained, not a copy of it
        assert layer.theta.dtype == dtype
        layer.log_abs_det_jacobian(torch.zeros(5), torch.zeros(5))
        assert inverse_error(layer) < TRACKED
        assert row.num_refactorizations is not None


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_posterior_of_a_conjugate_model_is_recovered(log_det: str, conjugate: Conjugate) -> None:
    guide = AutoNormalizingFlow(
        conjugate, partial(self_normalizing_linear, log_det=log_det, init_scale=0.3)
    )
    guide()
    steps = 600
    optimizer = ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(conjugate, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step()
    layer = guide.transform
    weight = layer.weight.detach()
    assert (layer.bias - conjugate.mean).abs().max() < MEAN
    assert (weight @ weight.mT - conjugate.covariance).abs().max() < COVARIANCE
    if log_det == "refined":
        # The ELBO is tight, and its value in training is no surrogate.
        loss = Trace_ELBO(num_particles=64, vectorize_particles=True).loss(conjugate, guide)
        assert -loss == pytest.approx(conjugate.log_evidence, abs=0.02)
        assert svi.step() == pytest.approx(-conjugate.log_evidence, abs=0.1)


ELBOS: dict[str, Callable[[], ELBO]] = {
    "ELBO": Trace_ELBO,
    "mean-field ELBO": TraceMeanField_ELBO,  # no closed-form divergence exists for a flow
    **{
        f"Rényi {alpha}": partial(RenyiELBO, alpha=alpha, num_particles=3, vectorize_particles=True)
        for alpha in (0.0, 0.5, 2.0)
    },
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("elbo", ELBOS)
def test_objective_at_the_posterior_is_the_evidence(
    conjugate: Conjugate, elbo: str, mode: str
) -> None:
    # Every sample of the optimal guide has log p(z, y) − log q(z) = log p(y): no noise at all.
    gradients = []
    for log_det in ("refined", "exact"):
        pyro.clear_param_store()
        layer = conjugate.optimal(log_det=log_det).train(mode == "train")
        pyro.set_rng_seed(0)
        loss = ELBOS[elbo]().loss_and_grads(conjugate, flow_guide(layer, 4))
        assert loss == pytest.approx(-conjugate.log_evidence, rel=EXACT)
        gradients.append(layer.theta.grad)
    assert relative_error(*gradients) < EXACT


def test_expected_gradient_at_the_posterior_is_zero(conjugate: Conjugate) -> None:
    # 4096 samples leave 1/64 of the deviation of one.
    layer = conjugate.optimal()
    elbo = Trace_ELBO(num_particles=4096, vectorize_particles=True)
    elbo.differentiable_loss(conjugate, flow_guide(layer, 4)).backward()
    assert layer.theta.grad.abs().max() < 0.1
    assert layer.bias.grad.abs().max() < 0.2


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_density_model_learns_the_covariance(log_det: str) -> None:
    # Maximum likelihood of Gaussian data in a plain loop: WᵀW is the inverse covariance.
    root = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-0.5, 0.3, 1.0]])
    data = torch.randn(400, 3) @ root.mT + torch.tensor([1.0, -2.0, 0.5])
    centred = data - data.mean(0)
    covariance = centred.mT @ centred / len(data)
    # An error of R is one of the solution: by default up to 2 %, of variances up to 4.
    method = Refined(tolerance=0.005) if log_det == "refined" else log_det
    layer = SelfNormalizingLinear(3, log_det=method)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [layer.inv])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for _ in range(800):
        loss = -density.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weight = layer.weight.detach()
    assert (torch.linalg.inv(weight.mT @ weight) - covariance).abs().max() < 0.05
    with torch.no_grad():
        best = dist.MultivariateNormal(data.mean(0), covariance).log_prob(data).mean().item()
        assert density.log_prob(data).mean().item() == pytest.approx(best, abs=0.01)
    # And samples, through the inverse, are of that density.
    assert (density.sample((4000,)).mT.cov() - covariance).abs().max() < 0.5


# --- Modules and the parameter store ------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_attribute_of_a_pyro_module_is_trained(log_det: str, conjugate: Conjugate) -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = Compose(
                [
                    SelfNormalizingLinear(4, log_det=log_det),
                    SmoothLeakyReLU(learnable=True),
                    SelfNormalizingLinear(4, log_det=log_det, init_scale=0.5).inv,
                ]
            )

        def forward(self) -> None:
            base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

    guide = Guide()
    before = copy.deepcopy(guide.state_dict())
    svi = SVI(conjugate, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    names = {name.replace("$$$", ".") for name in pyro.get_param_store()}
    assert names == {name for name, _ in guide.named_parameters()}
    for name, parameter in guide.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def train_by_store(layer: SelfNormalizingLinear, conjugate: Conjugate, steps: int) -> float:
    svi = SVI(conjugate, flow_guide(layer, 4), Adam({"lr": 0.05}), Trace_ELBO())
    return sum(svi.step() for _ in range(steps)) / steps


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_parameter_store_into_a_fresh_layer(
    log_det: str, conjugate: Conjugate, tmp_path: Path
) -> None:
    # The store has the parameters and not R, which is then one of another weight.
    layer = SelfNormalizingLinear(4, log_det=log_det)
    loss = train_by_store(layer, conjugate, 30)
    pyro.get_param_store().save(str(tmp_path / "store"))

    pyro.clear_param_store()
    fresh = SelfNormalizingLinear(4, log_det=log_det)
    x = torch.randn(3, 4)
    fresh.log_abs_det_jacobian(x, fresh(x))  # it has settled on its own weight
    pyro.get_param_store().load(str(tmp_path / "store"))
    pyro.module("flow", fresh, update_module_params=True)
    assert torch.equal(fresh.weight, layer.weight)
    assert torch.equal(fresh(x), layer(x))

    if log_det == "refined":
        assert inverse_error(fresh) > 0.1
        value = fresh.log_abs_det_jacobian(x, fresh(x))
        expected = torch.linalg.slogdet(fresh.weight.detach()).logabsdet
        assert torch.allclose(value.detach(), expected.expand(3), atol=1e-4)
        assert inverse_error(fresh) < TRACKED
    # Training goes on where it stopped.
    assert train_by_store(fresh, conjugate, 5) < loss


# --- The jit ------------------------------------------------------------------------------------


def jit_stack(log_det: str) -> Compose:
    parts = [linear(4, log_det=log_det), SmoothLeakyReLU(learnable=True)]
    return Compose([*parts, linear(4, log_det=log_det, seed=1)])


def jit_convolutions(log_det: str) -> Compose:
    """On vectors, as images of two channels."""
    parts = [ReshapeTransform((4,), (2, 2, 1)), conv(2, kernel_size=1, log_det=log_det)]
    parts.extend([ReshapeTransform((2, 2, 1), (1, 1, 4)), SmoothLeakyReLU(learnable=True)])
    options = {"kernel_size": (1, 3), "log_det": log_det}
    parts.extend([conv(1, **options), conv(1, padding_mode="circular", seed=1, **options)])
    return Compose([*parts, ReshapeTransform((1, 1, 4), (4,))])


JIT_LAYERS: dict[str, Callable[[str], Transform]] = {
    "linear": lambda log_det: linear(4, log_det=log_det),
    "stack": jit_stack,
    "convolutions": jit_convolutions,
}


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize("use", ["guide T", "guide T.inv", "density"])
@pytest.mark.parametrize("make", JIT_LAYERS)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_jit_gives_the_gradients_of_every_step(
    log_det: str, make: str, use: str, conjugate: Conjugate
) -> None:
    # A trace repeats operations on tensors and nothing else: a log-determinant of the first
    # step's weight, or a surrogate whose backward pass is lost, would pass unnoticed.
    runs = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        layer = JIT_LAYERS[make](log_det if isinstance(elbo, JitTrace_ELBO) else "exact")
        if use == "density":

            def density(layer: Transform = layer) -> None:  # the data go through T
                pyro.module("flow", layer.inv)
                base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
                flow = dist.TransformedDistribution(base, [layer.inv])
                with pyro.plate("data", 5):
                    pyro.sample("x", flow, obs=torch.linspace(-2, 2, 20).reshape(5, 4))

            programs = density, lambda: None
        else:
            programs = conjugate, flow_guide(layer if use == "guide T" else layer.inv, 4)
        runs.append([])
        elbo.loss_and_grads(*programs)  # compiles, and draws more numbers than a step does
        layer.clear_cache()
        for step in range(4):
            pyro.set_rng_seed(step)
            layer.zero_grad()
            loss = elbo.loss_and_grads(*programs)
            named = [(name, p) for name, p in layer.named_parameters() if "log_det" not in name]
            runs[-1].append((loss, {name: parameter.grad.clone() for name, parameter in named}))
            with torch.no_grad():
                for _, parameter in named:
                    parameter.add_(
                        torch.linspace(-0.05, 0.07, parameter.numel()).view_as(parameter)
                    )
    for (loss, gradients), (jit_loss, jit_gradients) in zip(*runs, strict=True):
        assert jit_loss == pytest.approx(loss, rel=EXACT)
        assert_gradients_equal(jit_gradients, gradients)


@pytest.mark.usefixtures("_jit_may_warn")
def test_jit_trains_a_learned_inverse_wholly_or_not_at_all(conjugate: Conjugate) -> None:
    # Half of its objective would drive R anywhere.
    gradients = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        layer = linear(4, log_det="learned")
        nudge_inverses(layer, 0.3)
        guide = flow_guide(layer, 4)
        elbo.loss_and_grads(conjugate, guide)
        layer.zero_grad()
        pyro.set_rng_seed(0)
        elbo.loss_and_grads(conjugate, guide)
        gradients.append(layer.log_det.theta.grad)
    if gradients[1] is not None and gradients[1].any():
        assert relative_error(*gradients) < EXACT


# --- Samplers -----------------------------------------------------------------------------------


def potential(layer: Transform, conjugate: Conjugate, z: Tensor) -> Tensor:
    """``−log p(T(z), y) − log|det J|``, as NeuTra warps it."""
    x = layer(z)
    precision = torch.linalg.inv(conjugate.covariance)
    centred = x - conjugate.mean
    log_density = -0.5 * (centred @ precision * centred).sum(-1)
    return -(log_density + layer.log_abs_det_jacobian(z, x)).sum()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_gradient_to_the_state_is_exact_whatever_r_is(
    log_det: str, mode: str, conjugate: Conjugate
) -> None:
    gradients = []
    for method in (log_det, "exact"):
        layer = linear(4, log_det=method).train(mode == "train")
        nudge_inverses(layer, 1.0)
        z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(2):  # as samplers do: the same state again
            (gradient,) = torch.autograd.grad(potential(layer, conjugate, z), z)
        gradients.append(gradient)
    assert relative_error(*gradients) < EXACT


def test_potential_of_a_state_before_and_after_it_needs_a_gradient(conjugate: Conjugate) -> None:
    # Pyro's integrator switches requires_grad of one and the same tensor on and off.
    layer = linear(4).eval()
    z = torch.randn(4)
    values = []
    for _ in range(2):
        values.append(potential(layer, conjugate, z).item())
        z.requires_grad_(True)
        value = potential(layer, conjugate, z)
        (gradient,) = torch.autograd.grad(value, z)
        z.requires_grad_(False)
        values.append(value.item())
        assert gradient.any()
    assert len(set(values)) == 1


def error_of_neutra(conjugate: Conjugate, guide: AutoContinuous, **options: int) -> float:
    """Of the mean of NUTS' samples, in deviations of the posterior."""
    neutra = NeuTraReparam(guide)
    sampler = NUTS(neutra.reparam(conjugate), max_tree_depth=4)
    mcmc = MCMC(sampler, disable_progbar=True, **options)
    mcmc.run()
    samples = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"])["z"]
    deviations = conjugate.covariance.diagonal().sqrt()
    return ((samples.mean(0) - conjugate.mean).abs() / deviations).max().item()


def test_neutra_finds_the_posterior(conjugate: Conjugate) -> None:
    # A guide that is off: the warped posterior is then no standard normal, and the sampler has
    # to use the transform's gradient to undo it.
    guide = AutoNormalizingFlow(conjugate, partial(self_normalizing_linear, init_scale=0.5))
    guide()
    guide.requires_grad_(False)
    with torch.no_grad():
        guide.transform.theta.copy_(0.5 * torch.randn(4, 4))
    # 150 samples: 0.08 deviations of the mean, which three times is a quarter.
    assert error_of_neutra(conjugate, guide, num_samples=150, warmup_steps=50) < 0.4


# --- The factory, and the inverse of Pyro's transforms ------------------------------------------


def test_factory_works_with_iterated_and_partial() -> None:
    stack = iterated(3, partial(self_normalizing_linear, log_det="exact"), 4, init_scale=0.5)
    assert [repr(part.log_det) for part in stack.parts] == ["Exact()"] * 3
    x = torch.randn(2, 4)
    assert torch.allclose(stack(x), x / 8)
    assert len({id(parameter) for parameter in stack.parameters()}) == 9

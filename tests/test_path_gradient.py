"""The path derivative: values, scores against autodiff, expectations, unequal weights."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms as pyro_transforms
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions import transforms as torch_transforms

from pyro_snf import (
    Compose,
    InverseTransformModule,
    LowRankAutoregressive,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
)
from pyro_snf.path_gradient import EqualWeightsCheck, PathGradientDistribution, push_score
from tests.registry import linear, randomize
from tests.test_pyro import Conjugate

# Float64, condition numbers below 3, a few layers deep: rounding, and three digits to spare.
EXACT = 1e-9
# The accuracy of the inverse of Pyro's Spline.
SPLINE = 1e-6
# The average of many samples is about normal: such a deviation has a probability of about 10⁻⁵.
STANDARD_ERRORS = 4.5

DIM = 3
BATCH_SHAPES = [(), (4,), (4, 1), (2, 1, 5)]


def base(dim: int = DIM) -> Distribution:
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def path(*transforms: Transform) -> PathGradientDistribution:
    return PathGradientDistribution(base(), list(transforms))


def close(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> bool:
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def autoregressive(dim: int = DIM) -> LowRankAutoregressive:
    layer = LowRankAutoregressive(dim, 4)
    randomize(layer)
    return layer


def foreign(transform: nn.Module) -> nn.Module:
    """A transform of Pyro, with noise added to its parameters."""
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return transform


STACKS: dict[str, Callable[[], list[Transform]]] = {
    "linear": lambda: [linear(DIM)],
    "linear exact": lambda: [linear(DIM, log_det="exact")],
    "T.inv of linear": lambda: [linear(DIM).inv],
    "autoregressive": lambda: [autoregressive()],
    "T.inv of autoregressive": lambda: [autoregressive().inv],
    "linear, autoregressive, linear": lambda: [
        Compose([linear(DIM), autoregressive(), linear(DIM, seed=1)])
    ],
    "SmoothLeakyReLU": lambda: [linear(DIM), SmoothLeakyReLU(), linear(DIM, seed=1)],
    "T.inv of SmoothLeakyReLU": lambda: [linear(DIM), SmoothLeakyReLU().inv],
    "learnable SmoothLeakyReLU": lambda: [Compose([SmoothLeakyReLU(learnable=True), linear(DIM)])],
    "Spline in Compose": lambda: [Compose([foreign(pyro_transforms.Spline(DIM)), linear(DIM)])],
    "Spline by itself": lambda: [linear(DIM), foreign(pyro_transforms.Spline(DIM))],
    "T.inv of Spline": lambda: [
        linear(DIM),
        InverseTransformModule(foreign(pyro_transforms.Spline(DIM))),
    ],
    "AffineCoupling": lambda: [Compose([foreign(pyro_transforms.affine_coupling(DIM))])],
    "AffineAutoregressive": lambda: [
        Compose([foreign(pyro_transforms.affine_autoregressive(DIM)), linear(DIM)])
    ],
    "Permute": lambda: [linear(DIM), pyro_transforms.Permute(torch.tensor([2, 0, 1]))],
    "nested Compose": lambda: [
        Compose([Compose([linear(DIM), SmoothLeakyReLU()]), Compose([linear(DIM, seed=1)])]),
        linear(DIM, seed=2),
    ],
    "T.inv of Compose": lambda: [Compose([linear(DIM), autoregressive()]).inv],
    "torch's ComposeTransform": lambda: [
        torch_transforms.ComposeTransform([linear(DIM), SmoothLeakyReLU()])
    ],
    "negative affine": lambda: [
        linear(DIM),
        torch_transforms.AffineTransform(torch.ones(DIM), torch.tensor([-2.0, 0.5, 3.0])),
    ],
    # Log-dets that are written in y, or in both.
    "exp": lambda: [linear(DIM), torch_transforms.ExpTransform()],
    "exp, log": lambda: [
        linear(DIM),
        torch_transforms.ExpTransform(),
        torch_transforms.ExpTransform().inv,
    ],
    "power": lambda: [
        torch_transforms.ExpTransform(),
        torch_transforms.PowerTransform(torch.tensor(3.0)),
    ],
    "sigmoid, logit": lambda: [
        torch_transforms.SigmoidTransform(),
        torch_transforms.AffineTransform(0.0, 0.5),
        torch_transforms.SigmoidTransform().inv,
    ],
    # An event of another number of dimensions.
    "correlations": lambda: [linear(DIM), torch_transforms.CorrCholeskyTransform()],
    "simplex": lambda: [linear(DIM), torch_transforms.StickBreakingTransform()],
}
EVERY_STACK = pytest.mark.parametrize("stack", STACKS)


def tolerance_of(stack: str) -> float:
    return SPLINE if "Spline" in stack else EXACT


def set_mode(transforms: list[Transform], mode: str) -> None:
    for transform in transforms:
        if isinstance(transform, nn.Module):
            transform.train(mode == "train")


# --- Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_STACK
def test_value_is_that_of_a_transformed_distribution(stack: str, mode: str) -> None:
    transforms = STACKS[stack]()
    set_mode(transforms, mode)
    for shape in BATCH_SHAPES:
        x = path(*transforms).rsample(shape)
        found = path(*transforms).log_prob(x)
        expected = dist.TransformedDistribution(base(), transforms).log_prob(x.detach().clone())
        assert found.shape == shape
        assert close(found, expected, tolerance_of(stack))


def test_value_without_gradients_is_the_ordinary_one() -> None:
    transforms = [linear(DIM), SmoothLeakyReLU(), autoregressive(), linear(DIM, seed=1)]
    with torch.no_grad():
        x = path(*transforms).rsample((4,))
        ordinary = dist.TransformedDistribution(base(), transforms).log_prob(x)
        assert torch.equal(path(*transforms).log_prob(x), ordinary)


@pytest.mark.parametrize(
    ("batch_shape", "shape"), [((4,), (4,)), ((3,), ()), ((2, 1), (5,)), ((), (6,))]
)
def test_batch_of_the_distribution_and_of_the_value(
    batch_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    # They are broadcast, also where the value has the smaller batch, of the event's size.
    layer = linear(DIM)
    location = torch.randn(*batch_shape, DIM)
    x = torch.randn(*shape, DIM).requires_grad_()
    results = []
    for kind in (PathGradientDistribution, dist.TransformedDistribution):
        flow = kind(dist.Normal(location, 1.0).to_event(1), [layer])
        value = flow.log_prob(x)
        factors = torch.linspace(1, 2, value.numel()).reshape(value.shape)
        results.append((value, *torch.autograd.grad((factors * value).sum(), x)))
    assert close(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1])


# --- Scores -------------------------------------------------------------------------------------


def density_by_hand(transforms: list[Transform], x: Tensor) -> Tensor:
    """``log q(x)`` of one x by plain inverses and the log-dets that these transforms give."""
    return dist.TransformedDistribution(base(), transforms).log_prob(x)


@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_STACK
def test_gradient_is_the_score(stack: str, mode: str) -> None:
    transforms = STACKS[stack]()
    set_mode(transforms, mode)
    for shape in BATCH_SHAPES:
        x = path(*transforms).rsample(shape).detach().requires_grad_()
        (expected,) = torch.autograd.grad(density_by_hand(transforms, x).sum(), x)
        # The same x, as a sample: it has come out of the transforms.
        for transform in transforms:
            transform.clear_cache()
        flow = path(*transforms)
        (found,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
        assert close(found, expected, 10 * tolerance_of(stack))


@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_STACK
def test_gradient_of_a_sample_is_the_score(stack: str, mode: str) -> None:
    # Through the cached pairs of the sample.
    transforms = STACKS[stack]()
    set_mode(transforms, mode)
    flow = path(*transforms)
    x = flow.rsample((4,))
    if not x.requires_grad:
        return  # no parameters, so no graph
    (found,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    value = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(density_by_hand(transforms, value).sum(), value)
    assert close(found, expected, 10 * tolerance_of(stack))


SMALL_STACKS = ["linear", "linear, autoregressive, linear", "SmoothLeakyReLU", "T.inv of linear"]


@pytest.mark.parametrize("stack", SMALL_STACKS)
def test_score_by_plain_autodiff(stack: str) -> None:
    # Without inverses and log-dets of the transforms: log q(T(z)) = log q(z) − log|det J(z)|.
    transforms = [transform.eval() for transform in STACKS[stack]()]

    def forward(z: Tensor) -> Tensor:
        for transform in transforms:
            z = transform(z)
        return z

    z = torch.randn(DIM).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(forward, z, create_graph=True)
    density = base().log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    (by_z,) = torch.autograd.grad(density, z)
    expected = torch.linalg.solve(jacobian.detach().mT, by_z)
    x = forward(z.detach()).detach().requires_grad_()
    (found,) = torch.autograd.grad(path(*transforms).log_prob(x), x)
    assert close(found, expected)


def test_weight_of_each_row() -> None:
    # As with poutine.scale. x is not a sample, so unequal weights are allowed.
    flow = path(linear(DIM))
    x = torch.randn(4, 1, DIM).requires_grad_()
    factors = torch.tensor([1.0, -2.0, 0.0, 3.0]).unsqueeze(-1)
    (found,) = torch.autograd.grad((factors * flow.log_prob(x)).sum(), x)
    (expected,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    assert close(found, factors.unsqueeze(-1) * expected)


def test_base_without_a_score() -> None:
    # A uniform distribution's log-density depends on nothing.
    flow = PathGradientDistribution(
        dist.Uniform(torch.zeros(DIM), 1.0).to_event(1), [linear(DIM).eval()]
    )
    x = flow.rsample()
    (gradient,) = torch.autograd.grad(flow.log_prob(x), x)
    assert torch.equal(gradient, torch.zeros(DIM))


def test_base_with_parameters_is_trained_by_the_path() -> None:
    # −E log q of N(m, s²): the path through z = m + s ε gives 0 for m and −1/s for s.
    location, scale = torch.zeros(DIM).requires_grad_(), torch.ones(DIM).requires_grad_()
    flow = PathGradientDistribution(dist.Normal(location, scale).to_event(1), [linear(DIM)])
    noise = 20_000
    flow.log_prob(flow.rsample((noise,))).mean().backward()
    assert location.grad.abs().max() < STANDARD_ERRORS / math.sqrt(noise)
    # The variance of ε² is 2.
    assert (scale.grad + 1).abs().max() < STANDARD_ERRORS * math.sqrt(2 / noise)


def test_push_score_leaves_its_inputs_alone() -> None:
    for transform in (linear(DIM), autoregressive(), SmoothLeakyReLU(), SmoothLeakyReLU().inv):
        x, score = torch.randn(2, DIM), torch.randn(2, DIM)
        y = transform(x)
        before = [tensor.detach().clone() for tensor in (x, y, score)]
        push_score(transform, x, y, score)
        for tensor, value in zip((x, y, score), before, strict=True):
            assert torch.equal(tensor, value)
        assert not x.requires_grad


# --- Gradients to the parameters ----------------------------------------------------------------


def everything() -> Compose:
    """Layers of all kinds, R exact."""
    activation = SmoothLeakyReLU(learnable=True)
    return Compose([linear(DIM), autoregressive(), linear(DIM, seed=1), activation, linear(DIM)])


def elbo_gradient(
    kind: type[dist.TransformedDistribution], flow: nn.Module, noise: Tensor
) -> list[Tensor]:
    """Of each sample, for each parameter: ``∇ [log q(x) − log p(x)]``, shapes ``(B, ...)``."""
    result = []
    for row in noise:
        x = flow(row)
        target = 0.25 * (x - 1).pow(4).sum()
        loss = kind(base(), [flow]).log_prob(x) + target
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
        result.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(result)


def test_expectation_is_that_of_the_total_gradient() -> None:
    # With the same noise: the difference is the omitted term, whose mean is 0.
    flow = everything().eval()
    noise = torch.randn(400, DIM)
    difference = elbo_gradient(PathGradientDistribution, flow, noise) - elbo_gradient(
        dist.TransformedDistribution, flow, noise
    )
    deviation = difference.std(0) / math.sqrt(len(noise))
    assert (difference.mean(0).abs() <= STANDARD_ERRORS * deviation + EXACT).all()
    # The difference itself is not 0.
    assert difference.abs().max() > 0.1


def test_omitted_term_is_the_gradient_at_a_fixed_sample() -> None:
    # In every sample: ∇_θ log q_θ(x) for an x that does not depend on θ.
    flow = everything().eval()
    noise = torch.randn(5, DIM)
    found = elbo_gradient(dist.TransformedDistribution, flow, noise) - elbo_gradient(
        PathGradientDistribution, flow, noise
    )
    for row, difference in zip(noise, found, strict=True):
        x = flow(row).detach()
        flow.clear_cache()
        log_q = dist.TransformedDistribution(base(), [flow]).log_prob(x)
        gradients = torch.autograd.grad(log_q, list(flow.parameters()))
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        assert close(difference, expected, 10 * EXACT)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_gradient_at_the_posterior_is_zero_in_every_sample(log_det: str, mode: str) -> None:
    conjugate = Conjugate(DIM)
    layer = conjugate.optimal(log_det=log_det).train(mode == "train")

    def guide() -> None:
        pyro.module("flow", layer)
        pyro.sample("z", path(layer))

    for _ in range(5):
        layer.zero_grad()
        Trace_ELBO().differentiable_loss(conjugate, guide).backward()
        for parameter in layer.parameters():
            assert parameter.grad.abs().max() < EXACT


def test_density_at_an_input_has_no_gradient_in_the_parameters() -> None:
    flow = everything()
    x = path(flow).rsample((4,)).detach().requires_grad_()
    path(flow).log_prob(x).sum().backward()
    assert x.grad.any()
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_density_at_a_constant_is_the_ordinary_one() -> None:
    # As in reweighted wake-sleep, where samples are constants.
    flow, x = everything(), torch.randn(4, DIM)
    gradients = []
    for kind in (PathGradientDistribution, dist.TransformedDistribution):
        value = kind(base(), [flow]).log_prob(x.clone())
        gradients.append(torch.autograd.grad(value.sum(), list(flow.parameters())))
    for found, expected in zip(*gradients, strict=True):
        assert close(found, expected)


# --- Inside Pyro --------------------------------------------------------------------------------


def guide_of(flow: nn.Module, dim: int = DIM) -> Callable[[], None]:
    """A hand-written guide with one check of weights for all samples, as in the autoguide."""
    check = EqualWeightsCheck()

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", PathGradientDistribution(base(dim), [flow], weights_check=check))

    return guide


@pytest.fixture
def conjugate() -> Conjugate:
    return Conjugate(DIM)


ACTIVATIONS: dict[str, Callable[[], list[Transform]]] = {
    "linear": lambda: [linear(DIM)],
    "autoregressive": lambda: [autoregressive(), linear(DIM)],
    # Has no cache, so that the inverse at a sample is computed.
    "Permute": lambda: [linear(DIM), pyro_transforms.Permute(torch.tensor([2, 0, 1]))],
}
UNEQUAL = {
    "Renyi sequential": lambda: RenyiELBO(alpha=0.5, num_particles=3),
    "Renyi vectorized": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "importance weighted": lambda: RenyiELBO(alpha=0.0, num_particles=2),
    "tail-adaptive": lambda: TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("objective", UNEQUAL)
def test_unequal_weights_are_refused(objective: str, activation: str, conjugate: Conjugate) -> None:
    guide = guide_of(Compose(ACTIVATIONS[activation]()))
    with pytest.raises(RuntimeError, match="use gradient='total' instead"):
        UNEQUAL[objective]().loss_and_grads(conjugate, guide)


def test_training_goes_on_after_a_refusal(conjugate: Conjugate) -> None:
    guide = guide_of(linear(DIM))
    with pytest.raises(RuntimeError, match="gradient='total'"):
        RenyiELBO(num_particles=3).loss_and_grads(conjugate, guide)
    Trace_ELBO(num_particles=3).loss_and_grads(conjugate, guide)


AVERAGING = {
    "one": Trace_ELBO,
    "sequential": lambda: Trace_ELBO(num_particles=3),
    "vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean field": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "graph": lambda: TraceGraph_ELBO(num_particles=3),
    "Renyi, one particle": lambda: RenyiELBO(alpha=0.5, num_particles=1),
}


@pytest.mark.parametrize("scale", [1.0, 1e-3, 50.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("objective", AVERAGING)
def test_averages_are_not_refused(
    objective: str, activation: str, scale: float, conjugate: Conjugate
) -> None:
    flow = Compose(ACTIVATIONS[activation]())
    guide, model = guide_of(flow), conjugate
    elbo = AVERAGING[objective]()
    for factor in (1.0, 0.5):  # the weight may change from step to step
        elbo.loss_and_grads(
            poutine.scale(model, scale * factor), poutine.scale(guide, scale * factor)
        )
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_sum_of_losses_in_one_backward_pass(conjugate: Conjugate) -> None:
    guide = guide_of(linear(DIM))
    losses = [Trace_ELBO(num_particles=2).differentiable_loss(conjugate, guide) for _ in range(3)]
    sum(losses).backward()


def test_backward_passes_of_several_losses(conjugate: Conjugate) -> None:
    # Each with its own weight.
    guide = guide_of(linear(DIM))
    losses = [Trace_ELBO().differentiable_loss(conjugate, guide) for _ in range(3)]
    for factor, loss in enumerate(losses, 1):
        (factor * loss).backward()


def test_backward_pass_repeated_with_another_factor(conjugate: Conjugate) -> None:
    layer = linear(DIM)
    loss = Trace_ELBO(num_particles=2).differentiable_loss(conjugate, guide_of(layer))
    loss.backward(retain_graph=True)
    once = layer.theta.grad.clone()
    (3 * loss).backward()
    assert close(layer.theta.grad, 4 * once)


def test_two_guides_at_once(conjugate: Conjugate) -> None:
    first, second = guide_of(linear(DIM)), guide_of(linear(DIM, seed=1))
    one = Trace_ELBO().differentiable_loss(conjugate, first)
    pyro.clear_param_store()
    other = Trace_ELBO().differentiable_loss(conjugate, second)
    (one + 0.1 * other).backward()


def test_weights_of_zero_are_equal(conjugate: Conjugate) -> None:
    # Annealing may start at 0.
    layer = linear(DIM)
    loss = Trace_ELBO(num_particles=2).differentiable_loss(conjugate, guide_of(layer))
    (0.0 * loss).backward()
    assert not layer.theta.grad.any()


def test_expansion_checks_its_samples() -> None:
    # Vectorized particles are samples of an expansion.
    flow = path(linear(DIM)).expand([4])
    assert isinstance(flow, PathGradientDistribution)
    x = flow.rsample()
    value = flow.log_prob(x)
    assert x.shape == (4, DIM)
    assert value.shape == (4,)
    with pytest.raises(RuntimeError, match="gradient='total'"):
        (torch.arange(4.0) * value).sum().backward()


def test_independent_and_masked(conjugate: Conjugate) -> None:
    layer = linear(DIM)
    flow = path(layer).expand([4])
    x = flow.rsample()
    (expected,) = torch.autograd.grad(flow.log_prob(x).sum(), x, retain_graph=True)
    (found,) = torch.autograd.grad(flow.to_event(1).log_prob(x), x, retain_graph=True)
    assert close(found, expected)
    assert torch.equal(flow.mask(False).log_prob(x), torch.zeros(4))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy(make_copy: Callable[[Distribution], Distribution]) -> None:
    flow = path(everything())
    x = flow.rsample((2,))
    flow.log_prob(x).sum().backward()
    other = make_copy(flow)
    value = x.detach().requires_grad_()
    assert close(other.log_prob(value), flow.log_prob(value), 1e-5)  # R is updated between the two
    other.log_prob(other.rsample((2,))).sum().backward()


# --- The jit, second derivatives, bad values ----------------------------------------------------


@pytest.mark.usefixtures("_jit_may_warn")
def test_jit_takes_the_total_gradient(conjugate: Conjugate) -> None:
    gradients = []
    for elbo, kind in [
        (JitTrace_ELBO(ignore_jit_warnings=True), PathGradientDistribution),
        (Trace_ELBO(), dist.TransformedDistribution),
    ]:
        pyro.clear_param_store()
        layer = linear(DIM)

        def guide(
            layer: SelfNormalizingLinear = layer,
            kind: type[dist.TransformedDistribution] = kind,
        ) -> None:
            pyro.module("flow", layer)
            pyro.sample("z", kind(base(), [layer]))

        elbo.loss_and_grads(conjugate, guide)  # compiles
        for step in range(2):
            layer.zero_grad()
            pyro.set_rng_seed(step)
            elbo.loss_and_grads(conjugate, guide)
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert close(found, expected)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_values_are_validated(needs_gradient: bool) -> None:
    flow = PathGradientDistribution(base(), [linear(DIM)], validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        flow.log_prob(torch.full((DIM,), math.nan, requires_grad=needs_gradient))
    with pytest.raises(ValueError, match=r"right-most size|shape"):
        flow.log_prob(torch.zeros(DIM + 1, requires_grad=needs_gradient))


def test_second_derivative_is_refused() -> None:
    # In a sum with other terms it would silently be missing.
    flow = path(linear(DIM))
    x = flow.rsample()
    loss = x.square().sum() + flow.log_prob(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives: use gradient='total'"):
        gradient.sum().backward()


def test_gradient_with_a_graph_that_is_not_used() -> None:
    flow = path(linear(DIM))
    x = flow.rsample()
    value = flow.log_prob(x)
    (found,) = torch.autograd.grad(value, x, create_graph=True)
    (expected,) = torch.autograd.grad(value, x)
    assert torch.equal(found, expected)


def test_nan_surfaces_and_stays_in_its_row() -> None:
    x = torch.randn(2, DIM)
    x[0, 1] = math.nan
    x.requires_grad_()
    with pyro.validation_enabled(False):
        flow = path(autoregressive(), linear(DIM), SmoothLeakyReLU())
        value = flow.log_prob(x)
    value.sum().backward()
    assert value[0].isnan()
    assert x.grad[0].isnan().any()
    assert value[1].isfinite()
    assert x.grad[1].isfinite().all()


def test_half_precision() -> None:
    layers = [LowRankAutoregressive(DIM, 4), SelfNormalizingLinear(DIM)]
    flow = Compose([layer.bfloat16() for layer in layers])
    zeros = torch.zeros(DIM, dtype=torch.bfloat16)
    q = PathGradientDistribution(dist.Normal(zeros, zeros + 1).to_event(1), [flow])
    x = q.rsample((2,))
    q.log_prob(x).sum().backward()
    assert layers[1].theta.grad.dtype == torch.bfloat16


def test_training_by_svi_reaches_the_posterior(conjugate: Conjugate) -> None:
    # The noise vanishes at the posterior, so that a constant learning rate suffices.
    layer = SelfNormalizingLinear(DIM, init_scale=0.3)
    svi = SVI(conjugate, guide_of(layer), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(500):
        svi.step()
    weight = layer.weight.detach()
    assert (layer.bias - conjugate.mean).abs().max() < 0.01
    assert (weight @ weight.mT - conjugate.covariance).abs().max() < 0.01

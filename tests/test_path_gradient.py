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
from pyro import infer, poutine
from pyro.distributions.transforms import (
    Permute,
    Spline,
    affine_autoregressive,
    affine_coupling,
    leaky_relu,
)
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions import Distribution, Transform

from pyro_snf import (
    Compose,
    InverseTransformModule,
    LowRankAutoregressive,
    RationalQuadraticSpline,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
)
from pyro_snf.path_gradient import EqualWeightsCheck, PathGradientDistribution, push_score
from tests.registry import is_close, linear, randomize
from tests.test_pyro import Conjugate

# Float64, condition numbers below 3, a few layers deep: rounding, and three digits to spare.
EXACT = 1e-9
# The accuracy of the inverse of Pyro's Spline.
SPLINE = 1e-6
# The average of many samples is about normal: such a deviation has a probability of about 10⁻⁵.
STANDARD_ERRORS = 4.5

DIM = 3
BATCH_SHAPES = [(), (4,), (4, 1), (2, 1, 5)]


def base() -> Distribution:
    return dist.Normal(torch.zeros(DIM), 1.0).to_event(1)


def path(*transforms: Transform) -> PathGradientDistribution:
    return PathGradientDistribution(base(), list(transforms))


def ordinary(*transforms: Transform) -> dist.TransformedDistribution:
    return dist.TransformedDistribution(base(), list(transforms))


def dense(seed: int = 0, **options: object) -> SelfNormalizingLinear:
    return linear(DIM, seed=seed, **options)


def autoregressive() -> LowRankAutoregressive:
    layer = LowRankAutoregressive(DIM, 4)
    randomize(layer)
    return layer


def foreign(make: Callable[[int], nn.Module]) -> nn.Module:
    """A transform of Pyro, with noise added to its parameters."""
    transform = make(DIM)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return transform


def permute() -> Transform:
    return Permute(torch.tensor([2, 0, 1]))


def everything() -> Compose:
    """Layers of all kinds, R exact."""
    return Compose([dense(), autoregressive(), dense(1), SmoothLeakyReLU(learnable=True), dense()])


STACKS: dict[str, Callable[[], list[Transform]]] = {
    "linear": lambda: [dense()],
    "linear exact": lambda: [dense(log_det="exact")],
    "T.inv of linear": lambda: [dense().inv],
    "autoregressive": lambda: [autoregressive()],
    "T.inv of autoregressive": lambda: [autoregressive().inv],
    "linear, autoregressive, linear": lambda: [Compose([dense(), autoregressive(), dense(1)])],
    "SmoothLeakyReLU": lambda: [dense(), SmoothLeakyReLU(), dense(1)],
    "T.inv of SmoothLeakyReLU": lambda: [dense(), SmoothLeakyReLU().inv],
    "learnable SmoothLeakyReLU": lambda: [Compose([SmoothLeakyReLU(learnable=True), dense()])],
    "Spline in Compose": lambda: [Compose([foreign(Spline), dense()])],
    "Spline by itself": lambda: [dense(), foreign(Spline)],
    "T.inv of Spline": lambda: [dense(), InverseTransformModule(foreign(Spline))],
    "AffineCoupling": lambda: [Compose([foreign(affine_coupling)])],
    "AffineAutoregressive": lambda: [Compose([foreign(affine_autoregressive), dense()])],
    "Permute": lambda: [dense(), permute()],
    "nested Compose": lambda: [
        Compose([Compose([dense(), SmoothLeakyReLU()]), Compose([dense(1)])]),
        dense(2),
    ],
    "T.inv of Compose": lambda: [Compose([dense(), autoregressive()]).inv],
    "torch's ComposeTransform": lambda: [td.ComposeTransform([dense(), SmoothLeakyReLU()])],
    "negative affine": lambda: [
        dense(),
        td.AffineTransform(torch.ones(DIM), torch.tensor([-2.0, 0.5, 3.0])),
    ],
    # Log-dets that are written in y, or in both.
    "exp": lambda: [dense(), td.ExpTransform()],
    "exp, log": lambda: [dense(), td.ExpTransform(), td.ExpTransform().inv],
    "power": lambda: [td.ExpTransform(), td.PowerTransform(torch.tensor(3.0))],
    "sigmoid, logit": lambda: [
        td.SigmoidTransform(),
        td.AffineTransform(0.0, 0.5),
        td.SigmoidTransform().inv,
    ],
    # An event of another number of dimensions.
    "correlations": lambda: [dense(), td.CorrCholeskyTransform()],
    "simplex": lambda: [dense(), td.StickBreakingTransform()],
}


# --- Values and scores --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("stack", STACKS)
def test_value_and_score(stack: str, mode: str) -> None:
    # The oracle: plain inverses and the log-dets that these transforms give.
    transforms = STACKS[stack]()
    tolerance = SPLINE if "Spline" in stack else EXACT
    for transform in transforms:
        if isinstance(transform, nn.Module):
            transform.train(mode == "train")
    for shape in BATCH_SHAPES:
        flow = path(*transforms)
        sample = flow.rsample(shape)
        found = flow.log_prob(sample)  # through the cached pairs
        assert found.shape == shape
        x = sample.detach().requires_grad_()
        expected = ordinary(*transforms).log_prob(x)
        (score,) = torch.autograd.grad(expected.sum(), x)
        assert is_close(found, expected, tolerance)
        if sample.requires_grad:  # with parameters, there is a graph
            (gradient,) = torch.autograd.grad(found.sum(), sample)
            assert is_close(gradient, score, 10 * tolerance)
        for transform in transforms:
            transform.clear_cache()
        found = path(*transforms).log_prob(x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert is_close(found, expected, tolerance)
        assert is_close(gradient, score, 10 * tolerance)


@pytest.mark.parametrize(
    ("batch_shape", "shape"), [((4,), (4,)), ((3,), ()), ((2, 1), (5,)), ((), (6,))]
)
def test_batch_of_the_distribution_and_of_the_value(
    batch_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    # They are broadcast, also where the value has the smaller batch, of the event's size. x is not
    # a sample, so unequal weights, as with poutine.scale, are allowed.
    layer, location = dense(), torch.randn(*batch_shape, DIM)
    x = torch.randn(*shape, DIM).requires_grad_()
    results = []
    for kind in (PathGradientDistribution, dist.TransformedDistribution):
        value = kind(dist.Normal(location, 1.0).to_event(1), [layer]).log_prob(x)
        factors = torch.linspace(-1, 2, value.numel()).round().reshape(value.shape)
        results.append((value, *torch.autograd.grad((factors * value).sum(), x)))
    assert is_close(results[0][0], results[1][0])
    assert is_close(results[0][1], results[1][1])


SMALL_STACKS = ["linear", "linear, autoregressive, linear", "SmoothLeakyReLU", "T.inv of linear"]


@pytest.mark.parametrize("stack", SMALL_STACKS)
def test_score_by_plain_autodiff(stack: str) -> None:
    # Without inverses and log-dets of the transforms: log q(T(z)) = log q(z) − log|det J(z)|.
    transforms = [transform.eval() for transform in STACKS[stack]()]
    forward = td.ComposeTransform(transforms)
    z = torch.randn(DIM).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(forward, z, create_graph=True)
    density = base().log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    (by_z,) = torch.autograd.grad(density, z)
    expected = torch.linalg.solve(jacobian.detach().mT, by_z)
    x = forward(z.detach()).detach().requires_grad_()
    (found,) = torch.autograd.grad(path(*transforms).log_prob(x), x)
    assert is_close(found, expected)


def test_base_without_a_score() -> None:
    # A uniform distribution's log-density depends on nothing.
    uniform = dist.Uniform(torch.zeros(DIM), 1.0).to_event(1)
    flow = PathGradientDistribution(uniform, [dense().eval()])
    x = flow.rsample()
    (gradient,) = torch.autograd.grad(flow.log_prob(x), x)
    assert torch.equal(gradient, torch.zeros(DIM))


def test_base_with_parameters_is_trained_by_the_path() -> None:
    # −E log q of N(m, s²): the path through z = m + s ε gives 0 for m and −1/s for s.
    location, scale = torch.zeros(DIM).requires_grad_(), torch.ones(DIM).requires_grad_()
    flow = PathGradientDistribution(dist.Normal(location, scale).to_event(1), [dense()])
    noise = 20_000
    flow.log_prob(flow.rsample((noise,))).mean().backward()
    assert location.grad.abs().max() < STANDARD_ERRORS / math.sqrt(noise)
    # The variance of ε² is 2.
    assert (scale.grad + 1).abs().max() < STANDARD_ERRORS * math.sqrt(2 / noise)


@pytest.mark.parametrize("error", [KeyError, NotImplementedError])
def test_push_score_without_an_inverse(error: type[Exception]) -> None:
    class OneWay(LowRankAutoregressive):
        push_score = None

        def _inverse(self, y: Tensor) -> Tensor:
            raise error

    transform = LowRankAutoregressive(3, hidden_dim=4)
    randomize(transform)
    one_way = OneWay(3, hidden_dim=4)
    one_way.load_state_dict(transform.state_dict())
    for shape in BATCH_SHAPES:
        x = torch.randn(*shape, 3)
        y = transform(x).detach()
        expected = push_score(transform, x, y, -x)
        assert is_close(push_score(one_way, x, y, -x), expected)


def test_push_score_of_an_autoregressive_transform() -> None:
    transform = affine_autoregressive(20)  # whose inverse takes 20 passes
    x = torch.randn(5, 20)
    found = push_score(transform, x, transform(x), -x)
    y = transform(x).detach().requires_grad_()
    z = transform.inv(y)
    total = (-x * z).sum() - transform.log_abs_det_jacobian(z, y).sum()
    (expected,) = torch.autograd.grad(total, y)
    assert is_close(found, expected, 1e-5)  # residuals of 1e-6


def test_push_score_leaves_its_inputs_alone() -> None:
    for transform in (dense(), autoregressive(), SmoothLeakyReLU(), SmoothLeakyReLU().inv):
        x, score = torch.randn(2, DIM), torch.randn(2, DIM)
        y = transform(x)
        before = [tensor.detach().clone() for tensor in (x, y, score)]
        push_score(transform, x, y, score)
        for tensor, value in zip((x, y, score), before, strict=True):
            assert torch.equal(tensor, value)
        assert not x.requires_grad


# --- Gradients to the parameters ----------------------------------------------------------------


def test_expectation_is_that_of_the_total_gradient() -> None:
    # With the same noise, the difference is the omitted term: the gradient in the parameters at a
    # fixed sample, ∇_θ log q_θ(x), whose mean is 0.
    flow = everything().eval()

    def gradient(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
        return torch.cat([part.flatten() for part in gradients])

    def loss(kind: Callable[[Transform], Distribution], noise: Tensor) -> Tensor:
        x = flow(noise)
        return kind(flow).log_prob(x) + 0.25 * (x - 1).pow(4).sum()

    differences = []
    for noise in torch.randn(250, DIM):
        differences.append(gradient(loss(ordinary, noise)) - gradient(loss(path, noise)))
        if len(differences) <= 5:
            x = flow(noise).detach()
            flow.clear_cache()
            assert is_close(differences[-1], gradient(ordinary(flow).log_prob(x)), 10 * EXACT)
    difference = torch.stack(differences)
    deviation = difference.std(0) / math.sqrt(len(difference))
    assert (difference.mean(0).abs() <= STANDARD_ERRORS * deviation + EXACT).all()
    assert difference.abs().max() > 0.1


def standard_errors_of_the_omitted_term(flow: Transform, num_samples: int = 20_000) -> Tensor:
    """The mean of ``∂ log q(x)/∂x`` over samples, in standard errors.

    For a flow that ends in a bias b, it is minus the mean of the omitted term for b.
    """
    with torch.no_grad():
        x = path(flow).rsample((num_samples,))
    (score,) = torch.autograd.grad(path(flow).log_prob(x.requires_grad_()).sum(), x)
    return (score.mean(0) / score.std(0)).abs().max() * math.sqrt(num_samples)


SMOOTH: dict[str, Callable[[], nn.Module | Transform]] = {
    "autoregressive": autoregressive,
    "inverse of autoregressive": lambda: autoregressive().inv,
    "SmoothLeakyReLU": SmoothLeakyReLU,
    "inverse of SmoothLeakyReLU": lambda: SmoothLeakyReLU().inv,
    "spline": lambda: foreign(lambda dim: RationalQuadraticSpline(dim, bound=2.0)),
}


@pytest.mark.parametrize("activation", SMOOTH)
def test_expectation_of_the_score_is_zero_where_it_is_declared(activation: str) -> None:
    flow = Compose([dense(), SMOOTH[activation](), dense(1)]).eval()
    assert flow.has_continuous_log_det
    assert standard_errors_of_the_omitted_term(flow) < STANDARD_ERRORS


def test_expectation_of_the_score_is_not_zero_with_a_kink() -> None:
    # So such transforms must not declare it.
    flow = Compose([dense(), leaky_relu(), dense(1)]).eval()
    assert not flow.has_continuous_log_det
    assert standard_errors_of_the_omitted_term(flow) > 10 * STANDARD_ERRORS


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
        infer.Trace_ELBO().differentiable_loss(conjugate, guide).backward()
        for parameter in layer.parameters():
            assert parameter.grad.abs().max() < EXACT


def test_density_at_an_input_or_a_constant() -> None:
    flow = everything()
    x = path(flow).rsample((4,)).detach().requires_grad_()
    path(flow).log_prob(x).sum().backward()
    assert x.grad.any()
    assert all(parameter.grad is None for parameter in flow.parameters())
    # At a constant it is the ordinary one, as in reweighted wake-sleep.
    results = []
    for kind in (path, ordinary):
        value = kind(flow).log_prob(x.detach().clone())
        results.append(torch.autograd.grad(value.sum(), list(flow.parameters())))
    for found, expected in zip(*results, strict=True):
        assert is_close(found, expected)
    with torch.no_grad():
        x = path(flow).rsample((4,))
        assert torch.equal(path(flow).log_prob(x), ordinary(flow).log_prob(x))


# --- Inside Pyro --------------------------------------------------------------------------------


def guide_of(flow: nn.Module) -> Callable[[], None]:
    """A hand-written guide with one check of weights for all samples, as in the autoguide."""
    check = EqualWeightsCheck()

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", PathGradientDistribution(base(), [flow], weights_check=check))

    return guide


@pytest.fixture
def conjugate() -> Conjugate:
    return Conjugate(DIM)


ACTIVATIONS: dict[str, Callable[[], list[Transform]]] = {
    "linear": STACKS["linear"],
    "autoregressive": lambda: [autoregressive(), dense()],
    "Permute": STACKS["Permute"],  # has no cache, so that the inverse at a sample is computed
}
UNEQUAL = {
    "Renyi sequential": lambda: infer.RenyiELBO(alpha=0.5, num_particles=3),
    "Renyi vectorized": lambda: infer.RenyiELBO(
        alpha=0.5, num_particles=3, vectorize_particles=True
    ),
    "importance weighted": lambda: infer.RenyiELBO(alpha=0.0, num_particles=2),
    "tail-adaptive": lambda: infer.TraceTailAdaptive_ELBO(
        num_particles=4, vectorize_particles=True
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("objective", UNEQUAL)
def test_unequal_weights_are_refused(objective: str, activation: str, conjugate: Conjugate) -> None:
    guide = guide_of(Compose(ACTIVATIONS[activation]()))
    with pytest.raises(RuntimeError, match="use gradient='total' instead"):
        UNEQUAL[objective]().loss_and_grads(conjugate, guide)
    infer.Trace_ELBO(num_particles=3).loss_and_grads(conjugate, guide)  # training goes on


AVERAGING = {
    "one": infer.Trace_ELBO,
    "sequential": lambda: infer.Trace_ELBO(num_particles=3),
    "vectorized": lambda: infer.Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean field": lambda: infer.TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "graph": lambda: infer.TraceGraph_ELBO(num_particles=3),
    "Renyi, one particle": lambda: infer.RenyiELBO(alpha=0.5, num_particles=1),
}


@pytest.mark.parametrize("scale", [1.0, 1e-3, 50.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("objective", AVERAGING)
def test_averages_are_not_refused(
    objective: str, activation: str, scale: float, conjugate: Conjugate
) -> None:
    flow = Compose(ACTIVATIONS[activation]())
    guide, elbo = guide_of(flow), AVERAGING[objective]()
    for factor in (scale, 0.5 * scale):  # the weight may change from step to step
        elbo.loss_and_grads(poutine.scale(conjugate, factor), poutine.scale(guide, factor))
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_losses_in_one_backward_pass_and_in_several(conjugate: Conjugate) -> None:
    layer = dense()
    guides = [guide_of(layer), guide_of(dense(1))]

    def loss(guide: Callable[[], None] = guides[0]) -> Tensor:
        pyro.clear_param_store()
        return infer.Trace_ELBO(num_particles=2).differentiable_loss(conjugate, guide)

    sum([loss() for _ in range(3)]).backward()
    for factor, one in enumerate([loss() for _ in range(3)], 1):  # each with its own weight
        (factor * one).backward()
    one, other = map(loss, guides)
    (one + 0.1 * other).backward()
    layer.zero_grad()
    (0.0 * loss()).backward()  # annealing may start at 0
    assert not layer.theta.grad.any()
    one = loss()
    one.backward(retain_graph=True)
    once = layer.theta.grad.clone()
    (3 * one).backward()
    assert is_close(layer.theta.grad, 4 * once)


def test_expanded_independent_and_masked() -> None:
    # Vectorized particles are samples of an expansion, whose weights are checked.
    flow = path(dense()).expand([4])
    assert isinstance(flow, PathGradientDistribution)
    x = flow.rsample()
    value = flow.log_prob(x)
    assert (x.shape, value.shape) == ((4, DIM), (4,))
    (expected,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    (found,) = torch.autograd.grad(flow.to_event(1).log_prob(x), x, retain_graph=True)
    assert is_close(found, expected)
    assert torch.equal(flow.mask(False).log_prob(x), torch.zeros(4))
    with pytest.raises(RuntimeError, match="gradient='total'"):
        (torch.arange(4.0) * value).sum().backward()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy(make_copy: Callable[[Distribution], Distribution]) -> None:
    flow = path(everything())
    x = flow.rsample((2,))
    flow.log_prob(x).sum().backward()
    other = make_copy(flow)
    value = x.detach().requires_grad_()
    # R is updated between the two.
    assert is_close(other.log_prob(value), flow.log_prob(value), 1e-5)
    other.log_prob(other.rsample((2,))).sum().backward()


# --- The jit, second derivatives, bad values ----------------------------------------------------


@pytest.mark.usefixtures("_jit_may_warn")
def test_jit_takes_the_total_gradient(conjugate: Conjugate) -> None:
    gradients = []
    for elbo, kind in (
        (infer.JitTrace_ELBO(ignore_jit_warnings=True), path),
        (infer.Trace_ELBO(), ordinary),
    ):
        pyro.clear_param_store()
        layer = dense()

        def guide(
            layer: SelfNormalizingLinear = layer,
            kind: Callable[[Transform], Distribution] = kind,
        ) -> None:
            pyro.module("flow", layer)
            pyro.sample("z", kind(layer))

        elbo.loss_and_grads(conjugate, guide)  # compiles
        for step in range(2):
            layer.zero_grad()
            pyro.set_rng_seed(step)
            elbo.loss_and_grads(conjugate, guide)
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert is_close(found, expected)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_values_are_validated(needs_gradient: bool) -> None:
    flow = PathGradientDistribution(base(), [dense()], validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        flow.log_prob(torch.full((DIM,), math.nan, requires_grad=needs_gradient))
    with pytest.raises(ValueError, match=r"right-most size|shape"):
        flow.log_prob(torch.zeros(DIM + 1, requires_grad=needs_gradient))


def test_second_derivative_is_refused() -> None:
    # In a sum with other terms it would silently be missing.
    flow = path(dense())
    x = flow.rsample()
    value = flow.log_prob(x)
    (found,) = torch.autograd.grad(value, x, create_graph=True)  # a graph that is not used
    assert torch.equal(found, *torch.autograd.grad(value, x, retain_graph=True))
    (gradient,) = torch.autograd.grad(x.square().sum() + value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives: use gradient='total'"):
        gradient.sum().backward()


def test_nan_surfaces_and_stays_in_its_row() -> None:
    x = torch.randn(2, DIM)
    x[0, 1] = math.nan
    x.requires_grad_()
    with pyro.validation_enabled(False):
        flow = path(autoregressive(), dense(), SmoothLeakyReLU())
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

"""Pairs of networks that are given a context, against dense Jacobians for each context."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_snf import (
    GECO,
    Compose,
    ConditionalSelfNormalizing,
    SelfNormalizing,
    conditional_self_normalizing,
)
from tests.pairs import Dense, gradients_of, is_close, log_det_of
from tests.registry import (
    CONDITIONAL_CASES,
    COPIES,
    LOG_DETS,
    LOSSES,
    ConditionalCase,
    assert_gradients_equal,
    conditional_pair,
    density_by_inverse,
    entropy_of_guide,
    linear,
    standard_normal,
)

# Float64, condition numbers below 10.
EXACT = 1e-9
# The same in float32, with residuals of 6e-6.
SINGLE = 1e-4
# Root mean square errors of posterior moments of size 0.1 to 1, after 300 steps of Adam with a
# falling rate.
MEAN = 0.05
COVARIANCE = 0.03


@pytest.fixture(params=[name for name in CONDITIONAL_CASES if "free form" in name])
def case(request: pytest.FixtureRequest) -> ConditionalCase:
    """Each named constructor of a conditional pair in turn."""
    return CONDITIONAL_CASES[request.param]


def contexts(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(200 + seed))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(300 + seed))


def oracle(module: ConditionalSelfNormalizing, context: Tensor, shape: torch.Size) -> Dense:
    """For inputs of this shape: a context for each of them."""
    rows = context.expand(*shape[:-1], context.shape[-1]).reshape(-1, context.shape[-1])
    return Dense(module.transform.forward_net, rows)


def exact_surrogate(log_det: str, **options: object) -> ConditionalSelfNormalizing:
    """A pair whose surrogate is exact by iterations, and whose penalty trains g alone."""
    return conditional_pair(
        log_det=log_det,
        num_probes=3,
        probe="orthogonal",
        max_iterations=3,
        tolerance=1e-12,
        reconstruction="inverse",
        **options,
    )


# --- Values -------------------------------------------------------------------------------------

# Batches of the contexts, and of the inputs.
BATCHES = [
    ((), ()),
    ((), (5,)),
    ((5,), ()),
    ((5,), (5,)),
    ((5,), (3, 5)),
    ((5,), (3, 1)),
    ((2, 1), (5,)),
    ((2, 5), (3, 1, 1, 5)),
]


@pytest.mark.parametrize(("context_batch", "batch"), BATCHES)
def test_values_and_shapes_are_those_of_the_networks(
    case: ConditionalCase, context_batch: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    module, context, x = case.make().eval(), contexts(*context_batch), inputs(*batch)
    transform = module.condition(context)
    shape = torch.broadcast_shapes(context_batch, batch)
    whole = x.expand(*shape, 3)
    reference = oracle(module, context, whole.shape)

    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert y.shape == whole.shape
    assert log_det.shape == shape
    assert is_close(y, reference(whole), EXACT)
    assert is_close(log_det, log_det_of(reference, whole), EXACT)

    transform.clear_cache()
    solution = transform.inv(x)
    assert solution.shape == whole.shape
    assert is_close(solution, reference.inv(whole), EXACT)
    assert transform.forward_shape(x.shape) == transform.inverse_shape(x.shape) == y.shape

    module.train()
    y = transform(x)
    assert transform.log_abs_det_jacobian(x, y).shape == shape


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_log_det_is_that_of_the_jacobian(case: ConditionalCase, direction: str) -> None:
    module = case.make().eval()
    for context, x in zip(contexts(3), inputs(3), strict=True):
        transform = module.condition(context)
        if direction == "T.inv":
            transform = transform.inv
        jacobian = torch.autograd.functional.jacobian(transform, x)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert is_close(log_det_of(transform, x), expected, EXACT)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_round_trips(case: ConditionalCase, mode: str) -> None:
    module, x = case.make().train(mode != "eval"), inputs(3, 5)
    with torch.set_grad_enabled(mode != "no_grad"):
        transform = module.condition(contexts(5))
        for part in (transform, transform.inv):
            y = part(x).detach()
            transform.clear_cache()
            assert is_close(part.inv(y), x, EXACT)


def test_training_value_is_the_log_det_or_exactly_zero(case: ConditionalCase) -> None:
    module, x, context = case.make(), inputs(5), contexts(5)
    value = log_det_of(module.condition(context), x)
    if module.transform.log_det == "learned":
        assert torch.equal(value, torch.zeros(5))
    else:
        assert is_close(value, log_det_of(oracle(module, context, x.shape), x), EXACT)


def test_context_changes_the_map(case: ConditionalCase) -> None:
    module, x = case.make(), inputs(3)
    one, other = contexts(2)
    assert not is_close(module.condition(one)(x), module.condition(other)(x), 1e-3)


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_in_a_conditional_distribution(case: ConditionalCase, direction: str) -> None:
    module, context = case.make().eval(), contexts(5)
    transform = module if direction == "T" else module.inv
    flow = dist.ConditionalTransformedDistribution(standard_normal(3), [transform])
    flow = flow.condition(context)
    # The base is expanded, for each context has a sample of its own.
    assert flow.batch_shape == (5,)
    assert flow.event_shape == (3,)
    sample = flow.rsample((7,))
    assert sample.shape == (7, 5, 3)
    assert len({row.tolist()[0] for row in flow.base_dist.sample().unbind()}) == 5
    for value in (sample, sample.detach().clone(), inputs(5)):
        reference = oracle(module, context, value.shape)
        reference = reference if direction == "T" else reference.inv
        x = reference.inv(value.detach())
        expected = standard_normal(3).log_prob(x) - reference.log_abs_det_jacobian(x, value)
        assert is_close(flow.log_prob(value), expected, EXACT)


@pytest.mark.parametrize(("context_dim", "shape"), [(0, ()), (1, (2,)), (2, (2, 3))])
def test_contexts_of_any_number_of_dimensions(context_dim: int, shape: tuple[int, ...]) -> None:
    def total(context: Tensor) -> Tensor:
        return context.reshape(len(context), -1).sum(1, keepdim=True)

    class Shifted(nn.Module):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return x.sinh() * total(context).exp()

    class Back(nn.Module):
        def forward(self, y: Tensor, context: Tensor) -> Tensor:
            return (y / total(context).exp()).asinh()

    module = ConditionalSelfNormalizing(Shifted(), Back(), event_shape=3, context_dim=context_dim)
    context, x = torch.randn(4, *shape), inputs(2, 4)
    transform = module.condition(context)
    y = transform(x)
    assert is_close(y, x.sinh() * total(context).exp(), EXACT)
    expected = x.cosh().log().sum(-1) + 3 * total(context).squeeze(1)
    assert is_close(transform.log_abs_det_jacobian(x, y), expected, EXACT)
    assert is_close(transform.inv(y.clone()), x, EXACT)


def test_determinants_of_several_contexts_may_differ_in_sign() -> None:
    # Each context has a map of its own: nothing is wrong, and nothing is warned of.
    class Scaled(nn.Module):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return context * x

    module = ConditionalSelfNormalizing(Scaled(), Scaled(), event_shape=1)
    value = log_det_of(module.condition(torch.tensor([[2.0], [-2.0]])), torch.ones(2, 1))
    assert is_close(value, torch.full((2,), math.log(2.0)), EXACT)


# --- What is remembered -------------------------------------------------------------------------


def test_pair_is_remembered(case: ConditionalCase) -> None:
    transform, x = case.make().condition(contexts(5)), inputs(5)
    y = transform(x)
    assert transform(x) is y
    assert transform.inv(y) is x
    assert transform.inv.inv is transform
    assert transform.with_cache(1)(x) is y
    plain = transform.with_cache(0)
    assert plain(x) is not plain(x)
    transform.clear_cache()
    assert transform(x) is not y
    y = inputs(5, seed=1)
    x = transform.inv(y)
    assert transform(x) is y


def test_conditionings_do_not_disturb_each_other(case: ConditionalCase) -> None:
    module, x = case.make().eval(), inputs(5)
    given = [contexts(5), contexts(5, seed=1), contexts(), contexts(2, 1)]
    transforms = [module.condition(context) for context in given]
    images = [transform(x) for transform in transforms]
    for transform, context, y in zip(transforms, given, images, strict=True):
        reference = oracle(module, context, y.shape)
        whole = x.expand(y.shape)
        assert is_close(y, reference(whole), EXACT)
        assert transform.inv(y) is x
        log_det = transform.log_abs_det_jacobian(x, y)
        assert is_close(log_det, log_det_of(reference, whole), EXACT)
        # Of the others' images it knows nothing.
        assert is_close(transform.inv(images[0]), reference.inv(images[0].expand(y.shape)), EXACT)


def test_same_data_and_context_step_after_step(case: ConditionalCase) -> None:
    # The same tensors are scored again and again: nothing of the last step may come back.
    module, data, context = case.make(), inputs(5), contexts(5)
    twin = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (module, twin)]
    losses = []
    for _ in range(4):
        for each, optimizer, x, c in [
            (module, optimizers[0], data, context),
            (twin, optimizers[1], data.clone(), context.clone()),
        ]:
            loss = density_loss(each, x, c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0::2] == pytest.approx(losses[1::2], rel=EXACT)
    assert len(set(losses[0::2])) == 4


@pytest.mark.parametrize("training", [False, True])
def test_pair_dies_when_the_context_is_written_to(training: bool) -> None:
    module, context, x = exact_surrogate("refined"), contexts(5), inputs(5)
    transform = module.train(training).condition(context)
    y = transform(x)
    context.mul_(-2)
    reference = oracle(module, context, x.shape)
    assert not is_close(y, reference(x), 1e-3)
    assert is_close(transform(x), reference(x), EXACT)
    assert is_close(transform.inv(y.detach()), reference.inv(y.detach()), EXACT)
    value = transform.log_abs_det_jacobian(x, transform(x))
    assert is_close(value, log_det_of(reference, x), EXACT)


def test_condition_draws_no_random_numbers(case: ConditionalCase) -> None:
    module, x = case.make(), inputs(5)
    state = torch.get_rng_state()
    transform = module.condition(contexts(5))
    log_det_of(transform, x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_states_are_those_of_all_contexts() -> None:
    controller = GECO(0.001)
    module = conditional_pair(log_det="learned", reconstruction_weight=controller)
    first, second = module.condition(contexts(5)), module.condition(contexts(5, seed=1))
    log_det_of(first, inputs(5))
    weight = controller.weight.item()
    log_det_of(second, inputs(5))
    assert controller.weight.item() == weight > 1  # one step for the same parameters
    assert module.transform.estimator.num_draws == 2
    assert module.transform.estimator.num_steps == 1
    assert first.certificate == second.certificate == module.transform.certificate
    first.inv(inputs(4, 5))
    assert second.convergence.num_samples == 20


# --- Gradients ----------------------------------------------------------------------------------


def density_loss(module: ConditionalSelfNormalizing, data: Tensor, context: Tensor) -> Tensor:
    return -density_by_inverse(module.condition(context), data).mean()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_gradient_is_that_of_dense_jacobians(
    log_det: str, loss: Callable[[Transform, Tensor], Tensor]
) -> None:
    module, results = exact_surrogate(log_det), []
    parameters = dict(module.transform.forward_net.named_parameters())
    weights = torch.linspace(-1, 2, 15).view(3, 5)  # of both signs, as importance weights are
    for dense in (False, True):
        x, context = inputs(3, 5).requires_grad_(), contexts(5).requires_grad_()
        transform = oracle(module, context, x.shape) if dense else module.condition(context)
        named = {"context": context, **parameters}
        results.append(gradients_of(transform, x, named, (weights * loss(transform, x)).sum()))
    assert_gradients_equal(*results)


def test_gradient_outside_training_is_exact(case: ConditionalCase) -> None:
    module, results = case.make().eval(), []
    parameters = dict(module.transform.forward_net.named_parameters())
    for dense in (False, True):
        x, context = inputs(5).requires_grad_(), contexts(5).requires_grad_()
        transform = oracle(module, context, x.shape) if dense else module.condition(context)
        named = {"context": context, **parameters}
        loss = density_by_inverse(transform, x).sum()
        results.append(gradients_of(transform, x, named, loss))
    assert_gradients_equal(*results)


@pytest.mark.parametrize("which", ["both", "data", "context"])
@pytest.mark.parametrize("reconstruction", ["both", "inverse"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_neither_data_nor_context_get_a_gradient_of_the_penalty(
    log_det: str, reconstruction: str, which: str
) -> None:
    found = []
    for weight in (0.0, 10.0):
        module = conditional_pair(
            log_det=log_det,
            reconstruction=reconstruction,
            reconstruction_weight=weight,
            latent_noise=0.3,
            base=standard_normal(3),
        )
        x = inputs(5).requires_grad_(which != "context")
        context = contexts(5).requires_grad_(which != "data")
        density_loss(module, x, context).backward()
        found.append([one.grad for one in (x, context) if one.requires_grad])
    for without, with_penalty in zip(*found, strict=True):
        assert without.any()
        assert is_close(with_penalty, without, EXACT)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradient_reaches_every_parameter(
    case: ConditionalCase, loss: Callable[[Transform, Tensor], Tensor]
) -> None:
    module = case.make()
    loss(module.condition(contexts(5)), inputs(5)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


# --- Construction -------------------------------------------------------------------------------


def test_factory_starts_as_the_identity() -> None:
    module, x = conditional_self_normalizing(3, 2, [7], num_blocks=3), inputs(5)
    transform = module.condition(10 * contexts(5))
    assert torch.equal(transform(x), x)
    assert torch.equal(transform.inv(x.clone()), x)
    with torch.no_grad():
        assert torch.equal(log_det_of(transform, x), torch.zeros(5))
    for network in (module.transform.forward_net, module.transform.inverse_net):
        assert len(network.blocks) == 3
        assert network.blocks[0][0].weight.shape == (7, 5)


def test_case_is_built_by_the_name_that_it_claims(case: ConditionalCase) -> None:
    assert type(case.make()) is ConditionalSelfNormalizing


def test_parameters_are_floating_and_contiguous(case: ConditionalCase) -> None:
    # Pyro's store copies a parameter that is not contiguous, and then trains the copy.
    for name, tensor in case.make().named_parameters():
        assert tensor.is_contiguous(), name
        assert tensor.is_floating_point(), name
        assert tensor.is_leaf, name


def test_repr(case: ConditionalCase) -> None:
    module = case.make()
    assert repr(module.transform) in repr(module)
    assert repr(module.condition(contexts(5))) == repr(module.transform)


# --- State, copies, types, devices --------------------------------------------------------------


def outputs(module: ConditionalSelfNormalizing) -> list[Tensor]:
    training, x = module.training, inputs(5)
    module.eval()
    with torch.no_grad():
        transform = module.condition(contexts(5))
        y = transform(x)
        result = [y, transform.log_abs_det_jacobian(x, y), transform.inv(x.clone())]
    module.train(training)
    return result


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(module: ConditionalSelfNormalizing) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for step in range(3):
        transform = module.condition(contexts(5, seed=step))
        loss = entropy_of_guide(transform, inputs(5, seed=step)).mean()
        loss = loss + density_loss(module, inputs(5), contexts(5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("make_copy", COPIES)
def test_copies(
    case: ConditionalCase, make_copy: Callable[[nn.Module], nn.Module], trained: bool
) -> None:
    module = case.make()
    if trained:
        train(module)
    alive = module.condition(contexts(5))  # with a graph, as it is in a training loop
    alive(inputs(5))
    before = outputs(module)
    twin = make_copy(module)
    assert same(outputs(twin), before)
    train(twin)
    assert same(outputs(module), before)
    assert not same(outputs(twin), before)


def test_state_dict(case: ConditionalCase) -> None:
    module, other = case.make(), case.make(seed=1)
    keys = list(module.state_dict())
    train(module)
    assert list(module.state_dict()) == keys
    assert not same(outputs(other), outputs(module))
    result = other.load_state_dict(module.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(outputs(other), outputs(module))


def test_to_another_dtype_and_back(case: ConditionalCase) -> None:
    module = case.make()
    expected = outputs(module)
    module.float()
    x, context = inputs(5).float(), contexts(5).float()
    transform = module.condition(context)
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    solution = transform.inv(x.clone())
    assert y.dtype == log_det.dtype == solution.dtype == torch.float32
    assert is_close(y.double(), expected[0], SINGLE)
    assert is_close(solution.double(), expected[2], SINGLE)
    log_det.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in module.parameters())
    module.double()
    for actual, value in zip(outputs(module), expected, strict=True):
        assert is_close(actual, value, SINGLE)


def test_on_the_device(case: ConditionalCase, device: torch.device) -> None:
    expected = outputs(case.make())
    module = case.make().to(device)
    x, context = inputs(5).to(device), contexts(5).to(device)
    transform = module.condition(context)
    y = transform(x)
    assert is_close(y.cpu(), expected[0], EXACT)
    assert is_close(transform.inv(x.clone()).cpu(), expected[2], EXACT)
    transform.log_abs_det_jacobian(x, y).sum().backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    assert found
    assert all(gradient.device.type == device.type for gradient in found)


class Shift(nn.Module):
    """``x`` and an affine function of the context, in whatever dtype the two come."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.sign = sign

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.sign * self.linear(context)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    # An encoder under autocast gives a context in half precision.
    forward_net, inverse_net = Shift(1.0), Shift(-1.0)
    inverse_net.load_state_dict(forward_net.state_dict())
    modules = [
        conditional_pair().float(),
        ConditionalSelfNormalizing(forward_net, inverse_net, event_shape=3).float(),
    ]
    for module in modules:
        module.train(training)
        x, context = inputs(5).float(), contexts(5).float()
        expected = module.condition(context)(x)
        with torch.autocast("cpu", torch.bfloat16):
            transform = module.condition(context.to(dtype))
            y = transform(x)
            log_det = transform.log_abs_det_jacobian(x, y)
            again = transform.inv(y.detach().clone())
        assert is_close(y.float(), expected, 0.1)
        assert is_close(again.float(), x, 0.1)
        assert log_det.dtype == torch.float32
        (y.float().square().sum() - log_det.sum() + again.sum()).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is None or parameter.grad.dtype == torch.float32, name


# --- Inside Pyro --------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_parameters_are_registered(case: ConditionalCase, direction: str) -> None:
    module = case.make()
    pyro.module("flow", module if direction == "T" else module.inv)
    registered = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert registered == {id(parameter) for parameter in module.parameters()}
    assert module.inv.inv is module


def test_as_a_pyro_module_attribute(case: ConditionalCase) -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = case.make()

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.flow.condition(context)(x)

    model, x, context = Model(), inputs(5), contexts(5)
    assert is_close(model(x, context), oracle(model.flow, context, x.shape)(x), EXACT)
    registered = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert registered == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("cache_size", [0, 1])
def test_in_a_stack_of_pyro(cache_size: int) -> None:
    layers = [conditional_pair().eval(), linear(3).eval(), conditional_pair(seed=1).eval()]
    stack = ConditionalComposeTransformModule(layers, cache_size=cache_size)
    context, x = contexts(5), inputs(5)
    first, last = (oracle(layer, context, x.shape) for layer in (layers[0], layers[2]))
    transform = stack.condition(context)
    y = transform(x)
    middle = layers[1](first(x))
    assert is_close(y, last(middle), EXACT)
    expected = log_det_of(first, x) + log_det_of(layers[1], x) + log_det_of(last, middle)
    assert is_close(transform.log_abs_det_jacobian(x, y), expected, EXACT)
    assert is_close(transform.inv(y), x, EXACT)
    flow = dist.ConditionalTransformedDistribution(standard_normal(3), [stack.inv])
    assert flow.condition(context).log_prob(x).shape == (5,)
    # Conditioned, it is a transform as any other.
    ours = Compose([layers[0].condition(context), layers[1]])
    assert is_close(ours(x), middle, EXACT)


class Affine(nn.Module):
    """``W x + V c + b``."""

    def __init__(self, dim: int, context_dim: int, scale: float) -> None:
        super().__init__()
        self.map, self.shift = nn.Linear(dim, dim), nn.Linear(context_dim, dim, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(scale * torch.eye(dim))
            self.map.bias.zero_()
            self.shift.weight.zero_()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.map(x) + self.shift(context)


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_amortized_posterior_is_the_exact_one(log_det: str) -> None:
    # z ~ N(0, I), y | z ~ N(Bz, I): the posterior is Gaussian, its mean linear in y.
    matrix = torch.randn(4, 3, generator=torch.Generator().manual_seed(17))
    covariance = torch.linalg.inv(torch.eye(3) + matrix.mT @ matrix)
    module = ConditionalSelfNormalizing(
        Affine(3, 4, 0.3),
        Affine(3, 4, 1 / 0.3),
        event_shape=3,
        log_det=log_det,
        reconstruction_weight=1.0,
    )
    flow = dist.ConditionalTransformedDistribution(standard_normal(3), [module])

    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", standard_normal(3))
            pyro.sample("y", dist.Normal(z @ matrix.mT, 1.0).to_event(1), obs=data)

    def guide(data: Tensor) -> None:
        pyro.module("flow", module)
        with pyro.plate("data", len(data)):
            pyro.sample("z", flow.condition(data))

    steps = 300
    schedule = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.05},
            "gamma": 0.01 ** (1 / steps),
        }
    )
    svi = SVI(model, guide, schedule, Trace_ELBO())
    for _ in range(steps):
        svi.step(torch.randn(64, 3) @ matrix.mT + torch.randn(64, 4))
        schedule.step()

    network, unseen = module.transform.forward_net, torch.randn(200, 4)
    mean = network(torch.zeros(200, 3), unseen)
    assert (mean - unseen @ matrix @ covariance).square().mean().sqrt() < MEAN
    weight = network.map.weight
    assert (weight @ weight.mT - covariance).square().mean().sqrt() < COVARIANCE


# --- Bad input ----------------------------------------------------------------------------------


def make(**options: object) -> ConditionalSelfNormalizing:
    return conditional_self_normalizing(3, 2, [4], **options)


@pytest.mark.parametrize("context_dim", [0, -2, 2.0, None])
def test_context_dim_of_the_factory_is_checked(context_dim: object) -> None:
    message = f"expected context_dim, an integer >= 1; got {context_dim}"
    with pytest.raises(ValueError, match=message):
        conditional_self_normalizing(3, context_dim)


@pytest.mark.parametrize("context_dim", [-1, 1.0, None])
def test_context_dim_is_checked(context_dim: object) -> None:
    message = f"expected context_dim, an integer >= 0; got {context_dim}"
    with pytest.raises(ValueError, match=message):
        ConditionalSelfNormalizing(
            nn.Identity(), nn.Identity(), event_shape=3, context_dim=context_dim
        )


def test_options_are_checked_by_the_shared_transform() -> None:
    with pytest.raises(ValueError, match=r"expected log_det to be one of .*; got 'approximate'"):
        make(log_det="approximate")
    with pytest.raises(ValueError, match=r"expected a floating-point dtype; got torch\.int64"):
        make(dtype=torch.int64)
    with pytest.raises(TypeError, match="momentum"):
        make(momentum=0.9)
    with pytest.raises(ValueError, match=r"expected hidden_dims, a non-empty list .*; got 4"):
        conditional_self_normalizing(3, 2, 4)


@pytest.mark.parametrize("shape", [(), (0, 2), (4, 0)])
def test_context_of_too_few_numbers_is_refused(shape: tuple[int, ...]) -> None:
    message = rf"expected a non-empty context of at least 1 dimensions; got \({shape and shape[0]}"
    if not shape:
        message = r"expected a non-empty context of at least 1 dimensions; got \(\)"
    with pytest.raises(ValueError, match=message):
        make().condition(torch.zeros(shape))


@pytest.mark.parametrize(
    ("context", "got"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), r"torch\.int64"),
        (torch.zeros(4, 2, dtype=torch.complex64), r"torch\.complex64"),
        ([0.0, 1.0], "list"),
        (None, "NoneType"),
    ],
)
def test_context_that_is_not_floating_is_refused(context: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"expected a floating-point context; got {got}"):
        make().condition(context)


def test_context_of_another_dtype_is_refused() -> None:
    message = r"expected a context of dtype torch\.float64; got torch\.float32"
    with pytest.raises(ValueError, match=message):
        make().condition(torch.zeros(4, 2, dtype=torch.float32))


def test_batch_that_does_not_broadcast_is_refused() -> None:
    transform, x = make().condition(contexts(4)), inputs(5)
    message = (
        r"SelfNormalizing.*expected a batch that broadcasts with the context's \(4,\); got \(5,"
    )
    for use in (transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)):
        with pytest.raises(ValueError, match=message):
            use(x)
    for shape_of in (transform.forward_shape, transform.inverse_shape):
        with pytest.raises(ValueError, match=message):
            shape_of(x.shape)


def test_inputs_are_checked() -> None:
    transform = make().condition(contexts(4))
    for use in (transform, transform.inv):
        with pytest.raises(ValueError, match=r"expected .*shape \(\.\.\., 3\); got \(4, 2\)"):
            use(torch.zeros(4, 2))
        with pytest.raises(ValueError, match=r"expected a floating-point tensor; got torch\.int64"):
            use(torch.zeros(4, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"expected dtype torch\.float64; got torch\.float32"):
            use(torch.zeros(4, 3, dtype=torch.float32))


def test_networks_are_checked_with_their_contexts() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return x + context.mean() + x.mean(0)

    module = ConditionalSelfNormalizing(Mixing(), nn.Identity(), event_shape=3)
    with pytest.raises(ValueError, match="expected forward_net to map each event for itself"):
        module.condition(contexts(4))(inputs(4))


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
def test_bad_context_surfaces_and_spoils_no_other(case: ConditionalCase) -> None:
    module, x, context = case.make().eval(), inputs(3), contexts(3)
    bad = context.clone()
    bad[1] = math.nan
    good_transform, bad_transform = module.condition(context), module.condition(bad)
    y, bad_y = good_transform(x), bad_transform(x)
    log_det = good_transform.log_abs_det_jacobian(x, y)
    bad_log_det = bad_transform.log_abs_det_jacobian(x, bad_y)
    good_x, bad_x = good_transform.inv(x.clone()), bad_transform.inv(x.clone())
    for good, found in [(y, bad_y), (log_det, bad_log_det), (good_x, bad_x)]:
        assert not torch.isfinite(found[1]).all()
        assert is_close(found[[0, 2]], good[[0, 2]], EXACT)


def test_transform_of_a_context_is_a_self_normalizing() -> None:
    transform = make().condition(contexts(4))
    assert isinstance(transform, SelfNormalizing)
    assert transform.domain.event_dim == transform.codomain.event_dim == 1
    assert transform.bijective

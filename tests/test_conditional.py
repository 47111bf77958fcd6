"""Conditional transforms, over the registry: against a transform for each context by itself."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.nn import DenseNN, PyroModule
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Transform, constraints

import pyro_snf
from pyro_snf import (
    GECO,
    Compose,
    ConditionalSelfNormalizingLinear,
    ConditionalSelfNormalizingPair,
    ConditionalSplineAutoregressive,
    Learned,
    Reconstruction,
    Refined,
    SelfNormalizingLinear,
    SelfNormalizingPair,
    conditional_self_normalizing_linear,
    conditional_self_normalizing_pair,
)
from pyro_snf.diagnostics import inverse_error
from pyro_snf.maps.dense import Dense as DenseMap
from pyro_snf.transforms.conditional_linear import LowRankUpdate
from tests.pairs import EXACT, SINGLE, Dense, gradients_of
from tests.registry import (
    CONDITIONAL_CASES,
    COPIES,
    LOG_DETS,
    LOSSES,
    ConditionalCase,
    all_equal,
    assert_gradients_equal,
    conditional_pair,
    density_by_inverse,
    entropy_of_guide,
    is_close,
    linear,
    log_det_of,
    nudge_inverses,
    randomize,
    standard_normal,
)

# Roundings of a network and a few products, in units of the last place.
HALF = 64

Module = ConditionalSelfNormalizingLinear | ConditionalSelfNormalizingPair
Loss = Callable[[Transform, Tensor], Tensor]
Shape = tuple[int, ...]

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@pytest.fixture(params=CONDITIONAL_CASES)
def case(request: pytest.FixtureRequest) -> ConditionalCase:
    return CONDITIONAL_CASES[request.param]


class FullMatrices(Transform):
    """The map ``y = M x + b`` with a matrix for each context, all in O(D³)."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, module: ConditionalSelfNormalizingLinear, context: Tensor) -> None:
        super().__init__()
        self.bias, log_scale, *factors = module.nn(context)
        update = torch.eye(module.input_dim)
        if factors:
            u, v = (one.unflatten(-1, (module.rank, module.input_dim)).mT for one in factors)
            update = update + u @ v.mT
        self.matrix = log_scale.exp().unsqueeze(-1) * (module.linear.weight @ update)

    def _call(self, x: Tensor) -> Tensor:
        return (self.matrix @ x.unsqueeze(-1)).squeeze(-1) + self.bias

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, (y - self.bias).unsqueeze(-1)).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.matrix).logabsdet.expand(x.shape[:-1])


def expected_map(module: Module, context: Tensor, shape: torch.Size) -> Transform:
    """The same maps, computed in another way, for inputs of a shape with the context's batch."""
    context = context.expand(*shape[:-1], context.shape[-1])
    if isinstance(module, ConditionalSelfNormalizingLinear):
        return FullMatrices(module, context)
    return Dense(module.transform.forward_net, context.reshape(-1, context.shape[-1]))


def shared(module: Module) -> SelfNormalizingLinear | SelfNormalizingPair:
    return module.linear if hasattr(module, "linear") else module.transform


def parameters_of_map(module: Module) -> dict[str, Tensor]:
    """All but those of approximate inverses."""
    return {
        name: p
        for name, p in module.named_parameters()
        if "log_det." not in name and "inverse_net." not in name
    }


def contexts(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(200 + seed))


def inputs(case: ConditionalCase, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(300 + seed)
    return torch.randn(*shape, case.input_dim, generator=generator)


def uses(transform: Transform) -> list[Callable[[Tensor], Tensor]]:
    return [transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)]


def assert_refused(function: Callable, given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(given)


class Function(nn.Module):
    """A map of events and contexts, or the parameters of a map, without parameters of its own."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.forward = function


class Affine(nn.Module):
    """``W x + V c + b``, as f or as g."""

    def __init__(self, dim: int, context_dim: int, scale: float) -> None:
        super().__init__()
        self.map, self.shift = nn.Linear(dim, dim), nn.Linear(context_dim, dim, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(scale * torch.eye(dim))
            self.map.bias.zero_()
            self.shift.weight.zero_()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.map(x) + self.shift(context)


def exact_pair(log_det: str = "refined") -> ConditionalSelfNormalizingPair:
    """A pair whose gradients are exact by Krylov steps; its penalty trains g alone."""
    options: dict[str, object] = {"log_det": log_det, "reconstruction": {"trains": "inverse"}}
    if log_det == "refined":
        options |= {"num_probes": 3, "krylov_steps": 3, "tolerance": 1e-12, "lanczos_steps": 3}
    return conditional_pair(**options)


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
def test_values_of_each_context(case: ConditionalCase, context_batch: Shape, batch: Shape) -> None:
    module, context, x = case.make().eval(), contexts(*context_batch), inputs(case, *batch)
    transform, shape = module.condition(context), torch.broadcast_shapes(context_batch, batch)
    whole = x.expand(*shape, case.input_dim)
    expected = expected_map(module, context, whole.shape)

    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert y.shape == whole.shape
    assert log_det.shape == shape
    assert is_close(y, expected(whole), EXACT)
    assert is_close(log_det, log_det_of(expected, whole), EXACT)

    transform.clear_cache()
    solution = transform.inv(x)
    # The inverse's input may have fewer batch dimensions than its output.
    backward = transform.inv.log_abs_det_jacobian(x, solution)
    assert solution.shape == whole.shape
    assert backward.shape == shape
    assert is_close(solution, expected.inv(whole), EXACT)
    assert is_close(backward, -log_det_of(expected, solution), EXACT)
    assert transform.forward_shape(x.shape) == transform.inverse_shape(x.shape) == y.shape
    # In training, "learned" has no value of its own; with R exact, that of "refined" is exact too.
    transform, expected_log_det = module.train().condition(context), log_det_of(expected, whole)
    if shared(module).log_det.training_value == "0":
        is_linear = hasattr(module, "linear")  # whose s and I + UVᵀ have exact ones
        own = torch.linalg.slogdet(module.linear.weight)[1] if is_linear else expected_log_det
        expected_log_det = expected_log_det - own
    assert is_close(transform(x), expected(whole), EXACT)
    assert is_close(log_det_of(transform, x), expected_log_det, EXACT)
    assert is_close(transform.inv(x.clone()), expected.inv(whole), EXACT)


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_in_a_conditional_distribution(case: ConditionalCase, direction: str) -> None:
    module, context, base = case.make().eval(), contexts(5), standard_normal(case.input_dim)
    transform = module if direction == "T" else module.inv
    flow = dist.ConditionalTransformedDistribution(base, [transform]).condition(context)
    # The base is expanded, for each context has a sample of its own.
    assert flow.batch_shape == (5,)
    assert flow.event_shape == (case.input_dim,)
    sample = flow.rsample((7,))
    assert sample.shape == (7, 5, case.input_dim)
    assert len({row.tolist()[0] for row in flow.base_dist.sample().unbind()}) == 5
    for value in (sample, sample.detach().clone(), inputs(case, 5)):
        expected = expected_map(module, context, value.shape)
        expected = expected if direction == "T" else expected.inv
        x = expected.inv(value.detach())
        density = base.log_prob(x) - expected.log_abs_det_jacobian(x, value)
        assert is_close(flow.log_prob(value), density, EXACT)


@pytest.mark.parametrize(("event_dim", "shape"), [(0, ()), (1, (2,)), (2, (2, 3))])
def test_contexts_of_a_pair_have_any_number_of_dimensions(event_dim: int, shape: Shape) -> None:
    def total(context: Tensor) -> Tensor:
        return context.reshape(len(context), -1).sum(1, keepdim=True)

    f = Function(lambda x, context: x.sinh() * total(context).exp())
    g = Function(lambda y, context: (y / total(context).exp()).asinh())
    module = ConditionalSelfNormalizingPair(f, g, event_shape=3, context_event_dim=event_dim)
    context, x = torch.randn(4, *shape), torch.randn(2, 4, 3)
    transform = module.condition(context)
    y = transform(x)
    assert is_close(y, x.sinh() * total(context).exp(), EXACT)
    expected = x.cosh().log().sum(-1) + 3 * total(context).squeeze(1)
    assert is_close(transform.log_abs_det_jacobian(x, y), expected, EXACT)
    assert is_close(transform.inv(y.clone()), x, EXACT)


def test_determinants_of_several_contexts_may_differ_in_sign() -> None:
    # Each context has a map of its own: there is no warning.
    f, g = (Function(lambda x, context: context * x) for _ in range(2))
    module = ConditionalSelfNormalizingPair(f, g, event_shape=1)
    value = log_det_of(module.condition(torch.tensor([[2.0], [-2.0]])), torch.ones(2, 1))
    assert is_close(value, torch.full((2,), math.log(2.0)), EXACT)


# --- What is computed once, and cached ----------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("use", ["guide", "density"])
def test_products_are_made_once(use: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    products, contexts_seen, multiply = [], [], DenseMap.multiply

    def counted(self: DenseMap, theta: Tensor, rows: Tensor) -> Tensor:
        products.append(tuple(rows.shape))
        return multiply(self, theta, rows)

    monkeypatch.setattr(DenseMap, "multiply", counted)
    module = conditional_self_normalizing_linear(4, 2, rank=rank)
    module.nn.register_forward_pre_hook(lambda _, given: contexts_seen.append(given))
    base, context = standard_normal(4), torch.randn(5, 2)
    transform = module if use == "guide" else module.inv
    flow = dist.ConditionalTransformedDistribution(base, [transform]).condition(context)
    value = flow.rsample((3,)) if use == "guide" else torch.randn(3, 5, 4)
    (value.sum() + flow.log_prob(value).sum()).backward()
    assert products == [(15, 4)]
    assert len(contexts_seen) == 1


def test_pair_is_cached(case: ConditionalCase) -> None:
    transform, x = case.make().condition(contexts(5)), inputs(case, 5)
    y = transform(x)
    assert transform(x) is transform.with_cache(1)(x) is y
    assert transform.inv(y) is x
    assert transform.inv.inv is transform
    transform.clear_cache()
    assert transform(x) is not y
    assert torch.equal(transform(x), y)
    for part in getattr(transform, "parts", [transform]):
        assert part.with_cache(0)(x) is not part.with_cache(0)(x)
        assert torch.equal(part.with_cache(0)(x), part(x))
    y = inputs(case, 5, seed=1)
    assert transform(transform.inv(y)) is y


def test_conditionings_do_not_affect_each_other(case: ConditionalCase) -> None:
    module, x = case.make().eval(), inputs(case, 5)
    given = [contexts(5), contexts(5, seed=1), contexts(), contexts(2, 1)]
    transforms = [module.condition(context) for context in given]
    images = [transform(x) for transform in transforms]
    assert not is_close(images[0], images[1], 1e-3)
    for transform, context, y in zip(transforms, given, images, strict=True):
        expected, whole = expected_map(module, context, y.shape), x.expand(y.shape)
        assert transform.inv(y) is x
        log_det = transform.log_abs_det_jacobian(x, y)
        assert is_close(log_det, log_det_of(expected, whole), EXACT)
        # The images of the others are not those that it has cached.
        solution = expected.inv(images[0].expand(y.shape))
        assert is_close(transform.inv(images[0]), solution, EXACT)


def test_same_data_and_context_step_after_step(case: ConditionalCase) -> None:
    # The same tensors are scored again and again: no value of the last step may come back.
    module, data, context = case.make(), inputs(case, 5), contexts(5)
    runs = []
    for each, fresh in ((copy.deepcopy(module), torch.clone), (module, lambda tensor: tensor)):
        optimizer, losses = torch.optim.SGD(each.parameters(), lr=0.01), []
        for _ in range(4):
            loss = density_loss(each, fresh(data), fresh(context))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=EXACT)
    assert len(set(runs[0])) == 4


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["linear", "pair"])
def test_pair_is_dropped_when_the_context_is_written_to(kind: str, training: bool) -> None:
    module, context = exact_pair(), contexts(5)
    if kind == "linear":  # the outputs of the network are views of the context
        module = ConditionalSelfNormalizingLinear(3, lambda c: c.chunk(4, dim=-1), rank=1)
        context = torch.randn(5, 12)
    transform, x = module.train(training).condition(context), torch.randn(5, 3)
    y = transform(x)
    context.mul_(-2)
    expected = expected_map(module, context, x.shape)
    assert not is_close(y, expected(x), 1e-3)
    assert is_close(transform(x), expected(x), EXACT)
    assert is_close(transform.inv(y.detach()), expected.inv(y.detach()), EXACT)
    assert is_close(log_det_of(transform, x), log_det_of(expected, x), EXACT)


def test_contexts_share_the_states_of_a_pair() -> None:
    penalty = {"weight": GECO(0.001)}
    module = conditional_pair(log_det="learned", reconstruction=penalty)
    controller = module.transform.reconstruction.weight
    first, second = module.condition(contexts(5)), module.condition(contexts(5, seed=1))
    log_det_of(first, torch.randn(5, 3))
    weight, estimate = controller.weight.item(), first.error_estimate
    log_det_of(second, torch.randn(5, 3))
    assert controller.weight.item() == weight > 1  # one step for the same parameters
    assert first.error_estimate == second.error_estimate == module.transform.error_estimate
    assert first.error_estimate != estimate
    first.inv(torch.randn(4, 5, 3))
    assert second.convergence.num_samples == 20


# --- Gradients ----------------------------------------------------------------------------------


def density_loss(module: Module, data: Tensor, context: Tensor) -> Tensor:
    return -density_by_inverse(module.condition(context), data).mean()


def gradients_of_both(
    module: Module, shape: Shape, dim: int, loss: Loss
) -> list[dict[str, Tensor]]:
    """Of the module and of the expected map, in x, the context and the parameters."""
    results = []
    # Of both signs, as the weights of score functions are.
    weights = torch.linspace(-1, 2, math.prod(shape)).view(shape)
    data = torch.randn(*shape, dim, generator=torch.Generator().manual_seed(300))
    for make in (module.condition, lambda context: expected_map(module, context, data.shape)):
        x, context = data.clone().requires_grad_(), contexts(5).requires_grad_()
        transform = make(context)
        named = {"context": context, **parameters_of_map(module)}
        results.append(gradients_of(transform, x, named, (weights * loss(transform, x)).sum()))
    return results


#: Modules whose gradient is exact, in training or outside it, and the number of features.
EXACT_MODULES: dict[str, tuple[Callable[[], Module], int]] = {
    **{
        name: (one.make, one.input_dim)
        for name, one in CONDITIONAL_CASES.items()
        if "free" not in name
    },
    **{f"pair {log_det}": (partial(exact_pair, log_det), 3) for log_det in ("refined", "exact")},
    **{
        f"{name}, eval": (lambda one=one: one.make().eval(), one.input_dim)
        for name, one in CONDITIONAL_CASES.items()
    },
}


@EVERY_LOSS
@pytest.mark.parametrize("kind", EXACT_MODULES)
def test_gradient_is_the_exact_one(kind: str, loss: Loss) -> None:
    make, dim = EXACT_MODULES[kind]
    assert_gradients_equal(*gradients_of_both(make(), (3, 5), dim, loss))


@EVERY_LOSS
def test_gradient_reaches_every_parameter(case: ConditionalCase, loss: Loss) -> None:
    module = case.make()
    with torch.no_grad():
        nudge_inverses(module, 0.05)  # at an exact R the gradient of its penalty is 0
    state = torch.get_rng_state()
    loss(module.condition(contexts(5)), inputs(case, 5)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert_gradients_are_of(module, torch.float64)
    assert all((parameter.grad != 0).any() for parameter in module.parameters())


@pytest.mark.parametrize("which", ["both", "data", "context"])
@pytest.mark.parametrize("trains", ["both", "inverse"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_penalty_has_no_gradient_in_data_or_context(log_det: str, trains: str, which: str) -> None:
    found, probes = [], {} if log_det == "exact" else {"seed": 0}
    for weight in (0.0, 10.0):
        penalty = {"weight": weight, "trains": trains}
        module = conditional_pair(log_det=log_det, reconstruction=penalty, **probes)
        x = contexts(5, 3).sum(-1).requires_grad_(which != "context")
        context = contexts(5).requires_grad_(which != "data")
        density_loss(module, x, context).backward()
        found.append([one.grad for one in (x, context) if one.requires_grad])
    for without, with_penalty in zip(*found, strict=True):
        assert without.any()
        assert is_close(with_penalty, without, EXACT)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("log_det", "training"), [("exact", True), ("refined", False)])
def test_second_derivatives(log_det: str, training: bool, rank: int) -> None:
    # The network is smooth here: gradcheck must not meet a kink.
    dims = [3, 3, 6, 6][: 4 if rank else 2]
    network = DenseNN(2, [4], dims, nonlinearity=nn.Tanh())
    module = ConditionalSelfNormalizingLinear(3, network, rank=rank, log_det=log_det)
    randomize(module)
    module.train(training)

    def function(part: Module, _: Tensor, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        transform = part.condition(context)
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y)

    inputs = module.linear.theta, torch.randn(2, 3), torch.randn(2, 2)
    for part in (module, module.inv):
        for check in (gradcheck, gradgradcheck):
            assert check(partial(function, part), [one.requires_grad_() for one in inputs])


def test_tracked_inverse_follows_training() -> None:
    case = CONDITIONAL_CASES["conditional linear refined rank=2"]
    module = case.make()
    train(module, case, range(50))
    assert inverse_error(module.linear) < 0.05


# --- Construction -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("hidden_dims", [None, [7], (5, 6)])
def test_linear_factory_starts_at_the_scale(rank: int, hidden_dims: list[int] | None) -> None:
    module = conditional_self_normalizing_linear(3, 2, hidden_dims, rank=rank, init_scale=0.3)
    widths = [layer.out_features for layer in module.nn.layers[:-1]]
    assert widths == [30, 30] if hidden_dims is None else list(hidden_dims)
    x, transform = torch.randn(5, 3), module.condition(3 * contexts(5))
    assert is_close(transform(x), 0.3 * x, EXACT)
    assert is_close(log_det_of(transform, x), torch.full((5,), 3 * math.log(0.3)), EXACT)
    assert torch.equal(module.linear.weight, SelfNormalizingLinear(3, init_scale=0.3).weight)


def test_linear_factory_starts_with_columns_of_norm_one() -> None:
    module = conditional_self_normalizing_linear(200, 2, [5], rank=10)
    *_, u, v = module.nn(contexts(4))
    assert torch.equal(u, torch.zeros(4, 2000))
    norms = v.unflatten(-1, (10, 200)).norm(dim=-1)
    assert (norms - 1).abs().max() < 0.25  # five standard deviations, 1/√(2D) each
    assert len(set(norms[0].tolist())) == 10
    module.condition(contexts(4))(torch.randn(4, 200)).square().sum().backward()
    gradient_of_u = module.nn.layers[-1].bias.grad[400:2400]
    assert (gradient_of_u != 0).all()


def test_pair_factory_starts_as_the_identity() -> None:
    module, x = conditional_self_normalizing_pair(3, 2, [7], num_blocks=3), torch.randn(5, 3)
    transform = module.eval().condition(10 * contexts(5))
    assert torch.equal(transform(x), x)
    assert torch.equal(transform.inv(x.clone()), x)
    assert torch.equal(log_det_of(transform, x), torch.zeros(5))
    for network in (module.transform.forward_net, module.transform.inverse_net):
        assert len(network.blocks) == 3
        assert network.blocks[0][0].weight.shape == (7, 5)


def test_options_are_those_of_the_shared_layer() -> None:
    method = Learned(mixture=0.3)
    options = {"log_det": method, "inverse": "one_pass", "init_scale": 2.0}
    layer = conditional_self_normalizing_linear(3, 2, rank=1, **options).linear
    assert (layer.log_det.mixture, layer.inverse, layer.bias) == (0.3, "one_pass", None)
    assert layer.log_det is not method
    assert torch.equal(layer.weight, 2 * torch.eye(3))
    layer = conditional_self_normalizing_linear(3, 2, log_det=Refined(num_probes=2)).linear
    assert layer.log_det.num_probes == 2
    options = {"reconstruction": Reconstruction(3.0), "inverse": "one_pass", "log_det": "learned"}
    layer = conditional_self_normalizing_pair(3, 2, **options).transform
    assert (layer.reconstruction.weight, layer.inverse) == (3.0, "one_pass")
    assert layer.log_det.training_value == "0"


def test_case_is_what_it_claims_to_be(case: ConditionalCase) -> None:
    class Model(PyroModule):
        def __init__(self, flow: Module) -> None:
            super().__init__()
            self.flow = flow

        def forward(self) -> Transform:
            return self.flow.condition(contexts(5))

    module, by_factory = case.make(), case.api.startswith("conditional_")
    assert by_factory or type(module) is getattr(pyro_snf, case.api)
    # Pyro's store copies a parameter that is not contiguous, and then trains the copy.
    assert all(p.is_contiguous() and p.is_floating_point() for p in module.parameters())
    own = {id(parameter) for parameter in module.parameters()}
    assert module.inv.inv is module
    for part in (module, module.inv):
        for register in (partial(pyro.module, "flow", part), Model(part)):
            pyro.clear_param_store()
            register()
            assert {id(one) for _, one in pyro.get_param_store().named_parameters()} == own
    assert repr(shared(module)) in repr(module)
    conditioned = repr(module.condition(contexts(5)))
    if isinstance(module, ConditionalSelfNormalizingPair):
        assert conditioned == repr(module.transform)
    else:
        assert f"{module.input_dim}, rank={module.rank}" in repr(module)
        assert "ScaleAndShift" in conditioned
        assert ("LowRankUpdate" in conditioned) == (module.rank > 0)


# --- State, copies, types, devices --------------------------------------------------------------


def outputs(module: Module, case: ConditionalCase, device: str = "cpu") -> list[Tensor]:
    """Value, log-determinant and inverse without training."""
    training = module.training
    module.eval()
    dtype = next(module.parameters()).dtype
    x, context = (one.to(device, dtype) for one in (inputs(case, 5), contexts(5)))
    with torch.no_grad():
        transform = module.condition(context)
        y = transform(x)
        result = [y, transform.log_abs_det_jacobian(x, y), transform.inv(x.clone())]
    module.train(training)
    return result


def train(module: Module, case: ConditionalCase, steps: range) -> list[float]:
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=0.02), []
    for step in steps:
        transform = module.condition(contexts(5, seed=step))
        loss = entropy_of_guide(transform, inputs(case, 5, seed=step)).mean()
        loss = loss + density_loss(module, inputs(case, 5), contexts(5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    "make_copy", ["state_dict", *COPIES], ids=lambda way: getattr(way, "__name__", way)
)
def test_copy_trains_alike(case: ConditionalCase, make_copy: str | Callable, trained: bool) -> None:
    module = case.make()
    train(module, case, range(3 if trained else 0))
    alive = module.condition(contexts(5))  # with a graph, as it is in a training loop
    alive(inputs(case, 5))
    before = outputs(module, case)
    if isinstance(make_copy, str):
        other = case.make(seed=1)
        assert not all_equal(outputs(other, case), before)
        other.load_state_dict(module.state_dict(), strict=True)
    else:
        other = make_copy(module)
    assert all_equal(outputs(other, case), before)
    losses = train(other, case, range(3, 6))
    assert all_equal(outputs(module, case), before)
    assert not all_equal(outputs(other, case), before)
    torch.randn(5)  # the global random stream is not a part of it
    assert train(module, case, range(3, 6)) == losses
    assert all_equal(outputs(other, case), outputs(module, case))


def assert_gradients_are_of(module: Module, dtype: torch.dtype, *, everywhere: bool = True) -> None:
    for name, parameter in module.named_parameters():
        if everywhere or parameter.grad is not None:
            assert parameter.grad.dtype == dtype, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype_and_back(case: ConditionalCase, dtype: torch.dtype) -> None:
    module, tolerance = case.make().to(dtype), max(SINGLE, HALF * torch.finfo(dtype).eps)
    x, context = inputs(case, 5).to(dtype), contexts(5).to(dtype)
    # The map of the rounded parameters, in float64.
    exact = copy.deepcopy(module).double().eval()
    expected = exact.condition(context.double())
    transform = module.condition(context)
    y = transform(x)
    value = transform.log_abs_det_jacobian(x, y)
    again = transform.inv(y.detach().clone())
    assert y.dtype == again.dtype == dtype
    assert value.dtype in (torch.float32, torch.float64)
    assert is_close(y.double(), expected(x.double()), tolerance)
    assert is_close(again.double(), x.double(), tolerance)
    (y.float().square().sum() - value.sum()).backward()
    assert_gradients_are_of(module, dtype, everywhere=False)
    with torch.no_grad():
        value = log_det_of(module.condition(context), x)
        assert is_close(value.double(), log_det_of(expected, x.double()), tolerance)
    assert all_equal(outputs(module.double(), case)[:1], outputs(exact, case)[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(case: ConditionalCase, dtype: torch.dtype) -> None:
    # An encoder under autocast returns contexts in half precision.
    module, x, context = case.make().float(), inputs(case, 5).float(), contexts(5).float()
    with torch.no_grad():
        transform = module.condition(context)
        expected = transform(x)
        exact = log_det_of(transform, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module.condition(context.to(dtype))
        y = cast(x)
        in_training = cast.log_abs_det_jacobian(x, y)
        again = cast.inv(y.detach().clone())
        low = cast(x.bfloat16())
        with torch.no_grad():  # what was computed in float32 is not rounded
            assert is_close(transform.inv(expected), x, SINGLE)
            assert is_close(log_det_of(transform, x.clone()), exact, SINGLE)
    for actual, wanted in [(y, expected), (low, expected), (again, x)]:
        assert is_close(actual.float(), wanted, 0.1)
    assert in_training.dtype == torch.float32
    (y.float().square().sum() - in_training.sum() + again.sum()).backward()
    assert_gradients_are_of(module, torch.float32)


def test_autocast_of_networks_that_add_what_they_are_given() -> None:
    shift = Function(lambda x, context: x + context)
    module = ConditionalSelfNormalizingPair(shift, Affine(3, 3, 1.0).float(), event_shape=3)
    x, context = torch.randn(5, 3).float(), torch.randn(5, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        transform = module.condition(context)
        y = transform(x)
        assert is_close(transform.inv(y.clone()).float(), x, 0.1)
        assert transform.log_abs_det_jacobian(x, y).dtype == torch.float32


def test_on_the_device(case: ConditionalCase, device: torch.device) -> None:
    module = case.make()
    expected = outputs(module, case)
    for actual, value in zip(outputs(module.to(device), case, device.type), expected, strict=True):
        assert is_close(actual.cpu(), value, EXACT)
    x, context = inputs(case, 5).to(device), contexts(5).to(device)
    log_det_of(module.condition(context), x).sum().backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    assert found
    assert all(gradient.device.type == device.type for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_built_on_the_device_and_of_the_dtype(dtype: torch.dtype, device: torch.device) -> None:
    for make in (LINEAR, PAIR):
        module = make(device=device, dtype=dtype)
        for name, parameter in module.named_parameters():
            assert (parameter.device.type, parameter.dtype) == (device.type, dtype), name
        x, context = (torch.ones(4, dim, device=device, dtype=dtype) for dim in (3, 2))
        log_det_of(module.condition(context), x).sum().backward()


# --- Inside Pyro --------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("kind", ["linear refined rank=2", "free form exact GECO"])
def test_in_a_stack_of_pyro(kind: str, cache_size: int) -> None:
    case = CONDITIONAL_CASES[f"conditional {kind}"]
    layers = [case.make(0).eval(), linear(case.input_dim).eval(), case.make(1).eval()]
    stack = ConditionalComposeTransformModule(layers, cache_size=cache_size)
    context, x = contexts(5), inputs(case, 5)
    first, last = (expected_map(layer, context, x.shape) for layer in (layers[0], layers[2]))
    transform = stack.condition(context)
    y, middle = transform(x), layers[1](first(x))
    assert is_close(y, last(middle), EXACT)
    expected = log_det_of(first, x) + log_det_of(layers[1], x) + log_det_of(last, middle)
    assert is_close(transform.log_abs_det_jacobian(x, y), expected, EXACT)
    assert is_close(transform.inv(y), x, EXACT)
    base = standard_normal(case.input_dim)
    flow = dist.ConditionalTransformedDistribution(base, [stack.inv])
    assert flow.condition(context).log_prob(x).shape == (5,)
    # Conditioned, it is a transform like any other.
    assert is_close(Compose([layers[0].condition(context), layers[1]])(x), middle, EXACT)


def affine_pair(log_det: str) -> ConditionalSelfNormalizingPair:
    f, g = Affine(3, 4, 0.3), Affine(3, 4, 1 / 0.3)
    penalty = Reconstruction(1.0)
    return ConditionalSelfNormalizingPair(
        f, g, event_shape=3, log_det=log_det, reconstruction=penalty
    )


#: Modules, steps of Adam and its first rate, and root mean square errors of posterior moments of
#: size 0.1 to 1. Where b is a network, what is left is its error at rare contexts: 0.036 and 0.010
#: were seen with four seeds.
AMORTIZED: dict[str, tuple[Callable[[], Module], int, float, float, float]] = {
    **{
        f"linear rank={rank}": (
            partial(conditional_self_normalizing_linear, 3, 4, [32], rank=rank, init_scale=0.3),
            *(500, 0.015, 0.06, 0.015),
        )
        for rank in (0, 1)
    },
    **{
        f"pair {log_det}": (partial(affine_pair, log_det), 300, 0.05, 0.05, 0.03)
        for log_det in LOG_DETS
    },
}


@pytest.mark.parametrize("kind", AMORTIZED)
def test_amortized_posterior_is_the_exact_one(kind: str) -> None:
    # z ~ N(0, I), y | z ~ N(Bz, I): the posterior is Gaussian, its mean linear in y.
    make, steps, rate, mean_tolerance, covariance_tolerance = AMORTIZED[kind]
    matrix = torch.randn(4, 3, generator=torch.Generator().manual_seed(17))
    covariance = torch.linalg.inv(torch.eye(3) + matrix.mT @ matrix)
    module = make()
    flow = dist.ConditionalTransformedDistribution(standard_normal(3), [module])

    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", standard_normal(3))
            pyro.sample("y", dist.Normal(z @ matrix.mT, 1.0).to_event(1), obs=data)

    def guide(data: Tensor) -> None:
        pyro.module("flow", module)
        with pyro.plate("data", len(data)):
            pyro.sample("z", flow.condition(data))

    def draw(count: int) -> Tensor:
        return torch.randn(count, 3) @ matrix.mT + torch.randn(count, 4)

    optimizer = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}}
    schedule = pyro.optim.ExponentialLR({**optimizer, "gamma": 0.02 ** (1 / steps)})
    svi = SVI(model, guide, schedule, Trace_ELBO())
    for _ in range(steps):
        svi.step(draw(256))
        schedule.step()

    # All these maps are affine in x.
    unseen = draw(200)
    transform = module.eval().condition(unseen)
    mean, *columns = (transform(x) for x in (torch.zeros(3), *torch.eye(3)))
    root = torch.stack(columns, -1) - mean.unsqueeze(-1)
    mean_error = mean - unseen @ matrix @ covariance
    covariance_error = root @ root.mT - covariance
    assert mean_error.square().mean().sqrt() < mean_tolerance
    assert covariance_error.square().mean().sqrt() < covariance_tolerance


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize("rank", [0, 2])
def test_jit_traces_the_network_too(rank: int) -> None:
    # A density, for it is deterministic: of random numbers, a trace draws others than Pyro does.
    case = CONDITIONAL_CASES["conditional linear exact" + (" rank=2" if rank else "")]
    module = case.make()
    flow = dist.ConditionalTransformedDistribution(standard_normal(4), [module.inv])

    def model(data: Tensor, context: Tensor) -> None:
        pyro.module("flow", module)
        with pyro.plate("data", len(data)):
            pyro.sample("x", flow.condition(context), obs=data)

    jit = JitTrace_ELBO(ignore_jit_warnings=True)
    for step in range(3):
        runs = []
        for elbo in (jit, Trace_ELBO()):
            module.zero_grad()
            arguments = inputs(case, 5, seed=step), contexts(5, seed=step)
            loss = elbo.loss_and_grads(model, lambda data, context: None, *arguments)
            runs.append([torch.tensor(loss), *[p.grad.clone() for p in module.parameters()]])
        for actual, expected in zip(*runs, strict=True):
            assert is_close(actual, expected, EXACT)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)


# --- The scale of contexts ----------------------------------------------------------------------

UNITS = torch.tensor([1e4, 1e-3])
OFFSET = torch.tensor([1950.0, 0.0])


@pytest.mark.parametrize("rank", [0, 2])
def test_standardized_contexts_do_without_units(rank: int) -> None:
    # The same maps and, whatever the units, the same gradients: hence the same training.
    case = CONDITIONAL_CASES["conditional linear exact" + (" rank=2" if rank else "")]
    sample, x = contexts(100), inputs(case, 100)
    plain, other = case.make(), case.make()
    plain.standardize_contexts(sample)
    other.standardize_contexts(sample * UNITS + OFFSET)
    seen = []
    other.nn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for module, context in ((plain, sample), (other, sample * UNITS + OFFSET)):
        density_loss(module, x, context).backward()
    (standardized,) = seen
    assert is_close(standardized.mean(0), torch.zeros(2), EXACT)
    assert is_close(standardized.std(0, correction=0), torch.ones(2), EXACT)
    for one, another in zip(plain.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (another.grad is None)
        if one.grad is not None:
            assert is_close(one.grad, another.grad, 1e-8)  # 1950 + 1e4 c has lost digits


class Times(nn.Module):
    """``x · c``, with the sign of c; or ``x² + c``, which folds at 0."""

    def __init__(self, folds: bool) -> None:
        super().__init__()
        self.folds = folds

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x.square() + c if self.folds else x * c


@pytest.mark.parametrize(
    ("folds", "values", "is_told"),
    [
        (False, [-2.0, 3.0, -2.0, 3.0, -2.0, 3.0], False),  # two maps, both one to one
        (False, [-2.0, -1.0, 3.0, 1.0, 2.0, -3.0], False),
        (True, [1.0], True),
        (True, [1.0, 2.0, 2.0, 1.0, 1.0, 2.0], True),
        (True, [1.0, 2.0, 3.0, 4.0, 5.0, 3.0], True),  # at the third and the last event
        (True, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], False),
    ],
)
@pytest.mark.parametrize("is_training", [False, True])
def test_folds_of_each_context_are_told(
    folds: bool, values: list[float], is_told: bool, is_training: bool
) -> None:
    g = nn.Sequential()
    g.forward = lambda x, c: x
    module = ConditionalSelfNormalizingPair(Times(folds), g, event_shape=1).train(is_training)
    layer = module.condition(torch.tensor(values).unsqueeze(1))
    x = torch.tensor([1.0, -1.0, 2.0, 3.0, -2.0, -3.0]).unsqueeze(1)

    def evaluate() -> Tensor:
        return layer.log_abs_det_jacobian(x, layer(x))

    if is_told:
        with pytest.warns(RuntimeWarning, match="does not integrate to 1.*equal contexts"):
            evaluate()
    else:
        evaluate()


SCALED: dict[str, Callable[..., nn.Module]] = {
    "linear": partial(conditional_self_normalizing_linear, 3, 2, rank=1),
    "spline": partial(ConditionalSplineAutoregressive, 3, 2, 8),
    "pair": partial(conditional_self_normalizing_pair, 3, 2, [8]),
}
EVERY_SCALED = pytest.mark.parametrize("make", SCALED.values(), ids=list(SCALED))


@EVERY_SCALED
def test_scale_of_contexts_is_saved_and_copied(make: Callable[..., nn.Module]) -> None:
    module, context = make(), contexts(9) * UNITS + OFFSET
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    module.eval()
    before = module.condition(context)(torch.ones(3))
    module.standardize_contexts(context.view(3, 3, 2))
    after = module.condition(context)(torch.ones(3))
    assert not is_close(before, after, 1e-3)
    loaded = make().eval()
    loaded.load_state_dict(module.state_dict())
    for twin in (loaded, *(make_copy(module) for make_copy in COPIES)):
        assert torch.equal(twin.condition(context)(torch.ones(3)), after)
    scale = {"context_scale.mean", "context_scale.deviation"}
    assert scale <= {name for name, _ in module.named_buffers()}
    assert not scale & set(dict(module.named_parameters()))


@EVERY_SCALED
def test_constant_columns_are_only_centred(make: Callable[..., nn.Module]) -> None:
    module, context = make(), contexts(7)
    context[:, 0] = 0.1  # seven of which have a mean that is rounded
    module.standardize_contexts(context)
    assert module.context_scale.deviation[0] == 1
    assert is_close(module.context_scale.deviation[1], context[:, 1].std(correction=0), EXACT)
    module.standardize_contexts(context[0])  # a single one
    assert torch.equal(module.context_scale.deviation, torch.ones(2))


@EVERY_SCALED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scale_of_contexts_has_the_dtype_of_the_layer(
    make: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    module, context = make(dtype=dtype), (100 * contexts(40)).to(dtype)
    module.standardize_contexts(context)
    assert module.context_scale.mean.dtype == module.context_scale.deviation.dtype == dtype
    assert module.condition(context)(torch.ones(3, dtype=dtype)).dtype == dtype


@EVERY_SCALED
def test_samples_of_contexts_are_checked(make: Callable[..., nn.Module]) -> None:
    for sample, message in [
        (torch.zeros(4, 3), r"context of shape \(\.\.\., 2\); got \(4, 3\)"),
        (torch.zeros(4, 2).float(), r"context of dtype torch\.float64"),
        (torch.tensor([[0.0, math.nan]]), "finite mean and variance; got NaN or infinity"),
    ]:
        assert_refused(make().standardize_contexts, sample, message)
        if "finite" not in message:
            assert_refused(make().condition, sample, message)


def test_other_networks_standardize_contexts_themselves() -> None:
    for module, message in [
        (BY_NETWORK(), "DenseNN; got Identity"),
        (BY_NETWORKS(), "two ResidualMLP of the same context_dim; got Identity and Identity"),
    ]:
        assert_refused(module.standardize_contexts, torch.zeros(4, 2), message)
        assert module.context_scale is None


@EVERY_SCALED
@pytest.mark.parametrize(
    ("count", "factor", "offset"),
    [(40, UNITS, OFFSET), (1, 1e4, 0.0), (40, 1.0, 1e3), (40, 1e-3, 0.0)],
)
def test_contexts_far_from_unit_scale_are_told_once(
    make: Callable[..., nn.Module], count: int, factor: Tensor | float, offset: Tensor | float
) -> None:
    module, far = make(), contexts(count) * factor + offset
    module.eval().condition(far)
    with torch.no_grad():
        module.train().condition(far)
    with pytest.warns(UserWarning, match="far from unit scale.* call standardize_contexts"):
        module.condition(far)
    module.condition(far)
    quiet = make()
    quiet.standardize_contexts(far)
    quiet.condition(far)


@pytest.mark.parametrize(("count", "factor"), [(40, 1.0), (1, 1e-4), (40, 0.0), (40, math.nan)])
def test_contexts_near_unit_scale_are_not(count: int, factor: float) -> None:
    LINEAR().condition(factor * contexts(count))


def test_sparse_contexts_are_not_far_from_unit_scale() -> None:
    rare = torch.zeros(1000, 2)
    rare[0, 0] = 1 / 16
    LINEAR().condition(rare)


# --- Bad input ----------------------------------------------------------------------------------


LINEAR = partial(conditional_self_normalizing_linear, 3, 2)
PAIR = partial(conditional_self_normalizing_pair, 3, 2)
BY_NETWORK = partial(ConditionalSelfNormalizingLinear, 3, nn.Identity())
BY_NETWORKS = partial(ConditionalSelfNormalizingPair, nn.Identity(), nn.Identity(), event_shape=3)

MAKERS = {"linear": LINEAR, "linear rank=1": partial(LINEAR, rank=1), "pair": PAIR}

#: Constructors, an option, what it may be, and values that are not.
OPTIONS: list[tuple[Callable[..., Module], str, str, list[object]]] = [
    *[
        (make, "input_dim", ", an integer >= 1", [0, -1, 2.0, "3", None])
        for make in (
            partial(conditional_self_normalizing_linear, context_dim=2),
            partial(ConditionalSelfNormalizingLinear, nn=nn.Identity()),
        )
    ],
    (LINEAR, "rank", ", an integer from 0 to 3", [-1, 4, 1.0, None]),
    (BY_NETWORK, "rank", ", an integer from 0 to 3", [-1, 4, 1.0, None]),
    *[
        (partial(make, 3), "context_dim", ", an integer >= 1", [0, -2, 2.0, None])
        for make in (conditional_self_normalizing_linear, conditional_self_normalizing_pair)
    ],
    (BY_NETWORKS, "context_event_dim", ", an integer >= 0", [-1, 1.0, None]),
    (LINEAR, "hidden_dims", ", a non-empty list of ", [[], (), [0], [4, -1], [4.0], 8, "44"]),
    *[(make, "log_det", " to be ", ["approximate"]) for make in (LINEAR, PAIR)],
    *[(make, "dtype", ", a floating-point ", [torch.int64]) for make in (LINEAR, PAIR)],
    (partial(ConditionalSelfNormalizingLinear, 3), "nn", ", a network ", [2]),
]


@pytest.mark.parametrize(
    ("make", "option", "expected", "value"),
    [(make, name, expected, value) for make, name, expected, values in OPTIONS for value in values],
)
def test_option_is_checked(make: Callable, option: str, expected: str, value: object) -> None:
    message = f"expected {option}{expected}.*; got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message):
        make(**{option: value})


def test_options_that_there_are_not() -> None:
    for make in (LINEAR, PAIR):
        with pytest.raises(TypeError, match="momentum"):
            make(momentum=0.9)
    for bias in (True, False):
        with pytest.raises(ValueError, match=rf"expected no bias: .* got bias={bias}"):
            LINEAR(bias=bias)


CONTEXTS: list[tuple[object, str]] = [
    (torch.zeros(4, 2, dtype=torch.int64), r"expected a floating-point context; got torch\.int64"),
    (torch.zeros(4, 2, dtype=torch.complex64), r"floating-point context; got torch\.complex64"),
    ([0.0, 1.0], "expected a floating-point context; got list"),
    (None, "expected a floating-point context; got NoneType"),
    (torch.zeros(4, 2).float(), r"expected a context of dtype torch\.float64; got torch\.float32"),
    *[
        (torch.zeros(shape), rf"expected a non-empty context of .*; got {re.escape(str(shape))}")
        for shape in [(), (0, 2)]
    ],
]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("context", "message"), CONTEXTS)
def test_context_is_checked(kind: str, context: object, message: str) -> None:
    module = MAKERS[kind]()
    assert_refused(module.condition, context, message)
    if kind == "linear":  # a pair's networks take contexts of any shape
        for shape in [(3,), (2, 1), (2, 4)]:
            message = rf"context of shape \(\.\.\., 2\); got \({shape[0]}"
            assert_refused(module.condition, torch.zeros(shape), message)


@pytest.mark.parametrize("kind", MAKERS)
def test_inputs_are_checked(kind: str) -> None:
    module, x = MAKERS[kind](), torch.zeros(5, 3)
    transform = module.condition(contexts(4))
    message = r"expected a .* broadcasts with the context's .*\(4,\); got \(5,"
    for value, expected in [
        (x, message),
        (torch.zeros(4, 2), r"expected .*shape \(\.\.\., 3\); got \(4, 2\)"),
        (torch.zeros(4, 3).long(), r"expected a floating-point tensor; got torch\.int64"),
        (torch.zeros(4, 3).float(), r"expected dtype torch\.float64; got torch\.float32"),
    ]:
        for use in uses(transform):
            assert_refused(use, value, expected)
    for shape_of in (transform.forward_shape, transform.inverse_shape):
        assert_refused(shape_of, x.shape, message)
    base = dist.Normal(x, 1.0).to_event(1)
    for each in (module, module.inv):
        flow = dist.ConditionalTransformedDistribution(base, [each])
        assert_refused(flow.condition, contexts(4), message)


def zeros(*shapes: int | Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Of shapes, or of four rows with as many columns as given."""
    shapes = [(4, shape) if isinstance(shape, int) else shape for shape in shapes]
    return tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)


#: Outputs of a network, the rank of the layer, and what is said of them.
RESULTS: list[tuple[object, int, str]] = [
    (zeros(3, 3, 3), 0, r"2 tensors of shapes \(\*batch, 3\), \(\*batch, 3\); got \[\(4, 3\), "),
    (zeros(3, 4), 0, r"2 tensors .*; got \[\(4, 3\), \(4, 4\)\]"),
    (zeros(3, 3), 1, r"4 tensors .*\(\*batch, 3\), \(\*batch, 3\); got \[\(4, 3\), \(4, 3\)\]"),
    (zeros(3, 3, 6, 3), 2, r"4 tensors .*\(\*batch, 6\); got .*\(4, 6\), \(4, 3\)\]"),
    (*zeros(6), 0, "2 tensors .*; got Tensor"),
    ((), 0, r".*got \[\]"),
    (None, 0, ".*got NoneType"),
    ((*zeros(3), 1.0), 0, ".*got tuple"),
    (zeros(3, (3,)), 0, r".*got \[\(4, 3\), \(3,\)\]"),
    (zeros((), ()), 0, r".*got \[\(\), \(\)\]"),
    (zeros(3, 3, dtype=torch.float32), 0, r".*dtype torch\.float64; got \[torch\.float32"),
]


@pytest.mark.parametrize(("result", "rank", "message"), RESULTS)
def test_outputs_of_the_network_are_checked(result: object, rank: int, message: str) -> None:
    module = ConditionalSelfNormalizingLinear(3, lambda context: result, rank=rank)
    assert_refused(module.condition, contexts(4), r"expected nn\(context\) to be " + message)


def test_networks_of_a_pair_are_checked_with_their_contexts() -> None:
    mixing = Function(lambda x, context: x + context.mean() + x.mean(0))
    module = ConditionalSelfNormalizingPair(mixing, nn.Identity(), event_shape=3)
    message = "expected forward_net to map each event independently"
    assert_refused(module.condition(contexts(4)), torch.zeros(4, 3), message)


# --- What is singular or not finite -------------------------------------------------------------


def test_singular_update_has_a_log_det_of_minus_infinity_and_no_inverse() -> None:
    # For three contexts, of which I + VᵀU is singular for the second.
    u = torch.tensor([1.0, 0.0, 0.0]).expand(3, 1, 3)
    update = LowRankUpdate(u, torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1) * u)
    expected = torch.tensor([math.log(2), -math.inf, math.log(3)])
    assert torch.equal(log_det_of(update, torch.randn(3, 3)), expected)
    message = r"LowRankUpdate\(3, batch_shape=\(3,\), rank=1\): I \+ VᵀU: .*element 1.*singular"
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        update.inv(torch.randn(3, 3))


def test_singular_shared_matrix_is_an_error() -> None:
    module = conditional_self_normalizing_linear(4, 2, rank=1).eval()
    with torch.no_grad():
        module.linear.theta.copy_(-2 * torch.eye(4))  # A = I + Θ/√4 = 0
    for use in uses(module.condition(torch.zeros(2)))[1:]:
        with pytest.raises(torch.linalg.LinAlgError, match="SelfNormalizingLinear"):
            use(torch.randn(4))


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_context_affects_no_other(case: ConditionalCase, value: float) -> None:
    if value == math.inf and case.api != "conditional_self_normalizing_linear":
        pytest.skip("a bounded nonlinearity has a finite value there")
    module, x, context = case.make().eval(), inputs(case, 3), contexts(3)
    bad = context.clone()
    bad[1] = value
    good, found = ([use(x.clone()) for use in uses(module.condition(c))] for c in (context, bad))
    for expected, actual in zip(good, found, strict=True):
        assert not torch.isfinite(actual[1]).all()
        assert is_close(actual[[0, 2]], expected[[0, 2]], EXACT)


@pytest.mark.parametrize("rank", [0, 2])
def test_bad_context_never_enters_the_tracked_inverse(rank: int) -> None:
    module = LINEAR(rank=rank)
    transform = module.condition(torch.full((4, 2), math.nan))
    with pytest.raises(torch.linalg.LinAlgError, match="its output is NaN"):
        log_det_of(transform, torch.randn(4, 3))
    assert torch.isfinite(module.linear.inverse_weight).all()

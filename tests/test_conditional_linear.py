"""Conditional layers against a full matrix for each context."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

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
    Compose,
    ConditionalSelfNormalizingLinear,
    SelfNormalizingLinear,
    conditional_self_normalizing_linear,
)
from pyro_snf.dense import near_identity
from pyro_snf.transforms.conditional_linear import LowRankUpdate
from tests.registry import (
    CONDITIONAL_CASES,
    COPIES,
    INVERSES,
    LOG_DETS,
    LOSSES,
    ConditionalCase,
    density_by_inverse,
    entropy_of_guide,
    make_inverse_exact,
    randomize,
    standard_normal,
)

# Float64, condition numbers of some tens at most: rounding, and three digits to spare.
EXACT = 1e-9
# The same in float32.
SINGLE = 1e-4
# Root mean square errors of posterior moments of size 0.1 to 1, after 800 steps of Adam with a
# falling rate. What is left is the network's error where contexts are rare: 0.027 and 0.007 were
# seen with four seeds.
MEAN = 0.06
COVARIANCE = 0.015


@pytest.fixture(params=[name for name in CONDITIONAL_CASES if "linear" in name])
def case(request: pytest.FixtureRequest) -> ConditionalCase:
    """Each named constructor of a conditional layer of matrices in turn."""
    return CONDITIONAL_CASES[request.param]


def close(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> bool:
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


class FullMatrices(Transform):
    """The reference: ``y = M x + b`` with a matrix for each context, all in O(D³)."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, module: ConditionalSelfNormalizingLinear, context: Tensor) -> None:
        super().__init__()
        self.bias, log_scale, *factors = module.nn(context)
        eye = torch.eye(module.input_dim, dtype=self.bias.dtype)
        update = eye
        if factors:
            u, v = (one.unflatten(-1, (module.rank, module.input_dim)).mT for one in factors)
            update = eye + u @ v.mT
        self.matrix = log_scale.exp().unsqueeze(-1) * (module.linear.weight @ update)

    def _call(self, x: Tensor) -> Tensor:
        return (self.matrix @ x.unsqueeze(-1)).squeeze(-1) + self.bias

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, (y - self.bias).unsqueeze(-1)).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        value = torch.linalg.slogdet(self.matrix).logabsdet
        return value.expand(torch.broadcast_shapes(x.shape[:-1], value.shape))

    @property
    def distribution(self) -> dist.MultivariateNormal:
        """That of T(x), x being standard normal."""
        return dist.MultivariateNormal(self.bias, self.matrix @ self.matrix.mT)

    @property
    def inverse_distribution(self) -> dist.MultivariateNormal:
        """That of T⁻¹(x), x being standard normal."""
        mean = self._inverse(torch.zeros_like(self.bias))
        return dist.MultivariateNormal(mean, precision_matrix=self.matrix.mT @ self.matrix)


def contexts(case: ConditionalCase, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(200 + seed)
    return torch.randn(*shape, case.context_dim, generator=generator)


def inputs(case: ConditionalCase, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(300 + seed)
    return torch.randn(*shape, case.input_dim, generator=generator)


class Split(nn.Module):
    """The parameters themselves for a context."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        return context.split(self.dims, dim=-1)


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
def test_values_and_shapes_are_those_of_full_matrices(
    case: ConditionalCase, context_batch: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    module, context = case.make().eval(), contexts(case, *context_batch)
    transform, reference = module.condition(context), FullMatrices(module, context)
    x = inputs(case, *batch)
    expected = reference(x)
    shape = torch.broadcast_shapes(context_batch, batch)

    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert y.shape == (*shape, case.input_dim)
    assert log_det.shape == shape
    assert close(y, expected)
    assert close(log_det, reference.log_abs_det_jacobian(x, expected))

    transform.clear_cache()
    solution = transform.inv(x)
    assert solution.shape == (*shape, case.input_dim)
    assert close(solution, reference.inv(x))
    # The inverse's input may have fewer batch dimensions than its output.
    backward = transform.inv.log_abs_det_jacobian(x, solution)
    assert backward.shape == shape
    assert close(backward, -log_det)

    assert transform.forward_shape(x.shape) == transform.inverse_shape(x.shape) == y.shape


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_log_det_is_that_of_the_jacobian(case: ConditionalCase, direction: str) -> None:
    module = case.make().eval()
    for context, x in zip(contexts(case, 3), inputs(case, 3), strict=True):
        transform = module.condition(context)
        if direction == "T.inv":
            transform = transform.inv
        jacobian = torch.autograd.functional.jacobian(transform, x)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert close(transform.log_abs_det_jacobian(x, transform(x)), expected)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_round_trips(case: ConditionalCase, mode: str) -> None:
    module, x = case.make().train(mode != "eval"), inputs(case, 3, 5)
    with torch.set_grad_enabled(mode != "no_grad"):
        transform = module.condition(contexts(case, 5))
        for part in (transform, transform.inv):
            y = part(x).detach()
            transform.clear_cache()
            assert close(part.inv(y), x)


def test_training_value_is_the_log_det_or_that_of_the_context(case: ConditionalCase) -> None:
    # With R exact the estimate of "refined" is too; "learned" knows no value of log|det W|.
    module, x, context = case.make(), inputs(case, 5), contexts(case, 5)
    transform, reference = module.condition(context), FullMatrices(module, context)
    value = transform.log_abs_det_jacobian(x, transform(x))
    expected = reference.log_abs_det_jacobian(x, x)
    if module.linear.log_det == "learned":
        expected = expected - torch.linalg.slogdet(module.linear.weight).logabsdet
    assert close(value, expected)


def test_context_changes_the_map(case: ConditionalCase) -> None:
    module, x = case.make(), inputs(case, 3)
    one, other = contexts(case, 2)
    assert not close(module.condition(one)(x), module.condition(other)(x), 0.01)


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_in_a_conditional_distribution(case: ConditionalCase, direction: str) -> None:
    module, context = case.make().eval(), contexts(case, 5)
    base = standard_normal(case.input_dim)
    transform = module if direction == "T" else module.inv
    flow = dist.ConditionalTransformedDistribution(base, [transform]).condition(context)
    reference = FullMatrices(module, context)
    expected = reference.distribution if direction == "T" else reference.inverse_distribution
    # The base is expanded, for each context has a sample of its own.
    assert flow.batch_shape == (5,)
    assert flow.event_shape == (case.input_dim,)
    sample = flow.rsample((7,))
    assert sample.shape == (7, 5, case.input_dim)
    assert len({row.tolist()[0] for row in flow.base_dist.sample().unbind()}) == 5
    for value in (sample, sample.detach().clone(), inputs(case, 5)):
        assert close(flow.log_prob(value), expected.log_prob(value))


# --- What is computed, and what is remembered ---------------------------------------------------


def affine_nodes(*tensors: Tensor) -> set[object]:
    """The nodes of the shared layer in the tensors' graph."""
    pending = [tensor.grad_fn for tensor in tensors]
    seen: set[object] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(parent for parent, _ in node.next_functions)
    return {node for node in seen if type(node).__name__ == "_AffineBackward"}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all rows that A is multiplied with."""
    shapes: list[tuple[int, ...]] = []
    multiply = near_identity.multiply

    def counted(theta: Tensor, rows: Tensor) -> Tensor:
        shapes.append(tuple(rows.shape))
        return multiply(theta, rows)

    monkeypatch.setattr(near_identity, "multiply", counted)
    return shapes


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("use", ["guide", "density"])
def test_one_product_and_one_node(use: str, rank: int, products: list[tuple[int, ...]]) -> None:
    module = conditional_self_normalizing_linear(4, 2, rank=rank)
    base, context = standard_normal(4), torch.randn(5, 2)
    if use == "guide":
        flow = dist.ConditionalTransformedDistribution(base, [module]).condition(context)
        value = flow.rsample((3,))
        terms = [value, flow.log_prob(value)]
    else:
        flow = dist.ConditionalTransformedDistribution(base, [module.inv]).condition(context)
        terms = [flow.log_prob(torch.randn(3, 5, 4))]
    assert products == [(15, 4)]
    assert len(affine_nodes(*terms)) == 1
    sum(term.sum() for term in terms).backward()
    assert products == [(15, 4)]


def test_network_is_evaluated_once() -> None:
    class Counted(DenseNN):
        calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            self.calls += 1
            return super().forward(x)

    network = Counted(2, [6], [3, 3, 3, 3])
    module = ConditionalSelfNormalizingLinear(3, network, rank=1)
    transform = module.condition(torch.randn(5, 2))
    x = torch.randn(5, 3)
    y = transform(x)
    transform.log_abs_det_jacobian(x, y)
    transform.inv(y.clone())
    assert network.calls == 1


def test_pair_is_remembered(case: ConditionalCase) -> None:
    transform, x = case.make().condition(contexts(case, 5)), inputs(case, 5)
    y = transform(x)
    assert transform(x) is y
    assert transform.inv(y) is x
    assert transform.inv.inv is transform
    assert transform.with_cache(1)(x) is y
    transform.clear_cache()
    assert transform(x) is not y
    assert torch.equal(transform(x), y)
    y = inputs(case, 5, seed=1)
    x = transform.inv(y)
    assert transform(x) is y


def test_parts_without_a_cache(case: ConditionalCase) -> None:
    transform, x = case.make().condition(contexts(case, 5)), inputs(case, 5)
    plain = Compose([part.with_cache(0) for part in transform.parts])
    y = plain(x)
    assert plain(x) is not y
    assert close(y, transform(x))
    assert close(plain.log_abs_det_jacobian(x, y), transform.log_abs_det_jacobian(x, transform(x)))


def test_conditionings_do_not_disturb_each_other(case: ConditionalCase) -> None:
    module, x = case.make().eval(), inputs(case, 5)
    given = [contexts(case, 5), contexts(case, 5, seed=1), contexts(case), contexts(case, 2, 1)]
    transforms = [module.condition(context) for context in given]
    images = [transform(x) for transform in transforms]
    for transform, context, y in zip(transforms, given, images, strict=True):
        reference = FullMatrices(module, context)
        assert close(y, reference(x))
        assert transform.inv(y) is x
        assert close(transform.log_abs_det_jacobian(x, y), reference.log_abs_det_jacobian(x, y))
        # Of the others' images it knows nothing.
        assert close(transform.inv(images[0]), reference.inv(images[0]))


def test_same_data_and_context_step_after_step(case: ConditionalCase) -> None:
    # The same tensors are scored again and again: nothing of the last step may come back.
    module, data, context = case.make(), inputs(case, 5), contexts(case, 5)
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


def test_pair_dies_when_the_outputs_of_the_network_are_written_to() -> None:
    context = torch.randn(5, 12)
    network = Split([3, 3, 3, 3])
    transform = ConditionalSelfNormalizingLinear(3, network, rank=1).condition(context)
    x = torch.randn(5, 3)
    y = transform(x)
    context.mul_(2)  # the outputs are views of it
    assert not close(transform(x), y, 0.01)
    assert not close(transform.inv(y), x, 0.01)


def test_condition_draws_no_random_numbers(case: ConditionalCase) -> None:
    module, x = case.make(), inputs(case, 5)
    state = torch.get_rng_state()
    transform = module.condition(contexts(case, 5))
    transform.log_abs_det_jacobian(x, transform(x)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


# --- Gradients ----------------------------------------------------------------------------------


def density_loss(module: ConditionalSelfNormalizingLinear, data: Tensor, context: Tensor) -> Tensor:
    return -density_by_inverse(module.condition(context), data).mean()


def all_gradients(
    module: ConditionalSelfNormalizingLinear, x: Tensor, context: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """Those of x, the context and all parameters but R."""
    named = {name: p for name, p in module.named_parameters() if "estimator" not in name}
    named = {"x": x, "context": context, **named}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradient_is_that_of_full_matrices(
    case: ConditionalCase, loss: Callable[[Transform, Tensor], Tensor]
) -> None:
    module = case.make()
    make_inverse_exact(module.linear)
    x, context = inputs(case, 3, 5).requires_grad_(), contexts(case, 5).requires_grad_()
    weights = torch.linspace(-1, 2, 15).view(3, 5)  # of both signs, as importance weights are
    actual, expected = (
        all_gradients(module, x, context, (weights * loss(transform, x)).sum())
        for transform in (module.condition(context), FullMatrices(module, context))
    )
    for name, gradient in expected.items():
        assert (gradient != 0).any(), name
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < EXACT, name


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradient_reaches_every_parameter(
    case: ConditionalCase, loss: Callable[[Transform, Tensor], Tensor]
) -> None:
    module = case.make()
    loss(module.condition(contexts(case, 5)), inputs(case, 5)).sum().backward()
    for name, parameter in module.named_parameters():
        if "estimator" not in name:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("log_det", "training"), [("exact", True), ("refined", False)])
def test_second_derivatives(log_det: str, training: bool, rank: int) -> None:
    # The network is smooth here: gradcheck must not meet a kink.
    dims = [3, 3, 6, 6][: 4 if rank else 2]
    network = DenseNN(2, [4], dims, nonlinearity=nn.Tanh())
    module = ConditionalSelfNormalizingLinear(3, network, rank=rank, log_det=log_det)
    randomize(module)
    module.train(training)
    theta, x, context = module.linear.theta, torch.randn(2, 3), torch.randn(2, 2)

    def forward(theta: Tensor, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        transform = module.condition(context)
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y)

    def backward(theta: Tensor, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        transform = module.condition(context)
        x = transform.inv(y)
        return x, transform.log_abs_det_jacobian(x, y)

    arguments = (theta, x.requires_grad_(), context.requires_grad_())
    for function in (forward, backward):
        assert gradcheck(function, arguments)
        assert gradgradcheck(function, arguments)


def test_tracked_inverse_follows_training() -> None:
    module = conditional_self_normalizing_linear(6, 2, [8], rank=2)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(50):
        context = torch.randn(64, 2)
        data = 3 * torch.randn(64, 6) + context.repeat(1, 3)
        loss = density_loss(module, data, context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    linear = module.linear
    assert linear.num_refreshes < 10
    residual = torch.eye(6) - linear.inverse_weight @ linear.weight
    assert residual.norm() / math.sqrt(6) < 0.05


# --- Construction -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("hidden_dims", [None, [7], (5, 6)])
def test_factory_starts_at_a_multiple_of_the_identity(
    rank: int, hidden_dims: list[int] | None
) -> None:
    module = conditional_self_normalizing_linear(3, 2, hidden_dims, rank=rank, init_scale=0.3)
    widths = [layer.out_features for layer in module.nn.layers[:-1]]
    assert widths == [30, 30] if hidden_dims is None else list(hidden_dims)
    x = torch.randn(5, 3)
    transform = module.condition(10 * torch.randn(5, 2))
    y = transform(x)
    assert close(y, 0.3 * x)
    expected = torch.full((5,), 3 * math.log(0.3))
    assert close(transform.log_abs_det_jacobian(x, y), expected)


def test_factory_starts_with_columns_of_norm_one() -> None:
    module = conditional_self_normalizing_linear(200, 2, [5], rank=10)
    *_, u, v = module.nn(torch.randn(4, 2))
    assert torch.equal(u, torch.zeros(4, 2000))
    norms = v.unflatten(-1, (10, 200)).norm(dim=-1)
    assert (norms - 1).abs().max() < 0.25  # five standard deviations, 1/√(2D) each
    assert len(set(norms[0].tolist())) == 10
    module.condition(torch.randn(4, 2))(torch.randn(4, 200)).square().sum().backward()
    gradient_of_u = module.nn.layers[-1].bias.grad[400:2400]
    assert (gradient_of_u != 0).all()


def test_factory_starts_like_the_shared_layer() -> None:
    assert torch.equal(
        conditional_self_normalizing_linear(3, 2, init_scale=0.3).linear.weight,
        SelfNormalizingLinear(3, bias=False, init_scale=0.3).weight,
    )


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_options_are_those_of_the_shared_layer(log_det: str, inverse: str) -> None:
    options = {"log_det": log_det, "inverse": inverse, "tolerance": 0.01, "num_probes": 2}
    module = conditional_self_normalizing_linear(3, 2, rank=1, **options)
    assert module.linear.log_det == log_det
    assert module.linear.inverse == inverse
    assert module.linear.bias is None
    if log_det == "refined":
        assert module.linear.estimator.tolerance == 0.01
        assert module.linear.estimator.num_probes == 2
    transform, x = module.condition(torch.randn(5, 2)), torch.randn(5, 3)
    y = transform(x)
    transform.log_abs_det_jacobian(x, y).sum().backward()
    assert close(transform.inv(y.detach().clone()), x)  # R starts exact


def test_parameters_are_floating_and_contiguous(case: ConditionalCase) -> None:
    # Pyro's store copies a parameter that is not contiguous, and then trains the copy.
    for name, tensor in case.make().named_parameters():
        assert tensor.is_contiguous(), name
        assert tensor.is_floating_point(), name
        assert tensor.is_leaf, name


def test_case_is_built_by_the_name_that_it_claims(case: ConditionalCase) -> None:
    assert isinstance(case.make(), pyro_snf.ConditionalSelfNormalizingLinear)
    assert (case.api == "conditional_self_normalizing_linear") == isinstance(
        case.make().nn.f, nn.ReLU
    )


def test_repr(case: ConditionalCase) -> None:
    module = case.make()
    assert f"{module.input_dim}, rank={module.rank}" in repr(module)
    transform = module.condition(contexts(case, 5))
    assert "ScaleAndShift" in repr(transform)
    assert ("LowRankUpdate" in repr(transform)) == (module.rank > 0)


# --- State, copies, types, devices --------------------------------------------------------------


def outputs(module: ConditionalSelfNormalizingLinear, case: ConditionalCase) -> list[Tensor]:
    training = module.training
    module.eval()
    x, context = inputs(case, 5), contexts(case, 5)
    with torch.no_grad():
        transform = module.condition(context)
        y = transform(x)
        result = [y, transform.log_abs_det_jacobian(x, y), transform.inv(x.clone())]
    module.train(training)
    return result


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(module: ConditionalSelfNormalizingLinear, case: ConditionalCase) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for step in range(3):
        transform = module.condition(contexts(case, 5, seed=step))
        loss = entropy_of_guide(transform, inputs(case, 5, seed=step)).mean()
        loss = loss + density_loss(module, inputs(case, 5), contexts(case, 5))
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
        train(module, case)
    alive = module.condition(contexts(case, 5))  # with a graph, as it is in a training loop
    alive(inputs(case, 5))
    before = outputs(module, case)
    twin = make_copy(module)
    assert same(outputs(twin, case), before)
    train(twin, case)
    assert same(outputs(module, case), before)
    assert not same(outputs(twin, case), before)


def test_state_dict(case: ConditionalCase) -> None:
    module, other = case.make(), case.make(seed=1)
    keys = list(module.state_dict())
    train(module, case)
    assert list(module.state_dict()) == keys
    assert not same(outputs(other, case), outputs(module, case))
    result = other.load_state_dict(module.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(outputs(other, case), outputs(module, case))


def test_to_another_dtype_and_back(case: ConditionalCase) -> None:
    module = case.make()
    expected = outputs(module, case)
    module.float()
    x, context = inputs(case, 5).float(), contexts(case, 5).float()
    transform = module.condition(context)
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    solution = transform.inv(x.clone())
    assert y.dtype == log_det.dtype == solution.dtype == torch.float32
    assert close(y.double(), expected[0], SINGLE)
    assert close(solution.double(), expected[2], SINGLE)
    log_det.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in module.parameters())
    module.double()
    for actual, value in zip(outputs(module, case), expected, strict=True):
        assert close(actual, value, SINGLE)


def test_on_the_device(case: ConditionalCase, device: torch.device) -> None:
    expected = outputs(case.make(), case)
    module = case.make().to(device)
    x, context = inputs(case, 5).to(device), contexts(case, 5).to(device)
    transform = module.condition(context)
    y = transform(x)
    assert close(y.cpu(), expected[0])
    assert close(transform.inv(x.clone()).cpu(), expected[2])
    transform.log_abs_det_jacobian(x, y).sum().backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    assert found
    assert all(gradient.device.type == device.type for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_built_on_the_device_and_of_the_dtype(dtype: torch.dtype, device: torch.device) -> None:
    module = conditional_self_normalizing_linear(3, 2, rank=1, device=device, dtype=dtype)
    for name, parameter in module.named_parameters():
        assert parameter.device.type == device.type, name
        assert parameter.dtype == dtype, name
    context = torch.ones(4, 2, device=device, dtype=dtype)
    transform, x = module.condition(context), torch.ones(4, 3, device=device, dtype=dtype)
    transform.log_abs_det_jacobian(x, transform(x)).sum().backward()


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, log_det: str) -> None:
    case = CONDITIONAL_CASES[f"conditional linear {log_det} rank=2"]
    reference, module = case.make().eval(), case.make().to(dtype)
    x, context = inputs(case, 5), contexts(case, 5)
    expected = reference.condition(context)
    transform = module.condition(context.to(dtype))
    y = transform(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 48 * torch.finfo(dtype).eps  # some dozen roundings of numbers of size 1 to 4
    assert close(y.double(), expected(x), tolerance)
    again = transform.inv(y.detach().clone())
    assert again.dtype == dtype
    assert close(again.double(), x, tolerance)
    value = module.eval().condition(context.to(dtype)).log_abs_det_jacobian(x.to(dtype), y)
    assert value.dtype in (torch.float32, torch.float64)
    assert close(value.double(), expected.log_abs_det_jacobian(x, expected(x)), tolerance)
    (y.float().square().sum() - value.sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == dtype, name


@pytest.mark.parametrize("rank", [0, 2])
def test_autocast(rank: int) -> None:
    name = "conditional linear refined rank=2" if rank else "conditional linear refined"
    case = CONDITIONAL_CASES[name]
    module, x, context = case.make().float(), inputs(case, 5).float(), contexts(case, 5).float()
    expected = module.condition(context)(x)
    with torch.autocast("cpu", torch.bfloat16):
        transform = module.condition(context)
        y = transform(x)
        log_det = transform.log_abs_det_jacobian(x, y)
        again = transform.inv(y.detach().clone())
        low = transform(x.bfloat16())
    assert close(y.float(), expected, 0.1)
    assert close(low.float(), expected, 0.1)
    assert close(again.float(), x, 0.1)
    assert log_det.dtype == torch.float32
    (y.float().square().sum() - log_det.sum() + again.sum()).backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.float32, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_log_det_and_inverse_are_not_rounded_by_autocast() -> None:
    case = CONDITIONAL_CASES["conditional linear refined rank=2"]
    module, x = case.make().float().eval(), inputs(case, 5).float()
    transform = module.condition(contexts(case, 5).float())
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    transform.clear_cache()
    with torch.autocast("cpu", torch.bfloat16):
        assert close(transform.inv(y), x, SINGLE)
        assert close(transform.log_abs_det_jacobian(x, y), log_det, SINGLE)


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

    model, x, context = Model(), inputs(case, 5), contexts(case, 5)
    assert close(model(x, context), FullMatrices(model.flow, context)(x))
    registered = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert registered == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("cache_size", [0, 1])
def test_in_a_stack_of_pyro(cache_size: int) -> None:
    case = CONDITIONAL_CASES["conditional linear refined rank=2"]
    layers = [case.make(0).eval(), SelfNormalizingLinear(4).eval(), case.make(1).eval()]
    stack = ConditionalComposeTransformModule(layers, cache_size=cache_size)
    context, x = contexts(case, 5), inputs(case, 5)
    first, last = (FullMatrices(layer, context) for layer in (layers[0], layers[2]))
    transform = stack.condition(context)
    y = transform(x)
    assert close(y, last(first(x)))
    expected = first.log_abs_det_jacobian(x, x) + last.log_abs_det_jacobian(x, x)
    assert close(transform.log_abs_det_jacobian(x, y), expected)
    assert close(transform.inv(y), x)
    flow = dist.ConditionalTransformedDistribution(standard_normal(4), [stack.inv])
    assert flow.condition(context).log_prob(x).shape == (5,)


class LinearEncoder(nn.Linear):
    """A network of one's own: b is affine in the context, s and the rest a constant."""

    def __init__(self, context_dim: int, dims: list[int]) -> None:
        super().__init__(context_dim, dims[0])
        self.rest = nn.ParameterList([0.1 * torch.randn(dim) for dim in dims[1:]])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        bias = super().forward(x)
        return bias, *[one.expand(*x.shape[:-1], -1) for one in self.rest]


class Inference:
    """``z ~ N(0, I)``, ``x | z ~ N(Bz, I)``: the posterior is Gaussian, its mean linear in x."""

    def __init__(self, dim: int = 3, observations: int = 4) -> None:
        self.dim, self.observations = dim, observations
        generator = torch.Generator().manual_seed(17)
        self.matrix = torch.randn(observations, dim, generator=generator)
        self.covariance = torch.linalg.inv(torch.eye(dim) + self.matrix.mT @ self.matrix)

    def posterior_mean(self, data: Tensor) -> Tensor:
        return data @ self.matrix @ self.covariance

    def draw(self, count: int) -> Tensor:
        latent = torch.randn(count, self.dim)
        return latent @ self.matrix.mT + torch.randn(count, self.observations)

    def model(self, data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", standard_normal(self.dim))
            pyro.sample("x", dist.Normal(z @ self.matrix.mT, 1.0).to_event(1), obs=data)

    def guide_of(self, module: ConditionalSelfNormalizingLinear) -> Callable[[Tensor], None]:
        flow = dist.ConditionalTransformedDistribution(standard_normal(self.dim), [module])

        def guide(data: Tensor) -> None:
            pyro.module("flow", module)
            with pyro.plate("data", len(data)):
                pyro.sample("z", flow.condition(data))

        return guide


@pytest.mark.parametrize("encoder", ["network", "linear rank=1"])
def test_amortized_posterior_is_the_exact_one(encoder: str) -> None:
    problem = Inference()
    if encoder == "network":
        module = conditional_self_normalizing_linear(3, 4, [32], init_scale=0.3)
    else:
        module = ConditionalSelfNormalizingLinear(3, LinearEncoder(4, [3, 3, 3, 3]), rank=1)
    steps = 800
    schedule = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.02},
            "gamma": 0.02 ** (1 / steps),
        }
    )
    svi = SVI(problem.model, problem.guide_of(module), schedule, Trace_ELBO())
    for _ in range(steps):
        svi.step(problem.draw(128))
        schedule.step()

    unseen = problem.draw(200)
    reference = FullMatrices(module.eval(), unseen)
    mean_error = reference.bias - problem.posterior_mean(unseen)
    covariance_error = reference.distribution.covariance_matrix - problem.covariance
    assert mean_error.square().mean().sqrt() < MEAN
    assert covariance_error.square().mean().sqrt() < COVARIANCE


# torch deprecates its tracer; Pyro's JitTrace_ELBO stands on it.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("rank", [0, 2])
def test_jit_traces_the_network_too(rank: int) -> None:
    # A density, for it is deterministic: of random numbers, a trace draws others than Pyro does.
    case = CONDITIONAL_CASES[
        "conditional linear exact rank=2" if rank else "conditional linear exact"
    ]
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
            arguments = inputs(case, 5, seed=step), contexts(case, 5, seed=step)
            loss = elbo.loss_and_grads(model, lambda data, context: None, *arguments)
            runs.append([torch.tensor(loss), *[p.grad.clone() for p in module.parameters()]])
        for actual, expected in zip(*runs, strict=True):
            assert close(actual, expected)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)


# --- Bad input ----------------------------------------------------------------------------------


def make(input_dim: object = 3, **options: object) -> ConditionalSelfNormalizingLinear:
    return conditional_self_normalizing_linear(input_dim, 2, [4], **options)


def make_with(*dims: int, rank: int = 0) -> ConditionalSelfNormalizingLinear:
    """With a network whose outputs are of these sizes, made for D = 3."""
    return ConditionalSelfNormalizingLinear(3, DenseNN(2, [4], list(dims)), rank=rank)


@pytest.mark.parametrize("input_dim", [0, -1, 2.0, "3", None])
def test_input_dim_is_checked(input_dim: object) -> None:
    with pytest.raises(ValueError, match=f"expected input_dim, an integer >= 1; got {input_dim!r}"):
        make(input_dim)
    with pytest.raises(ValueError, match=f"expected input_dim, an integer >= 1; got {input_dim!r}"):
        ConditionalSelfNormalizingLinear(input_dim, nn.Identity())


@pytest.mark.parametrize("rank", [-1, 4, 1.0, None])
def test_rank_is_checked(rank: object) -> None:
    for build in (
        make,
        lambda **options: ConditionalSelfNormalizingLinear(3, nn.Linear, **options),
    ):
        with pytest.raises(ValueError, match=f"expected rank, an integer from 0 to 3; got {rank}"):
            build(rank=rank)


@pytest.mark.parametrize("context_dim", [0, -2, 2.0, None])
def test_context_dim_is_checked(context_dim: object) -> None:
    message = f"expected context_dim, an integer >= 1; got {context_dim}"
    with pytest.raises(ValueError, match=message):
        conditional_self_normalizing_linear(3, context_dim)


@pytest.mark.parametrize("hidden_dims", [[], (), [0], [4, -1], [4.0], 8, "44"])
def test_hidden_dims_are_checked(hidden_dims: object) -> None:
    with pytest.raises(ValueError, match=r"expected hidden_dims, a non-empty list .* >= 1; got "):
        conditional_self_normalizing_linear(3, 2, hidden_dims)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_no_option(bias: bool) -> None:
    with pytest.raises(ValueError, match=f"expected no bias: b.c. is there; got bias={bias}"):
        make(bias=bias)


def test_options_are_checked_by_the_shared_layer() -> None:
    with pytest.raises(ValueError, match=r"expected log_det to be one of .*; got 'approximate'"):
        make(log_det="approximate")
    with pytest.raises(ValueError, match=r"expected a floating-point dtype; got torch\.int64"):
        make(dtype=torch.int64)
    with pytest.raises(TypeError, match="momentum"):
        make(momentum=0.9)


def test_network_must_be_callable() -> None:
    with pytest.raises(ValueError, match=r"expected nn, a network .*; got 2"):
        ConditionalSelfNormalizingLinear(3, 2)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 4), (0, 2)])
def test_context_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    message = (
        rf"expected a non-empty context of shape \(\.\.\., 2\); got \({', '.join(map(str, shape))}"
    )
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


@pytest.mark.parametrize(
    ("dims", "rank", "message"),
    [
        ((3, 3, 3), 0, r"2 tensors of shapes \(\*batch, 3\), \(\*batch, 3\); got \[\(4, 3\), "),
        ((3, 4), 0, r"2 tensors .*; got \[\(4, 3\), \(4, 4\)\]"),
        ((3, 3), 1, r"4 tensors .*\(\*batch, 3\), \(\*batch, 3\); got \[\(4, 3\), \(4, 3\)\]"),
        ((3, 3, 6, 3), 2, r"4 tensors .*\(\*batch, 6\); got .*\(4, 6\), \(4, 3\)\]"),
        ((6,), 0, "2 tensors .*; got Tensor"),
    ],
)
def test_outputs_of_the_network_are_checked(dims: tuple[int, ...], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=r"expected nn\(context\) to be " + message):
        make_with(*dims, rank=rank).condition(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((), r"got \[\]"),
        (None, "got NoneType"),
        ((torch.zeros(3), 1.0), "got tuple"),
        ((torch.zeros(4, 3), torch.zeros(3)), r"got \[\(4, 3\), \(3,\)\]"),
        ((torch.zeros(()), torch.zeros(())), r"got \[\(\), \(\)\]"),
    ],
)
def test_outputs_of_any_callable_are_checked(result: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalSelfNormalizingLinear(3, lambda context: result).condition(torch.zeros(2))


def test_outputs_of_another_dtype_are_refused() -> None:
    module = ConditionalSelfNormalizingLinear(
        3, lambda context: (torch.zeros(3), torch.zeros(3)), dtype=torch.float32
    )
    message = (
        r"expected nn\(context\) to be of the layer's dtype torch\.float32; got \[torch\.float64"
    )
    with pytest.raises(ValueError, match=message):
        module.condition(torch.zeros(2))


@pytest.mark.parametrize("rank", [0, 1])
def test_batch_that_does_not_broadcast_is_refused(rank: int) -> None:
    module = make(rank=rank)
    transform = module.condition(torch.zeros(4, 2))
    x = torch.zeros(5, 3)
    message = r"expected a shape \(\.\.\., 3\) that broadcasts .*batch \(4,\); got \(5, 3\)"
    for use in (transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)):
        with pytest.raises(ValueError, match=message):
            use(x)
    base = dist.Normal(torch.zeros(5, 3), 1.0).to_event(1)
    for each in (module, module.inv):
        with pytest.raises(ValueError, match=message):
            dist.ConditionalTransformedDistribution(base, [each]).condition(torch.zeros(4, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_inputs_are_checked(rank: int) -> None:
    transform = make(rank=rank).condition(torch.zeros(4, 2))
    for use in (transform, transform.inv):
        with pytest.raises(ValueError, match=r"expected .*shape \(\.\.\., 3\); got \(4, 2\)"):
            use(torch.zeros(4, 2))
        with pytest.raises(ValueError, match=r"expected a floating-point tensor; got torch\.int64"):
            use(torch.zeros(4, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"expected dtype torch\.float64; got torch\.float32"):
            use(torch.zeros(4, 3, dtype=torch.float32))


# --- What is singular or not finite -------------------------------------------------------------


def singular_update() -> LowRankUpdate:
    """For three contexts, of which ``I + VᵀU`` is singular for the second."""
    u = torch.tensor([1.0, 0.0, 0.0]).expand(3, 1, 3)
    return LowRankUpdate(u, torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1) * u)


def test_singular_update_has_a_log_det_of_minus_infinity() -> None:
    update, x = singular_update(), torch.randn(3, 3)
    expected = torch.tensor([math.log(2), -math.inf, math.log(3)])
    assert torch.equal(update.log_abs_det_jacobian(x, update(x)), expected)


def test_singular_update_has_no_inverse() -> None:
    message = r"LowRankUpdate\(3, batch_shape=\(3,\), rank=1\): I \+ VᵀU: .*element 1.*singular"
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        singular_update().inv(torch.randn(3, 3))


def test_singular_shared_matrix_is_an_error() -> None:
    module = make(4, rank=1).eval()
    with torch.no_grad():
        module.linear.theta.copy_(-2 * torch.eye(4))  # A = I + Θ/√4 = 0
    transform, x = module.condition(torch.zeros(2)), torch.randn(4)
    with pytest.raises(torch.linalg.LinAlgError, match="SelfNormalizingLinear"):
        transform.log_abs_det_jacobian(x, transform(x))
    with pytest.raises(torch.linalg.LinAlgError, match="SelfNormalizingLinear"):
        transform.inv(x.clone())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_context_surfaces_and_spoils_no_other(case: ConditionalCase, value: float) -> None:
    if value == math.inf and case.api == "ConditionalSelfNormalizingLinear":
        pytest.skip("a bounded nonlinearity makes a number of it")
    module, x, context = case.make().eval(), inputs(case, 3), contexts(case, 3)
    bad = context.clone()
    bad[1] = value
    good_transform, bad_transform = module.condition(context), module.condition(bad)
    y, bad_y = good_transform(x), bad_transform(x)
    log_det = good_transform.log_abs_det_jacobian(x, y)
    bad_log_det = bad_transform.log_abs_det_jacobian(x, bad_y)
    good_x, bad_x = good_transform.inv(x.clone()), bad_transform.inv(x.clone())
    for good, found in [(y, bad_y), (log_det, bad_log_det), (good_x, bad_x)]:
        assert not torch.isfinite(found[1]).all()
        assert close(found[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("rank", [0, 2])
def test_bad_context_never_enters_the_tracked_inverse(rank: int) -> None:
    module = make(rank=rank)
    x = torch.randn(4, 3)
    transform = module.condition(torch.full((4, 2), math.nan))
    transform.log_abs_det_jacobian(x, transform(x)).sum().backward()
    assert torch.isfinite(module.linear.estimator.inverse_t).all()

"""The gradient of T(x) and of its log-determinant in one buffer, against two separate ones."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributions import Transform
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_snf import Compose, Learned
from pyro_snf.maps import Dense
from tests.registry import conv, linear, make_inverse_exact, nudge_inverses

# Float64, R exact, condition below 3: what is left is rounding.
EXACT = 1e-9
# The same sums in another order.
SAME = 1e-12
# A few roundings of sums over 5 features and 6 rows.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


class Kind(NamedTuple):
    make: Callable[..., Any]
    shape: tuple[int, ...]  # of a batch of events


KINDS = {
    "linear": Kind(partial(linear, 5), (6, 5)),
    "conv": Kind(partial(conv, 2), (3, 2, 4, 3)),
    "conv 1×1": Kind(partial(conv, 3, kernel_size=1), (2, 3, 2, 2)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


Loss = Callable[[Any, Tensor], Tensor]


def evaluate(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = layer(x)
    return y, layer.log_abs_det_jacobian(x, y)


def both(layer: Any, x: Tensor) -> Tensor:
    y, log_det = evaluate(layer, x)
    return y.square().sum() - (torch.linspace(-1, 2, log_det.numel()) * log_det.flatten()).sum()


def map_alone(layer: Any, x: Tensor) -> Tensor:
    return evaluate(layer, x)[0].square().sum()


def log_det_alone(layer: Any, x: Tensor) -> Tensor:
    return evaluate(layer, x)[1].square().sum()


def each_twice(layer: Any, x: Tensor) -> Tensor:
    y, log_det = evaluate(layer, x)
    again = layer.log_abs_det_jacobian(x, y)
    return (y.sin() * layer(x)).sum() + 0.3 * log_det.sum() - 2 * again.square().sum()


def particles(layer: Any, x: Tensor) -> Tensor:
    return sum((both(layer, factor * x) for factor in (1.0, -0.5, 2.0)), torch.zeros(()))


def tied(layer: Any, x: Tensor) -> Tensor:
    """The layer after itself: its input depends on its own parameters."""
    middle, log_det = evaluate(layer, x)
    return layer(middle).square().sum() + both(layer, middle) + log_det.sum()


def written_to(layer: Any, x: Tensor) -> Tensor:
    y, log_det = evaluate(layer, x)
    return y.mul_(2).add_(1).square().sum() - log_det.sum()


LOSSES = [both, map_alone, log_det_alone, each_twice, particles, tied, written_to]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def leaf(*shape: int, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).requires_grad_(requires_grad)


def gradients(layer: Any, loss: Loss, x: Tensor, **options: bool) -> Gradients:
    """Those in x and the parameters, None where there is none."""
    inputs = [x, layer.theta, layer.log_scale, layer.bias]
    asked = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return list(torch.autograd.grad(loss(layer, x), asked, allow_unused=True, **options))


def gradients_so_far(layer: Any, x: Tensor) -> Gradients:
    return [one.grad for one in (x, layer.theta, layer.log_scale, layer.bias)]


Gradients = list[Tensor | None]


def assert_same(actual: Gradients, expected: Gradients, tolerance: float = EXACT) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).norm() <= tolerance * (1 + theirs.norm())


def assert_same_for_exact(
    function: Callable[[Any], Gradients], kind: str | Kind = "linear"
) -> None:
    """For ``log_det="exact"``, whose gradients are autograd's own."""
    make = KINDS.get(kind, kind).make
    assert_same(function(make()), function(make(log_det="exact")))


# --- First derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@EVERY_LOSS
def test_gradient_is_the_exact_one(kind: Kind, loss: Loss, bias: bool, create_graph: bool) -> None:
    layer, exact = kind.make(bias=bias), kind.make(bias=bias, log_det="exact")
    no_cache = copy.deepcopy(layer).with_cache(0)
    results = [
        gradients(one, loss, leaf(*kind.shape), create_graph=create_graph)
        for one in (layer, no_cache, exact)
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@EVERY_LOSS
def test_gradient_of_a_wrong_inverse_is_the_same_surrogate(loss: Loss) -> None:
    # What is added is R as it is, at whatever error.
    layer = linear(5, tolerance=0.99)
    evaluate(layer, leaf(6, 5))
    with torch.no_grad():
        layer.theta.mul_(1.1)
    exact = linear(5, log_det="exact")
    exact.load_state_dict(layer.state_dict(), strict=False)
    plain = copy.deepcopy(layer).with_cache(0)
    found, right = (gradients(one, loss, leaf(6, 5)) for one in (layer, exact))
    assert_same(found, gradients(plain, loss, leaf(6, 5)))
    assert loss is map_alone or (found[1] - right[1]).norm() > 1e-4 * right[1].norm()


@pytest.mark.parametrize("frozen", ["x", "log_scale", "bias", "x log_scale bias"])
@EVERY_LOSS
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(loss: Loss, frozen: str) -> None:
    def result(layer: Any) -> Gradients:
        for name in set(frozen.split()) - {"x"}:
            getattr(layer, name).requires_grad_(False)
        return gradients(layer, loss, leaf(6, 5, requires_grad="x" not in frozen))

    assert_same_for_exact(result)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 1, 5), (2, 3, 5), "strided"])
def test_shapes(shape: tuple[int, ...] | str) -> None:
    def result(layer: Any) -> Gradients:
        x = leaf(5, 4, 3) if shape == "strided" else leaf(*shape)
        rows = x.permute(1, 2, 0) if shape == "strided" else x
        assert [one.shape for one in evaluate(layer, rows)] == [rows.shape, rows.shape[:-1]]
        return list(torch.autograd.grad(both(layer, rows), [x, layer.theta]))

    assert_same_for_exact(result)


def test_gradients_of_a_part() -> None:
    for loss in (both, map_alone):  # in x alone
        x = leaf(6, 5)
        assert_same_for_exact(lambda layer: list(torch.autograd.grad(loss(layer, x), x)))  # noqa: B023
    for create_graph in (False, True):  # the log-determinant of the second of two layers
        first, second, x = linear(5), linear(5, seed=1), leaf(6, 5)
        loss = log_det_alone(second, first(x))
        inputs = [x, first.theta, second.theta]
        found = torch.autograd.grad(loss, inputs, allow_unused=True, create_graph=create_graph)
        assert [one is None for one in found] == [True, True, False]


# --- More than one backward pass ----------------------------------------------------------------


@EVERY_LOSS
def test_two_backward_passes(kind: Kind, loss: Loss) -> None:
    expected = gradients(kind.make(), loss, leaf(*kind.shape))
    twice = [None if gradient is None else 2 * gradient for gradient in expected]
    layer, x = kind.make(), leaf(*kind.shape)
    total = loss(layer, x)
    for retain_graph in (True, False):  # through one graph
        total.backward(retain_graph=retain_graph)
    assert_same(gradients_so_far(layer, x), twice)
    # Of the same input: the pair's graph is used up by the first backward pass, also where that
    # reached it through the log-determinant alone.
    layer, x = kind.make(), leaf(*kind.shape, requires_grad=False)
    for _ in range(2):
        loss(layer, x).backward()
    assert_same(gradients_so_far(layer, x)[1:], twice[1:])


def test_map_and_log_det_in_backward_passes_of_their_own() -> None:
    # Of one node: autograd wants retain_graph, and then nothing is counted twice.
    expected = gradients(linear(5), both, leaf(6, 5))
    for order in (0, 1):
        layer, x = linear(5), leaf(6, 5)
        y, log_det = evaluate(layer, x)
        parts = [y.square().sum(), -(torch.linspace(-1, 2, 6) * log_det).sum()]
        parts[order].backward(retain_graph=True)
        parts[1 - order].backward()
        assert_same(gradients_so_far(layer, x), expected)


@pytest.mark.parametrize("rows", [1, 6])
def test_batched_backward_pass(rows: int) -> None:
    # What torch.autograd.functional.jacobian(vectorize=True) does.
    def result(layer: Any) -> list[Tensor]:
        x = leaf(rows, 5)
        y, log_det = evaluate(layer, x)
        outputs = torch.cat([y.flatten(), log_det, y[0] * log_det[0]])
        inputs, eye = [x, layer.theta, layer.log_scale, layer.bias], torch.eye(len(outputs))
        return list(torch.autograd.grad(outputs, inputs, eye, is_grads_batched=True))

    assert_same_for_exact(result)


# --- Second derivatives -------------------------------------------------------------------------


def map_of_map(layer: Any, x: Tensor) -> Tensor:
    return layer(layer(x)).pow(3).sum()


@pytest.mark.parametrize("loss", [map_alone, map_of_map], ids=lambda loss: loss.__name__)
def test_second_derivatives_of_the_map(kind: Kind, loss: Loss) -> None:
    def result(layer: Any) -> Gradients:
        x = leaf(*kind.shape)
        first = gradients(layer, loss, x, create_graph=True)
        penalty = sum((gradient.square().sum() for gradient in first), torch.zeros(()))
        return list(torch.autograd.grad(penalty, [x, *layer.parameters()], allow_unused=True))

    assert_same_for_exact(result, kind)


def test_second_derivatives_beside_a_log_det() -> None:
    def penalized(layer: Any) -> Gradients:
        # A gradient penalty on x next to a likelihood: the surrogate is differentiated only once.
        x = leaf(6, 5)
        y, log_det = evaluate(layer, x)
        (score,) = torch.autograd.grad(y.pow(3).sum() - log_det.sum(), x, create_graph=True)
        (score.square().sum() - log_det.sum()).backward()
        return gradients_so_far(layer, x)[:3]

    def through_the_scale(layer: Any) -> Gradients:
        # The gradient in s is the cotangent, a function of log|det W|.
        first = gradients(layer, log_det_alone, leaf(6, 5), create_graph=True)[2]
        return list(torch.autograd.grad(first.square().sum(), layer.theta))

    assert_same_for_exact(penalized)
    assert_same_for_exact(through_the_scale)


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_second_derivative_of_the_log_det_is_refused(kind: Kind, log_det: str) -> None:
    layer = kind.make(log_det=log_det)
    for loss in (lambda layer, x: evaluate(layer, x)[1].sum(), both):
        first = gradients(layer, loss, leaf(*kind.shape), create_graph=True)[1]
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(first.square().sum(), layer.theta)


# --- What changes between T(x) and the backward pass --------------------------------------------


def exact_value(theta: Tensor, log_scale: Tensor) -> float:
    matrix = Dense().weight(theta.detach())
    return (torch.linalg.slogdet(matrix).logabsdet + log_scale.detach().sum()).item()


EDITS: dict[str, Callable[[Any], object]] = {
    "in place": lambda layer: layer.theta.mul_(1.9),
    "through data": lambda layer: layer.theta.data.mul_(1.9),
    "another data": lambda layer: setattr(layer.theta, "data", 1.9 * layer.theta.data),
    "another parameter": lambda layer: setattr(layer, "theta", nn.Parameter(1.9 * layer.theta)),
}


@pytest.mark.parametrize("known", [False, True], ids=["first use", "evaluated before"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("edit", EDITS)
def test_edit_before_the_log_det(edit: str, steps: int, known: bool) -> None:
    # The log-determinant of the weight as it was or as it is: of no other, and with its gradient.
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    for step in range(steps):  # slow ones, after which no check is due for a while
        with torch.no_grad():
            layer.theta.mul_(1 + 1e-5)
        evaluate(layer, (1.0 + step) * x)
    y = layer(x)
    if known:
        layer.log_abs_det_jacobian(x, y)
    old = layer.theta.detach().clone()
    with torch.no_grad():
        EDITS[edit](layer)
    log_det = layer.log_abs_det_jacobian(x, y)
    thetas = {exact_value(theta, layer.log_scale): theta for theta in (old, layer.theta)}
    found = min(thetas, key=lambda value: abs(value - log_det[0].item()))
    assert log_det[0].item() == pytest.approx(found, abs=1e-4)
    try:
        log_det.mean().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        expected = torch.linalg.inv(Dense().weight(thetas[found].detach())).mT / math.sqrt(5)
        assert (layer.theta.grad - expected).norm() < 0.03 * expected.norm()
    if edit == "in place":  # as of an average of the weights that is swapped in and out again
        layer.theta.data.copy_(old)
        again = evaluate(layer, x.clone())[1][0].item()
        assert again == pytest.approx(exact_value(old, layer.log_scale), abs=1e-8)


@pytest.mark.parametrize("how", ["refactorize", "overwritten", "later steps", "state dict"])
def test_inverse_that_changes_before_the_backward_pass_is_an_error(how: str) -> None:
    layer = linear(5)
    log_det, x = log_det_alone(layer, leaf(6, 5)), leaf(6, 5)
    total = map_alone(layer, x)  # which does not need R
    if how == "later steps":
        layer.theta.data.mul_(1.9)  # past the version counters, as Pyro's optimizers write
        evaluate(layer, leaf(4, 5))
        layer.theta.data.div_(1.9)
    elif how == "refactorize":
        layer.refactorize()
    elif how == "overwritten":
        layer.log_det.estimator.inverse_t.mul_(1.1)
    else:
        layer.log_det.load_state_dict(linear(5, seed=1).log_det.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_det.backward()
    layer.zero_grad()
    total.backward()
    assert_same(gradients_so_far(layer, x), gradients(linear(5), map_alone, leaf(6, 5)))


@pytest.mark.parametrize("factor", [1.0, 1.5], ids=["copies", "others"])
def test_other_parameters_have_gradients_of_their_own(factor: float) -> None:
    # As of an inner loop of meta-learning; as copies, of the same contents and version.
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    y = layer(x)
    others = {
        name: (factor * parameter.detach()).requires_grad_()
        for name, parameter in layer.named_parameters()
    }
    weight = others["log_scale"].exp().unsqueeze(1) * Dense().weight(others["theta"])
    value = torch.linalg.slogdet(weight).logabsdet
    scorer = nn.Module()
    scorer.layer, scorer.forward = layer, layer.log_abs_det_jacobian
    prefixed = {f"layer.{name}": other for name, other in others.items()}
    for found, expected in [
        (functional_call(layer, others, (x,)).square(), (x @ weight.mT + others["bias"]).square()),
        (functional_call(scorer, prefixed, (x, y)), value.expand(6)),
    ]:
        assert torch.allclose(found, expected)
        asked = [others["theta"], others["log_scale"]]
        results = [
            torch.autograd.grad(one.sum(), asked, retain_graph=True) for one in (found, expected)
        ]
        assert_same(*map(list, results))


SCORERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "own cache": lambda layer: layer.with_cache(0),
    "clones": lambda layer: layer,
    "stack": lambda layer: Compose([layer]),
}


@pytest.mark.parametrize("how", SCORERS)
def test_pair_of_another_object_is_scored_all_the_same(how: str) -> None:
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    y = layer(x)
    scorer = SCORERS[how](layer)
    pair = (x.clone(), y.detach().clone()) if how == "clones" else (x, y)
    scorer.log_abs_det_jacobian(*pair).sum().backward()
    expected = gradients(linear(5, log_det="exact"), lambda m, x: evaluate(m, x)[1].sum(), x)
    target = scorer if how == "deepcopy" else layer
    assert_same([target.theta.grad, target.log_scale.grad], expected[:2])


# --- What else autograd and torch can do --------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_functional_transforms_and_forward_mode() -> None:
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    weight, ones = layer.weight.detach(), torch.ones(6, 5)
    single = torch.func.grad(lambda x: layer(x).sum())
    assert_same([torch.func.vmap(single)(x)], [weight.sum(0).expand(6, 5)])
    assert_same([torch.func.jacrev(layer)(x[0]), torch.func.jacfwd(layer)(x[0])], [weight] * 2)
    assert_same([torch.func.jvp(layer, (x,), (ones,))[1]], [weight.sum(1).expand(6, 5)])
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, ones))).tangent
    assert_same([tangent], [weight.sum(1).expand(6, 5)])

    def total(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(total)(dict(layer.named_parameters()))
    expected = gradients(linear(5), map_alone, x)
    assert_same([found[name] for name in ("theta", "log_scale", "bias")], expected)


@pytest.mark.parametrize("where", ["both", "T(x)", "log-det"])
def test_autocast(where: str) -> None:
    def total(layer: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "log-det"):
            y = layer(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "T(x)"):
            log_det = layer.log_abs_det_jacobian(x, y)
        assert log_det.dtype == torch.float32
        return y.float().square().sum() - log_det.sum()

    layers = [linear(5).float(), linear(5, log_det="exact").float()]
    results = [gradients(layer, total, leaf(6, 5).detach().float()) for layer in layers]
    assert_same(*results, ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    layer, exact = linear(5).to(dtype), linear(5, log_det="exact")
    exact.load_state_dict(layer.state_dict(), strict=False)
    make_inverse_exact(layer)
    x = leaf(6, 5).detach().to(dtype)

    def total(layer: Any, x: Tensor) -> Tensor:
        y, log_det = evaluate(layer, x)
        return y.double().square().sum() - log_det.double().sum()

    actual, expected = gradients(layer, total, x), gradients(exact, total, x.double())
    assert [gradient.dtype for gradient in actual] == [dtype] * 3
    assert_same([gradient.double() for gradient in actual], expected, ROUNDING[dtype])


# --- A learned inverse, and the products that it has in common ----------------------------------


def learned(kind: Kind, reconstruction: str, mixture: float = 0.4) -> Any:
    options = {"reconstruction": reconstruction, "reconstruction_weight": 0.7}
    layer = kind.make(log_det="learned", mixture=mixture, **options)
    nudge_inverses(layer, 0.3)
    return layer


def all_gradients(layer: Any, loss: Loss, x: Tensor, **options: bool) -> Gradients:
    inputs = [x, *layer.parameters()]
    return list(torch.autograd.grad(loss(layer, x), inputs, allow_unused=True, **options))


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize(
    ("reconstruction", "mixture"),
    [("both", 0.0), ("both", 0.4), ("inverse", 0.4), ("symmetric", 0.4)],
)
@EVERY_LOSS
def test_learned_inverse_with_and_without_common_products(
    name: str, loss: Loss, reconstruction: str, mixture: float
) -> None:
    kind = KINDS[name]
    layer, x = learned(kind, reconstruction, mixture), leaf(*kind.shape)
    apart = all_gradients(layer.with_cache(0), loss, x)
    for create_graph in (False, True):
        assert_same(all_gradients(layer, loss, x, create_graph=create_graph), apart, SAME)
    for _ in range(2):  # the pair's graph is used up by the first backward pass
        loss(layer, x).backward()
    twice = [None if gradient is None else 2 * gradient for gradient in apart]
    assert_same([x.grad, *(one.grad for one in layer.parameters())], twice, SAME)


@pytest.mark.parametrize("reconstruction", Learned.RECONSTRUCTIONS)
def test_second_derivatives_beside_a_learned_inverse(reconstruction: str) -> None:
    def penalized(layer: Any) -> Gradients:
        x = leaf(6, 5)
        y, log_det = evaluate(layer, x)
        (score,) = torch.autograd.grad(y.pow(3).sum() - log_det.sum(), x, create_graph=True)
        loss = score.square().sum() - log_det.sum()
        return list(torch.autograd.grad(loss, [x, *layer.parameters()]))

    layer = learned(KINDS["linear"], reconstruction)
    assert_same(penalized(layer), penalized(layer.with_cache(0)), SAME)
    first = all_gradients(layer, both, leaf(6, 5), create_graph=True)
    for gradient in (first[1], first[-1]):  # in A and in R
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward(retain_graph=True)


def total_log_det(layer: Any, x: Tensor) -> Tensor:
    return evaluate(layer, x)[1].sum()


def test_learned_inverse_that_changes_before_the_log_det_or_the_backward_pass() -> None:
    layer, x = learned(KINDS["linear"], "both"), leaf(6, 5)
    y = layer(x)
    layer.refactorize()
    log_det = layer.log_abs_det_jacobian(x, y)
    found = torch.autograd.grad(log_det.sum(), list(layer.parameters())[1:], allow_unused=True)
    expected = all_gradients(layer, total_log_det, leaf(6, 5))[2:]
    assert_same(list(found), expected, SAME)
    loss = both(layer, x)
    layer.refactorize()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_pass_of_a_learned_inverse_is_outside_autocast(kind: Kind) -> None:
    results = []
    for is_enabled in (False, True):
        layer, x = learned(kind, "both"), leaf(*kind.shape)
        loss = both(layer.float(), x.detach().float())
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            results.append(list(torch.autograd.grad(loss, [layer.theta, layer.log_det.theta])))
    assert_same(*results, tolerance=0.0)


class _Counter(TorchDispatchMode):
    """Counts operations by name, and their results that are new D × D buffers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.operations, self.buffers = dim, Counter(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        if isinstance(result, Tensor) and result.shape == (self.dim, self.dim):
            storages = {one.data_ptr() for one in args if isinstance(one, Tensor)}
            self.buffers += result.data_ptr() not in storages
        return result


@pytest.mark.parametrize(("mixture", "buffers"), [(0.5, 4), (0.0, 3)])
def test_step_of_a_learned_inverse_has_six_products(mixture: float, buffers: int) -> None:
    layer = linear(40, log_det="learned", mixture=mixture)
    with _Counter(40) as counter:
        both(layer, leaf(6, 40)).backward()
    assert counter.operations["addmm"] + counter.operations["mm"] == 6
    assert counter.buffers == buffers  # the gradients, and transposes of A and R


# --- Memory -------------------------------------------------------------------------------------


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("log_det", ["refined", "learned"])
@pytest.mark.parametrize("after", ["T(x)", "log-det", "backward", "create_graph", "again"])
def test_nothing_is_kept_by_a_cycle(kind: Kind, after: str, log_det: str) -> None:
    stack = Compose([kind.make(seed=seed, log_det=log_det) for seed in (0, 1)])
    with no_garbage_collector():
        x = leaf(*kind.shape)
        y = stack(x)
        total = y.square().sum()
        if after != "T(x)":
            total = total + stack.log_abs_det_jacobian(x, y).sum()
        if after == "backward":
            total.backward()
        elif after in ("create_graph", "again"):
            # In x alone: a parameter's .grad with a graph is a cycle of the user's own.
            (score,) = torch.autograd.grad(total, x, create_graph=True)
            if after == "again":
                score.square().sum().backward()
            del score
        watched = [weakref.ref(x), weakref.ref(y), weakref.ref(total)]
        stack.clear_cache()
        del x, y, total
        assert [reference() for reference in watched] == [None] * 3


def test_layer_that_goes_out_of_scope_takes_the_pair_along() -> None:
    with no_garbage_collector():
        layer, x = linear(5), leaf(6, 5)
        log_det, watched = evaluate(layer, x)[1], weakref.ref(x)
        del layer, x
        log_det.sum().backward()  # which does without the layer
        del log_det
        assert watched() is None


@pytest.mark.parametrize("make", [linear, conv])
def test_edit_before_a_second_order_backward_pass_raises(make: Callable[..., Transform]) -> None:
    layer = make(2, log_det="exact")
    x = torch.randn(3, *((2,) if make is linear else (2, 4, 4)))
    log_det = layer.log_abs_det_jacobian(x, layer(x)).sum()
    with torch.no_grad():
        layer.theta.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(log_det, layer.theta, create_graph=True)

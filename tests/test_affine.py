"""The fused node of the affine map and its log-determinant, against the same layer unfused."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from pyro_snf import Compose, SelfNormalizingLinear
from pyro_snf.dense import affine as affine_module
from pyro_snf.dense import near_identity
from tests.registry import linear, make_inverse_exact, nudge_inverses, randomize

# Float64, R exact, condition below 3: what is left is rounding.
EXACT = 1e-9
# A few roundings of sums over 5 features and 6 rows.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}

Loss = Callable[[SelfNormalizingLinear, Tensor], Tensor]


def evaluate(layer: SelfNormalizingLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    y = layer(x)
    return y, layer.log_abs_det_jacobian(x, y)


def both(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    y, log_det = evaluate(layer, x)
    return y.square().sum() - (torch.linspace(-1, 2, log_det.numel()) * log_det.flatten()).sum()


def map_alone(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    return evaluate(layer, x)[0].square().sum()


def log_det_alone(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    return evaluate(layer, x)[1].square().sum()


def each_twice(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    y, log_det = evaluate(layer, x)
    again = layer.log_abs_det_jacobian(x, y)
    return (y.exp() * layer(x)).sum() + 0.3 * log_det.sum() - 2 * again.square().sum()


def particles(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    return sum((both(layer, factor * x) for factor in (1.0, -0.5, 2.0)), torch.zeros(()))


def tied(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    """The layer after itself: its input depends on its own parameters."""
    middle = layer(x)
    log_det = layer.log_abs_det_jacobian(x, middle)
    return layer(middle).square().sum() + both(layer, middle) + log_det.sum()


def written_to(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    y, log_det = evaluate(layer, x)
    return y.mul_(2).add_(1).square().sum() - log_det.sum()


LOSSES = [both, map_alone, log_det_alone, each_twice, particles, tied, written_to]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def leaf(*shape: int, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).requires_grad_(requires_grad)


def gradients(
    layer: SelfNormalizingLinear, loss: Loss, x: Tensor, **options: bool
) -> list[Tensor | None]:
    """Those in x and the parameters, None where there is none."""
    names = ("theta", "log_scale", "bias")
    inputs = [x, *[getattr(layer, name) for name in names]]
    asked = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return list(torch.autograd.grad(loss(layer, x), asked, allow_unused=True, **options))


def assert_same(
    actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float = EXACT
) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).norm() <= tolerance * (1 + theirs.norm())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that the fused node was given."""
    shapes: list[torch.Size] = []

    def spy(rows: Tensor, *rest: Tensor | None) -> object:
        shapes.append(rows.shape)
        return affine_module.affine(rows, *rest)

    monkeypatch.setattr("pyro_snf.transforms.linear.affine", spy)
    return shapes


# --- First derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("oracle", ["no cache", "exact"])
@pytest.mark.parametrize("bias", [True, False])
@EVERY_LOSS
def test_gradient_is_that_of_plain_operations(
    loss: Loss, bias: bool, oracle: str, create_graph: bool, calls: list[torch.Size]
) -> None:
    layer = linear(5, bias=bias)
    if oracle == "exact":
        plain = linear(5, bias=bias, log_det="exact")
    else:
        plain = copy.deepcopy(layer).with_cache(0)
    actual, expected = (
        gradients(module, loss, leaf(6, 5), create_graph=create_graph) for module in (layer, plain)
    )
    assert calls
    assert_same(actual, expected)


@EVERY_LOSS
def test_gradient_of_a_wrong_inverse_is_the_same_surrogate(loss: Loss) -> None:
    # What the node adds is R as it is, at whatever error: no gradient is lost by R being exact.
    layer = linear(5)
    layer.estimator.tolerance = 0.99
    nudge_inverses(layer, 0.05)
    plain = copy.deepcopy(layer).with_cache(0)
    assert_same(*[gradients(module, loss, leaf(6, 5)) for module in (layer, plain)])


@pytest.mark.parametrize("frozen", ["x", "log_scale", "bias", "x log_scale bias"])
@EVERY_LOSS
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(loss: Loss, frozen: str) -> None:
    results = []
    for module in (linear(5), linear(5, log_det="exact")):
        for name in set(frozen.split()) - {"x"}:
            getattr(module, name).requires_grad_(False)
        results.append(gradients(module, loss, leaf(6, 5, requires_grad="x" not in frozen)))
    assert_same(*results)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 1, 5), (2, 3, 5), (1, 1, 1, 5)])
def test_shapes(shape: tuple[int, ...], calls: list[torch.Size]) -> None:
    results = []
    for module in (linear(5), linear(5, log_det="exact")):
        y, log_det = evaluate(module, leaf(*shape))
        assert (y.shape, log_det.shape) == (shape, shape[:-1])
        results.append(gradients(module, both, leaf(*shape)))
    assert set(calls) == {(math.prod(shape[:-1]), 5)}
    assert_same(*results)


def test_strided_input() -> None:
    results = []
    for module in (linear(5), linear(5, log_det="exact")):
        x = leaf(5, 4, 3)
        results.append(torch.autograd.grad(both(module, x.permute(1, 2, 0)), [x, module.theta]))
    assert_same(*map(list, results))


def test_gradient_in_x_alone() -> None:
    for loss in (both, map_alone):
        found = []
        for module in (linear(5), linear(5, log_det="exact")):
            x = leaf(6, 5)
            found.append(list(torch.autograd.grad(loss(module, x), x)))
        assert_same(*found)
    layer, x = linear(5), leaf(6, 5)
    assert torch.autograd.grad(log_det_alone(layer, x), x, allow_unused=True) == (None,)


def test_log_det_of_the_second_of_two_layers_is_no_affair_of_the_first() -> None:
    for create_graph in (False, True):
        first, second = linear(5), linear(5, seed=1)
        middle = first(leaf(6, 5))
        loss = log_det_alone(second, middle)
        inputs = [first.theta, second.theta]
        found = torch.autograd.grad(loss, inputs, allow_unused=True, create_graph=create_graph)
        assert found[0] is None
        assert found[1] is not None


# --- More than one backward pass ----------------------------------------------------------------


@EVERY_LOSS
def test_two_backward_passes_through_one_graph(loss: Loss) -> None:
    layer = linear(5)
    once = gradients(layer, loss, leaf(6, 5))
    x = leaf(6, 5)
    total = loss(layer, x)
    for retain_graph in (True, False):
        total.backward(retain_graph=retain_graph)
    twice = [x.grad, layer.theta.grad, layer.log_scale.grad, layer.bias.grad]
    assert_same(twice, [None if gradient is None else 2 * gradient for gradient in once])


@EVERY_LOSS
def test_same_input_again_after_a_backward_pass(loss: Loss) -> None:
    # Gradients accumulated over two passes before a step. The pair's graph is used up by the
    # first, also where that reached it through the log-determinant alone.
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    once = gradients(layer, loss, leaf(6, 5))[1:]
    for _ in range(2):
        loss(layer, x).backward()
    parameters = [layer.theta, layer.log_scale, layer.bias]
    twice = [parameter.grad for parameter in parameters]
    assert_same(twice, [None if gradient is None else 2 * gradient for gradient in once])


def test_map_and_log_det_in_backward_passes_of_their_own() -> None:
    # One node: autograd wants retain_graph, and then nothing is counted twice.
    layer = linear(5)
    expected = gradients(layer, both, leaf(6, 5))
    for order in (0, 1):
        layer.zero_grad()
        x = leaf(6, 5)
        y, log_det = evaluate(layer, x)
        parts = [y.square().sum(), -(torch.linspace(-1, 2, 6) * log_det).sum()]
        parts[order].backward(retain_graph=True)
        parts[1 - order].backward()
        assert_same([x.grad, layer.theta.grad, layer.log_scale.grad, layer.bias.grad], expected)


# --- Second derivatives -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [map_alone, tied], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives_of_the_map(bias: bool, loss: Loss) -> None:
    def map_of_map(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
        return layer(layer(x)).pow(3).sum()

    results = []
    for module in (linear(5, bias=bias), linear(5, bias=bias, log_det="exact")):
        x = leaf(6, 5)
        function = map_of_map if loss is tied else loss
        first = gradients(module, function, x, create_graph=True)
        penalty = sum((gradient.square().sum() for gradient in first), torch.zeros(()))
        inputs = [x, *[p for p in module.parameters() if p.requires_grad]]
        results.append(list(torch.autograd.grad(penalty, inputs, allow_unused=True)))
    assert_same(*results)


def test_second_derivatives_of_the_map_beside_a_log_det() -> None:
    # A gradient penalty on x next to a likelihood: the surrogate is only differentiated once.
    results = []
    for module in (linear(5), linear(5, log_det="exact")):
        x = leaf(6, 5)
        y, log_det = evaluate(module, x)
        (score,) = torch.autograd.grad(y.pow(3).sum() - log_det.sum(), x, create_graph=True)
        (score.square().sum() - log_det.sum()).backward()
        results.append([x.grad, module.theta.grad, module.log_scale.grad])
    assert_same(*results)


def test_second_derivative_of_the_log_det_is_refused() -> None:
    layer = linear(5)
    (first,) = gradients(layer, log_det_alone, leaf(6, 5), create_graph=True)[1:2]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), layer.theta)


def test_gradient_in_the_scale_is_differentiable_through_its_cotangent() -> None:
    # It is the cotangent, a function of log|det W|, whose first derivative is all that it takes.
    results = []
    for module in (linear(5), linear(5, log_det="exact")):
        first = gradients(module, log_det_alone, leaf(6, 5), create_graph=True)[2]
        results.append(list(torch.autograd.grad(first.square().sum(), module.theta)))
    assert_same(*results)


# --- The parameters change between T(x) and its log-determinant ---------------------------------


def exact_value(theta: Tensor, log_scale: Tensor) -> float:
    theta, log_scale = theta.detach(), log_scale.detach()
    return (near_identity.log_abs_det(theta) + log_scale.sum()).item()


def slow_steps(layer: SelfNormalizingLinear, steps: int) -> None:
    """After which nothing is looked at for a while."""
    for step in range(steps):
        with torch.no_grad():
            layer.theta.mul_(1 + 1e-5)
        evaluate(layer, (1.0 + step) * leaf(6, 5))


EDITS: dict[str, Callable[[SelfNormalizingLinear], None]] = {
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
    layer = linear(5)
    slow_steps(layer, steps)
    x = leaf(6, 5, requires_grad=False)
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
        return
    assert layer.theta.grad is not None
    expected = torch.linalg.inv(near_identity.matrix(thetas[found].detach())).mT / math.sqrt(5)
    assert (layer.theta.grad - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("edit", ["in place"])
def test_edit_that_is_undone_leaves_nothing_behind(edit: str) -> None:
    # An average of the weights that is swapped in and out again.
    layer = linear(5)
    old, expected = layer.theta.detach().clone(), exact_value(layer.theta, layer.log_scale)
    x = leaf(6, 5)
    y = layer(x)
    with torch.no_grad():
        EDITS[edit](layer)
    layer.log_abs_det_jacobian(x, y)
    layer.theta.data.copy_(old)
    _, log_det = evaluate(layer, x.detach().clone())
    assert log_det[0].item() == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("how", ["refresh", "overwritten", "later steps", "state dict"])
def test_inverse_that_changes_before_the_backward_pass_is_an_error(how: str) -> None:
    layer = linear(5)
    log_det = log_det_alone(layer, leaf(6, 5))
    if how == "later steps":
        layer.theta.data.mul_(1.9)  # past the version counters, as Pyro's optimizers write
        evaluate(layer, leaf(4, 5))
    with torch.no_grad():
        if how == "refresh":
            layer.refresh()
        elif how == "overwritten":
            layer.estimator.inverse_t.mul_(1.1)
        elif how == "state dict":
            layer.estimator.load_state_dict(linear(5, seed=1).estimator.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_det.backward()


def test_map_alone_does_not_mind_that_the_inverse_has_changed() -> None:
    layer = linear(5)
    expected = gradients(layer, map_alone, leaf(6, 5))
    x = leaf(6, 5)
    total = map_alone(layer, x)
    layer.refresh()
    total.backward()
    assert_same([x.grad, layer.theta.grad, layer.log_scale.grad, layer.bias.grad], expected)


# --- Other parameters, other objects ------------------------------------------------------------


class LogDet(nn.Module):
    def __init__(self, layer: SelfNormalizingLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer.log_abs_det_jacobian(x, y)


def other_parameters(layer: SelfNormalizingLinear, factor: float) -> dict[str, Tensor]:
    """As of an inner loop of meta-learning; as copies, of the same contents and version."""
    return {
        name: (factor * parameter.detach()).requires_grad_()
        for name, parameter in layer.named_parameters()
    }


@pytest.mark.parametrize("factor", [1.0, 1.5], ids=["copies", "others"])
def test_map_of_other_parameters_has_their_gradient(factor: float) -> None:
    layer, x = SelfNormalizingLinear(5), leaf(6, 5, requires_grad=False)
    layer.theta = nn.Parameter(linear(5).theta.detach().clone())
    layer(x)
    others = other_parameters(layer, factor)
    found = functional_call(layer, others, (x,))
    expected = x + x @ others["theta"].mT / math.sqrt(5)
    results = [
        list(torch.autograd.grad(y.square().sum(), others["theta"], allow_unused=True))
        for y in (found, expected)
    ]
    assert_same(*results)


@pytest.mark.parametrize("factor", [1.0, 1.5], ids=["copies", "others"])
def test_log_det_of_other_parameters_has_their_gradient(factor: float) -> None:
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    y = layer(x)
    others = other_parameters(layer, factor)
    parameters = {f"layer.{name}": other for name, other in others.items()}
    log_det = functional_call(LogDet(layer), parameters, (x, y))
    expected = near_identity.log_abs_det(others["theta"]) + others["log_scale"].sum()
    assert log_det[0].item() == pytest.approx(expected.item(), abs=EXACT)
    results = [
        list(torch.autograd.grad(value.mean(), others["theta"], allow_unused=True))
        for value in (log_det, expected)
    ]
    assert_same(*results)


@pytest.mark.parametrize("how", ["deepcopy", "twin", "clones", "stack"])
def test_pair_of_another_object_is_scored_all_the_same(how: str) -> None:
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    y = layer(x)
    scorer, other = layer, (x, y)
    if how == "deepcopy":
        scorer = copy.deepcopy(layer)
    elif how == "twin":
        scorer = layer.with_cache(0)
    elif how == "clones":
        other = (x.clone(), y.detach().clone())
    else:
        scorer = Compose([layer])
    scorer.log_abs_det_jacobian(*other).sum().backward()
    expected = gradients(linear(5, log_det="exact"), lambda m, x: evaluate(m, x)[1].sum(), x)
    target = scorer if how == "deepcopy" else layer
    assert_same([target.theta.grad, target.log_scale.grad], expected[:2])


# --- What else autograd and torch can do --------------------------------------------------------


# What torch itself warns of where it compiles a derivative, or is asked for a trace.
DEPRECATED = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


@contextmanager
def dual(x: Tensor, tangent: Tensor) -> Iterator[Tensor]:
    with forward_ad.dual_level():
        yield forward_ad.make_dual(x, tangent)


@DEPRECATED
def test_functional_transforms_in_training_mode(calls: list[torch.Size]) -> None:
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    weight = layer.weight.detach()
    single = torch.func.grad(lambda x: layer(x).sum())
    assert_same([torch.func.vmap(single)(x)], [weight.sum(0).expand(6, 5)])
    assert_same([torch.func.jacrev(layer)(x[0]), torch.func.jacfwd(layer)(x[0])], [weight] * 2)
    assert_same(
        [torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]], [weight.sum(1).expand(6, 5)]
    )
    parameters = dict(layer.named_parameters())

    def total(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(total)(parameters)
    expected = gradients(linear(5), map_alone, x)
    assert not calls[:-1]  # none of these went through the node
    assert_same([found[name] for name in ("theta", "log_scale", "bias")], expected)


@DEPRECATED
def test_forward_mode(calls: list[torch.Size]) -> None:
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    with dual(x, torch.ones_like(x)) as x_dual:
        tangent = forward_ad.unpack_dual(layer(x_dual)).tangent
    assert_same([tangent], [layer.weight.detach().sum(1).expand(6, 5)])
    assert not calls


@DEPRECATED
def test_trace(calls: list[torch.Size]) -> None:
    layer, x = linear(5).requires_grad_(False), leaf(6, 5, requires_grad=False)
    theta = layer.theta.detach().clone().requires_grad_()

    def function(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        layer._parameters["theta"] = theta  # a trace takes it for a constant if it is no argument
        return evaluate(layer, x)

    traced = torch.jit.trace(function, (x, theta))
    assert not calls
    for factor in (1, 2):
        assert_same(list(traced(factor * x, theta)), list(evaluate(linear(5), factor * x)))


@pytest.mark.parametrize("rows", [1, 6])
def test_batched_backward_pass(rows: int) -> None:
    # What torch.autograd.functional.jacobian(vectorize=True) does.
    results = []
    for module in (linear(5), linear(5, log_det="exact")):
        x = leaf(rows, 5)
        y, log_det = evaluate(module, x)
        outputs = torch.cat([y.flatten(), log_det, y[0] * log_det[0]])
        inputs = [x, module.theta, module.log_scale, module.bias]
        eye = torch.eye(len(outputs))
        results.append(list(torch.autograd.grad(outputs, inputs, eye, is_grads_batched=True)))
    assert_same(*results)


def test_inference_mode_before_and_after() -> None:
    layer, x = linear(5), leaf(6, 5, requires_grad=False)
    expected = gradients(linear(5), both, x)
    with torch.inference_mode():
        y = layer(x)
        layer.refresh()
    layer.log_abs_det_jacobian(x, y)
    assert_same(gradients(layer, both, x), expected)
    with torch.inference_mode():
        inside = both(layer, x)
    assert inside.item() == pytest.approx(both(layer, x).item(), rel=EXACT)


@pytest.mark.parametrize("where", ["both", "T(x)", "log-det"])
def test_autocast(where: str, calls: list[torch.Size]) -> None:
    def total(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "log-det"):
            y = layer(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "T(x)"):
            log_det = layer.log_abs_det_jacobian(x, y)
        assert log_det.dtype == torch.float32
        return y.float().square().sum() - log_det.sum()

    x = leaf(6, 5).detach().float()
    results = [
        gradients(module.float(), total, x) for module in (linear(5), linear(5, log_det="exact"))
    ]
    assert bool(calls) == (where == "log-det")
    assert_same(*results, ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_other_types(dtype: torch.dtype, calls: list[torch.Size]) -> None:
    layer = linear(5).to(dtype)
    exact = linear(5, log_det="exact")
    exact.load_state_dict(
        {name: value for name, value in layer.state_dict().items() if "estimator" not in name}
    )
    make_inverse_exact(layer)
    x = leaf(6, 5).detach().to(dtype)

    def total(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
        y, log_det = evaluate(layer, x)
        return y.double().square().sum() - log_det.double().sum()

    actual, expected = gradients(layer, total, x), gradients(exact, total, x.double())
    assert calls
    assert [gradient.dtype for gradient in actual] == [dtype] * 3
    assert_same([gradient.double() for gradient in actual], expected, ROUNDING[dtype])


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after", ["T(x)", "log-det", "backward", "create_graph", "double backward"]
)
def test_nothing_is_kept_by_a_cycle(after: str) -> None:
    stack = Compose([SelfNormalizingLinear(5), SelfNormalizingLinear(5)])
    randomize(stack)
    gc.collect()
    gc.disable()
    try:
        x = leaf(6, 5)
        y = stack(x)
        total = y.square().sum()
        if after != "T(x)":
            total = total + stack.log_abs_det_jacobian(x, y).sum()
        if after == "backward":
            total.backward()
        elif after in ("create_graph", "double backward"):
            # In x alone: a parameter's .grad with a graph is a cycle of the user's own.
            (score,) = torch.autograd.grad(total, x, create_graph=True)
            if after == "double backward":
                score.square().sum().backward()
            del score
        watched = [weakref.ref(x), weakref.ref(y), weakref.ref(total)]
        stack.clear_cache()
        for part in stack.parts:
            part.clear_cache()
        del x, y, total
        assert [reference() for reference in watched] == [None] * 3
    finally:
        gc.enable()


def test_backward_pass_leaves_nothing_but_y() -> None:
    # A y that is kept, for a plot say, is not to keep the other intermediate results.
    layer, x = linear(5), leaf(6, 5)
    y, log_det = evaluate(layer, x)
    node = y.grad_fn if y._base is None else y._base.grad_fn
    (y.sum() + log_det.sum()).backward()
    kept = [value for value in vars(node).values() if isinstance(value, Tensor)]
    assert all(value.dim() < 2 for value in kept)


def test_layer_that_goes_out_of_scope_takes_the_pair_along() -> None:
    gc.collect()
    gc.disable()
    try:
        layer, x = linear(5), leaf(6, 5)
        _, log_det = evaluate(layer, x)
        watched = weakref.ref(x)
        del layer, x
        assert watched() is not None  # the graph of the log-det
        log_det.sum().backward()  # which does without the layer
        del log_det, _
        assert watched() is None
    finally:
        gc.enable()

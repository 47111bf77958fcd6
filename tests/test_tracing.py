"""Under torch.compile, torch.export, torch.func.vmap and activation checkpointing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.func import functional_call, grad, jacfwd, jacrev, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from pyro_snf import Compose, SelfNormalizingPair, SmoothLeakyReLU
from tests.registry import (
    CASES,
    Case,
    batch,
    conv,
    free_form,
    linear,
    output_batch,
)

# The same numbers in another order of operations, in float64.
ROUNDING = 1e-9

DIRECTION = pytest.mark.parametrize("direction", ["T", "T.inv"])

# Pyro's own spline finds its bins by Boolean indices.
OWN = {name: case for name, case in CASES.items() if "Pyro" not in name}


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


def in_direction(case: Case, direction: str) -> tuple[Transform, Tensor]:
    transform = case.make()
    if direction == "T":
        return transform, batch(case, (3,))
    return transform.inv, output_batch(case, (3,))


def value_and_log_det(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


class Module(nn.Module):
    """A module whose call is T(x) and its log-determinant."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_log_det(self.transform, x)


def has_pair(transform: nn.Module) -> bool:
    return any(isinstance(part, SelfNormalizingPair) for part in transform.modules())


# --- Activation checkpointing -------------------------------------------------------------------


def train(transform: Transform, x: Tensor, *, reentrant: bool | None) -> list[Tensor]:
    """The losses of some steps, and the parameters and the input's gradient after them."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_log_det(transform, 1.0 * x)

    parameters = list(transform.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2) if parameters else None
    losses = []
    for _ in range(3):
        x = x.detach().requires_grad_()
        if reentrant is None:
            y, log_det = evaluate(x)
        else:
            y, log_det = checkpoint(evaluate, x, use_reentrant=reentrant)
        loss = y.square().sum() / 2 - log_det.sum()
        losses.append(loss.detach())
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        if optimizer is not None:
            optimizer.step()
    assert x.grad is not None
    return [*losses, x.grad, *(parameter.detach() for parameter in parameters)]


@DIRECTION
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_checkpointed_training_is_the_plain_one(case: Case, direction: str) -> None:
    expected = train(*in_direction(case, direction), reentrant=None)
    close(train(*in_direction(case, direction), reentrant=False), expected)


@pytest.mark.parametrize("make", [linear, conv, free_form])
def test_reentrant_checkpoint_has_the_gradient_of_training(make: Callable) -> None:
    # Its forward pass is one without gradients, so that values are exact.
    transform, other = make(log_det="exact"), make(log_det="exact")
    x = torch.randn(2, *transform.event_shape) if transform.event_shape else torch.randn(2, 2, 3, 4)
    expected, found = train(transform, x, reentrant=None), train(other, x, reentrant=True)
    close(found, expected)


def test_pair_from_before_the_checkpoint_is_not_used_within() -> None:
    layer, x = linear(4), torch.randn(3, 4, requires_grad=True)
    y = layer(x)
    value = checkpoint(
        lambda x, y: layer.log_abs_det_jacobian(x, y).sum(), x, y, use_reentrant=False
    )
    value.backward()
    assert layer.theta.grad is not None


# --- torch.func ---------------------------------------------------------------------------------


@DIRECTION
@pytest.mark.parametrize("case", OWN.values(), ids=OWN.keys())
def test_vmap(case: Case, direction: str) -> None:
    # In training too, log-determinants are exact within, as in eval().
    transform, inputs = in_direction(case, direction)
    evaluate = vmap(partial(value_and_log_det, transform))
    if has_pair(transform):
        with pytest.raises(RuntimeError, match="cannot record the derivatives of a network"):
            evaluate(inputs)
        return
    y, log_det = evaluate(inputs)
    transform.eval()
    close((y, log_det), value_and_log_det(transform, inputs))


@DIRECTION
@pytest.mark.parametrize("case", OWN.values(), ids=OWN.keys())
def test_gradients_of_functional_transforms(case: Case, direction: str) -> None:
    transform, inputs = in_direction(case, direction)
    x = inputs[0]

    def log_det(x: Tensor) -> Tensor:
        return value_and_log_det(transform, x)[1].sum()

    inverts = direction == "T.inv" or "inverse of" in str(case)
    if has_pair(transform) and inverts and not str(transform).count("one_pass"):
        with pytest.raises(RuntimeError, match="cannot record the derivatives of a network"):
            jacrev(transform)(x)
        return
    expected = torch.autograd.functional.jacobian(transform, x)
    close(jacrev(transform)(x), expected)
    transform.eval()  # exact, as log-determinants are within
    _, gradient = torch.autograd.functional.vjp(log_det, x)
    transform.train()
    if not has_pair(transform):  # whose gradients in training are random
        close(grad(log_det)(x), gradient)


@pytest.mark.parametrize("make", [linear, conv])
def test_functional_call_leaves_no_trace(make: Callable) -> None:
    # Gradients in the parameters, far from those that the state belongs to.
    layer = make()
    x = torch.randn(3, *(layer.event_shape or (2, 3, 4)))
    value_and_log_det(layer, x)  # makes a state
    state = copy.deepcopy(layer.state_dict())
    theta = layer.theta.detach() + 0.2 * torch.randn_like(layer.theta)

    def log_det(theta: Tensor) -> Tensor:
        return functional_call(Module(layer), {"transform.theta": theta}, (x,))[1].sum()

    gradient = grad(log_det)(theta)
    close(dict(layer.state_dict()), dict(state))
    with torch.no_grad():
        layer.theta.copy_(theta)
    layer.eval()
    (expected,) = torch.autograd.grad(value_and_log_det(layer, x)[1].sum(), layer.theta)
    close(gradient, expected)


def test_vmap_over_parameters() -> None:
    layers = [linear(3, seed=seed).eval() for seed in range(4)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(4, 2, 3)

    class LogProb(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(layers[0])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y, log_det = value_and_log_det(self.layer, x)
            return y, log_det, self.layer.inv(x)

    def evaluate(parameters: dict, buffers: dict, x: Tensor) -> tuple[Tensor, ...]:
        named = {f"layer.{name}": one for name, one in (parameters | buffers).items()}
        return functional_call(module, named, (x,))

    module = LogProb()
    found = vmap(evaluate)(parameters, buffers, x)
    expected = [
        (*value_and_log_det(layer, x[i]), layer.inv(x[i])) for i, layer in enumerate(layers)
    ]
    close(found, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of jacfwd
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("make", [linear, conv])
def test_jacobians_of_functional_transforms(make: Callable, transform: Callable) -> None:
    layer = make().eval()
    shape = layer.event_shape or (2, 3, 4)
    x = torch.randn(shape)
    jacobian = transform(layer)(x).reshape(math.prod(shape), -1)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    close(layer.log_abs_det_jacobian(x, layer(x)), expected)


# --- torch.compile and torch.export -------------------------------------------------------------

# Compilation takes seconds: one of a kind.
TRAINED = [
    *("linear refined", "linear learned GECO", "conv refined", "conv refined 1×1", "conv exact"),
    *("free form refined", "actnorm of images", "autoregressive", "image coupling"),
]
EVALUATED = ["linear refined", "conv refined", "actnorm of features", "autoregressive"]


def loss_of(transform: Transform, x: Tensor) -> Tensor:
    y, log_det = value_and_log_det(transform, x)
    return y.square().sum() / 2 - log_det.sum()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # 3.13.0
# torch looks at the .grad of what passes from graph to graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", TRAINED)
def test_compiled_training_is_the_plain_one(name: str) -> None:
    numbers = []
    for compiles in (False, True):
        torch._dynamo.reset()
        transform, x = in_direction(CASES[name], "T")
        loss = partial(loss_of, transform)
        if compiles:
            loss = torch.compile(loss, backend="aot_eager")
        optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
        numbers.append([])
        for _ in range(3):
            value = loss(x)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            numbers[-1].append(value.detach())
        # The state is in order, so that training can go on without the compiler.
        numbers[-1] += [loss_of(transform, x).detach(), *transform.state_dict().values()]
    close(*numbers)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # 3.13.0
@DIRECTION
@pytest.mark.parametrize("name", EVALUATED)
def test_compiled_evaluation_is_one_graph(name: str, direction: str) -> None:
    torch._dynamo.reset()
    transform, x = in_direction(CASES[name], direction)
    transform.eval()
    compiled = torch.compile(partial(loss_of, transform), backend="aot_eager", fullgraph=True)
    parameters = list(transform.parameters())
    value, expected = compiled(x), loss_of(transform, x)
    close(value, expected)
    close(torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters))


class LogProb(nn.Module):
    """The density model of a transform, for ``torch.export``, which cannot validate values."""

    def __init__(self, transform: Transform, dim: int) -> None:
        super().__init__()
        self.transform = transform
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        base = dist.Normal(x.new_zeros(self.dim), 1.0, validate_args=False).to_event(1)
        density = dist.TransformedDistribution(base, [self.transform.inv], validate_args=False)
        return density.log_prob(x)


def test_exported_density() -> None:
    flow = Compose([linear(3), SmoothLeakyReLU(0.3, learnable=True), linear(3, seed=1)]).eval()
    model, x = LogProb(flow, 3), torch.randn(4, 3)
    exported = torch.export.export(model, (x,)).module()
    for scale in (1.0, 3.0):
        close(exported(scale * x), model(scale * x))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", TRAINED)
def test_exported_transform(name: str, mode: str) -> None:
    # Log-determinants are exact, as in eval().
    transform, x = in_direction(CASES[name], "T")

    module = Module(transform).train(mode == "train")
    if has_pair(transform):
        with pytest.raises(RuntimeError, match="cannot record the derivatives of a network"):
            torch.export.export(module, (x,))
        return
    exported = torch.export.export(module, (x,)).module()
    module.eval()
    close(exported(2 * x), module(2 * x))

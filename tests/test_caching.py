"""What is remembered, and how it dies: values, pairs, and the memory that they hold."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from torch import Tensor, nn

from pyro_snf import Compose, SelfNormalizingLinear, SmoothLeakyReLU
from pyro_snf.caching import PairCache, ParameterCache, TensorState
from pyro_snf.transforms.base import InvertibleTransformModule
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform
from tests.registry import LOG_DETS, conv, density_loss, linear, nudge_inverses, randomize

# A remembered value against one computed anew: the same operations in the same order.
SAME = 1e-12

# Four vectors, or four images of one channel and one row.
X = torch.randn(4, 1, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def relu() -> SmoothLeakyReLU:
    return SmoothLeakyReLU(0.3, learnable=True)


def stack() -> Compose:
    transform = Compose([SelfNormalizingLinear(3), relu(), SelfNormalizingLinear(3)])
    randomize(transform)
    return transform


TRANSFORMS: dict[str, Callable[[], InvertibleTransformModule | Compose]] = {
    "linear refined": lambda: linear(3),
    "linear learned": lambda: linear(3, log_det="learned"),
    "linear exact": lambda: linear(3, log_det="exact"),
    "conv refined": lambda: conv(1, kernel_size=(1, 3)),
    "conv learned": lambda: conv(1, kernel_size=(1, 3), log_det="learned"),
    "conv exact": lambda: conv(1, kernel_size=(1, 3), log_det="exact"),
    "smooth leaky relu": relu,
    "stack": stack,
}


#: Layers with options, for :data:`X`.
LAYERS: dict[str, Callable[..., SelfNormalizingTransform]] = {
    "linear": partial(linear, 3),
    "conv": partial(conv, 1, kernel_size=(1, 3)),
}


@pytest.fixture(params=TRANSFORMS)
def transform(request: pytest.FixtureRequest) -> InvertibleTransformModule | Compose:
    return TRANSFORMS[request.param]()


def forward_parameters(transform: nn.Module) -> list[nn.Parameter]:
    """Those on which T(x) depends: not those of R."""
    return [p for name, p in transform.named_parameters() if "estimator" not in name]


# --- Pairs die when they stop being true --------------------------------------------------------


@torch.no_grad()
def add_in_place(parameter: Tensor) -> None:
    parameter.add_(0.1)


def add_to_data(parameter: Tensor) -> None:
    parameter.data.add_(0.1)


def replace_data(parameter: Tensor) -> None:
    parameter.data = parameter.data + 0.1


def step_adam(parameter: Tensor) -> None:
    parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam([parameter], lr=0.1).step()


def step_fused_adam(parameter: Tensor) -> None:
    parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam([parameter], lr=0.1, fused=True).step()


def step_clipped_adam(parameter: Tensor) -> None:
    parameter.grad = torch.ones_like(parameter)
    pyro.optim.clipped_adam.ClippedAdam([parameter], lr=0.1).step()


CHANGES = [add_in_place, add_to_data, replace_data, step_adam, step_fused_adam, step_clipped_adam]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_pair_dies_with_any_parameter(
    transform: InvertibleTransformModule | Compose, change: Callable[[Tensor], None]
) -> None:
    for parameter in forward_parameters(transform):
        for first in (transform, transform.inv):
            image = first(X)
            change(parameter)
            assert (first(X) - image).abs().max() > 1e-3
            x_again = first.inv(image)
            assert (x_again - X).abs().max() > 1e-3
            transform.clear_cache()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_exact_log_det_dies_with_any_parameter(
    transform: InvertibleTransformModule | Compose, change: Callable[[Tensor], None]
) -> None:
    transform.eval()
    for parameter in forward_parameters(transform):
        transform.log_abs_det_jacobian(X, transform(X))
        change(parameter)
        after = transform.log_abs_det_jacobian(X, transform(X))
        fresh = copy.deepcopy(transform)
        assert torch.equal(after, fresh.log_abs_det_jacobian(X, fresh(X)))


def test_small_change_of_data_is_noticed() -> None:
    # Late in training, ClippedAdam writes changes of this size past autograd's counter.
    for dtype, size in [(torch.float32, 1e-5), (torch.float64, 1e-12)]:
        matrix = torch.randn(50, 50, dtype=dtype)
        state = TensorState(matrix)
        assert state == TensorState(matrix)
        matrix.data[17, 31] += size
        assert state != TensorState(matrix)


@pytest.mark.parametrize("start", ["grad", "no_grad"])
def test_pair_dies_with_the_grad_mode(
    transform: InvertibleTransformModule | Compose, start: str
) -> None:
    with torch.set_grad_enabled(start == "grad"):
        y = transform(X)
    with torch.set_grad_enabled(start != "grad"):
        assert transform(X).requires_grad == (start != "grad")
        transform.clear_cache()
    with torch.set_grad_enabled(start == "grad"):
        y = transform(X)
    with torch.set_grad_enabled(start != "grad"):
        assert transform.inv(y) is not X


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_pair_dies_when_the_input_is_written_to(
    transform: InvertibleTransformModule | Compose, direction: str
) -> None:
    first = transform if direction == "T" else transform.inv
    x = X.clone()
    with torch.no_grad():
        first(x)
        x.add_(1.0)
        assert (first(x) - first(x.clone())).abs().max() < SAME


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_pair_dies_when_the_output_is_written_to(
    transform: InvertibleTransformModule | Compose, direction: str
) -> None:
    first = transform if direction == "T" else transform.inv
    with torch.no_grad():
        y = first(X)
        expected = y.clone()
        y.add_(1.0)
        assert (first(X) - expected).abs().max() < SAME
        assert first.inv(y) is not X


def test_pair_dies_when_the_input_is_to_have_a_gradient(
    transform: InvertibleTransformModule | Compose,
) -> None:
    # Samplers (HMC) evaluate a state first, and ask for its gradient after.
    x = X.clone()
    transform(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(transform(x).sum(), x)
    fresh = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(transform(fresh).sum(), fresh)
    assert torch.equal(gradient, expected)


def test_pair_dies_when_a_parameter_is_unfrozen(
    transform: InvertibleTransformModule | Compose,
) -> None:
    transform.requires_grad_(False)
    y = transform(X)
    assert not y.requires_grad
    transform.requires_grad_(True)
    assert transform(X).requires_grad
    transform(X).sum().backward()
    assert forward_parameters(transform)[0].grad.any()


def test_pair_dies_when_a_parameter_is_frozen(
    transform: InvertibleTransformModule | Compose,
) -> None:
    transform(X)
    transform.requires_grad_(False)
    assert not transform(X).requires_grad


def test_pair_dies_with_the_training_mode() -> None:
    # In training the mixture objective is in T's gradient; a pair from eval() lacks it.
    layer = linear(3, log_det="learned").eval()
    layer(X)
    layer.train()
    layer(X).sum().backward()
    assert layer.estimator.theta.grad is not None


def test_pair_dies_with_autocast() -> None:
    layer, x = linear(3).float(), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(layer(x), layer.with_cache(0)(x))


def test_change_of_data_is_noticed_under_autocast() -> None:
    # There a product is rounded to eight bits, unless one takes care.
    parameter = torch.randn(20, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = TensorState(parameter)
        assert state == TensorState(parameter)
        parameter.data[3, 4] += 1e-3
        assert state != TensorState(parameter)


@pytest.mark.parametrize("direction", ["T", "T.inv"])
def test_pair_whose_graph_is_used_up_is_made_anew(
    transform: InvertibleTransformModule | Compose, direction: str
) -> None:
    first = transform if direction == "T" else transform.inv
    gradients = []
    for _ in range(3):
        transform.zero_grad()
        first(X).square().sum().backward()
        gradients.append(forward_parameters(transform)[0].grad.clone())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_pair_survives_what_changes_nothing(
    transform: InvertibleTransformModule | Compose,
) -> None:
    y = transform(X)
    transform.zero_grad()
    transform.log_abs_det_jacobian(X, y)
    transform.state_dict()
    copy.deepcopy(transform)
    assert transform(X) is y
    assert transform.inv(y) is X


def test_only_the_last_pair_is_kept() -> None:
    layer = linear(3)
    y = layer(X)
    layer(X + 1)
    assert layer.inv(y) is not X


# --- Approximate inverses -----------------------------------------------------------------------


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_approximate_inverse_is_never_taken_for_the_truth(log_det: str) -> None:
    layer = linear(3, log_det=log_det, inverse="learned")
    nudge_inverses(layer, 0.3)
    x = layer.inv(X)
    expected = x @ layer.weight.mT + layer.bias
    assert (layer(x) - expected).abs().max() < SAME
    assert (layer(x) - X).abs().max() > 1e-3
    # The other way round T is exact, and a sample is scored at what it came from.
    y = layer(X)
    assert layer.inv(y) is X


@pytest.mark.parametrize("inverse", ["refined", "exact"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_exact_inverse_is_kept_however_bad_r_is(log_det: str, inverse: str) -> None:
    layer = linear(3, log_det=log_det, inverse=inverse)
    nudge_inverses(layer, 3.0)
    x = layer.inv(X)
    assert layer(x) is X
    assert (layer(x.clone()) - X).abs().max() < 1e-9


# --- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, pyro.optim.clipped_adam.ClippedAdam])
def test_full_batch_training_is_that_of_fresh_tensors(
    log_det: str, optimizer: type[torch.optim.Optimizer]
) -> None:
    losses = []
    for fresh in (False, True):
        layer = linear(3, log_det=log_det)
        updates = optimizer(layer.parameters(), lr=0.02)
        losses.append([])
        for _ in range(5):
            loss = density_loss(layer, X.clone() if fresh else X)
            losses[-1].append(loss.item())
            updates.zero_grad()
            loss.backward()
            updates.step()
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5


def test_evaluation_between_steps_follows_the_parameters() -> None:
    # The same test data under no_grad after each step: a stale pair would freeze the number.
    layer = linear(3)
    updates = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        loss = density_loss(layer, X + 1)
        updates.zero_grad()
        loss.backward()
        updates.step()
        with torch.no_grad():
            fresh = density_loss(layer, X.clone())
            assert (density_loss(layer, X) - fresh).abs() < SAME


def test_sampled_and_cloned_values_have_the_same_gradient() -> None:
    # The path through a remembered x and the one through the inverse must agree.
    layer = linear(3)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [layer])
    y = flow.sample((5,))
    gradients = []
    for value in (y, y.clone()):
        (gradient,) = torch.autograd.grad(flow.log_prob(value).sum(), layer.theta)
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-9


# --- with_cache ---------------------------------------------------------------------------------


def test_cache_size_is_zero_or_one() -> None:
    layer = linear(3)
    assert layer.with_cache(1) is layer
    assert layer.with_cache() is layer
    for size in (2, -1):
        with pytest.raises(ValueError, match=f"expected cache_size 0 or 1; got {size}"):
            layer.with_cache(size)


def test_twins_have_caches_of_their_own() -> None:
    layer = linear(3)
    twin = layer.with_cache(0).with_cache(1)
    assert twin is not layer
    y = layer(X)
    assert twin(X) is not y
    assert layer(X) is y


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_twins_are_in_the_same_mode(log_det: str) -> None:
    layer = linear(3, log_det=log_det)
    nudge_inverses(layer, 0.3)
    twin = layer.with_cache(0)
    layer.eval()
    values = [part.log_abs_det_jacobian(X, part(X)) for part in (layer, twin)]
    assert torch.equal(values[0], values[1])


def test_stack_reaches_the_parts_whose_caches_it_turned_on() -> None:
    part = linear(3, log_det="learned").with_cache(0)
    layers = Compose([part, relu()], cache_size=1)
    layers.eval()
    assert all(not module.training for module in layers.parts)
    y = layers(X)
    assert layers(X) is y
    with torch.no_grad():
        expected = layers.log_abs_det_jacobian(X, y)
    assert torch.equal(layers.log_abs_det_jacobian(X, y), expected)


# --- The caches themselves ----------------------------------------------------------------------


def test_parameter_cache_computes_once_a_state() -> None:
    parameter, calls = nn.Parameter(torch.ones(2, 2)), []
    cache: ParameterCache[int] = ParameterCache()

    def compute() -> int:
        calls.append(1)
        return len(calls)

    assert [cache.get([parameter], compute) for _ in range(3)] == [1, 1, 1]
    add_to_data(parameter)
    assert [cache.get([parameter], compute) for _ in range(3)] == [2, 2, 2]
    cache.clear()
    assert cache.get([parameter], compute) == 3


def test_parameter_cache_keeps_nothing_of_a_failure() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    cache: ParameterCache[int] = ParameterCache()

    def fail() -> int:
        raise RuntimeError("no")

    cache.get([parameter], lambda: 1)
    add_in_place(parameter)
    with pytest.raises(RuntimeError, match="no"):
        cache.get([parameter], fail)
    assert cache.get([parameter], lambda: 2) == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.data.copy_(p.flip(0)),
        lambda p: p.data.copy_(p.flip(1)),
        lambda p: p.data.copy_(p.mT.clone()),
        lambda p: p.data.neg_(),
        lambda p: p.data.add_(torch.tensor([[0.1, -0.1], [0, 0]])),
        lambda p: p.data.add_(torch.tensor([[0.1, 0], [-0.1, 0]])),
        lambda p: setattr(p, "data", p.data.float()),
        lambda p: p.data.fill_(math.nan),
    ],
    ids=["rows", "columns", "transpose", "sign", "row sum", "column sum", "dtype", "NaN"],
)
def test_tensor_state_sees_edits_past_autograd(edit: Callable[[nn.Parameter], None]) -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    version = parameter._version
    state = TensorState(parameter)
    edit(parameter)
    assert parameter._version == version
    assert state != TensorState(parameter)


def test_tensor_state_of_nan_never_holds() -> None:
    parameter = nn.Parameter(torch.full((2, 2), math.nan))
    assert TensorState(parameter) != TensorState(parameter)


def test_tensor_state_in_half_precision() -> None:
    parameter = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    state = TensorState(parameter)
    assert state == TensorState(parameter)
    parameter.data[5, 6] = 1.0078125  # the next number: 2⁻⁷ in a row sum of 64
    assert state != TensorState(parameter)


def test_copies_of_caches_are_empty() -> None:
    cache: ParameterCache[int] = ParameterCache()
    cache.get([X], lambda: 1)
    pair = PairCache()
    y = X + 1
    pair.store(X, y, [], (), computed=y)
    for make_copy in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert make_copy(cache).get([X], lambda: 2) == 2
        assert make_copy(pair).y_of(X, [], ()) is None


def test_copy_of_a_layer_holds_no_tensors_of_old() -> None:
    layer = linear(200)
    small = len(pickle.dumps(layer))
    x = torch.randn(5000, 200)
    layer(x)
    with torch.no_grad():
        layer.log_abs_det_jacobian(x, x)
    assert len(pickle.dumps(layer)) < 1.01 * small


# --- inference_mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_training_after_inference_mode(log_det: str, kind: str) -> None:
    layer = LAYERS[kind](log_det=log_det)
    layer.log_abs_det_jacobian(X, layer(X))  # now there is something to refresh
    with torch.inference_mode():
        for mode in (False, True):
            layer.train(mode)
            layer.log_abs_det_jacobian(X, layer(X))
            layer.inv(X)
            _ = layer.inverse_weight((1, 3)) if kind == "conv" else layer.inverse_weight
            _ = layer.weight
            layer.refresh()
    for mode in (False, True):
        layer.train(mode).zero_grad()
        loss = layer.log_abs_det_jacobian(X, layer(X)).sum() + layer(X).sum() + layer.inv(X).sum()
        loss.backward()
        assert layer.theta.grad.any()


def test_pair_from_inference_mode_is_not_given_out_beyond_it() -> None:
    layer = linear(3)
    with torch.inference_mode():
        layer(X)
    with torch.no_grad():
        y = layer(X)
    assert not y.is_inference()
    (nn.Parameter(torch.ones(3)) * y).sum().backward()  # which an inference tensor refuses


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["refined", "exact", "learned"])
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_is_freed_with_its_last_reference(kind: str, log_det: str, inverse: str) -> None:
    # A remembered pair has a graph, and a graph must not hold the layer that remembers it.
    layer = LAYERS[kind](log_det=log_det, inverse=inverse)
    loss = density_loss(layer, X) + layer.inv(X).sum()
    loss.backward()
    layer.log_abs_det_jacobian(X, layer.inv(X))
    reference = weakref.ref(layer)
    del layer, loss
    gc.collect()
    assert reference() is None


def test_activation_is_freed_with_its_last_reference() -> None:
    activation = relu()
    activation.inv(X).sum().backward()
    activation(activation.inv(X))
    reference = weakref.ref(activation)
    del activation
    gc.collect()
    assert reference() is None


def test_cache_of_a_part_of_torch_is_behind_an_honest_one() -> None:
    # torch's own remembers a tensor by its identity, whatever has been written to it.
    flow = Compose([dist.transforms.ExpTransform()], cache_size=1)
    x = torch.ones(3)
    flow(x)
    x.zero_()
    assert torch.equal(flow(x), torch.ones(3))

"""What is remembered, and when it is dropped: values and pairs."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.utils import prune

from pyro_snf import Compose, MultiScale, SmoothLeakyReLU, Squeeze2d
from pyro_snf.caching import PairCache, StateCache, TensorState, state_of
from tests.registry import (
    LOG_DETS,
    Case,
    batch,
    density_loss,
    linear,
    nudge_inverses,
    one_of_a_kind,
    output_batch,
)

# A remembered value against one computed anew: the same operations in the same order.
SAME = 1e-12


# A case of every constructor and method that has parameters and this library's cache.
KINDS = one_of_a_kind(
    lambda case: not case.foreign and case.remembers_inverse and bool([*case.make().parameters()])
)
EVERY_KIND = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
DIRECTION = pytest.mark.parametrize("direction", ["T", "T.inv"])

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def forward_parameters(transform: nn.Module) -> list[nn.Parameter]:
    """Those on which T(x) depends: not those of R."""
    named = transform.named_parameters()
    return [one for name, one in named if "log_det." not in name and "inverse_net" not in name]


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=SAME, atol=SAME)


def in_direction(case: Case, direction: str) -> tuple[Transform, Transform, Tensor]:
    """The transform, itself or its inverse, and an input of the latter."""
    transform = case.make()
    if direction == "T":
        return transform, transform, batch(case)
    return transform, transform.inv, output_batch(case)


# --- When a pair is dropped ---------------------------------------------------------------------


def pattern(parameter: Tensor) -> Tensor:
    return torch.arange(parameter.numel()).cos().view_as(parameter)


@torch.no_grad()
def add_in_place(parameter: Tensor) -> None:
    parameter.add_(0.1 * pattern(parameter))


def add_to_data(parameter: Tensor) -> None:
    parameter.data.add_(0.1 * pattern(parameter))


def replace_data(parameter: Tensor) -> None:
    parameter.data = parameter.data + 0.1 * pattern(parameter)


def step(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[[Tensor], None]:
    def change(parameter: Tensor) -> None:
        parameter.grad = pattern(parameter)
        optimizer([parameter], lr=0.1, **options).step()

    change.__name__ = "_".join([optimizer.__name__, *options])
    return change


CHANGES = [
    *(add_in_place, add_to_data, replace_data),
    *(step(torch.optim.Adam), step(torch.optim.Adam, fused=True), step(ClippedAdam)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@EVERY_KIND
def test_nothing_outlives_a_change_of_a_parameter(
    case: Case, change: Callable[[Tensor], None]
) -> None:
    transform, x, y = case.make(), batch(case, (2,)), output_batch(case, (2,))
    for number, parameter in enumerate(forward_parameters(transform)[:3]):
        for mode in (True, False):
            transform.train(mode)
            image, preimage = transform(x), transform.inv(y)
            transform(x)
            transform.eval().log_abs_det_jacobian(x, image)
            transform.train(mode)
            with torch.set_grad_enabled(number % 2 == 0):
                change(parameter)
            fresh = copy.deepcopy(transform).eval()
            assert not torch.equal(transform(x), image)
            assert close(transform(x), fresh(x))
            assert close(transform.inv(image), fresh.inv(image))
            assert close(transform(preimage), fresh(preimage))
            value = transform.eval().log_abs_det_jacobian(x, image)
            assert close(value, fresh.log_abs_det_jacobian(x, image))


@pytest.mark.parametrize("start", ["grad", "no_grad"])
@DIRECTION
@EVERY_KIND
def test_pair_is_dropped_with_the_grad_mode(case: Case, direction: str, start: str) -> None:
    _, first, x = in_direction(case, direction)
    for use in (first, first.inv):
        with torch.set_grad_enabled(start == "grad"):
            y = first(x)
        with torch.set_grad_enabled(start != "grad"):
            if use is first:
                assert first(x).requires_grad == (start != "grad")
            else:
                assert first.inv(y) is not x


CONDITIONS: dict[str, Callable[[Transform, Tensor, Tensor], object]] = {
    "write to input": lambda transform, x, y: x.add_(0.3),
    "write to output": lambda transform, x, y: y.add_(0.3),
    # as samplers (HMC) do, after they have evaluated a state
    "ask for gradient": lambda transform, x, y: x.requires_grad_(),
    "freeze": lambda transform, x, y: transform.requires_grad_(False),
    "unfreeze": lambda transform, x, y: transform.requires_grad_(True),
}


@pytest.mark.parametrize("change", CONDITIONS)
@DIRECTION
@EVERY_KIND
def test_pair_is_dropped_when_it_would_be_another(case: Case, direction: str, change: str) -> None:
    transform, first, data = in_direction(case, direction)
    x = data.clone()
    transform.requires_grad_(change != "unfreeze")
    with torch.set_grad_enabled(not change.startswith("write")):
        y = first(x)
        CONDITIONS[change](transform, x, y)
        again = first(x)
        assert again is not y
        transform.clear_cache()
        expected = first(x)
        transform.clear_cache()
    assert close(again, expected)
    assert again.requires_grad == expected.requires_grad
    if again.requires_grad:
        inputs = [one for one in (x, *forward_parameters(transform)) if one.requires_grad]
        for one in (again, expected):
            one.square().sum().backward()
        assert any(one.grad.any() for one in inputs if one.grad is not None)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "one entry": lambda tensor: tensor.data.view(-1)[0].add_(1e-6),
    "through NumPy": lambda tensor: np.multiply(view := tensor.detach().numpy(), 0.7, out=view),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", ["train", "inference_mode"])
@pytest.mark.parametrize("direction", ["T", "T.inv"])
@EVERY_KIND
def test_nothing_outlives_the_contents_of_a_reused_buffer(
    case: Case, direction: str, mode: str, write: str
) -> None:
    # A batch that is read into the same memory has the same tensor, and the same version of it.
    transform, use, data = in_direction(case, direction)
    transform.train(mode == "train")
    fresh = copy.deepcopy(transform).with_cache(0)
    fresh = fresh if direction == "T" else fresh.inv
    with torch.inference_mode(mode == "inference_mode"):
        for which in ("input", "output"):
            x = data.clone()
            y = use(x)
            use.log_abs_det_jacobian(x, y)
            WRITES[write](x if which == "input" else y)
            assert close(use(x), fresh(x.clone()))
            assert close(use.inv(y), fresh.inv(y.clone()))
            if which == "input" and "free form" not in str(transform):  # with other probes
                found, expected = (one.log_abs_det_jacobian(x, one(x)) for one in (use, fresh))
                assert close(found, expected)


@EVERY_KIND
def test_pair_outlives_what_changes_nothing(case: Case) -> None:
    transform, x = case.make(), batch(case)
    y = transform(x)
    transform.zero_grad()
    transform.log_abs_det_jacobian(x, y)
    transform.state_dict()
    copy.deepcopy(transform)
    assert transform(x) is y
    assert transform.inv(y) is x
    transform(x + 1)  # only the latest is kept
    assert transform.inv(y) is not x


def test_pair_is_dropped_with_the_training_mode() -> None:
    # In training the mixture objective is in T's gradient; a pair from eval() lacks it.
    layer = linear(3, log_det="learned").eval()
    layer(X)
    layer.train()
    layer(X).sum().backward()
    assert layer.log_det.theta.grad is not None


@pytest.mark.parametrize("inverse", ["iterative", "exact"])
@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_exact_inverse_is_kept_however_bad_r_is(log_det: str, inverse: str) -> None:
    layer = linear(3, log_det=log_det, inverse=inverse)
    nudge_inverses(layer, 3.0)
    x = layer.inv(X)
    assert layer(x) is X
    assert (layer(x.clone()) - X).abs().max() < 1e-9


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_full_batch_training_is_that_of_fresh_tensors(log_det: str) -> None:
    # Pyro's optimizer writes to parameter.data: autograd's version counters do not move.
    losses = []
    for fresh in (False, True):
        layer = linear(3, log_det=log_det)
        updates = ClippedAdam(layer.parameters(), lr=0.02)
        losses.append([])
        for _ in range(5):
            loss = density_loss(layer, X.clone() if fresh else X)
            losses[-1].append(loss.item())
            updates.zero_grad()
            loss.backward()
            updates.step()
    assert losses[0] == pytest.approx(losses[1], rel=SAME)
    assert len(set(losses[0])) == 5


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
    assert layer.with_cache(1) is layer.with_cache() is layer
    for size in (2, -1):
        with pytest.raises(ValueError, match=f"expected cache_size 0 or 1; got {size}"):
            layer.with_cache(size)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_copies_with_own_cache_share_the_mode(log_det: str) -> None:
    layer = linear(3, log_det=log_det)
    nudge_inverses(layer, 0.3)
    other = layer.with_cache(0).with_cache(1)
    y = layer(X)
    assert other(X) is not y
    assert layer(X) is y
    layer.eval()
    values = [part.log_abs_det_jacobian(X, part(X)) for part in (layer, other)]
    assert torch.equal(*values)


def test_stack_reaches_the_parts_whose_caches_it_turned_on() -> None:
    part = linear(3, log_det="learned").with_cache(0)
    layers = Compose([part, SmoothLeakyReLU(0.3, learnable=True)], cache_size=1)
    layers.eval()
    assert all(not module.training for module in layers.parts)
    y = layers(X)
    assert layers(X) is y
    with torch.no_grad():
        expected = layers.log_abs_det_jacobian(X, y)
    assert torch.equal(layers.log_abs_det_jacobian(X, y), expected)


@pytest.mark.parametrize(
    "stack", [partial(Compose, cache_size=1), partial(MultiScale, event_shape=(2, 4, 4))]
)
def test_cache_of_a_part_of_torch_is_a_safe_one(stack: Callable[..., Transform]) -> None:
    # torch's own remembers a tensor by its identity, whatever has been written to it.
    affine = dist.transforms.AffineTransform(1.0, 2.0)
    for part in (affine, dist.transforms.ComposeTransform([affine])):
        flow, x = stack([part, Squeeze2d()]), torch.ones(3, 2, 4, 4)
        y = flow(x)
        x.zero_()
        assert torch.equal(flow(x), torch.ones_like(y))
        x.requires_grad_()
        assert flow(x).requires_grad


# --- The caches themselves ----------------------------------------------------------------------


def test_state_cache_computes_once_a_state() -> None:
    parameter, calls = nn.Parameter(torch.ones(2, 2)), []
    cache: StateCache[int] = StateCache()

    def compute() -> int:
        calls.append(1)
        return len(calls)

    def fail() -> int:
        raise RuntimeError("no")

    def get(key: object = None) -> int:
        return cache.get(state_of([parameter]), compute, key)

    assert [get(), get(), get()] == [1, 1, 1]
    add_to_data(parameter)
    assert [get(), get()] == [2, 2]
    assert [get(key) for key in "abcdefe"] == [3, 4, 5, 6, 7, 8, 7]
    assert get() == 9  # the latest four are kept
    cache.clear()
    assert get() == 10
    add_in_place(parameter)
    with pytest.raises(RuntimeError, match="no"):
        cache.get(state_of([parameter]), fail)
    assert get() == 11  # nothing is kept of a failure


EDITS: dict[str, Callable[[nn.Parameter], object]] = {
    "rows": lambda p: p.data.copy_(p.flip(0)),
    "columns": lambda p: p.data.copy_(p.flip(1)),
    "transpose": lambda p: p.data.copy_(p.mT.clone()),
    "sign": lambda p: p.data.neg_(),
    "row sum": lambda p: p.data.add_(torch.tensor([[0.1, -0.1], [0, 0]])),
    "column sum": lambda p: p.data.add_(torch.tensor([[0.1, 0], [-0.1, 0]])),
    "dtype": lambda p: setattr(p, "data", p.data.float()),
    "NaN": lambda p: p.data.fill_(math.nan),
}


@pytest.mark.parametrize("edit", EDITS)
def test_tensor_state_sees_edits_past_autograd(edit: str) -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    version, state = parameter._version, TensorState(parameter)
    assert state == TensorState(parameter)
    EDITS[edit](parameter)
    assert parameter._version == version
    assert state != TensorState(parameter)
    if edit == "NaN":  # which is never equal
        assert TensorState(parameter) != TensorState(parameter)


@pytest.mark.parametrize(
    ("dtype", "size", "is_autocast"),
    [
        (torch.float32, 1e-5, False),
        (torch.float64, 1e-12, False),
        (torch.bfloat16, 2.0**-7, False),  # the next number, in a row sum of 50
        (torch.float32, 1e-3, True),  # where a product is rounded to eight bits
    ],
)
@pytest.mark.parametrize("shape", [(50,), (50, 50), (5, 10, 5, 10)])
def test_tensor_state_sees_small_changes(
    shape: tuple[int, ...], dtype: torch.dtype, size: float, is_autocast: bool
) -> None:
    # Late in training, ClippedAdam writes changes of this size past autograd's counter.
    tensor = torch.ones(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        state = TensorState(tensor)
        assert state == TensorState(tensor)
        tensor.data.view(-1)[17] += size
        assert state != TensorState(tensor)


def test_copies_of_caches_are_empty() -> None:
    cache: StateCache[int] = StateCache()
    cache.get((), lambda: 1)
    pair, y = PairCache(), X + 1
    pair.store(X, y, [], (), computed=y)
    for make_copy in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert make_copy(cache).get((), lambda: 2) == 2
        assert make_copy(pair).y_of(X, [], ()) is None


def test_copy_of_a_layer_holds_no_tensors_of_old() -> None:
    layer, x = linear(200), torch.randn(5000, 200)
    small = len(pickle.dumps(layer))
    layer(x)
    with torch.no_grad():
        layer.log_abs_det_jacobian(x, x)
    assert len(pickle.dumps(layer)) < 1.01 * small


def reparametrize(kind: str, layer: nn.Module) -> nn.Parameter:
    """The parameter that ``theta`` is computed from."""
    if kind == "prune":
        prune.random_unstructured(layer, "theta", 0.4)
        return layer.theta_orig
    if kind == "weight_norm":
        nn.utils.weight_norm(layer, "theta")
        return layer.theta_v
    nn.utils.parametrizations.weight_norm(layer, "theta")
    return layer.parametrizations.theta.original1


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["prune", "weight_norm", "parametrization"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_reparametrized_weight_follows_its_parameters(log_det: str, kind: str, mode: str) -> None:
    layer = linear(4, log_det=log_det)
    original = reparametrize(kind, layer.train(mode == "train"))
    x = torch.randn(3, 4)
    for change in (0.0, 0.3, -0.2):
        with torch.no_grad():
            original.add_(change * torch.randn_like(original))
        y = layer(x)
        value = layer.log_abs_det_jacobian(x, y)
        weight = layer.weight.detach()
        bias = layer.bias.detach()
        assert close(y, x @ weight.mT + bias)
        assert torch.allclose(layer.inv(y), x, atol=1e-9)
        if mode == "eval" or log_det != "learned":  # whose value in training is 0
            tolerance = 1e-9 if mode == "eval" else 1e-3
            expected = torch.linalg.slogdet(weight).logabsdet.expand(3)
            assert torch.allclose(value, expected, atol=tolerance)
        (value.sum() + y.sum()).backward()
        assert original.grad.any()


def test_threads_share_a_state_cache() -> None:
    cache: StateCache[int] = StateCache()

    def is_right(number: int) -> bool:
        state, key = number % 3, number % 7
        return cache.get(state, lambda: 10 * state + key, key) == 10 * state + key

    def evaluate(start: int) -> bool:
        return all(map(is_right, range(start, start + 3000)))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(evaluate, range(8)))


def test_threads_do_not_mix_up_their_pairs() -> None:
    layer = linear(4).eval()
    inputs = [torch.randn(3, 4) for _ in range(4)]
    expected = [layer(x).clone() for x in inputs]

    def evaluate(index: int) -> bool:
        return all(torch.equal(layer(inputs[index]), expected[index]) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(evaluate, range(4)))

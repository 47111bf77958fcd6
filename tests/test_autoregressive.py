"""LowRankAutoregressive: dependences, values and scores against autodiff, bounds, caches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_snf import LowRankAutoregressive
from pyro_snf.path_gradient import push_score
from tests import test_contract as contract
from tests.registry import Case, is_close, randomize

# Float64, scales within e^±3, a few operations deep: rounding, and three digits to spare.
EXACT = 1e-9
# bfloat16 has 8 bits, and a few operations follow each other.
HALF = 0.1

#: D and H: smallest, one unit, one feature, H > D, H < D.
SIZES = [(1, 1), (1, 4), (2, 1), (4, 1), (3, 7), (5, 4), (9, 3), (7, 64)]
EVERY_SIZE = pytest.mark.parametrize(("dim", "hidden_dim"), SIZES)


def make(
    dim: int = 5, hidden_dim: int = 4, seed: int = 0, **options: float
) -> LowRankAutoregressive:
    """A random one, far from the identity."""
    layer = LowRankAutoregressive(dim, hidden_dim, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def jacobian_of(layer: Callable[[Tensor], Tensor], x: Tensor, **options: bool) -> Tensor:
    return torch.autograd.functional.jacobian(layer, x, **options)


def pushed_score(layer: Callable[[Tensor], Tensor], x: Tensor, score: Tensor) -> Tensor:
    """``J⁻ᵀ (score − ∇ log|det J|)`` of one x, all by autodiff."""
    x = x.detach().requires_grad_()
    jacobian = jacobian_of(layer, x, create_graph=True)
    log_det = torch.linalg.slogdet(jacobian).logabsdet
    (gradient,) = torch.autograd.grad(log_det, x, allow_unused=True, materialize_grads=True)
    return torch.linalg.solve(jacobian.detach().mT, score - gradient)


# --- The map ------------------------------------------------------------------------------------


@EVERY_SIZE
def test_formula(dim: int, hidden_dim: int) -> None:
    # Element by element: one output after the other, one hidden unit at a time.
    layer, x = make(dim, hidden_dim), torch.randn(dim)
    sigma = layer.max_log_scale
    last_seen = [unit * (dim - 1) // hidden_dim for unit in range(hidden_dim)]
    hidden = [
        torch.tanh(
            layer.weight_in[unit, : last + 1] @ x[: last + 1] / (last + 1) ** 0.5
            + layer.bias_in[unit]
        )
        for unit, last in enumerate(last_seen)
    ]
    y = layer(x)
    for i in range(dim):
        t, r = layer.bias_out[i], layer.bias_out[dim + i]
        for unit, last in enumerate(last_seen):
            if last < i:
                t = t + 2 * layer.weight_out[i, unit] * hidden[unit] / hidden_dim**0.5
                r = r + 2 * layer.weight_out[dim + i, unit] * hidden[unit] / hidden_dim**0.5
        assert is_close(y[i], torch.exp(sigma * torch.tanh(r / sigma)) * x[i] + t)
    jacobian = jacobian_of(layer, x)
    assert torch.equal(jacobian.triu(1), torch.zeros(dim, dim))
    assert is_close(jacobian_of(layer.inv, y.detach()) @ jacobian, torch.eye(dim), EXACT)


@EVERY_SIZE
def test_it_starts_as_the_identity(dim: int, hidden_dim: int) -> None:
    layer, x = LowRankAutoregressive(dim, hidden_dim), torch.randn(6, dim)
    y = layer(x)
    assert torch.equal(y, x)
    log_det = layer.log_abs_det_jacobian(x, y)
    assert torch.equal(log_det, torch.zeros(6))
    # The identity is not a stationary point: the gradient of C is not 0.
    (y.square().sum() - log_det.sum()).backward()
    assert layer.weight_out.grad.any() == (dim > 1)


def test_initialization_is_of_torchs_random_stream() -> None:
    torch.manual_seed(3)
    first, second = LowRankAutoregressive(4), LowRankAutoregressive(4)
    torch.manual_seed(3)
    again = LowRankAutoregressive(4)
    assert torch.equal(first.weight_in, again.weight_in)
    assert not torch.equal(first.weight_in, second.weight_in)


@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_log_scale_is_bounded(sigma: float) -> None:
    layer = make(4, 3, max_log_scale=sigma)
    with torch.no_grad():
        layer.bias_out.mul_(1e6)
    x = torch.randn(50, 4)
    slopes = torch.stack([jacobian_of(layer, row).diagonal() for row in x])
    assert (slopes.log().abs() <= sigma + EXACT).all()
    # The bound is approached.
    assert slopes.log().abs().max() > 0.99 * sigma


def test_bound_changes_small_log_scales_little() -> None:
    # tanh(u) = u − u³/3: a log scale of 0.3 with σ = 3 is off by 0.3 %.
    layer = LowRankAutoregressive(3)
    with torch.no_grad():
        layer.bias_out[3:] = 0.3
    x = torch.randn(3)
    assert layer.log_abs_det_jacobian(x, layer(x)).item() == pytest.approx(0.9, rel=0.004)


# --- Hidden units -------------------------------------------------------------------------------


@EVERY_SIZE
def test_every_unit_is_used_and_they_are_spread_evenly(dim: int, hidden_dim: int) -> None:
    layer = make(dim, hidden_dim)
    assert layer.mask_in.any(-1).all()
    if dim > 1:
        assert layer.mask_out.any(0).all()
    num_seen = (layer.mask_in != 0).sum(-1)
    steps = num_seen.diff()
    assert num_seen[0] == 1
    assert (steps >= 0).all()
    if hidden_dim > 1:
        assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("dim", [2, 5, 9])
def test_with_a_unit_a_feature_all_features_see_all_before_them(dim: int) -> None:
    jacobian = jacobian_of(make(dim, dim - 1), torch.randn(dim))
    assert (jacobian.tril() != 0).sum() == dim * (dim + 1) // 2


def test_one_feature_trains_its_scale_and_shift() -> None:
    layer = make(1, 3)
    x = torch.randn(5, 1)
    layer.log_abs_det_jacobian(x, layer(x)).sum().backward()
    assert layer.bias_out.grad[1] != 0
    # No output depends on the units: the gradient is 0, and not None, which optimizers would skip.
    assert not layer.weight_in.grad.any()


# The properties of all transforms, except that the gradient of every parameter is not 0.
def _random_of_one_feature(seed: int = 0) -> LowRankAutoregressive:
    with torch.random.fork_rng(devices=[]):
        layer = LowRankAutoregressive(1, 3)
    randomize(layer, seed)
    return layer


ONE_FEATURE = Case(_random_of_one_feature, (1,), "LowRankAutoregressive")


@pytest.mark.parametrize(
    "check",
    [
        contract.test_round_trips,
        contract.test_inverse_log_det_is_the_negative,
        contract.test_rows_of_a_batch_do_not_depend_on_each_other,
        contract.test_training_value_is_the_log_det_or_exactly_zero,
        contract.test_constraints,
        contract.test_in_a_transformed_distribution,
        contract.test_training_leaves_the_module_and_the_random_stream_as_they_are,
        contract.test_pair_is_remembered_where_it_is_exact,
        contract.test_sample_scores_as_its_clone_does,
        contract.test_two_backward_passes_before_a_step,
        contract.test_training_after_inference_mode,
    ],
    ids=lambda check: check.__name__,
)
def test_contract_with_one_feature(check: Callable[[Case], None]) -> None:
    check(ONE_FEATURE)


# --- Scores -------------------------------------------------------------------------------------


@EVERY_SIZE
def test_score_is_pushed_forward(dim: int, hidden_dim: int) -> None:
    layer = make(dim, hidden_dim)
    for shape in [(), (3,), (2, 1, 2)]:
        x, score = torch.randn(*shape, dim), torch.randn(*shape, dim)
        found = push_score(layer, x, layer(x), score)
        assert found.shape == x.shape
        assert not found.requires_grad
        rows = zip(x.view(-1, dim), score.view(-1, dim), strict=True)
        expected = torch.stack([pushed_score(layer, *row) for row in rows])
        assert is_close(found.view(-1, dim), expected)


def test_score_is_of_the_present_parameters() -> None:
    layer, x, score = make(4, 3), torch.randn(4), torch.randn(4)
    layer.push_score(x, layer(x), score)
    layer.weight_out.data.mul_(0.5)
    assert is_close(layer.push_score(x, layer(x), score), pushed_score(layer, x, score))
    # At the bound, where the slope of tanh is 0 to rounding, and e^s is 20.
    layer.bias_out.data[4:] = 1e3
    assert is_close(layer.push_score(x, layer(x), score), pushed_score(layer, x, score))


# --- Caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["data", "in place", "load"])
@pytest.mark.parametrize("mode", ["train", "no_grad", "frozen"])
def test_nothing_stale_after_parameters_change(edit: str, mode: str) -> None:
    layer, x = make(), torch.randn(3, 5)
    layer.requires_grad_(mode != "frozen")
    with torch.set_grad_enabled(mode != "no_grad"):
        layer.log_abs_det_jacobian(x, layer(x))
        if edit == "load":
            layer.load_state_dict(make(seed=1).state_dict())
        elif edit == "data":
            layer.bias_out.data.add_(0.5)  # autograd's version counter stays where it was
        else:
            with torch.no_grad():
                layer.bias_out.add_(0.5)
        fresh = copy.deepcopy(layer)
        y = layer(x)
        assert torch.equal(y, fresh(x.clone()))
        expected = torch.stack([torch.linalg.slogdet(jacobian_of(fresh, row))[1] for row in x])
        assert is_close(layer.log_abs_det_jacobian(x, y), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_to_the_input(frozen: bool) -> None:
    layer = make().requires_grad_(not frozen)
    x = torch.randn(5).requires_grad_()
    y = layer(x)
    (found,) = torch.autograd.grad(layer.log_abs_det_jacobian(x, y), x)

    def log_det(z: Tensor) -> Tensor:
        return torch.linalg.slogdet(jacobian_of(layer, z, create_graph=True)).logabsdet

    (expected,) = torch.autograd.grad(log_det(x), x)
    assert is_close(found, expected)
    # The log-det after a sample without gradients has one.
    with torch.no_grad():
        y = layer(x)
    assert is_close(torch.autograd.grad(layer.log_abs_det_jacobian(x, y), x)[0], expected)
    if not frozen:
        layer.log_abs_det_jacobian(x.detach(), y).backward()
        assert layer.bias_out.grad.any()


def test_gradients_by_finite_differences() -> None:
    layer = make(4, 3)

    def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        # gradcheck writes to x and to the layer's parameters past the version counters. The cache
        # compares the contents of parameters, but not those of x.
        x = x.clone()
        y = layer(x)
        return y, layer.log_abs_det_jacobian(x, y)

    x = torch.randn(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(both, (x, *layer.parameters()))


# --- Types and devices --------------------------------------------------------------------------


def test_device_and_dtype_options(device: torch.device) -> None:
    layer = LowRankAutoregressive(4, device=device, dtype=torch.float32)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        assert tensor.device.type == device.type
        assert tensor.dtype == torch.float32
    x = torch.ones(2, 4, device=device, dtype=torch.float32)
    y = layer(x)
    assert layer.push_score(x, y, x).device.type == y.device.type == device.type
    # The masks follow from the sizes.
    assert set(layer.state_dict()) == {"weight_in", "bias_in", "weight_out", "bias_out"}


@pytest.mark.parametrize("autocast", [False, True])
def test_score_in_half_precision(autocast: bool) -> None:
    exact = make()
    x, score = torch.randn(3, 5), torch.randn(3, 5)
    expected = exact.push_score(x, exact(x), score)
    layer = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    x, score = x.bfloat16(), score.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = layer.push_score(x, layer(x), score)
    assert found.dtype == layer.weight_in.dtype
    assert is_close(found.double(), expected, HALF)

"""The tracked inverse of a dense layer: its error, its value, edits of the weight, its state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from pyro_snf import SelfNormalizingLinear
from pyro_snf.diagnostics import gradient_error, inverse_error
from pyro_snf.maps import Dense
from tests.registry import LOG_DETS, density_loss, exact_log_det, linear

# Float64: R to rounding, at condition numbers below 10.
EXACT = 1e-9
# The determinant lemma, summed over some hundred updates, in units of the machine precision.
LEMMA = 1e5
# A check sees the error along one direction, and some steps pass between two checks: the error is
# up to this many times the tolerance.
SLACK = 3.0
# The default tolerance of the gradient's error is 0.02.
RECOVERED = 0.03


def random_theta(dim: int, size: float = 0.4, seed: int = 0) -> nn.Parameter:
    """``‖A − I‖₂ = size`` for sizes below 1: the condition is at most (1 + size)/(1 − size)."""
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1000 + seed))
    return nn.Parameter(size * math.sqrt(dim) / torch.linalg.matrix_norm(noise, 2) * noise)


def in_training(layer: SelfNormalizingLinear) -> Tensor:
    """The log-determinant of a training step, shape ``()``."""
    x = torch.zeros(layer.input_dim, dtype=layer.theta.dtype)
    return layer.log_abs_det_jacobian(x, x)


def walk(
    layer: SelfNormalizingLinear, steps: int, size: float, rank: int | None = None
) -> Iterator[float]:
    """Random steps of Θ, of a low rank if it is given, else drawn back to 0. R follows.

    :return: after each step, the error of the value.
    """
    dim = layer.input_dim
    basis = torch.eye(dim) if rank is None else torch.randn(rank, dim) / math.sqrt(rank)
    for _ in range(steps):
        with torch.no_grad():
            noise = torch.randn(dim, len(basis)) @ basis
            layer.theta.mul_(1 - size if rank is None else 1)
            layer.theta.add_(noise.to(layer.theta), alpha=size)
        yield in_training(layer).item() - exact_log_det(layer)


# --- The error ----------------------------------------------------------------------------------


def test_error_estimate_is_near_the_error() -> None:
    layer = linear(64, tolerance=0.99)  # nothing is corrected
    assert math.isnan(SelfNormalizingLinear(3).error_estimate)
    in_training(layer)
    assert layer.error_estimate < EXACT
    ratios, latest = [], 0.0
    for _ in walk(layer, 200, 1e-4):
        if layer.error_estimate != latest:
            latest = layer.error_estimate
            ratios.append(math.log(latest / inverse_error(layer)))
    assert len(ratios) > 20
    assert abs(sum(ratios)) / len(ratios) < 0.1
    assert max(map(abs, ratios)) < 0.5
    assert layer.num_refactorizations == 1  # that of the registry


@pytest.mark.parametrize("dim", [1, 2, 5, 32])
def test_tolerance_holds(dim: int) -> None:
    for size in (1.0, 1e-1, 1e-2, 1e-3, 1e-4) if dim == 32 else (1e-2,):
        layer = linear(dim, tolerance=0.02)
        errors = [gradient_error(layer).relative for _ in walk(layer, 40, size)]
        assert max(errors) < SLACK * 0.02, size


@pytest.mark.parametrize("rank", [1, 2])
def test_quiet_training_does_not_refactorize_and_noisy_training_does(rank: int) -> None:
    numbers = []
    for size, of_rank in [(1e-6, rank), (0.005, rank), (0.05, None)]:
        layer = linear(150)
        in_training(layer)
        kept = layer.log_det.estimator.inverse_t.clone()
        list(walk(layer, 80, size, of_rank))
        is_kept = torch.equal(layer.log_det.estimator.inverse_t, kept)
        numbers.append((is_kept, layer.num_refactorizations - 1))
    assert numbers[:2] == [(True, 0), (False, 0)]  # checked and left alone; updated
    assert numbers[2][1] > 20
    layer = linear(24)
    in_training(layer)
    list(walk(layer, 10, 1e-7))
    list(walk(layer, 1, 1e-5))  # a step a hundred times as long as the others
    assert layer.num_refactorizations == 1


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen", "call", "inverse", "unchanged"])
def test_nothing_but_a_training_log_det_of_another_weight_moves_r(how: str) -> None:
    layer, x = linear(6), torch.randn(4, 6)
    in_training(layer)
    if how != "unchanged":
        with torch.no_grad():
            layer.theta.mul_(0.9)
    state = copy.deepcopy(layer.state_dict())
    if how in ("call", "inverse"):
        layer(x) if how == "call" else layer.inv(x)
    else:
        layer.train(how != "eval").requires_grad_(how != "frozen")
        with torch.set_grad_enabled(how != "no_grad"):
            layer.log_abs_det_jacobian(x, layer(x))
    assert_same_state(layer.state_dict(), state)


# --- The value ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("dim", "rank"), [(1, None), (7, 2), (64, 1)])
def test_determinant_lemma(dim: int, rank: int | None, dtype: torch.dtype) -> None:
    layer = linear(dim, num_probes=1).to(dtype)
    estimator = layer.log_det.estimator
    num_updates = 0
    for _ in walk(layer, 100, 0.01, rank):
        num_updates = max(num_updates, estimator.num_updates)
        expected = torch.linalg.slogdet(estimator.inverse_t.double()).logabsdet
        error = abs(estimator.log_abs_det_inverse - expected)
        assert error < LEMMA * torch.finfo(dtype).eps
    assert num_updates >= 3
    assert estimator.log_abs_det_inverse.dtype == torch.float64


def test_value_is_right_to_second_order() -> None:
    # |log|det(I − E)| + tr E| ≤ ‖E‖²_F for ‖E‖₂ ≤ ½.
    layer = linear(48, num_probes=2, tolerance=0.99)
    errors: list[float] = []
    for error in walk(layer, 60, 0.01):
        residual = torch.eye(48) - layer.inverse_weight @ layer.weight.detach()
        assert torch.linalg.matrix_norm(residual, 2) < 0.5
        errors.append(abs(error))
        assert errors[-1] <= residual.square().sum() + 1e-8
    assert max(errors) > 1e-8  # else the bound above was not put to the test
    for size in (0.003, 0.03):
        errors = list(walk(linear(64), 60, size))
        assert abs(sum(errors) / len(errors)) < 0.01
        assert max(map(abs, errors)) < 0.1


# --- Edits of the weight ------------------------------------------------------------------------


def assert_repaired(layer: SelfNormalizingLinear) -> None:
    layer.zero_grad()
    value = in_training(layer)
    assert abs(value.item() - exact_log_det(layer)) < 0.01
    assert gradient_error(layer).relative < RECOVERED
    value.backward()
    expected = torch.linalg.inv(Dense().weight(layer.theta.detach())).mT
    expected = expected / math.sqrt(layer.input_dim)
    assert (layer.theta.grad - expected).norm() / expected.norm() < RECOVERED


OTHER = random_theta(32, 0.9, seed=9).double()

EDITS: dict[str, Callable[[SelfNormalizingLinear], object]] = {
    "in place": lambda layer: layer.theta.copy_(OTHER),
    "through data": lambda layer: layer.theta.data.copy_(OTHER),
    "another data": lambda layer: setattr(layer.theta, "data", OTHER.detach().clone()),
    "another parameter": lambda layer: setattr(layer, "theta", nn.Parameter(OTHER.clone())),
    "sign": lambda layer: layer.theta.data.neg_(),
    "rows permuted": lambda layer: layer.theta.data.copy_(layer.theta.flip(0)),
    "columns permuted": lambda layer: layer.theta.data.copy_(layer.theta.flip(1)),
    "a checkpoint without R": lambda layer: layer.load_state_dict({"theta": OTHER}, strict=False),
    "a checkpoint of another run": lambda layer: layer.load_state_dict(
        linear(32, seed=9).state_dict()
    ),
    "R overwritten": lambda layer: layer.log_det.estimator.inverse_t.normal_(),
    "R zeroed": lambda layer: layer.log_det.estimator.inverse_t.zero_(),
    "R NaN": lambda layer: layer.log_det.estimator.inverse_t.fill_(math.nan),
}


@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("edit", EDITS)
def test_edit_is_noticed_and_repaired_by_one_refactorization(edit: str, steps: int) -> None:
    layer = linear(32)
    in_training(layer)
    list(walk(layer, steps, 1e-4))
    before = layer.num_refactorizations
    with torch.no_grad():
        EDITS[edit](layer)
    assert_repaired(layer)
    assert layer.num_refactorizations <= before + 1


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_refactorization_by_hand(log_det: str) -> None:
    layer = linear(32, log_det=log_det)
    with torch.no_grad():
        layer.theta.copy_(OTHER)
    layer.refactorize()
    assert inverse_error(layer) < EXACT
    assert layer.num_refactorizations == (2 if log_det == "refined" else None)
    assert (layer.error_estimate is None) == (log_det != "refined")


# --- Singular weights ---------------------------------------------------------------------------


def singular_theta(dim: int, kind: str) -> Tensor:
    root = math.sqrt(dim)
    theta = torch.zeros(dim, dim)
    if kind == "zero matrix":
        theta = -root * torch.eye(dim)
    elif kind == "zero row":  # dim is a square, so that A₁₁ = 0 exactly
        theta[0, 0] = -root
    elif kind == "equal rows":
        theta[0, 0], theta[0, 1] = -root, root
    else:
        theta[-1, 0] = float(kind)
    return theta


SINGULAR = ["zero matrix", "zero row", "equal rows", "nan", "inf"]


@pytest.mark.parametrize("mode", ["train", "eval", "inverse"])
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_singular_weight_is_an_error_of_the_layer(log_det: str, kind: str, mode: str) -> None:
    if log_det == "learned" and mode == "train" and kind not in ("nan", "inf"):
        pytest.skip("nothing is inverted there")
    layer, x = linear(4, log_det=log_det).train(mode == "train"), torch.randn(3, 4)
    with torch.no_grad():
        layer.theta.copy_(singular_theta(4, kind))
    use = layer.inv if mode == "inverse" else lambda x: layer.log_abs_det_jacobian(x, layer(x))
    message = r"SelfNormalizingLinear\(4, .*(singular|finite|NaN)"
    for _ in range(2):  # the error is not a matter of the first time
        with pytest.raises(torch.linalg.LinAlgError, match=message):
            use(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["zero row", "equal rows"])
@pytest.mark.parametrize("dim", [64, 784])
def test_one_singular_direction_is_an_error(dim: int, kind: str, dtype: torch.dtype) -> None:
    # ‖I − RA‖_F/√D = 1/28 at D = 784: not much, but a NaN or a huge R must not come of it.
    layer = linear(dim, tolerance=0.05).to(dtype)
    with torch.no_grad():
        layer.theta.zero_()
        in_training(layer)
        layer.theta.copy_(singular_theta(dim, kind))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        in_training(layer)


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("dim", [4, 64])
def test_layer_recovers_from_a_singular_weight(dim: int, kind: str) -> None:
    layer = linear(dim)
    in_training(layer)
    good = layer.theta.detach().clone()
    with torch.no_grad():
        layer.theta.copy_(singular_theta(dim, kind))
    with pytest.raises(torch.linalg.LinAlgError):
        in_training(layer)
    with torch.no_grad():
        layer.theta.copy_(good)
    assert_repaired(layer)


def nearly_singular_theta(dim: int, smallest: float) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(dim, dim)).Q for _ in range(2))
    values = torch.ones(dim)
    values[-1] = smallest
    return math.sqrt(dim) * ((left * values) @ right - torch.eye(dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [4, 32])
def test_nearly_singular_weight_is_right_or_an_error(dim: int, dtype: torch.dtype) -> None:
    # There log|det R| may be off in float32; it must not stay so when the weight is a good one.
    for smallest in [10.0**-power for power in range(1, 17)]:
        layer = SelfNormalizingLinear(dim, dtype=dtype)
        with torch.no_grad():
            layer.theta.copy_(nearly_singular_theta(dim, smallest))
        try:
            value = in_training(layer).item()
        except torch.linalg.LinAlgError:
            assert smallest < (1e-12 if dtype == torch.float64 else 1e-5)
        else:
            assert dtype == torch.float32 or value == pytest.approx(exact_log_det(layer), abs=0.1)
        with torch.no_grad():
            layer.theta.copy_(random_theta(dim))
        assert_repaired(layer)


@pytest.mark.parametrize("dim", [6, 40])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_large_steps_give_no_silent_wrong_gradient(optimizer: Callable, dim: int) -> None:
    layer = SelfNormalizingLinear(dim)
    mixing = torch.randn(dim, dim) / math.sqrt(dim)
    for rate, steps in [(0.3, 40), (0.001, 20)]:
        updates = optimizer(layer.parameters(), lr=rate)
        for _ in range(steps):
            loss = density_loss(layer, torch.randn(32, dim) @ mixing)
            assert inverse_error(layer) < SLACK * 0.9 / math.sqrt(dim)
            updates.zero_grad()
            loss.backward()
            updates.step()
    assert_repaired(layer)


# --- The state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9, 14])
def test_copy_goes_on_bit_for_bit(stop: int) -> None:
    # At every stage of waiting for the next check.
    layer, other = linear(24, num_probes=4), linear(24, num_probes=4, seed=5)
    list(walk(layer, stop, 1e-3))
    kept = layer.state_dict()
    other.load_state_dict(copy.deepcopy(kept))
    extra = {name: copy.deepcopy(one) for name, one in kept.items() if "extra" in name}
    values = []
    for one in (layer, copy.deepcopy(layer), other):
        torch.manual_seed(1)
        values.append([value + exact_log_det(one) for value in walk(one, 30, 1e-3)])
    assert values[0] == values[1] == values[2]
    assert_same_state(layer.state_dict(), other.state_dict())
    # A state that was given out is not that of a later step.
    assert_same_state({name: kept[name] for name in extra}, extra)


def assert_same_state(actual: dict[str, object], expected: dict[str, object]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("start", ["constructor", "to"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layer_keeps_a_better_inverse(dtype: torch.dtype, start: str) -> None:
    layer = SelfNormalizingLinear(32, dtype=dtype if start == "constructor" else torch.float32)
    layer.to(dtype)
    with torch.no_grad():
        layer.theta.copy_(random_theta(32))
    in_training(layer).backward()
    assert layer.theta.grad.dtype == dtype
    assert layer.log_det.estimator.inverse_t.dtype == torch.float32
    assert layer.log_det.estimator.log_abs_det_inverse.dtype == torch.float64
    assert inverse_error(layer) < RECOVERED


@pytest.mark.parametrize("method", ["addmm_", "copy_"])
def test_interrupted_correction_is_repaired(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # R and log|det R| are two tensors, and Ctrl-C can come between them.
    layer = linear(6)
    in_training(layer)
    list(walk(layer, 5, 0.01))
    original = getattr(Tensor, method)

    def interrupted(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        original(tensor, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(walk(layer, 20, 0.03 if method == "addmm_" else 1.0))
    assert abs(in_training(layer).item() - exact_log_det(layer)) < 1e-10  # after a refactorization
    assert inverse_error(layer) < 1e-10


CORRUPTIONS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "log|det R| off": lambda state: state["log_abs_det_inverse"].add_(0.5),
    "log|det R| NaN": lambda state: state["log_abs_det_inverse"].fill_(math.nan),
    "R scaled": lambda state: state["inverse_t"].mul_(1.5),
    "R transposed": lambda state: state["inverse_t"].copy_(state["inverse_t"].mT.clone()),
    "R of zeros": lambda state: state["inverse_t"].zero_(),
    "one entry of R": lambda state: state["inverse_t"][0, 1].add_(3.0),
    "R NaN": lambda state: state["inverse_t"][2, 1].fill_(math.nan),
    "another run's theta": lambda state: state["theta"].copy_(OTHER),
}


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_loaded_state_is_checked(corruption: str, steps: int) -> None:
    layer = linear(32)
    list(walk(layer, steps, 1e-3))
    state = {key.rpartition(".")[2]: one.clone() for key, one in layer.state_dict().items()}
    names = {key.rpartition(".")[2]: key for key in layer.state_dict()}
    CORRUPTIONS[corruption](state)
    full = copy.deepcopy(layer.state_dict())
    for name in ("theta", "inverse_t", "log_abs_det_inverse"):
        full[names[name]] = state[name]
    other = SelfNormalizingLinear(32)
    other.load_state_dict(full)
    with pytest.warns(RuntimeWarning, match="not that of the loaded weight; both are computed"):
        assert_repaired(other)
    assert_repaired(other)  # it is said once


def test_loaded_state_that_is_right_is_kept() -> None:
    layer, other = linear(32), SelfNormalizingLinear(32)
    for size in (1e-3, 1e-2, 1e-1):
        list(walk(layer, 9, size))
        other.load_state_dict(layer.state_dict())
        before = other.num_refactorizations
        list(walk(other, 1, 0.0))
        assert other.num_refactorizations == before


def test_broadcast_of_the_buffers_changes_nothing() -> None:
    # As DistributedDataParallel does it in every step.
    layer = linear(16)
    other = copy.deepcopy(layer)
    values = []
    for one in (layer, other):
        torch.manual_seed(1)
        values.append([])
        for error in walk(one, 20, 1e-3):
            values[-1].append(error)
            if one is other:
                for buffer in other.buffers():
                    buffer.copy_(buffer.clone())
    assert values[0] == values[1]
    assert_same_state(layer.state_dict(), other.state_dict())
    with torch.no_grad():
        other.log_det.estimator.log_abs_det_inverse.add_(1.0)
    assert_repaired(other)


def follow_elsewhere(layer: SelfNormalizingLinear, seed: int, errors: mp.Queue) -> None:
    """Training in another process, on the same parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    for _ in range(20):
        loss = density_loss(layer, torch.randn(8, layer.input_dim, dtype=layer.theta.dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.put(inverse_error(layer) < 1)
    errors.put(True)


def test_shared_parameters_are_followed_by_each_process() -> None:
    layer = linear(8)
    in_training(layer)
    layer.share_memory()
    context = mp.get_context("fork")
    errors = context.Queue()
    processes = [context.Process(target=follow_elsewhere, args=(layer, i, errors)) for i in (1, 2)]
    for process in processes:
        process.start()
    found = [errors.get(timeout=60) for _ in range(42)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(found)
    assert layer.theta.is_shared()
    assert_repaired(layer)  # what the others did to the weight is seen here
    assert not layer.log_det.estimator.inverse_t.is_shared()


def test_small_edit_of_the_inverse_leaves_no_bias() -> None:
    layer = linear(8)
    x = torch.randn(2, 8)
    before = layer.log_abs_det_jacobian(x, layer(x))
    layer.log_det.estimator.inverse_t.mul_(1 + 1e-4)
    assert torch.allclose(layer.log_abs_det_jacobian(x, layer(x)), before, atol=1e-12)

"""The tracked inverse: what it certifies, what it values, what it notices, what it survives."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_snf import SelfNormalizingLinear
from pyro_snf.dense import near_identity
from pyro_snf.dense.tracked import TrackedInverse
from pyro_snf.diagnostics import gradient_error, inverse_error
from tests.registry import LOG_DETS, density_loss, linear

# Float64: R to rounding, at condition numbers below 10.
EXACT = 1e-9
# The determinant lemma, summed over 300 rounds in float64 and float32.
LEMMA = 1e-8
LEMMA_SINGLE = 1e-2
# A certificate of 8 probes at D = 64 is a mean over 512 random signs: good to a fifth.
CERTIFICATE = 0.2
# What a layer with the default tolerance may be off by after an update: no more than it certifies.
SLACK = 2.5
# The default tolerance of the gradient's error is 0.02.
RECOVERED = 0.03


def random_theta(
    dim: int, size: float = 0.4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Parameter:
    """``‖A − I‖₂ = size`` for sizes below 1: the condition is at most (1 + size)/(1 − size)."""
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1000 + seed))
    noise *= size * math.sqrt(dim) / torch.linalg.matrix_norm(noise, 2)
    return nn.Parameter(noise.to(dtype))


def tracked(dim: int, *, num_probes: int = 8, tolerance: float = 0.01, **options) -> TrackedInverse:
    return TrackedInverse(
        dim, num_probes=num_probes, tolerance=tolerance, seed=options.pop("seed", 0), **options
    )


def error_matrix(inverse: TrackedInverse, theta: Tensor) -> Tensor:
    matrix = near_identity.matrix(theta.detach().to(inverse.inverse_t.dtype))
    return torch.eye(len(matrix), dtype=matrix.dtype) - inverse.inverse_t.mT @ matrix


def error(inverse: TrackedInverse, theta: Tensor) -> float:
    """``‖I − RA‖_F/√D``."""
    return (error_matrix(inverse, theta).norm() / math.sqrt(len(theta))).item()


def exact_log_det(theta: Tensor) -> Tensor:
    return torch.linalg.slogdet(near_identity.matrix(theta.detach().double())).logabsdet


def value(inverse: TrackedInverse, theta: Tensor) -> Tensor:
    return inverse.training_log_abs_det(theta).detach()


@torch.no_grad()
def walk(
    inverse: TrackedInverse,
    theta: Tensor,
    steps: int,
    size: float,
    visit: Callable[[], None] = lambda: None,
) -> None:
    """A random walk of Θ that is drawn back to 0, R following it."""
    for _ in range(steps):
        theta.mul_(1 - size).add_(torch.randn_like(theta), alpha=size)
        inverse.update(theta)
        visit()


@pytest.fixture
def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change of Θ is met with a round, however good R still is."""
    monkeypatch.setattr(TrackedInverse, "_follow", TrackedInverse._correct)


# --- The certificate ----------------------------------------------------------------------------


@pytest.mark.usefixtures("never_idle")
@pytest.mark.parametrize("size", [0.01, 0.1, 0.2])
def test_certificate_is_the_error_that_was_found(size: float) -> None:
    theta = random_theta(64, size)
    inverse = tracked(64, tolerance=0.99)  # one round, whatever it finds
    before = error(inverse, theta)
    inverse.update(theta)
    assert inverse.certificate == pytest.approx(before, rel=CERTIFICATE)


@pytest.mark.usefixtures("never_idle")
def test_certificate_is_unbiased() -> None:
    # E‖EG‖²/‖G‖² = ‖E‖²_F/D exactly; 400 rounds of 8 probes estimate it to a percent.
    theta = random_theta(16, 0.3)
    expected = error(tracked(16), theta) ** 2
    squares = []
    for seed in range(400):
        inverse = tracked(16, tolerance=0.99, seed=seed)
        inverse.update(theta)
        squares.append(inverse.certificate**2)
    assert sum(squares) / len(squares) == pytest.approx(expected, rel=0.03)


def test_certificate_is_nan_before_the_first_measurement() -> None:
    assert math.isnan(SelfNormalizingLinear(3).certificate)


def test_exact_inverse_is_certified_as_such() -> None:
    layer = linear(20)
    x = torch.randn(2, 20)
    layer.log_abs_det_jacobian(x, layer(x))
    assert layer.certificate < EXACT
    assert layer.num_refreshes == 1  # that of the registry


# --- Updates ------------------------------------------------------------------------------------


def take_a_round(inverse: TrackedInverse, theta: Tensor) -> None:
    """One round, whatever the tolerance."""
    with torch.no_grad():
        residual, _ = inverse._measure(theta, inverse.num_probes)
        assert inverse._update(theta, residual)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_one_round_with_as_many_probes_as_features_is_exact(dim: int) -> None:
    theta = random_theta(dim)
    inverse = tracked(dim, num_probes=8)
    take_a_round(inverse, theta)
    assert error(inverse, theta) < EXACT


def test_error_falls_as_rounds_repeat() -> None:
    # R⁻¹ moves to A by projections, so ‖R⁻¹ − A‖_F never grows; with aimed probes each round of
    # k takes out more than the share k/D that random ones would.
    dim, num_probes, rounds = 64, 8, 6
    theta = random_theta(dim)
    matrix = near_identity.matrix(theta.detach())
    inverse = tracked(dim, num_probes=num_probes)
    distances = [(torch.eye(dim) - matrix).norm().item()]
    for _ in range(rounds):
        take_a_round(inverse, theta)
        distances.append((torch.linalg.inv(inverse.inverse_t.mT) - matrix).norm().item())
    assert inverse.num_rounds == rounds
    assert all(after < before for before, after in itertools.pairwise(distances))
    assert distances[-1] < (1 - num_probes / dim) ** (rounds / 2) * distances[0]


def test_good_inverse_is_measured_and_left_alone() -> None:
    theta = random_theta(32)
    inverse = tracked(32, tolerance=0.01)
    inverse.update(theta)
    kept = inverse.inverse_t.clone()
    with torch.no_grad():
        theta.add_(1e-3 * torch.randn_like(theta))
    inverse.update(theta)
    assert 0 < inverse.certificate < 0.25 * inverse.tolerance
    assert torch.equal(inverse.inverse_t, kept)
    # The value follows all the same, to second order in the error.
    value = inverse.training_log_abs_det(theta).item()
    assert abs(value - exact_log_det(theta).item()) < 32 * inverse.tolerance**2


def test_tolerance_holds_after_an_update() -> None:
    for size in (0.003, 0.03, 0.3):
        theta = random_theta(32)
        inverse = tracked(32, tolerance=0.01)
        inverse.refresh(theta)
        errors: list[float] = []
        walk(inverse, theta, 20, size, lambda: errors.append(error(inverse, theta)))  # noqa: B023
        assert max(errors) < SLACK * inverse.tolerance


def test_slow_walk_costs_little() -> None:
    theta = random_theta(32)
    inverse = tracked(32)
    inverse.refresh(theta)
    walk(inverse, theta, 100, 0.001)
    assert inverse.num_refreshes < 10
    assert inverse.num_rounds < 20


def test_unchanged_weight_costs_no_round() -> None:
    theta = random_theta(6)
    inverse = tracked(6)
    first = value(inverse, theta)
    state = (inverse.num_rounds, inverse.num_refreshes, inverse.inverse_t.clone())
    assert torch.equal(value(inverse, theta), first)
    assert (inverse.num_rounds, inverse.num_refreshes) == state[:2]
    assert torch.equal(inverse.inverse_t, state[2])


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen", "call", "inverse"])
def test_nothing_but_a_training_log_det_moves_r(how: str) -> None:
    layer, x = linear(6), torch.randn(4, 6)
    with torch.no_grad():
        layer.theta.mul_(0.9)
    state = copy.deepcopy(layer.state_dict())
    if how == "call":
        layer(x)
    elif how == "inverse":
        layer.inv(x)
    else:
        layer.train(how != "eval").requires_grad_(how != "frozen")
        with torch.set_grad_enabled(how != "no_grad"):
            layer.log_abs_det_jacobian(x, layer(x))
    assert torch.equal(layer.estimator.inverse_t, state["estimator.inverse_t"])
    assert layer.estimator.get_extra_state() == state["estimator._extra_state"]


def test_update_follows_several_changes_at_once() -> None:
    theta = random_theta(6)
    inverse = tracked(6)
    inverse.update(theta)
    rounds = inverse.num_rounds
    with torch.no_grad():
        theta.mul_(0.9)
        theta.mul_(1.05)
    inverse.update(theta)
    assert inverse.num_rounds > rounds
    assert error(inverse, theta) < EXACT


# --- The value ----------------------------------------------------------------------------------


def walk_by_rounds(inverse: TrackedInverse, theta: Tensor, steps: int, size: float) -> None:
    """The same walk, R following by one round a step and nothing else."""
    for _ in range(steps):
        with torch.no_grad():
            theta.mul_(1 - size).add_(torch.randn_like(theta), alpha=size)
        take_a_round(inverse, theta)


@pytest.mark.parametrize("dim", [1, 7, 32])
def test_determinant_lemma_on_a_random_walk(dim: int) -> None:
    theta = random_theta(dim)
    inverse = tracked(dim, num_probes=4)
    walk_by_rounds(inverse, theta, 300, 0.02)
    carried = inverse.log_abs_det_inverse
    assert abs(carried - torch.linalg.slogdet(inverse.inverse_t).logabsdet) < LEMMA


def test_determinant_lemma_in_float32() -> None:
    theta = random_theta(32, dtype=torch.float32)
    inverse = tracked(32, num_probes=4, dtype=torch.float32)
    walk_by_rounds(inverse, theta, 300, 0.02)
    assert inverse.log_abs_det_inverse.dtype == torch.float64
    expected = torch.linalg.slogdet(inverse.inverse_t.double()).logabsdet
    assert abs(inverse.log_abs_det_inverse - expected) < LEMMA_SINGLE


def test_value_is_right_to_second_order() -> None:
    # |log|det(I − E)| + tr E| ≤ ‖E‖²_F for ‖E‖₂ ≤ ½.
    theta = random_theta(48)
    inverse = tracked(48, num_probes=2, tolerance=0.99)
    inverse.refresh(theta)
    errors: list[float] = []

    def visit() -> None:
        residual = error_matrix(inverse, theta)
        assert torch.linalg.matrix_norm(residual, 2) < 0.5
        errors.append(abs(value(inverse, theta) - exact_log_det(theta)).item())
        assert errors[-1] <= residual.square().sum() + LEMMA

    walk(inverse, theta, 60, 0.01, visit)
    assert max(errors) > LEMMA  # else the bound above was not put to the test


@pytest.mark.parametrize("size", [0.003, 0.03])
def test_value_of_a_training_run_is_close(size: float) -> None:
    # The bound for the mean error is 0.1 nats, at D = 784.
    theta = random_theta(64)
    inverse = tracked(64)
    errors: list[float] = []
    walk(
        inverse,
        theta,
        60,
        size,
        lambda: errors.append((value(inverse, theta) - exact_log_det(theta)).item()),
    )
    assert abs(sum(errors) / len(errors)) < 0.01
    assert max(map(abs, errors)) < 0.1


def test_value_includes_the_scale() -> None:
    layer = linear(5)
    with torch.no_grad():
        layer.log_scale.fill_(2.0)
    x = torch.randn(3, 5)
    in_training = layer.log_abs_det_jacobian(x, layer(x))
    expected = torch.linalg.slogdet(layer.weight.detach()).logabsdet
    assert torch.allclose(in_training, expected.expand(3), atol=EXACT)


# --- Noticing what was done to the weight -------------------------------------------------------


def assert_repaired(layer: SelfNormalizingLinear) -> None:
    x = torch.randn(3, layer.input_dim, dtype=layer.theta.dtype)
    layer.zero_grad()
    in_training = layer.log_abs_det_jacobian(x, layer(x))
    expected = torch.linalg.slogdet(layer.weight.detach().double()).logabsdet
    assert abs(in_training[0] - expected) < 0.01
    assert gradient_error(layer).relative < RECOVERED
    in_training.mean().backward()
    exact = torch.linalg.inv(near_identity.matrix(layer.theta.detach())).mT
    exact = exact / math.sqrt(layer.input_dim)
    assert (layer.theta.grad - exact).norm() / exact.norm() < RECOVERED


EDITS: dict[str, Callable[[SelfNormalizingLinear], None]] = {
    "in place": lambda layer: layer.theta.copy_(random_theta(32, 0.9, seed=9)),
    "through data": lambda layer: layer.theta.data.copy_(random_theta(32, 0.9, seed=9)),
    "another data": lambda layer: setattr(layer.theta, "data", random_theta(32, 0.9, seed=9).data),
    "another parameter": lambda layer: setattr(layer, "theta", random_theta(32, 0.9, seed=9)),
    "sign": lambda layer: layer.theta.data.neg_(),
    "a checkpoint without R": lambda layer: layer.load_state_dict(
        {"theta": random_theta(32, 0.9, seed=9)}, strict=False
    ),
    "a checkpoint of another run": lambda layer: layer.load_state_dict(
        linear(32, seed=9).state_dict()
    ),
    "rows permuted": lambda layer: layer.theta.data.copy_(layer.theta.flip(0)),
    "columns permuted": lambda layer: layer.theta.data.copy_(layer.theta.flip(1)),
    "R overwritten": lambda layer: layer.estimator.inverse_t.normal_(),
    "R zeroed": lambda layer: layer.estimator.inverse_t.zero_(),
    "R NaN": lambda layer: layer.estimator.inverse_t.fill_(math.nan),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edit_is_noticed_and_repaired(edit: str) -> None:
    layer = linear(32)
    x = torch.randn(3, 32)
    layer.log_abs_det_jacobian(x, layer(x))
    refreshes = layer.num_refreshes
    with torch.no_grad():
        EDITS[edit](layer)
    assert_repaired(layer)
    assert layer.num_refreshes <= refreshes + 1


def test_weight_that_has_nothing_to_do_with_r_takes_one_refresh() -> None:
    theta = random_theta(150, seed=0)
    inverse = tracked(150)
    inverse.refresh(theta)
    with torch.no_grad():
        theta.copy_(random_theta(150, 0.9, seed=9))
    inverse.update(theta)
    assert inverse.num_refreshes == 2
    assert error(inverse, theta) < EXACT
    inverse.update(theta)
    assert inverse.num_refreshes == 2


@pytest.mark.usefixtures("never_idle")
def test_small_edit_through_data_is_noticed() -> None:
    # As small as an optimizer's late steps: it must not go by as "nothing has changed".
    layer = linear(32).float()
    x = torch.randn(3, 32, dtype=torch.float32)
    layer.log_abs_det_jacobian(x, layer(x))
    rounds = layer.estimator.num_rounds
    layer.theta.data[3, 7] += 1e-4
    layer.log_abs_det_jacobian(x, layer(x))
    assert layer.estimator.num_rounds > rounds


def test_refresh_by_hand() -> None:
    layer = linear(32)
    with torch.no_grad():
        layer.theta.copy_(random_theta(32, 0.9, seed=9))
    assert inverse_error(layer) > 0.1
    layer.refresh()
    assert inverse_error(layer) < EXACT
    assert layer.num_refreshes == 2


@pytest.mark.parametrize("log_det", ["learned", "exact"])
def test_refresh_is_no_affair_of_other_methods(log_det: str) -> None:
    layer = linear(4, log_det=log_det)
    state = copy.deepcopy(layer.state_dict())
    layer.refresh()
    assert all(torch.equal(layer.state_dict()[name], state[name]) for name in state)
    assert layer.num_refreshes is None
    assert layer.certificate is None


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
    elif kind == "NaN":
        theta[0, 0] = math.nan
    elif kind == "inf":
        theta[-1, 0] = math.inf
    return theta


SINGULAR = ["zero matrix", "zero row", "equal rows", "NaN", "inf"]


@pytest.mark.parametrize("mode", ["train", "eval", "inverse"])
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_singular_weight_is_an_error_that_names_the_layer(
    log_det: str, kind: str, mode: str
) -> None:
    if log_det == "learned" and mode == "train" and kind not in ("NaN", "inf"):
        pytest.skip("nothing is inverted there")
    layer = linear(4, log_det=log_det).train(mode == "train")
    with torch.no_grad():
        layer.theta.copy_(singular_theta(4, kind))
    x = torch.randn(3, 4)
    use = layer.inv if mode == "inverse" else lambda x: layer.log_abs_det_jacobian(x, layer(x))
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"SelfNormalizingLinear\(4, .*(singular|finite|NaN)"
    ):
        use(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["zero row", "equal rows"])
@pytest.mark.parametrize("dim", [64, 784])
def test_one_singular_direction_of_many_is_an_error(
    dim: int, kind: str, dtype: torch.dtype
) -> None:
    # ‖I − RA‖_F/√D = 1/28 at D = 784: not much, but a NaN or a huge R must not come of it.
    layer = SelfNormalizingLinear(dim, dtype=dtype, tolerance=0.05)
    with torch.no_grad():
        layer.theta.copy_(singular_theta(dim, kind))
    x = torch.randn(1, dim, dtype=dtype)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        layer.log_abs_det_jacobian(x, layer(x))


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("dim", [4, 64])
def test_layer_recovers_from_a_singular_weight(dim: int, kind: str) -> None:
    layer, x = linear(dim), torch.randn(3, dim)
    layer.log_abs_det_jacobian(x, layer(x))
    good = layer.theta.detach().clone()
    with torch.no_grad():
        layer.theta.copy_(singular_theta(dim, kind))
    for _ in range(2):  # the error is not a matter of the first time
        with pytest.raises(torch.linalg.LinAlgError):
            layer.log_abs_det_jacobian(x, layer(x))
    with torch.no_grad():
        layer.theta.copy_(good)
    assert_repaired(layer)


def nearly_singular_theta(dim: int, smallest: float) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(dim, dim)).Q for _ in range(2))
    values = torch.ones(dim)
    values[-1] = smallest
    return math.sqrt(dim) * ((left * values) @ right - torch.eye(dim))


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("dim", [4, 8, 32])
def test_value_is_right_after_a_visit_to_a_nearly_singular_weight(
    dim: int, smallest: float
) -> None:
    # There log|det R| may be off; it must not stay so when the weight is a good one again.
    layer = SelfNormalizingLinear(dim, dtype=torch.float32)
    x = torch.randn(3, dim, dtype=torch.float32)
    with torch.no_grad():
        layer.theta.copy_(nearly_singular_theta(dim, smallest))
    with contextlib.suppress(torch.linalg.LinAlgError):  # at the smallest it is an error
        layer.log_abs_det_jacobian(x, layer(x))
    with torch.no_grad():
        layer.theta.copy_(random_theta(dim))
    assert_repaired(layer)


def test_nearly_singular_weight_is_still_served_or_refused() -> None:
    # Down to the rounding level the value stays right, or there is an error: nothing in between.
    for smallest in [10.0**-power for power in range(1, 17)]:
        layer = SelfNormalizingLinear(32, dtype=torch.float64)
        with torch.no_grad():
            layer.theta.copy_(nearly_singular_theta(32, smallest))
        x = torch.randn(1, 32)
        try:
            in_training = layer.log_abs_det_jacobian(x, layer(x)).item()
        except torch.linalg.LinAlgError:
            assert smallest < 1e-12
            continue
        expected = torch.linalg.slogdet(layer.weight.detach()).logabsdet.item()
        assert in_training == pytest.approx(expected, abs=0.1)


# --- The state ----------------------------------------------------------------------------------


def run(
    layer: SelfNormalizingLinear, optimizer: torch.optim.Optimizer, steps: range
) -> list[float]:
    losses = []
    for step in steps:
        data = torch.randn(16, layer.input_dim, generator=torch.Generator().manual_seed(step))
        loss = density_loss(layer, 2 * data.cumsum(-1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("through", ["state_dict", "deepcopy", "torch.save"])
def test_resumed_run_is_the_same_bit_for_bit(through: str) -> None:
    layer = SelfNormalizingLinear(12, seed=7)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    run(layer, optimizer, range(6))

    if through == "state_dict":
        buffer = io.BytesIO()
        torch.save({"layer": layer.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        resumed = SelfNormalizingLinear(12)  # the seed is a part of the state
        resumed.load_state_dict(state["layer"])
    else:
        state = {"optimizer": copy.deepcopy(optimizer.state_dict())}
        if through == "deepcopy":
            resumed = copy.deepcopy(layer)
        else:
            buffer = io.BytesIO()
            torch.save(layer, buffer)
            buffer.seek(0)
            resumed = torch.load(buffer, weights_only=False)
    resumed_optimizer = torch.optim.Adam(resumed.parameters(), lr=0.02)
    resumed_optimizer.load_state_dict(state["optimizer"])

    expected = run(layer, optimizer, range(6, 14))
    torch.randn(5)  # the global stream is no part of it
    assert run(resumed, resumed_optimizer, range(6, 14)) == expected
    assert torch.equal(resumed.theta, layer.theta)
    assert torch.equal(resumed.estimator.inverse_t, layer.estimator.inverse_t)
    states = [part.estimator.get_extra_state() for part in (resumed, layer)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def certificates(seed: int, rounds: int = 3) -> list[float]:
    """What each round of probes made of the same error."""
    theta = random_theta(24, 0.3)
    inverse = tracked(24, num_probes=1, tolerance=0.99, seed=seed)
    result = []
    for _ in range(rounds):
        inverse.inverse_t.copy_(torch.eye(24))
        inverse.update(theta)
        result.append(inverse.certificate)
    return result


@pytest.mark.usefixtures("never_idle")
def test_probes_are_fresh_each_round() -> None:
    assert len(set(certificates(seed=0))) == 3


@pytest.mark.usefixtures("never_idle")
def test_probes_are_a_function_of_the_seed() -> None:
    assert certificates(seed=1) == certificates(seed=1)
    results = [tuple(certificates(seed)) for seed in (0, 1, 2, 2**31)]
    assert len(set(results)) == len(results)


def test_probes_are_not_those_of_the_global_stream() -> None:
    # Data or weights drawn under torch.manual_seed(0) would be the very probes of a layer with
    # seed 0, and the certificate a measurement in the directions that matter least or most.
    inverse = tracked(16, num_probes=4)
    torch.manual_seed(0)
    drawn = torch.randn(4, 16)
    assert not torch.equal(inverse._draw_probes(4), drawn)


@pytest.mark.parametrize("start", ["constructor", "to"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layer_keeps_a_better_inverse(dtype: torch.dtype, start: str) -> None:
    if start == "constructor":
        layer = SelfNormalizingLinear(32, dtype=dtype)
    else:
        layer = SelfNormalizingLinear(32, dtype=torch.float32).to(dtype)
    with torch.no_grad():
        layer.theta.copy_(random_theta(32))
    x = torch.randn(3, 32, dtype=dtype)
    layer.log_abs_det_jacobian(x, layer(x)).sum().backward()
    assert layer.theta.grad.dtype == dtype
    assert layer.estimator.inverse_t.dtype == torch.float32
    assert layer.estimator.log_abs_det_inverse.dtype == torch.float64
    assert error(layer.estimator, layer.theta) < SLACK * layer.estimator.tolerance


def test_running_determinant_stays_in_float64() -> None:
    layer = linear(5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer.to(dtype)
        assert layer.estimator.log_abs_det_inverse.dtype == torch.float64


# --- Stress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [6, 40])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_large_steps_give_no_silent_wrong_gradient(
    optimizer: type[torch.optim.Optimizer], dim: int
) -> None:
    layer = SelfNormalizingLinear(dim)
    mixing = torch.randn(dim, dim) / math.sqrt(dim)

    def step(updates: torch.optim.Optimizer) -> None:
        loss = density_loss(layer, torch.randn(32, dim) @ mixing)
        # The layer has just brought R up to date: what it gives now is what counts.
        allowed = layer.estimator._limits().inverse
        assert inverse_error(layer) < SLACK * allowed
        updates.zero_grad()
        loss.backward()
        updates.step()

    large = optimizer(layer.parameters(), lr=0.3)
    for _ in range(40):
        step(large)
    small = optimizer(layer.parameters(), lr=0.001)
    for _ in range(20):
        step(small)
    assert_repaired(layer)


# --- Interrupts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["addmm_", "copy_"])
def test_interrupt_within_an_update_is_repaired_by_the_next(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # R and log|det R| are two tensors: Ctrl-C between them must not part them for good.
    layer = linear(6)
    x = torch.ones(6)
    layer.log_abs_det_jacobian(x, x)
    with torch.no_grad():
        layer.theta.add_(torch.randn(6, 6), alpha=0.1)

    original = getattr(Tensor, method)

    def interrupted(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if method == "addmm_":
            original(tensor, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer.log_abs_det_jacobian(x, x)

    value = layer.log_abs_det_jacobian(x, x)
    value.backward()
    expected = torch.linalg.slogdet(layer.weight.detach()).logabsdet
    assert abs(value.item() - expected.item()) < 1e-10  # float64, after an exact refresh
    assert inverse_error(layer) < 1e-10

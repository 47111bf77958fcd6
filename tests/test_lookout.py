"""The lookout: what its estimates estimate, when it looks, when it looks away, what it survives."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_snf.caching import TensorState, fixed_directions
from pyro_snf.dense import lookout as lookout_module
from pyro_snf.dense import near_identity
from pyro_snf.dense.lookout import Error, Lookout, glance, measure
from pyro_snf.dense.tracked import TrackedInverse

# Means of some thousand squares of one probe, at D = 12: good to a few percent.
MEAN = 0.06
# Of sums over 12 features, in float64.
ROUNDING = 1e-12

LIMITS = Error(1.0, 1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(dim: int = 12, error: float = 0.1) -> tuple[Tensor, Tensor]:
    """Θ and an ``Rᵀ`` that is off in every direction, and in some more than in others."""
    theta = 0.5 * normal(dim, dim)
    exact = torch.linalg.inv(near_identity.matrix(theta)).mT
    noise = normal(dim, dim, seed=1) * torch.linspace(0.1, 3, dim)
    return theta, exact + error / math.sqrt(dim) * noise


def exact_errors(inverse_t: Tensor, theta: Tensor) -> dict[str, float]:
    matrix, inverse = near_identity.matrix(theta), inverse_t.mT
    eye = torch.eye(len(theta))
    root = math.sqrt(len(theta))
    right, left = eye - inverse @ matrix, eye - matrix @ inverse
    return {
        "right": (right.norm() / root).item(),
        "left": (left.norm() / root).item(),
        "gradient": ((right @ inverse).norm() / inverse.norm()).item(),
    }


# --- Estimates ----------------------------------------------------------------------------------


def test_fixed_directions_are_what_they_promise() -> None:
    rows = fixed_directions(4000, 6, torch.float64, torch.device("cpu"))
    assert torch.allclose(rows.square().mean(-1), torch.ones(4000))
    assert rows.abs().min() > 0.2
    # Independent entries of random signs: E wwᵀ = I makes ‖M w‖² an unbiased estimate of ‖M‖²_F.
    assert (rows.mT @ rows / 4000 - torch.eye(6)).abs().max() < 0.1
    again = fixed_directions(4000, 6, torch.float64, torch.device("cpu"))
    assert torch.equal(rows, again)
    assert torch.equal(rows.float(), fixed_directions(4000, 6, torch.float32, torch.device("cpu")))


def test_glance_estimates_the_error() -> None:
    theta, inverse_t = pair()
    directions = fixed_directions(4000, 12, torch.float64, torch.device("cpu"))
    found = torch.stack([glance(inverse_t, theta, direction) for direction in directions])
    exact = exact_errors(inverse_t, theta)
    assert found[:, 0].square().mean().sqrt() == pytest.approx(exact["left"], rel=MEAN)
    # A ratio of two estimates.
    images = (directions @ inverse_t).square().sum(-1)
    squares = (found[:, 1].square() * images).mean() / images.mean()
    assert squares.sqrt() == pytest.approx(exact["gradient"], rel=MEAN)
    assert found[:, 1].square().mean().sqrt() == pytest.approx(exact["gradient"], rel=0.3)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_measure_estimates_the_error(count: int) -> None:
    theta, inverse_t = pair()
    draws = normal(2000, count, 12, seed=2)
    found = torch.stack([measure(inverse_t, theta, probes)[1] for probes in draws])
    exact = exact_errors(inverse_t, theta)
    weights = draws.square().sum((-1, -2))
    squares = (found[:, 0].square() * weights).mean() / weights.mean()
    assert squares.sqrt() == pytest.approx(exact["right"], rel=MEAN)
    assert found.shape == (2000, 2)
    # Relative to the norm of the images of each draw.
    images = (draws[:, : (count + 1) // 2] @ inverse_t).square().sum((-1, -2))
    squares = (found[:, 1].square() * images).mean() / images.mean()
    assert squares.sqrt() == pytest.approx(exact["gradient"], rel=MEAN)


def test_measure_returns_the_residuals() -> None:
    theta, inverse_t = pair()
    probes = normal(3, 12, seed=2)
    residual, numbers = measure(inverse_t, theta, probes)
    error = torch.eye(12) - inverse_t.mT @ near_identity.matrix(theta)
    assert residual.shape == (5, 12)
    assert torch.allclose(residual[:3], probes @ error.mT, atol=ROUNDING)
    images = probes[:2] @ inverse_t
    ratio = (images @ error.mT).norm() / images.norm()
    assert torch.allclose(numbers[1], ratio, atol=ROUNDING)


@pytest.mark.parametrize("dim", [1, 12])
def test_exact_inverse_has_no_error(dim: int) -> None:
    theta, inverse_t = pair(dim, error=0.0)
    direction = fixed_directions(1, dim, torch.float64, torch.device("cpu"))[0]
    assert glance(inverse_t, theta, direction).max() < ROUNDING
    assert measure(inverse_t, theta, normal(1, dim))[1].max() < ROUNDING


@pytest.mark.parametrize(
    ("error", "expected"),
    [((1.0, 0.1), 2.0), ((0.1, 1.0), 4.0), ((0.5, 0.25), 1.0), ((math.inf, 0.0), math.inf)],
)
def test_size_is_the_larger_of_the_two(error: tuple[float, float], expected: float) -> None:
    assert Error(*error).relative_to(Error(0.5, 0.25)) == expected


@pytest.mark.parametrize("error", [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan)])
def test_size_is_nan_if_either_is(error: tuple[float, float]) -> None:
    assert math.isnan(Error(*error).relative_to(LIMITS))


# --- When it looks ------------------------------------------------------------------------------


class Watched:
    """A lookout over errors and movements that are given to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lookout = Lookout()
        self.error = 0.0
        self.looks: list[int] = []
        self.directions: list[Tensor] = []
        self.step = 0
        self.position = torch.zeros(3)

        def see(inverse_t: Tensor, theta: Tensor, direction: Tensor) -> Tensor:
            self.looks.append(self.step)
            self.directions.append(direction)
            return torch.tensor([self.error, 0.0])

        monkeypatch.setattr(lookout_module, "glance", see)

    def go(self, stride: float = 1.0) -> Error | None:
        self.position = self.position + torch.tensor([stride, 0.0, 0.0])
        assert self.lookout.moves_to(self.position) == (stride != 0 or self.step == 0)
        found = self.lookout.estimate(torch.eye(3), torch.zeros(3, 3), LIMITS)
        self.step += 1
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_first_step_is_an_event_and_looked_at(watched: Watched) -> None:
    assert watched.go() == Error(0.0, 0.0)
    assert watched.lookout.is_event
    watched.go()
    assert not watched.lookout.is_event


def test_position_that_does_not_change_is_no_step() -> None:
    lookout = Lookout()
    assert lookout.moves_to(torch.ones(3))
    assert not lookout.moves_to(torch.ones(3))
    assert not lookout.is_event
    assert lookout.moves_to(torch.full((3,), math.nan))


def test_patience_is_bounded(watched: Watched) -> None:
    for _ in range(60):
        watched.go()
    gaps = [after - before for before, after in itertools.pairwise(watched.looks[1:])]
    assert max(gaps) == lookout_module._MAX_PATIENCE + 1


def test_every_direction_is_looked_in(watched: Watched) -> None:
    watched.error = 2.0  # no patience
    for _ in range(20):
        watched.go()
    assert watched.looks == list(range(20))
    assert len({tuple(direction.tolist()) for direction in watched.directions}) == 16
    assert torch.equal(watched.directions[0], watched.directions[16])


@pytest.mark.parametrize("growth", [0.01, 0.1, 0.3, 1.0])
def test_steady_growth_is_met_in_time(growth: float, watched: Watched) -> None:
    # Half as many steps as it takes: an error that grows as it did is seen before, or when, it is
    # over its limit by a quarter, or by one step.
    watched.go()
    sizes = []
    for step in range(1, 200):
        watched.error = growth * step
        if watched.go() is not None:
            sizes.append(watched.error)
            if watched.error > 1:
                break
    assert 1 < sizes[-1] <= max(1.25, 1 + growth) + ROUNDING


@pytest.mark.parametrize("factor", [0.5, 2.9, 3.1, 9.9, 10.1, math.nan])
def test_unusual_stride_is_looked_at(factor: float, watched: Watched) -> None:
    watched.go()
    while watched.lookout._patience == 0 or watched.lookout._usual_stride == 0:
        watched.go()
    looks = len(watched.looks)
    found = watched.go(factor)
    is_unusual = not factor < 3
    assert (found is not None) == (len(watched.looks) > looks) == is_unusual
    assert watched.lookout.is_event == (factor > 10)


def test_slow_drift_of_the_stride_does_not_count_as_unusual_for_ever(watched: Watched) -> None:
    for _ in range(20):
        watched.go()
    assert watched.go(5.0) is not None
    looks = len(watched.looks)
    for _ in range(4):
        watched.go(5.0)
    assert len(watched.looks) <= looks + 1


def test_look_at_once_after_a_correction(watched: Watched) -> None:
    for _ in range(3):
        watched.go()
    assert watched.lookout._patience > 0
    watched.lookout.start_again()
    assert watched.go() is not None


# --- When it rests ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 0.3, 0.9, 1.0])
def test_rest_is_within_bounds(size: float) -> None:
    lookout = Lookout()
    lookout.rest(Error(size, 0.0), LIMITS)
    assert 0 <= lookout._patience <= lookout_module._MAX_PATIENCE
    # All of it grown in the one step before: half of what is left to 5/4.
    expected = int((1.25 - size) / (2 * max(size, lookout_module._LEAST_GROWTH)))
    assert lookout._patience == min(expected, lookout_module._MAX_PATIENCE)


@pytest.mark.parametrize("size", [1.001, 10.0, math.inf, math.nan])
def test_no_rest_over_the_limits(size: float) -> None:
    lookout = Lookout()
    lookout.rest(Error(0.0, 0.0), LIMITS)
    lookout.rest(Error(size, 0.0), LIMITS)
    assert lookout._patience == 0


@pytest.mark.parametrize("size", [math.inf, math.nan])
def test_rest_after_an_error_that_was_not_finite(size: float) -> None:
    lookout = Lookout()
    lookout.rest(Error(size, 0.0), LIMITS)
    lookout.rest(Error(0.5, 0.0), LIMITS)
    assert 0 <= lookout._patience <= lookout_module._MAX_PATIENCE


# --- Readings that come late, as from a GPU -----------------------------------------------------


def late(monkeypatch: pytest.MonkeyPatch, arrives: Callable[[], bool]) -> None:
    monkeypatch.setattr(lookout_module._Reading, "has_arrived", lambda self: arrives())


def test_late_reading_is_waited_for_in_the_end(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch, lambda: False)
    watched.error = 2.0
    found = [watched.go() for _ in range(10)]
    # Those of the first step are another test's.
    first = next(step for step, error in enumerate(found) if error is not None)
    assert first <= lookout_module._MAX_READINGS
    assert len(watched.lookout._readings) <= lookout_module._MAX_READINGS


def test_latest_of_the_readings_counts(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = [False]
    watched.go()
    watched.lookout.start_again()
    late(monkeypatch, lambda: arrived[0])
    for watched.error in (1.5, 2.0):
        assert watched.go() is None
    arrived[0], watched.error = True, 3.0
    assert watched.go() == Error(3.0, 0.0)
    assert not watched.lookout._readings


def test_correction_forgets_readings_of_the_old_inverse(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.go()
    watched.lookout.start_again()
    late(monkeypatch, lambda: False)
    watched.error = 5.0
    watched.go()
    watched.lookout.start_again()
    monkeypatch.undo()
    assert not watched.lookout._readings


# --- In a tracked inverse -----------------------------------------------------------------------


def tracked(dim: int = 24, **options: object) -> TrackedInverse:
    return TrackedInverse(dim, **{"num_probes": 4, "tolerance": 0.02, "seed": 0, **options})


def drift(inverse: TrackedInverse, theta: Tensor, steps: range, size: float = 1e-3) -> list[float]:
    values = []
    for step in steps:
        theta.add_(size * normal(*theta.shape, seed=step))
        values.append(inverse.update(theta).item())
    return values


def true_error(inverse: TrackedInverse, theta: Tensor) -> float:
    return exact_errors(inverse.inverse_t, theta)["gradient"]


def test_event_is_met_by_a_refresh() -> None:
    theta, inverse = 0.5 * normal(24, 24), tracked()
    inverse.refresh(theta)
    drift(inverse, theta, range(10))
    refreshes, rounds = inverse.num_refreshes, inverse.num_rounds
    theta.copy_(theta.mT.clone())
    inverse.update(theta)
    # One glance, no round; the refresh measures what it has left.
    assert (inverse.num_refreshes, inverse.num_rounds) == (refreshes + 1, rounds + 1)
    assert true_error(inverse, theta) < 1e-9


def test_event_that_changes_next_to_nothing_is_let_be() -> None:
    theta, inverse = 0.5 * normal(24, 24), tracked()
    inverse.refresh(theta)
    drift(inverse, theta, range(10), size=1e-7)
    refreshes = inverse.num_refreshes
    drift(inverse, theta, range(10, 11), size=1e-5)
    assert inverse._lookout.is_event
    assert inverse.num_refreshes == refreshes


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_error_is_met_before_it_matters(size: float) -> None:
    theta, inverse = 0.5 * normal(24, 24), tracked()
    inverse.refresh(theta)
    worst = 0.0
    for step in range(60):
        drift(inverse, theta, range(step, step + 1), size)
        worst = max(worst, true_error(inverse, theta))
    # One direction at a time, and half the way: over the limit by a factor, never by a lot.
    assert worst < 3 * inverse.tolerance


@pytest.mark.parametrize("arrives", ["never", "every third time"])
def test_inverse_that_belongs_to_another_weight_is_found_out_at_once(
    arrives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After a checkpoint without R, say: nothing is known of R, and no GPU is too busy to be asked.
    counter = itertools.count(1)
    late(monkeypatch, lambda: arrives != "never" and next(counter) % 3 == 0)
    theta, inverse = 0.5 * normal(24, 24), tracked()
    value = inverse.update(theta)
    assert value.item() == pytest.approx(near_identity.log_abs_det(theta).item(), abs=0.01)


@pytest.mark.parametrize("arrives", ["never", "every third time"])
def test_late_readings_still_correct_the_inverse(
    arrives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta, inverse = 0.5 * normal(24, 24), tracked()
    inverse.refresh(theta)
    counter = itertools.count(1)
    late(monkeypatch, lambda: arrives != "never" and next(counter) % 3 == 0)
    drift(inverse, theta, range(40), size=1e-2)
    assert true_error(inverse, theta) < 4 * inverse.tolerance  # which is seen some steps later
    assert inverse._schedule.num_rounds + inverse.num_refreshes > 1


def as_copy(inverse: TrackedInverse) -> TrackedInverse:
    return copy.deepcopy(inverse)


def as_pickle(inverse: TrackedInverse) -> TrackedInverse:
    return pickle.loads(pickle.dumps(inverse))


def as_state_dict(inverse: TrackedInverse) -> TrackedInverse:
    fresh = tracked(seed=5)
    fresh.load_state_dict(copy.deepcopy(inverse.state_dict()))
    return fresh


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9, 14])
@pytest.mark.parametrize("way", [as_copy, as_pickle, as_state_dict], ids=lambda way: way.__name__)
def test_copy_goes_on_bit_for_bit(way: Callable[..., TrackedInverse], stop: int) -> None:
    theta, inverse = 0.5 * normal(24, 24), tracked()
    inverse.refresh(theta)
    drift(inverse, theta, range(stop))
    other, other_theta = way(inverse), theta.clone()
    rest = range(stop, stop + 30)
    assert drift(inverse, theta, rest) == drift(other, other_theta, rest)
    assert torch.equal(inverse.inverse_t, other.inverse_t)
    torch.testing.assert_close(
        inverse.get_extra_state(), other.get_extra_state(), rtol=0, atol=0, equal_nan=True
    )


def test_state_is_not_that_of_a_later_step() -> None:
    theta, inverse = 0.5 * normal(24, 24), tracked()
    drift(inverse, theta, range(3))
    state = inverse.get_extra_state()
    kept = copy.deepcopy(state)
    drift(inverse, theta, range(3, 20))
    torch.testing.assert_close(state, kept, rtol=0, atol=0, equal_nan=True)


def test_state_given_is_that_of_the_weight() -> None:
    theta, inverse = 0.5 * normal(24, 24), tracked()
    drift(inverse, theta, range(3))
    other = copy.deepcopy(inverse)
    theta.mul_(1.001)
    assert torch.equal(inverse.update(theta), other.update(theta, TensorState(theta)))

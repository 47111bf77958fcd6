"""The residual monitor: what its estimates estimate, and when it checks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyro_snf.caching import fixed_directions
from pyro_snf.log_dets.residual_monitor import (
    InverseError,
    ResidualMonitor,
    _check_error,
    measure_error,
)
from pyro_snf.maps import Dense

# Means of some thousand squares of one probe, at D = 12: good to a few percent.
MEAN = 0.06
# Of sums over 12 features, in float64.
ROUNDING = 1e-12

LIMITS = InverseError(1.0, 1.0)
# The longest interval between two checks, and the number of directions used in turn.
INTERVAL, DIRECTIONS = 9, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def directions(count: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.stack(fixed_directions(count, dim, dtype, torch.device("cpu")))


def check(
    monitor: ResidualMonitor, inverse_t: Tensor, theta: Tensor, position: Tensor
) -> InverseError | None:
    """One step of Θ, to a fingerprint."""
    monitor.observe(position)
    return monitor.check(inverse_t, theta, LIMITS) if monitor.is_check_due() else None


def pair(dim: int = 12, error: float = 0.1) -> tuple[Tensor, Tensor]:
    """Θ and an ``Rᵀ`` that is off in every direction, and in some more than in others."""
    theta = 0.5 * normal(dim, dim)
    exact = torch.linalg.inv(Dense().weight(theta)).mT
    noise = normal(dim, dim, seed=1) * torch.linspace(0.1, 3, dim)
    return theta, exact + error / math.sqrt(dim) * noise


# --- Estimates ----------------------------------------------------------------------------------


def test_fixed_directions() -> None:
    rows = directions(4000, 6)
    assert torch.allclose(rows.square().mean(-1), torch.ones(4000))
    assert rows.abs().min() > 0.2
    # Independent entries of random signs: E wwᵀ = I makes ‖M w‖² an unbiased estimate of ‖M‖²_F.
    assert (rows.mT @ rows / 4000 - torch.eye(6)).abs().max() < 0.1
    assert torch.equal(rows.float(), directions(4000, 6, torch.float32))


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_estimates_of_the_error(count: int) -> None:
    """Of a check, along fixed directions, if the count is 0; else of so many random probes."""
    theta, inverse_t = pair()
    matrix, inverse, eye = Dense().weight(theta), inverse_t.mT, torch.eye(12)
    if count == 0:
        probes = sources = directions(4000, 12).unsqueeze(1)
        found = torch.stack([_check_error(inverse_t, theta, one[0]) for one in probes])
        expected = (eye - matrix @ inverse).norm() / math.sqrt(12)
    else:
        probes, sources = normal(2000, count, 12, seed=2), normal(2000, count, 12, seed=3)
        pairs = zip(probes, sources, strict=True)
        found = torch.stack([measure_error(inverse_t, theta, *one)[1] for one in pairs])
        expected = (eye - inverse @ matrix).norm() / math.sqrt(12)
    weights = probes.square().sum((1, 2))
    squares = (found[:, 0].square() * weights).mean() / weights.mean()
    assert squares.sqrt() == pytest.approx(expected.item(), rel=MEAN)
    # The error of the gradient is relative to the images of the sources.
    weights = (sources @ inverse_t).square().sum((1, 2))
    squares = (found[:, 1].square() * weights).mean() / weights.mean()
    expected = ((eye - inverse @ matrix) @ inverse).norm() / inverse.norm()
    assert squares.sqrt() == pytest.approx(expected.item(), rel=MEAN)


def test_measurement_returns_the_residuals() -> None:
    theta, inverse_t = pair()
    probes, sources = normal(3, 12, seed=2), normal(2, 12, seed=3)
    residual, numbers = measure_error(inverse_t, theta, probes, sources)
    error = torch.eye(12) - inverse_t.mT @ Dense().weight(theta)
    assert residual.shape == (5, 12)
    assert torch.allclose(residual[:3], probes @ error.mT, atol=ROUNDING)
    images = sources @ inverse_t
    ratio = (images @ error.mT).norm() / images.norm()
    assert torch.allclose(numbers[1], ratio, atol=ROUNDING)


@pytest.mark.parametrize("dim", [1, 12])
def test_exact_inverse_has_no_error(dim: int) -> None:
    theta, inverse_t = pair(dim, error=0.0)
    error = check(ResidualMonitor(), inverse_t, theta, theta[0])
    assert max(error) < ROUNDING
    assert measure_error(inverse_t, theta, normal(1, dim), normal(1, dim))[1].max() < ROUNDING


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ((1.0, 0.1), 2.0),
        ((0.1, 1.0), 4.0),
        ((0.5, 0.25), 1.0),
        ((math.inf, 0.0), math.inf),
        ((math.nan, 1.0), math.nan),
        ((1.0, math.nan), math.nan),
    ],
)
def test_size_of_an_error_is_the_larger_of_the_two(
    error: tuple[float, float], expected: float
) -> None:
    found = InverseError(*error).relative_to(InverseError(0.5, 0.25))
    assert found == pytest.approx(expected, nan_ok=True)


# --- When it checks -----------------------------------------------------------------------------


class Run:
    """A monitor of a 3 × 3 inverse whose relative error is a given number."""

    def __init__(self) -> None:
        self.monitor = ResidualMonitor()
        self.error = 0.0
        self.checks: list[int] = []
        self.step = 0
        self.position = torch.zeros(3)

    def go(self, length: float = 1.0) -> bool:
        """One step of Θ; whether there was a check."""
        self.position = self.position + torch.tensor([length, 0.0, 0.0])
        # A = I and R = (1 − ε) I: the errors are ε in every direction.
        inverse_t = (1 - self.error) * torch.eye(3)
        found = check(self.monitor, inverse_t, torch.zeros(3, 3), self.position)
        if found is not None:
            assert found.inverse == pytest.approx(abs(self.error), abs=ROUNDING)
            self.checks.append(self.step)
        self.step += 1
        return found is not None


def test_first_step_counts_as_an_external_change() -> None:
    run = Run()
    assert run.go()
    assert run.monitor.is_external_change
    run.go()
    assert not run.monitor.is_external_change
    assert not run.monitor.observe(run.position)  # Θ has not moved
    assert not run.monitor.is_external_change
    assert run.monitor.observe(torch.full((3,), math.nan))


def test_interval_between_checks() -> None:
    run = Run()
    for _ in range(60):
        run.go()
    gaps = [after - before for before, after in itertools.pairwise(run.checks[1:])]
    assert max(gaps) == INTERVAL
    # A step norm that has changed for good becomes the usual one.
    assert run.go(5.0)
    assert sum(run.go(5.0) for _ in range(4)) <= 1
    # A correction is checked at the next step.
    while run.go():
        pass
    run.monitor.reset()
    assert run.go()


def test_every_direction_is_used_in_turn() -> None:
    monitor, theta = ResidualMonitor(), torch.zeros(12, 12)
    inverse_t = torch.diag(torch.linspace(5, 9, 12))
    positions = torch.arange(2.0 * DIRECTIONS).unsqueeze(1)
    found = [check(monitor, inverse_t, theta, position) for position in positions]
    expected = [_check_error(inverse_t, theta, row)[0].item() for row in directions(DIRECTIONS, 12)]
    assert [one.inverse for one in found] == 2 * expected
    assert len(set(expected)) == DIRECTIONS


@pytest.mark.parametrize("growth", [0.01, 0.1, 0.3, 1.0])
def test_steady_growth_is_found_in_time(growth: float) -> None:
    # The interval is half of what the error needs: one that grows as it did is found before, or
    # when, it exceeds its limit by a quarter, or by one step.
    run = Run()
    run.go()
    for step in range(1, 200):
        run.error = growth * step
        if run.go() and run.error > 1:
            break
    assert 1 < run.error <= max(1.25, 1 + growth) + ROUNDING


@pytest.mark.parametrize("factor", [0.5, 2.9, 3.1, 9.9, 10.1, math.nan])
def test_long_step_is_checked_at_once(factor: float) -> None:
    run = Run()
    run.go()
    while run.monitor.steps_until_check == 0 or run.monitor.usual_step_norm == 0:
        run.go()
    assert run.go(factor) == (not factor < 3)
    assert run.monitor.is_external_change == (factor > 10)


@pytest.mark.parametrize("size", [0.0, 0.3, 0.9, 1.0, 1.001, 10.0, math.inf, math.nan])
def test_interval_after_an_error(size: float) -> None:
    monitor = ResidualMonitor()
    monitor.plan_next_check(InverseError(size, 0.0), LIMITS)
    # All of it grown in the one step before: half of what is left to 5/4.
    fits = size <= 1
    expected = min(int((1.25 - size) / (2 * max(size, 1 / 16))), INTERVAL - 1) if fits else 0
    assert monitor.steps_until_check == expected
    monitor.plan_next_check(InverseError(0.5, 0.0), LIMITS)  # also after one that was not finite
    assert 0 <= monitor.steps_until_check < INTERVAL


@pytest.mark.gpu
def test_check_on_a_gpu_is_read_at_the_next_step() -> None:
    monitor, theta = ResidualMonitor(), torch.zeros(3, 3, device="cuda")
    eye = torch.eye(3, device="cuda")
    # The first four are waited for.
    errors = [0.2, 0.3, 0.4, 0.5, 2.0, 3.0, 4.0]
    found = [check(monitor, (1 - error) * eye, theta, theta[0]) for error in errors]
    expected = [0.2, 0.3, 0.4, 0.5, 0.5, 2.0, 3.0]
    assert [one.inverse for one in found] == pytest.approx(expected, rel=1e-6)
    monitor.reset()
    found = [check(monitor, (1 - error) * eye, theta, theta[0]) for error in (0.5, 0.6)]
    assert [one.inverse for one in found] == pytest.approx([0.5, 0.5], rel=1e-6)

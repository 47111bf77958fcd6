"""The estimate of a convolution's log-determinant: unbiased, with an error estimate, repeatable."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_snf import Refined, SelfNormalizingConv2d
from pyro_snf.caching import TensorState
from pyro_snf.krylov import krylov
from pyro_snf.log_dets.control_variate_log_det import ControlVariateLogDet
from pyro_snf.maps import Convolution, convolution, kernels
from pyro_snf.probes import draw_probes, probe_generator
from pyro_snf.surrogate import Surrogate
from tests.registry import conv, density_loss, relative_error
from tests.test_convolution import fit
from tests.test_convolution_map import neighbours

# Float64, condition numbers below 10.
EXACT = 1e-9
# Solves in these tests are to rounding, unless they are the matter of the test.
TOLERANCE = 1e-10
# Standard errors of a mean over some hundred draws that chance is allowed: for each of the few
# dozen numbers that are compared, one in 15,000.
STANDARD_ERRORS = 4

IMAGE = torch.Size([2, 4, 5])
#: For a control variate with a periodic boundary; see :func:`without_factors`.
LARGE = torch.Size([3, 16, 16])

PADDED = pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)

Found = tuple[Tensor, Tensor]


def estimator(
    padding_mode: str = "zeros", event_shape: torch.Size = IMAGE, **options: object
) -> ControlVariateLogDet:
    zero = torch.zeros(event_shape[0], event_shape[0], 3, 3)
    defaults = {"num_probes": 4, "tolerance": TOLERANCE, "krylov_steps": 60, "seed": 0}
    return ControlVariateLogDet(Convolution(padding_mode), zero, **{**defaults, **options})


@pytest.fixture
def without_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the factors of a convolution with zero padding cost too much for training."""
    monkeypatch.setattr(convolution, "_MAX_COST_IN_PRODUCTS", 0.0)


def update(part: ControlVariateLogDet, theta: Tensor, event_shape: torch.Size = IMAGE) -> Found:
    """The value, and its gradient in θ."""
    return with_gradient(part.update(theta, event_shape, TensorState(theta)), theta)


def with_gradient(surrogate: Surrogate, theta: Tensor) -> Found:
    parameter = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate.attach_to(parameter), parameter)
    return surrogate.value, gradient


def theta_near(centre: Tensor | None, size: float, seed: int = 0, channels: int = 2) -> Tensor:
    """θ whose map is off that of ``centre`` (or the identity) by ``‖A‖₂ ≤ size``."""
    shape = (channels, channels, 3, 3)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(50 + seed))
    part, identity = Convolution("zeros"), torch.zeros(shape)
    noise *= size / part.norm_bound(part.theta_of(noise)) / part.theta_scale(identity)
    return noise if centre is None else centre + noise


def exact(theta: Tensor, padding_mode: str = "zeros", event_shape: torch.Size = IMAGE) -> Found:
    part = Convolution(padding_mode)
    return with_gradient(part.log_abs_det(part.factorize(theta.detach(), event_shape)), theta)


def assert_close(found: Found, expected: Found, tolerance: float = EXACT) -> None:
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance, abs=tolerance)
    assert relative_error(found[1], expected[1]) < tolerance


def draw(
    count: int, thetas: list[Tensor], event_shape: torch.Size = IMAGE, **options: object
) -> Found:
    """Values and gradients at the last θ, each by other probes, along the first dimension."""
    results = []
    for seed in range(count):
        part = estimator(event_shape=event_shape, seed=seed, **options)
        results.append([update(part, theta, event_shape) for theta in thetas][-1])
        assert part.num_refactorizations == 1
    values, gradients = zip(*results, strict=True)
    return torch.stack(values), torch.stack(gradients)


def assert_unbiased(draws: Found, expected: Found) -> None:
    for found, truth in zip(draws, expected, strict=True):
        # Where all draws are alike, rounding is all there is.
        deviation = (found.std(0) / math.sqrt(len(found))).clamp_min(EXACT)
        assert ((found.mean(0) - truth) / deviation).abs().max() < STANDARD_ERRORS
        assert found.std(0).norm() > 0
    assert relative_error(draws[1].mean(0), expected[1]) < 0.02


@PADDED
def test_estimate_is_exact_first_unbiased_nearby_and_exact_far_away(padding_mode: str) -> None:
    start = theta_near(None, 0.5)
    near, far = theta_near(start, 0.02, seed=1), theta_near(start, 0.9, seed=2)
    assert_unbiased(draw(300, [start, near], padding_mode=padding_mode), exact(near, padding_mode))
    part = estimator(padding_mode)
    assert math.isnan(part.error_estimate)
    for count, theta in enumerate((start, far), 1):
        assert_close(update(part, theta), exact(theta, padding_mode))
        assert part.error_estimate == 0
        assert part.num_refactorizations == count
    update(part, theta_near(far, 0.02))
    assert 0 < part.error_estimate <= TOLERANCE


@pytest.mark.usefixtures("without_factors")
def test_estimate_by_a_periodic_boundary_is_unbiased_nearby_and_far_away() -> None:
    start = theta_near(None, 0.5, channels=3)
    options = {"num_probes": 1, "tolerance": 1e-6}
    for thetas in ([start], [start, theta_near(start, 0.02, seed=1, channels=3)]):
        draws = draw(100, thetas, LARGE, **options)
        assert_unbiased(draws, exact(thetas[-1], event_shape=LARGE))
    part = estimator(event_shape=LARGE, **options)
    update(part, start, LARGE)
    far = theta_near(start, 0.5, seed=2, channels=3)
    found, expected = update(part, far, LARGE), exact(far, event_shape=LARGE)
    assert part.num_refactorizations == 2
    assert torch.equal(part.theta, far)
    assert found[0].item() == pytest.approx(expected[0].item(), abs=5)
    assert relative_error(found[1], expected[1]) < 0.2


def test_noise_falls_with_the_number_of_probes_and_with_the_distance() -> None:
    start, direction = theta_near(None, 0.5), theta_near(None, 1.0, seed=1)

    def deviations(num_probes: int, size: float) -> list[float]:
        values, gradients = draw(150, [start, start + size * direction], num_probes=num_probes)
        return [values.std().item(), gradients.std(0).norm().item()]

    # Like 1/√k; with the distance, of second order for the value and of first for the gradient.
    base = deviations(2, 0.02)
    assert deviations(8, 0.02) == pytest.approx([size / 2 for size in base], rel=0.25)
    assert deviations(2, 0.01) == pytest.approx([base[0] / 4, base[1] / 2], rel=0.25)


@PADDED
def test_slow_walk_needs_few_factorizations(padding_mode: str) -> None:
    part, theta = estimator(padding_mode, tolerance=0.02), theta_near(None, 0.3)
    for step in range(40):
        found, expected = update(part, theta), exact(theta, padding_mode)
        # E with ‖E‖_F²/D ≤ 0.01: less than 0.01·√(2 D/k)/2 at the mean, D = 40.
        assert abs(found[0] - expected[0]) < 0.1
        assert relative_error(found[1], expected[1]) < 0.05
        theta = theta_near(theta, 0.08, seed=step)
    assert 1 < part.num_refactorizations < 10


@PADDED
def test_solutions_are_kept_as_long_as_they_solve(
    padding_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solves, by_powers = [], ControlVariateLogDet._by_powers

    def counted(*arguments: Any) -> object:
        solves.append(arguments)
        return by_powers(*arguments)

    monkeypatch.setattr(ControlVariateLogDet, "_by_powers", counted)
    part, start = estimator(padding_mode, tolerance=0.02), theta_near(None, 0.3)
    direction, num_kept, num_solves = theta_near(None, 1.0, seed=1), 0, 0
    value, gradient = update(part, start)
    for step in range(1, 31):
        theta, before = start + 0.01 * step * direction, (value, gradient)
        count = (part.num_refactorizations, len(solves))
        value, gradient = update(part, theta)
        assert part.error_estimate <= 0.02
        expected = exact(theta, padding_mode)
        assert abs(value - expected[0]) < 0.05
        assert relative_error(gradient, expected[1]) < 0.03
        if count == (part.num_refactorizations, len(solves)):
            num_kept += 1
            assert torch.equal(gradient, before[1])
            change = (gradient * (0.01 * direction)).sum()  # linear
            assert (value - before[0]).item() == pytest.approx(change.item(), abs=EXACT)
        num_solves += len(solves) - count[1]
        # A run that is resumed here goes on in the same way.
        resumed = estimator(padding_mode, tolerance=0.02, seed=1)
        resumed.load_state_dict(copy.deepcopy(part.state_dict()))
        again = update(resumed, theta)
        assert torch.equal(again[0], value)
        assert torch.equal(again[1], gradient)
        assert resumed.num_refactorizations == part.num_refactorizations
    assert num_kept > 15
    assert num_solves > 2
    assert part.num_refactorizations < 8


def test_new_image_size_and_refactorize_make_the_estimate_exact() -> None:
    part, start, small = estimator(), theta_near(None, 0.3), torch.Size([2, 3, 3])
    part.refactorize(start)  # for images of which size? There is nothing to do
    assert part.num_refactorizations == 0
    for event_shape in (IMAGE, small, IMAGE):
        assert_close(update(part, start, event_shape), exact(start, event_shape=event_shape))
    assert part.num_refactorizations == 2  # the first value is still known
    theta = theta_near(start, 0.02, seed=1)
    update(part, theta, small)
    assert part.error_estimate > 0
    part.refactorize(theta)
    assert part.num_refactorizations == 3
    assert_close(update(part, theta, small), exact(theta, event_shape=small))
    assert part.error_estimate == 0


@torch.no_grad()
def set_neighbours(layer: SelfNormalizingConv2d, coupling: float) -> None:
    """``x ↦ x − c (its four neighbours)``: periodic, singular at c = ¼, for one direction."""
    layer.theta.copy_(neighbours(coupling, layer.theta.dtype))


@pytest.mark.parametrize("size", [16, 40, 64])
def test_one_direction_that_is_lost_is_noticed(size: int) -> None:
    # Of thousands of directions, it is a small drift, and less than the tolerance of a solve. With
    # most seeds, one of the probes sees it.
    layer = SelfNormalizingConv2d(1, padding_mode="circular", log_det=Refined(seed=0))
    x = torch.randn(1, 1, size, size)

    def value(coupling: float) -> float:
        set_neighbours(layer, coupling)
        return layer.log_abs_det_jacobian(x, layer(x)).item()

    value(0.249)
    for coupling in (0.24999, 0.2499999):
        in_training = value(coupling)
        with torch.no_grad():
            assert in_training == pytest.approx(value(coupling), rel=EXACT)
    value(0.249)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        value(0.25)
    in_training = value(0.24)
    with torch.no_grad():
        assert in_training == pytest.approx(value(0.24), rel=1e-3)


@pytest.mark.usefixtures("without_factors")
def test_unfinished_solves_warn_once_and_training_goes_on() -> None:
    method = Refined(krylov_steps=1, tolerance=1e-3, num_probes=1)
    layer, x = SelfNormalizingConv2d(3, log_det=method), torch.randn(4, *LARGE)
    with torch.no_grad():
        layer.theta.copy_(theta_near(None, 0.5, channels=3))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    with pytest.warns(RuntimeWarning, match=r"relative residual of 0\.\d+ after 1 steps"):
        density_loss(layer, x)
    for _ in range(2):  # without a further warning
        loss = density_loss(layer, x)
        assert 1e-3 < layer.error_estimate < 1
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        optimizer.step()


@pytest.mark.usefixtures("without_factors")
def test_error_estimate_is_the_residual_of_unfinished_solves() -> None:
    theta = theta_near(None, 0.5, channels=3)
    part = estimator(event_shape=LARGE, krylov_steps=2, num_probes=1, tolerance=1e-3)
    with pytest.warns(RuntimeWarning, match="after 2 steps"):
        update(part, theta, LARGE)
    generator = probe_generator(0, 0, theta.device)  # the same probes
    probes = draw_probes("rademacher", 1, LARGE, generator, theta.dtype)
    multiply = Convolution("zeros").multiply
    solve = Convolution("circular").factorize(theta, LARGE).solve
    space = krylov(lambda v: multiply(theta, v), solve, probes, tolerance=0, max_steps=2)
    residual = (probes - multiply(theta, space.solution)).flatten(1).norm(dim=1)
    expected = (residual / probes.flatten(1).norm(dim=1)).square().mean().sqrt()
    assert part.error_estimate == pytest.approx(expected.item(), rel=1e-6)
    # From exact factors, new ones are taken, and there is nothing to warn of.
    part, start = estimator("circular", krylov_steps=1), theta_near(None, 0.3)
    update(part, start)
    theta = theta_near(start, 0.02, seed=1)
    assert_close(update(part, theta), exact(theta, "circular"))
    assert part.num_refactorizations == 2
    assert part.error_estimate == 0


@PADDED
def test_estimate_is_made_once_a_change_and_in_training_alone(
    padding_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = conv(2, padding_mode=padding_mode), torch.randn(3, *IMAGE)
    estimator, evaluated = layer.log_det.estimator, []

    def evaluate(*arguments: object) -> Found:
        evaluated.append(arguments)
        return ControlVariateLogDet._evaluate_at(estimator, *arguments)

    def value(x: Tensor) -> float:
        return layer.log_abs_det_jacobian(x, layer(x))[0].item()

    value(x)
    monkeypatch.setattr(estimator, "_evaluate_at", evaluate)
    for count in (1, 2):
        with torch.no_grad():
            layer.theta.mul_(0.98)
        state = copy.deepcopy(layer.state_dict())
        for mode in ("eval", "no_grad", "frozen"):
            layer.train(mode != "eval").requires_grad_(mode != "frozen")
            with torch.set_grad_enabled(mode != "no_grad"):
                value(x)
        layer.train().requires_grad_(True)
        layer.inv(layer(x).detach().clone())
        torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0, equal_nan=True)
        values = [value(x), value(x + 1), value(x.clone())]
        y = layer(x)
        values.append(-layer.inv.log_abs_det_jacobian(y, layer.inv(y))[0].item())
        assert len(set(values)) == 1
        assert len(evaluated) == count
    assert layer.num_refactorizations == 1


def test_probes_are_new_for_every_factorization_and_a_function_of_the_seed() -> None:
    start, results = theta_near(None, 0.3), []
    near = theta_near(start, 0.02, seed=1)
    for seed in (0, 0, 1, 2**31, None, None):
        part, values = estimator(seed=seed), []
        for _ in range(2):
            update(part, start)
            torch.randn(3)  # the global stream is no part of it
            values.append(update(part, near)[0].item())
            part.load_state_dict(copy.deepcopy(part.state_dict()))
            assert update(part, near)[0].item() == values[-1]  # as in a run that is resumed
            part.refactorize(start)
        assert len(set(values)) == 2
        results.append(tuple(values))
    assert results[0] == results[1]
    assert len(set(results)) == 5


other = partial(conv, 2, seed=9)

EDITS: dict[str, Callable[[SelfNormalizingConv2d], object]] = {
    "nothing": lambda layer: None,
    "state zeroed": lambda layer: layer.log_det.estimator.theta.zero_(),
    "state NaN": lambda layer: layer.log_det.estimator.theta.fill_(math.nan),
    "solves' state zeroed": lambda layer: layer.log_det.estimator.solved_theta.zero_(),
    "solves' state NaN": lambda layer: layer.log_det.estimator.solved_theta.fill_(math.nan),
    "solves' state far away": lambda layer: layer.log_det.estimator.solved_theta.add_(0.2),
    "parameter loaded": lambda layer: layer.load_state_dict({"theta": other().theta}, strict=False),
    "a checkpoint of another run": lambda layer: layer.load_state_dict(other().state_dict()),
    "another parameter": lambda layer: setattr(layer, "theta", other().theta),
    "sign": lambda layer: layer.theta.data.neg_(),
    "channels exchanged": lambda layer: layer.theta.data.copy_(layer.theta.flip(0)),
    "mirrored": lambda layer: layer.theta.data.copy_(layer.theta.flip(-1)),
}


@pytest.mark.parametrize("reload", [False, True], ids=["in place", "reloaded"])
@pytest.mark.parametrize("edit", EDITS)
def test_edit_is_noticed_and_repaired(edit: str, reload: bool) -> None:
    layer, x = conv(2), torch.randn(3, *IMAGE)
    layer.log_abs_det_jacobian(x, layer(x))
    layer.inv(x)
    with torch.no_grad():
        EDITS[edit](layer)
    if reload:
        state = copy.deepcopy(layer.state_dict())
        layer = conv(2, seed=1)
        layer.load_state_dict(state)
    layer.zero_grad()
    value = layer.log_abs_det_jacobian(x, layer(x))
    value.mean().backward()
    expected = exact(layer.theta)
    offset = 20 * layer.log_scale.sum().detach()
    assert_close((value[0].detach() - offset, layer.theta.grad), expected)
    assert relative_error(layer(layer.inv(x.clone()).detach()), x) < EXACT


def test_state_that_is_singular_in_a_new_dtype_is_replaced() -> None:
    # A visit to a kernel of a condition number of 10⁹, which float32 takes for a singular one.
    layer, x = SelfNormalizingConv2d(1, padding_mode="circular"), torch.randn(2, 1, 8, 8)
    set_neighbours(layer, 0.25 - 1e-10)
    layer.log_abs_det_jacobian(x, layer(x))
    layer.float()
    set_neighbours(layer, 0.1)
    x = x.float()
    in_training = layer.log_abs_det_jacobian(x, layer(x))
    with torch.no_grad():
        assert torch.allclose(in_training, layer.log_abs_det_jacobian(x, layer(x)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_follows_float64_by_a_state_in_float32(dtype: torch.dtype) -> None:
    double, theta = estimator(tolerance=1e-3), theta_near(None, 0.3)
    part = estimator(tolerance=1e-3).float().to(dtype)
    for step in range(10):
        low = theta.to(dtype)
        found, expected = update(part, low), update(double, low.double())
        assert part.theta.dtype == found[0].dtype == torch.float32
        assert found[1].dtype == dtype
        assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-4)
        tolerance = max(1e-3, torch.finfo(dtype).eps)
        assert relative_error(found[1].double(), expected[1]) < tolerance
        theta = theta_near(theta, 0.02, seed=step)


@pytest.mark.parametrize("kind", ["exact factors", "periodic boundary", "circular"])
def test_training_ends_where_exact_training_does(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "periodic boundary":
        request.getfixturevalue("without_factors")
    shape = LARGE if kind == "periodic boundary" else torch.Size([2, 5, 5])
    padding_mode = "circular" if kind == "circular" else "zeros"
    noise = torch.randn(200, *shape, generator=torch.Generator().manual_seed(3))
    root = conv(shape[0], seed=5, kernel_size=5)
    data, ends = kernels.convolve(noise, root.weight.detach(), "zeros"), []
    for method in (Refined(num_probes=2), "exact"):
        layer = SelfNormalizingConv2d(shape[0], log_det=method, padding_mode=padding_mode)
        with torch.no_grad():
            start = density_loss(layer, data).item()
        last = fit(layer, data, num_steps=120, lr=0.05, decay=0.96)
        with torch.no_grad():
            ends.append(density_loss(layer, data).item())
        if method != "exact":
            assert layer.error_estimate <= layer.log_det.tolerance
            assert layer.num_refactorizations < 60
            # What is printed in training is the likelihood.
            assert last == pytest.approx(ends[0], abs=0.02 if shape != LARGE else 5)
    assert start - ends[1] > 1
    assert ends[0] == pytest.approx(ends[1], abs=0.01)

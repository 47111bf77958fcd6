"""The log-determinant of a convolution that moves: unbiased, certified, refreshed in time."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyro_snf import SelfNormalizingConv2d
from pyro_snf.conv import kernels, refined
from pyro_snf.conv.refined import RefinedLogDet
from tests.registry import conv, density_loss, norm_bound, relative_error, set_kernel

# Float64, condition numbers below 10.
EXACT = 1e-9
# Solves in these tests are to rounding, unless they are the matter of the test.
TOLERANCE = 1e-10
# Standard errors of a mean over some hundred draws that chance is allowed: for each of the few
# dozen numbers that are compared, one in 15,000.
STANDARD_ERRORS = 4

IMAGE = (4, 5)
PADDED = pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)


def estimator(padding_mode: str = "zeros", channels: int = 2, **options: object) -> RefinedLogDet:
    defaults = {"num_probes": 4, "tolerance": TOLERANCE, "max_iterations": 60, "seed": 0}
    return RefinedLogDet(channels, (3, 3), padding_mode=padding_mode, **{**defaults, **options})


def theta_near(centre: Tensor | None, size: float, seed: int = 0) -> Tensor:
    """θ whose kernel is off that of ``centre`` (or the identity) by ``‖J‖₂ ≤ size``."""
    noise = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(50 + seed))
    noise = size / (kernels.theta_scale(noise) * norm_bound(noise)) * noise
    return noise if centre is None else centre + noise


def exact(theta: Tensor, padding_mode: str, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``log|det J|``, and its gradient in the kernel."""
    kernel = kernels.near_identity(theta.detach()).requires_grad_()
    matrix = kernels.matrix(kernel, image_size, padding_mode)
    value = torch.linalg.slogdet(matrix).logabsdet
    (gradient,) = torch.autograd.grad(value, kernel)
    return value.detach(), gradient


def draw(part: RefinedLogDet, theta: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and gradients of as many batches of fresh probes, along the first dimension."""
    results = []
    for _ in range(count):
        part._memory = None
        results.append(part.update(theta, IMAGE))
    values, gradients = zip(*results, strict=True)
    return torch.stack(values), torch.stack(gradients)


class Deviation(NamedTuple):
    """Of the mean of some draws from what is exact."""

    worst: float
    """The largest one of all entries, in standard errors."""
    relative: float
    """That of all entries, relative to the norm of the exact ones."""

    @classmethod
    def of(cls, draws: Tensor, expected: Tensor) -> Deviation:
        error = draws.mean(0) - expected
        # Where all draws are alike, rounding is all there is.
        deviation = (draws.std(0) / math.sqrt(len(draws))).clamp_min(EXACT)
        return cls((error / deviation).abs().max().item(), relative_error(draws.mean(0), expected))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are kept, however far the kernel has moved."""
    monkeypatch.setattr(refined, "_MAX_DRIFT", math.inf)
    monkeypatch.setattr(refined, "_MIN_EIGENVALUE", 0.0)


@pytest.fixture
def on_a_torus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of zero-padded convolutions cost too much to be a reference."""
    monkeypatch.setattr(refined, "factorization_flops", lambda *_: math.inf)


# --- A reference of some steps ago --------------------------------------------------------------


@PADDED
def test_first_use_is_exact(padding_mode: str) -> None:
    part, theta = estimator(padding_mode), theta_near(None, 0.5)
    value, gradient = part.update(theta, IMAGE)
    expected, expected_gradient = exact(theta, padding_mode, IMAGE)
    assert value.item() == pytest.approx(expected.item(), rel=EXACT)
    assert relative_error(gradient, expected_gradient) < EXACT
    assert part.certificate == 0
    assert part.num_refreshes == 1
    assert part.num_draws == 0


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("size", [0.02, 0.2])
@PADDED
def test_estimates_are_unbiased(padding_mode: str, size: float) -> None:
    part, start = estimator(padding_mode), theta_near(None, 0.5)
    part.update(start, IMAGE)
    theta = theta_near(start, size, seed=1)
    values, gradients = draw(part, theta, 300)
    assert part.num_refreshes == 1
    assert len(set(values.tolist())) == 300
    expected, expected_gradient = exact(theta, padding_mode, IMAGE)
    assert Deviation.of(values, expected).worst < STANDARD_ERRORS
    deviation = Deviation.of(gradients, expected_gradient)
    assert deviation.worst < STANDARD_ERRORS
    assert deviation.relative < 0.02
    # That the first order alone would not have done: the probes matter.
    assert abs(part._reference.value - expected) > 1e-3 * size


@pytest.mark.usefixtures("held")
@PADDED
def test_noise_falls_with_the_number_of_probes(padding_mode: str) -> None:
    deviations = []
    for num_probes in (2, 8):
        part, start = estimator(padding_mode, num_probes=num_probes), theta_near(None, 0.5)
        part.update(start, IMAGE)
        values, gradients = draw(part, theta_near(start, 0.2, seed=1), 200)
        deviations.append((values.std().item(), gradients.std(0).norm().item()))
    # Like 1/√k; a standard deviation of 200 draws is good to a twentieth.
    assert deviations[1] == pytest.approx([size / 2 for size in deviations[0]], rel=0.2)


@pytest.mark.usefixtures("held")
@PADDED
def test_noise_falls_with_the_distance_from_the_reference(padding_mode: str) -> None:
    part, start = estimator(padding_mode), theta_near(None, 0.5)
    part.update(start, IMAGE)
    direction = theta_near(None, 1.0, seed=1)
    deviations = []
    for size in (0.08, 0.04, 0.02):
        values, gradients = draw(part, start + size * direction, 100)
        deviations.append((values.std().item(), gradients.std(0).norm().item()))
    for before, after in itertools.pairwise(deviations):
        # Second order for the value, first for the gradient.
        assert after == pytest.approx([before[0] / 4, before[1] / 2], rel=0.25)


@pytest.mark.usefixtures("held")
@PADDED
def test_change_in_one_channel_as_another_sees_it_is_no_change_of_the_determinant(
    padding_mode: str,
) -> None:
    # J P⁻¹ has no basis of eigenvectors then, and every probe must see the logarithm right.
    for channels, size in [((1, 0), 0.5), ((0, 1), 2.0)]:
        part, theta = estimator(padding_mode), torch.zeros(2, 2, 3, 3)
        part.update(theta, IMAGE)
        theta[channels] = size * torch.randn(3, 3)
        values, _ = draw(part, theta, 20)
        assert torch.allclose(values, torch.zeros(20), atol=1e-6)


# --- The reference on a torus -------------------------------------------------------------------


@pytest.mark.usefixtures("on_a_torus")
@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_estimates_by_a_torus_are_unbiased(drift: float) -> None:
    part, start = estimator(num_probes=16), theta_near(None, 0.5)
    part.update(start, IMAGE)
    assert not part._reference.is_exact
    theta = start if drift == 0 else theta_near(start, drift, seed=1)
    values, gradients = draw(part, theta, 200)
    assert part.num_refreshes == 1
    expected, expected_gradient = exact(theta, "zeros", IMAGE)
    assert Deviation.of(values, expected).worst < STANDARD_ERRORS
    deviation = Deviation.of(gradients, expected_gradient)
    assert deviation.worst < STANDARD_ERRORS
    assert deviation.relative < 0.02
    # One batch of 16 probes, on an image that is nearly all edges.
    assert (values - expected).abs().max() < 2
    assert relative_error(gradients[0], expected_gradient) < 0.3


@pytest.mark.usefixtures("on_a_torus")
def test_circular_padding_is_its_own_torus() -> None:
    part, theta = estimator("circular"), theta_near(None, 0.5)
    part.update(theta, IMAGE)
    assert part._reference.is_exact
    assert part.certificate == 0


def test_large_zero_padded_convolutions_get_a_torus() -> None:
    # Nothing is factorized here: this is the decision alone.
    decisions = []
    for channels, image_size in [(1, (28, 28)), (2, IMAGE), (32, (32, 32))]:
        cost = refined.factorization_flops((3, 3), channels, image_size, "zeros")
        convolution = 2 * 8 * channels**2 * 9 * math.prod(image_size)
        decisions.append(cost <= refined._MAX_COST * convolution)
    assert decisions == [True, True, False]


# --- When references are made anew --------------------------------------------------------------


@PADDED
def test_reference_is_kept_nearby_and_made_anew_far_away(padding_mode: str) -> None:
    part, start = estimator(padding_mode), theta_near(None, 0.3)
    part.update(start, IMAGE)
    part.update(theta_near(start, 0.02, seed=1), IMAGE)
    assert part.num_refreshes == 1
    assert 0 < part.certificate <= TOLERANCE
    far = theta_near(start, 0.9, seed=2)
    value, gradient = part.update(far, IMAGE)
    assert part.num_refreshes == 2
    expected, expected_gradient = exact(far, padding_mode, IMAGE)
    assert value.item() == pytest.approx(expected.item(), rel=EXACT)
    assert relative_error(gradient, expected_gradient) < EXACT


@pytest.mark.usefixtures("on_a_torus")
def test_torus_is_made_anew_far_away() -> None:
    part, start = estimator(num_probes=64), theta_near(None, 0.3)
    part.update(start, IMAGE)
    far = theta_near(start, 0.5, seed=2)
    value, gradient = part.update(far, IMAGE)
    assert part.num_refreshes == 2
    assert torch.equal(part.kernel, kernels.near_identity(far))
    expected, expected_gradient = exact(far, "zeros", IMAGE)
    assert value.item() == pytest.approx(expected.item(), abs=1)
    assert relative_error(gradient, expected_gradient) < 0.2


@PADDED
def test_slow_walk_needs_few_references(padding_mode: str) -> None:
    part, theta = estimator(padding_mode, tolerance=0.02), theta_near(None, 0.3)
    for step in range(40):
        value, gradient = part.update(theta, IMAGE)
        expected, expected_gradient = exact(theta, padding_mode, IMAGE)
        # E with ‖E‖_F²/D ≤ 0.01: less than 0.01·√(2 D/k)/2 at the mean, D = 40.
        assert abs(value - expected) < 0.1
        assert relative_error(gradient, expected_gradient) < 0.05
        theta = theta_near(theta, 0.08, seed=step)
    assert 1 < part.num_refreshes < 10


def test_new_image_size_takes_a_new_reference() -> None:
    part, theta = estimator(), theta_near(None, 0.5)
    for image_size in (IMAGE, (3, 3), IMAGE):
        value, _ = part.update(theta, image_size)
        expected, _ = exact(theta, "zeros", image_size)
        assert value.item() == pytest.approx(expected.item(), rel=EXACT)
        assert part.image_size == image_size
    assert part.num_refreshes == 3


def test_refresh_by_hand() -> None:
    part, start = estimator(), theta_near(None, 0.3)
    part.refresh(start)  # for images of which size? There is nothing to do
    assert part.num_refreshes == 0
    part.update(start, IMAGE)
    theta = theta_near(start, 0.02, seed=1)
    part.update(theta, IMAGE)
    assert part.certificate > 0
    part.refresh(theta)
    assert part.num_refreshes == 2
    value, _ = part.update(theta, IMAGE)
    assert value.item() == pytest.approx(exact(theta, "zeros", IMAGE)[0].item(), rel=EXACT)
    assert part.certificate == 0


def neighbours(coupling: float) -> Tensor:
    """``x ↦ x − c (its four neighbours)``: on a torus, singular at c = ¼, for one direction."""
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0] = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]) * -coupling
    kernel[0, 0, 1, 1] = 1
    return kernel


@pytest.mark.parametrize("size", [16, 40, 64])
def test_one_direction_that_is_lost_is_noticed(size: int) -> None:
    # Of thousands of directions, it is a small drift, and less than the tolerance of a solve.
    layer = SelfNormalizingConv2d(1, padding_mode="circular")
    x = torch.randn(1, 1, size, size)

    def value(coupling: float) -> float:
        set_kernel(layer.theta, neighbours(coupling))
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


# --- Solves that do not converge ----------------------------------------------------------------


@pytest.mark.usefixtures("on_a_torus")
def test_unfinished_solves_warn_once_and_training_goes_on() -> None:
    layer = conv(2, max_iterations=1, tolerance=1e-3)
    x = torch.randn(4, 2, *IMAGE)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for step in range(4):
        loss = density_loss(layer, x) if step else None
        if loss is None:
            with pytest.warns(RuntimeWarning, match=r"relative residual of 0\.\d+ after 1 iter"):
                loss = density_loss(layer, x)
        assert 1e-3 < layer.certificate < 1
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        optimizer.step()


@pytest.mark.usefixtures("on_a_torus")
def test_certificate_is_the_residual_of_the_solves() -> None:
    part, theta = estimator(max_iterations=2, num_probes=3), theta_near(None, 0.5)
    with pytest.warns(RuntimeWarning, match="after 2 iterations"):
        part.update(theta, IMAGE)
    # The same probes, solved in the same way.
    part.num_draws -= 1
    probes = part._draw_probes(IMAGE)
    matrix = kernels.matrix(kernels.near_identity(theta), IMAGE, "zeros")
    factors = part._reference.factors
    rows = probes.flatten(1)
    basis = [factors.solve(probes).flatten(1)]
    basis.append(factors.solve((basis[0] @ matrix.mT).view_as(probes)).flatten(1))
    squares = []
    for index in range(3):
        columns = torch.stack([matrix @ vectors[index] for vectors in basis], dim=1)
        best = torch.linalg.lstsq(columns, rows[index, :, None]).solution
        residual = rows[index, :, None] - columns @ best
        squares.append((residual.norm() / rows[index].norm()).item() ** 2)
    assert part.certificate == pytest.approx(math.sqrt(sum(squares) / 3), rel=1e-6)


@pytest.mark.usefixtures("held")
def test_unfinished_solves_by_an_exact_reference_take_a_new_one() -> None:
    part, start = estimator(max_iterations=1), theta_near(None, 0.3)
    part.update(start, IMAGE)
    theta = theta_near(start, 0.2, seed=1)
    value, _ = part.update(theta, IMAGE)  # no warning: there is nothing to warn of
    assert part.num_refreshes == 2
    assert part.certificate == 0
    assert value.item() == pytest.approx(exact(theta, "zeros", IMAGE)[0].item(), rel=EXACT)


# --- Once a step, and without a trace -----------------------------------------------------------


@PADDED
def test_update_is_made_once_a_change(padding_mode: str) -> None:
    layer, x = conv(2, padding_mode=padding_mode), torch.randn(3, 2, *IMAGE)
    layer.log_abs_det_jacobian(x, layer(x))
    with torch.no_grad():
        layer.theta.mul_(0.98)
    values = [layer.log_abs_det_jacobian(y, layer(y))[0].item() for y in (x, x + 1, x.clone())]
    y = layer(x)
    values.append(-layer.inv.log_abs_det_jacobian(y, layer.inv(y))[0].item())
    assert len(set(values)) == 1
    assert layer.estimator.num_draws == 1
    with torch.no_grad():
        layer.theta.mul_(0.99)
    layer.log_abs_det_jacobian(x, layer(x))
    assert layer.estimator.num_draws == 2
    assert layer.num_refreshes == 1


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen", "call", "inverse"])
def test_nothing_but_a_training_log_det_draws_probes(how: str) -> None:
    layer, x = conv(2), torch.randn(4, 2, *IMAGE)
    layer.log_abs_det_jacobian(x, layer(x))
    with torch.no_grad():
        layer.theta.mul_(0.98)
    state = copy.deepcopy(layer.state_dict())
    if how == "call":
        layer(x)
    elif how == "inverse":
        layer.inv(x)
    else:
        layer.train(how != "eval").requires_grad_(how != "frozen")
        with torch.set_grad_enabled(how != "no_grad"):
            layer.log_abs_det_jacobian(x, layer(x))
    assert torch.equal(layer.estimator.kernel, state["estimator.kernel"])
    assert layer.estimator.get_extra_state() == state["estimator._extra_state"]


def test_random_stream_of_the_user_is_untouched() -> None:
    part, theta = estimator(), theta_near(None, 0.3)
    state = torch.get_rng_state()
    for seed in range(3):
        part.update(theta_near(theta, 0.02, seed=seed), IMAGE)
    assert part.num_draws > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("held")
def test_probes_are_fresh_and_a_function_of_the_seed() -> None:
    results = []
    for seed in (0, 0, 1, 2**31):
        part, start = estimator(seed=seed), theta_near(None, 0.3)
        part.update(start, IMAGE)
        torch.randn(3)  # the global stream is no part of it
        values, _ = draw(part, theta_near(start, 0.1, seed=1), 3)
        assert len(set(values.tolist())) == 3
        results.append(tuple(values.tolist()))
    assert results[0] == results[1]
    assert len(set(results)) == 3


def test_probes_are_signs() -> None:
    part = estimator(num_probes=100)
    probes = part._draw_probes(IMAGE)
    assert probes.shape == (100, 2, *IMAGE)
    assert set(probes.unique().tolist()) == {-1, 1}
    assert abs(probes.mean()) < 0.1  # 4000 of them: a deviation of 0.016


# --- The state ----------------------------------------------------------------------------------


def edit_buffer(value: float) -> Callable[[SelfNormalizingConv2d], None]:
    return lambda layer: layer.estimator.kernel.fill_(value)


EDITS: dict[str, Callable[[SelfNormalizingConv2d], None]] = {
    "nothing": lambda layer: None,
    "reference zeroed": edit_buffer(0.0),
    "reference NaN": edit_buffer(math.nan),
    "a checkpoint without a reference": lambda layer: layer.load_state_dict(
        {"theta": conv(2, seed=9).theta}, strict=False
    ),
    "a checkpoint of another run": lambda layer: layer.load_state_dict(
        conv(2, seed=9).state_dict()
    ),
    "another parameter": lambda layer: setattr(layer, "theta", conv(2, seed=9).theta),
    "sign": lambda layer: layer.theta.data.neg_(),
    "channels exchanged": lambda layer: layer.theta.data.copy_(layer.theta.flip(0)),
    "mirrored": lambda layer: layer.theta.data.copy_(layer.theta.flip(-1)),
}


@pytest.mark.parametrize("reload", [False, True], ids=["in place", "reloaded"])
@pytest.mark.parametrize("edit", EDITS)
def test_edit_is_noticed_and_repaired(edit: str, reload: bool) -> None:
    layer, x = conv(2), torch.randn(3, 2, *IMAGE)
    layer.log_abs_det_jacobian(x, layer(x))
    with torch.no_grad():
        EDITS[edit](layer)
    if reload:
        state = copy.deepcopy(layer.state_dict())
        layer = conv(2, seed=1)
        layer.load_state_dict(state)
    layer.zero_grad()
    value = layer.log_abs_det_jacobian(x, layer(x))
    value.mean().backward()
    expected = torch.linalg.slogdet(kernels.matrix(layer.weight, IMAGE, "zeros")).logabsdet
    assert torch.allclose(value, expected.expand(3), rtol=EXACT)
    (gradient,) = torch.autograd.grad(expected, layer.theta)
    assert relative_error(layer.theta.grad, gradient) < EXACT


def test_reference_that_is_singular_in_a_new_dtype_is_replaced() -> None:
    # A visit to a kernel of a condition number of 10⁹, which float32 takes for a singular one.
    layer, x = SelfNormalizingConv2d(1, padding_mode="circular"), torch.randn(2, 1, 8, 8)
    set_kernel(layer.theta, neighbours(0.25 - 1e-10))
    layer.log_abs_det_jacobian(x, layer(x))
    layer.float()
    set_kernel(layer.theta, neighbours(0.1).float())
    x = x.float()
    in_training = layer.log_abs_det_jacobian(x, layer(x))
    with torch.no_grad():
        assert torch.allclose(in_training, layer.log_abs_det_jacobian(x, layer(x)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_is_in_float32_at_least(dtype: torch.dtype) -> None:
    single = SelfNormalizingConv2d(2, dtype=torch.float32)
    for layer in (SelfNormalizingConv2d(2, dtype=dtype), single.to(dtype)):
        assert layer.estimator.kernel.dtype == torch.float32
        x = torch.randn(2, 2, *IMAGE, dtype=dtype)
        layer.log_abs_det_jacobian(x, layer(x)).sum().backward()
        assert layer.theta.grad.dtype == dtype
        assert layer.estimator.kernel.dtype == torch.float32


def test_float32_follows_float64() -> None:
    parts = [estimator(tolerance=1e-3, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    theta = theta_near(None, 0.3)
    for step in range(10):
        values, gradients = zip(
            *[part.update(theta.to(part.kernel.dtype), IMAGE) for part in parts], strict=True
        )
        assert values[0].dtype == gradients[0].dtype == torch.float32
        assert values[0].item() == pytest.approx(values[1].item(), abs=1e-4)
        assert relative_error(gradients[0].double(), gradients[1]) < 1e-3
        theta = theta_near(theta, 0.02, seed=step)


# --- Training -----------------------------------------------------------------------------------


@pytest.fixture
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("reference", ["exact", "torus", "circular"])
def test_training_ends_where_exact_training_does(
    reference: str, request: pytest.FixtureRequest
) -> None:
    if reference == "torus":
        request.getfixturevalue("on_a_torus")
    padding_mode = "circular" if reference == "circular" else "zeros"
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(200, 2, 5, 5, generator=generator)
    data = kernels.convolve(data, conv(2, seed=5, kernel_size=5).weight.detach(), "zeros")
    ends = []
    for log_det in ("refined", "exact"):
        layer = SelfNormalizingConv2d(2, log_det=log_det, padding_mode=padding_mode)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.96)
        with torch.no_grad():
            start = density_loss(layer, data).item()
        for _ in range(120):
            loss = density_loss(layer, data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            ends.append(density_loss(layer, data).item())
        if log_det == "refined":
            assert layer.certificate <= layer.estimator.tolerance
            if reference != "torus":
                assert layer.num_refreshes < 60
            # What is printed in training is the likelihood.
            assert loss.item() == pytest.approx(ends[0], abs=0.02 if reference != "torus" else 1)
    assert start - ends[1] > 1
    assert ends[0] == pytest.approx(ends[1], abs=0.01)

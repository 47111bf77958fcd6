"""Natural steps: against formulas with dense matrices, and their convergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_snf import natural_step
from pyro_snf.natural_step import (
    Covariance,
    Moments,
    Secants,
    SignalShare,
    moments,
    relative_step,
)

# Float64, matrices of condition numbers below 100.
EXACT = 1e-9
# The average of many samples is about normal: such a deviation has a probability of about 10⁻⁵.
STANDARD_ERRORS = 4.5
# Draws of an average: its standard error is that of one draw, over 20.
DRAWS = 400

Step = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def secant_step(h: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    secants = Secants(h, y)
    return secants.step(rate, secants.product)


def positive_definite(dim: int, smallest: float = 0.4, largest: float = 4.0) -> Tensor:
    """Symmetric, with random eigenvectors and eigenvalues of uniformly spaced logarithms."""
    vectors = torch.linalg.qr(torch.randn(dim, dim)).Q
    return (vectors * torch.logspace(math.log10(smallest), math.log10(largest), dim)) @ vectors.mT


def dense(step: tuple[Tensor, Tensor]) -> Tensor:
    """``I + P Qᵀ``."""
    left, right = step
    return torch.eye(left.shape[-1]) + left.mT @ right


def of_gaussian(precision: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """h, standard normal, and ``y = (N − I) h``."""
    h = torch.randn(count, len(precision))
    return h, h @ (precision - torch.eye(len(precision)))


# --- Moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 5, 8, 64])
def test_contrasts_are_orthonormal_and_have_no_mean(count: int) -> None:
    found = moments(torch.eye(count), torch.zeros(count, count))
    assert found.h.shape == (count - 1, count)
    assert torch.allclose(found.h @ found.h.mT, torch.eye(count - 1), atol=EXACT)
    assert torch.allclose(found.h.sum(-1), torch.zeros(count - 1), atol=EXACT)


@pytest.mark.parametrize("count", [4, 9])
def test_contrasts_give_the_sample_covariance(count: int) -> None:
    h, y = torch.randn(count, 6), torch.randn(count, 6) + 3.0
    found = moments(h, y)
    expected = (y - y.mean(0)).mT @ (h - h.mean(0)) / (count - 1)
    assert torch.allclose(found.y.mT @ found.h / (count - 1), expected, atol=EXACT)
    assert torch.allclose(found.mean, y.mean(0), atol=EXACT)
    bounded = moments(h, y / 10).bounded  # not cut to a length of 2√D
    assert torch.allclose(bounded.left.mT @ bounded.right, expected / 10, atol=EXACT)


def test_covariance_is_that_of_its_factors() -> None:
    one, other = (Covariance(torch.randn(n, 6), torch.randn(n, 6)) for n in (3, 5))
    dense_one, dense_other = (each.left.mT @ each.right for each in (one, other))
    assert one.trace == pytest.approx(dense_one.trace().item() / 6, abs=EXACT)
    assert one.inner(other) == pytest.approx((dense_one * dense_other).sum().item(), abs=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_moments_are_in_double_precision(dtype: torch.dtype) -> None:
    h = torch.randn(8, 5).to(dtype)
    found = moments(h, h)
    assert found.h.dtype == found.y.dtype == found.mean.dtype == torch.float64
    expected = moments(h.double(), h.double())
    assert torch.equal(found.h, expected.h)
    assert torch.equal(found.bounded.left, expected.bounded.left)


@pytest.mark.parametrize("count", [8, 13])
def test_products_of_independent_moments_are_unbiased(count: int) -> None:
    # y = A h + d + noise, of lengths below those that are cut.
    dim = 20
    matrix = 0.3 * torch.randn(dim, dim) / math.sqrt(dim) + 0.3 * torch.eye(dim)
    shift = 0.3 * torch.ones(dim)

    def sample() -> Moments:
        h = torch.randn(count, dim)
        return moments(h, h @ matrix.mT + shift + 0.2 * torch.randn(count, dim))

    products, lengths = [], []
    for _ in range(DRAWS):
        one, other = sample(), sample()
        assert torch.equal(one.bounded_mean, one.mean)
        products.append(
            [
                one.bounded.inner(other.bounded),
                one.bounded_mean @ other.bounded_mean,
                one.bounded.trace,
            ]
        )
        lengths.append(one.bounded.inner(one.bounded))
    found = torch.tensor(products)
    error = found.std(0) / math.sqrt(DRAWS)
    expected = [matrix.square().sum(), shift.square().sum(), matrix.trace() / dim]
    assert ((found.mean(0) - torch.stack(expected)).abs() < STANDARD_ERRORS * error).all()
    assert sum(lengths) / DRAWS > 2 * expected[0]  # the length of one contains the noise, too


def test_length_for_a_gaussian_is_that_of_its_signal_and_few_samples() -> None:
    # For Gaussian y = A h with A's trace 0 and symmetric: E‖M − tr M/D‖² with n = N − 1 is that of
    # a Wishart matrix, ‖A‖² (1 + (D + 1)/n) − 2‖A‖²/(Dn).
    dim, count = 12, 8
    matrix = torch.diag(torch.tensor([0.2, -0.2] * 6))
    values = []
    for _ in range(DRAWS):
        h = torch.randn(count, dim)
        found = moments(h, h @ matrix).bounded
        values.append(found.inner(found) - dim * found.trace**2)
    powers = torch.tensor(values)
    error = powers.std() / math.sqrt(DRAWS)
    size = matrix.square().sum()
    expected = size * (1 + (dim + 1) / (count - 1) - 2 / (dim * (count - 1)))
    assert (powers.mean() - expected).abs() < STANDARD_ERRORS * error


def test_one_outlier_does_not_take_over() -> None:
    h, y = torch.randn(8, 10), torch.randn(8, 10)
    y[3] *= 1e6
    found = moments(h, y)
    # Contrasts count as 2√D long at most, and the mean as √D long.
    lengths = 7 * found.bounded.left.norm(dim=-1)
    assert lengths.max().item() == pytest.approx(2 * math.sqrt(10))
    assert torch.equal(found.bounded.right, found.h)
    longest = 2 * math.sqrt(10) * found.h.norm(dim=-1).max().item()
    assert found.bounded.inner(found.bounded) <= longest**2
    assert abs(found.bounded.trace) <= longest / 10
    assert found.bounded_mean.norm().item() == pytest.approx(math.sqrt(10))
    # The rows themselves are for the step, which cuts by itself.
    assert found.y.abs().max() > 1e5
    assert found.mean.norm() > 1e5


def test_moments_in_one_dimension() -> None:
    h, y = torch.randn(8, 1), 0.1 * torch.randn(8, 1)
    found = moments(h, y).bounded
    covariance = torch.cov(torch.stack([h[:, 0], y[:, 0]]))[0, 1].item()
    assert found.trace == pytest.approx(covariance, abs=EXACT)
    square = found.trace.item() ** 2  # M is its trace
    assert found.inner(found).item() == pytest.approx(square, abs=EXACT)


# --- The share of the signal --------------------------------------------------------------------


def test_share_is_1_for_constant_gradients() -> None:
    share = SignalShare()
    assert share.value == 0.0
    for _ in range(50):
        share.update(3.0, 3.0)
        assert share.value == 1.0
    assert share.memory == natural_step._MIN_MEMORY


def test_share_of_pure_noise_goes_to_0_and_its_memory_grows() -> None:
    # Signals of ±1 with a power of 1: of 100 of them, the average is 0.1.
    share = SignalShare()
    share.update(1.0, 1.0)
    values = []
    for _ in range(1000):
        share.update(*(torch.randn(2).sign().prod().item(), 1.0))
        values.append(share.value)
    assert sum(values[500:]) / 500 < 0.1
    assert share.memory > 0.5 * natural_step._MAX_MEMORY
    assert share.memory <= natural_step._MAX_MEMORY


def test_share_of_a_constant_signal_in_noise() -> None:
    share = SignalShare()
    values = []
    for _ in range(2000):
        share.update(0.3 + torch.randn(()).item(), 1.0)
        values.append(share.value)
    # Averages of some 14 values, of a deviation of 1, cut at 0 and 1: the mean of them is not far.
    assert sum(values[500:]) / 1500 == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("signal", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_share_ignores_what_is_not_finite(which: int, signal: float) -> None:
    share = SignalShare()
    share.update(1.0, 2.0)
    before = vars(share).copy()
    share.update(*((signal, 1.0), (1.0, signal))[which])
    assert vars(share) == before


def test_share_is_between_0_and_1() -> None:
    share = SignalShare()
    share.update(-1.0, 1.0)
    assert share.value == 0.0
    share.update(100.0, 1.0)
    assert share.value == 1.0
    assert SignalShare().value == 0.0


# --- Relative steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [3, 40])
def test_relative_step_is_its_formula(count: int, rate: float) -> None:
    h, y = torch.randn(count, 6), 1e-2 * torch.randn(count, 6)  # short ones, that are not cut
    expected = torch.eye(6) - rate * y.mT @ h / count
    assert torch.allclose(dense(relative_step(h, y, rate)), expected, atol=EXACT)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e12])
@pytest.mark.parametrize("count", [3, 40])
def test_relative_step_is_no_longer_than_its_cosine_allows(count: int, scale: float) -> None:
    dim = 6
    h, y = torch.randn(count, dim), scale * torch.randn(count, dim)
    left, right = relative_step(h, y, 1.0)
    cosine = (y * h).sum(-1).abs() / (y.norm(dim=-1) * h.norm(dim=-1))
    longest = 0.5 * cosine.clamp(min=1 / math.sqrt(dim)) * min(1, dim / count)
    size = left.norm(dim=-1) * right.norm(dim=-1)
    assert (size <= longest * (1 + EXACT)).all()
    assert torch.allclose(size, torch.minimum(y.norm(dim=-1) * h.norm(dim=-1) / count, longest))
    # Only the length is another one.
    directions = left / left.norm(dim=-1, keepdim=True)
    assert torch.allclose(directions, -y / y.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("zero", ["h", "y", "both"])
def test_relative_step_with_a_row_of_zeros(zero: str) -> None:
    h, y = torch.randn(3, 4), torch.randn(3, 4)
    for name, rows in {"h": h, "y": y}.items():
        rows[1] *= zero not in (name, "both")
    keep = torch.tensor([0, 2])
    expected = dense(relative_step(h, y, 1.0)) - torch.eye(4)
    left, right = relative_step(h, y, 1.0)
    assert torch.allclose(expected, left[keep].mT @ right[keep], atol=EXACT)


@pytest.mark.parametrize("count", [7, 19, 63])
def test_stiffest_relative_step_shrinks(count: int) -> None:
    # N = 10⁸ I, which is far too wide: no direction may become longer.
    h = natural_step._contrasts(torch.randn(count + 1, 20))
    change = dense(relative_step(h, 1e8 * h, 1.0))
    assert torch.linalg.matrix_norm(change, 2) <= 1 + EXACT


# --- Secant steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7])
def test_secant_step_finds_the_precision_along_its_samples(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(natural_step, "_SECANT_RATE", 1.0)
    precision = positive_definite(32)
    h, y = of_gaussian(precision, count)
    change = dense(secant_step(h, y, 1.0))
    # The new covariance maps N h to h, and the new precision is I along h.
    assert torch.allclose(h @ precision @ change @ change.mT, h, atol=EXACT)
    basis = torch.linalg.qr(h.mT).Q
    found = basis.mT @ change.mT @ precision @ change @ basis
    assert torch.allclose(found, torch.eye(count), atol=EXACT)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_secant_step_is_block_bfgs(rate: float) -> None:
    # Of N_η = I + η (N − I): S = V (VᵀUᵀ)⁻¹ V + (I − …)(I − …)ᵀ, the covariance after the update.
    dim, count = 24, 5
    eta = 0.7 * rate
    precision = positive_definite(dim)
    h, y = of_gaussian(precision, count)
    change = dense(secant_step(h, y, rate))
    eye = torch.eye(dim)
    partial = (1 - eta) * eye + eta * precision
    basis = torch.linalg.qr(h.mT).Q
    middle = basis @ torch.linalg.inv(basis.mT @ partial @ basis) @ basis.mT
    left = eye - middle @ partial
    assert torch.allclose(change @ change.mT, middle + left @ left.mT, atol=EXACT)


def test_secant_step_at_the_optimum_is_none() -> None:
    h = torch.randn(5, 24)
    change = dense(secant_step(h, torch.zeros(5, 24), 1.0))
    assert torch.allclose(change, torch.eye(24), atol=EXACT)


HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "stiff": lambda h: 1e8 * h,
    "flat": lambda h: -h,
    "concave": lambda h: -1e3 * h,
    "noise": lambda h: 1e3 * torch.randn_like(h),
    "one outlier": lambda h: torch.cat([1e9 * torch.randn(1, h.shape[-1]), 0.1 * h[1:]]),
    "skew": lambda h: 5 * h.roll(1, dims=-1),
}


@pytest.mark.parametrize("kind", HARD)
def test_secant_step_has_a_positive_determinant_and_bounded_growth(kind: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        h = torch.randn(7, 28)
        change = dense(secant_step(h, HARD[kind](h), 1.0))
        sign, log_det = torch.linalg.slogdet(change)
        assert sign == 1
        # The determinant is that of T^{−1/2}, of eigenvalues of at least 1/4 (or 1 − η).
        assert log_det <= -3.5 * math.log(0.3) + EXACT
        assert torch.isfinite(change).all()


def test_secant_step_takes_one_row_for_another_of_the_same_span() -> None:
    # It depends on the span of the rows, and on what y is there.
    precision = positive_definite(24)
    h, y = of_gaussian(precision, 5)
    mixing = torch.randn(5, 5)
    one, other = (secant_step(mix @ h, mix @ y, 0.5) for mix in (torch.eye(5), mixing))
    assert torch.allclose(dense(one), dense(other), atol=EXACT)


# --- Convergence --------------------------------------------------------------------------------


def steps_to_converge(step: Step, precision: Tensor, count: int, most: int) -> int:
    """From W = I, with n contrasts a step, until ``‖WᵀPW − I‖_F < 0.01``."""
    weight = torch.eye(len(precision))
    for number in range(most):
        h, y = of_gaussian(weight.mT @ precision @ weight, count)
        if (y.norm() / math.sqrt(count)) < 1e-2:
            return number
        weight = weight @ dense(step(h, y, 1.0))
    return most


def rated_relative_step(h: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """With the share of the signal that is typical of a Gaussian posterior."""
    count, dim = h.shape
    return relative_step(h, y, rate * count / (count + dim + 1))


@pytest.mark.parametrize(("step", "dim"), [(secant_step, 28), (rated_relative_step, 10)])
def test_convergence_is_hardly_slower_at_a_condition_number_of_1e8(step: Step, dim: int) -> None:
    # Measured: 34 and 65 steps (secant), 24 and 61; flat directions grow by bounded factors. With a
    # gradient's step, the ratio would be that of the conditions, 10⁶.
    numbers = []
    for condition in (1e2, 1e8):
        precision = positive_definite(dim, condition**-0.5, condition**0.5)
        numbers.append(steps_to_converge(step, precision, 7, 1000))
    assert numbers[0] < 60
    assert numbers[1] < 4 * numbers[0]


def test_secant_steps_gain_a_digit_in_some_multiples_of_d_over_n_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # D/n = 4 and 16 steps; measured: 3 and 2.5 times as many for a digit.
    for count in (14, 4):
        precision, weight = positive_definite(56), torch.eye(56)
        errors = []
        num_steps = 4 * 56 // count
        for _ in range(2 * num_steps):
            precision_now = weight.mT @ precision @ weight
            errors.append((precision_now - torch.eye(56)).norm().item())
            weight = weight @ dense(secant_step(*of_gaussian(precision_now, count), 1.0))
        assert errors[num_steps] < errors[0] / 10
        assert errors[-1] < errors[num_steps] / 5


@pytest.mark.parametrize("step", [relative_step, secant_step])
def test_steps_move_along_with_the_coordinates(step: Step) -> None:
    # W ← W (I + PQᵀ), and h and y = Wᵀg are what they are in all coordinates x → Bx: of rotated h,
    # which are as good, the step is the rotated one.
    h, y = of_gaussian(positive_definite(24), 5)
    rotation = torch.linalg.qr(torch.randn(24, 24)).Q
    rotated = dense(step(h @ rotation, y @ rotation, 0.8))
    assert torch.allclose(rotated, rotation.mT @ dense(step(h, y, 0.8)) @ rotation, atol=EXACT)

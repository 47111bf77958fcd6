"""Exact log-determinants and solves of convolutions, against the linear algebra of the matrix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyro_snf.maps import Convolution
from pyro_snf.maps.convolution_factors import ConvolutionFactors, factorization_flops
from pyro_snf.maps.kernels import PADDING_MODES, convolve, matrix

# float64, condition numbers up to 1e3 and thousands of entries; where no pivoting is needed, errors
# are of the order of 1e-13.
ROUNDING = 1e-9

# float32 results are those of float64, rounded.
ROUNDING_FLOAT32 = 1e-6

Size = tuple[int, int]

PADDED = pytest.mark.parametrize("padding_mode", PADDING_MODES)

KERNEL_SIZES = [(1, 1), (3, 3), (3, 5), (5, 3), (1, 3), (3, 1), (5, 5), (7, 3), (9, 1)]
IMAGE_SIZES = [(3, 3), (4, 4), (5, 4), (4, 7), (6, 8), (7, 7), (7, 9), (12, 5), (3, 13)]
PAIRS = itertools.product(KERNEL_SIZES, IMAGE_SIZES)
SHAPES = [(one, image) for one, image in PAIRS if one[0] <= image[0] and one[1] <= image[1]]


def make_kernel(channels: int, kernel_size: Size, scale: float = 0.5) -> Tensor:
    """``δ`` and noise: of a small condition number."""
    generator = torch.Generator().manual_seed(channels)
    kernel = torch.randn(channels, channels, *kernel_size, generator=generator)
    kernel *= scale / math.sqrt(kernel[0].numel())
    kernel[:, :, kernel_size[0] // 2, kernel_size[1] // 2] += torch.eye(channels)
    return kernel


def make_ill_conditioned(
    channels: int, image_size: Size, padding_mode: str, condition: float
) -> Tensor:
    """``I + sN`` for random N, with s a little below ``−1/λ``, λ a real eigenvalue of N."""
    while True:
        noise = torch.randn(channels, channels, 3, 3)
        if padding_mode == "circular":  # all eigenvalues are real if N is symmetric
            noise = noise + noise.flip(-1, -2).transpose(0, 1)
        values = torch.linalg.eigvals(matrix(noise, image_size, padding_mode))
        values = values.real[(values.imag.abs() < 1e-9) & (values.real < 0)]
        if len(values):
            break
    delta = make_kernel(channels, (3, 3), scale=0.0)
    scale, step = 0.0, -1 / values.min().item()
    for _ in range(60):
        step /= 2
        kernel = delta + (scale + step) * noise
        if torch.linalg.cond(matrix(kernel, image_size, padding_mode)) < condition:
            scale += step
    return delta + scale * noise


def log_abs_det(kernel: Tensor, factors: ConvolutionFactors) -> Tensor:
    """``log|det J|`` with all its derivatives in the kernel."""
    part = Convolution(factors.padding_mode)
    return part.log_abs_det(factors).attach_to(part.theta_of(kernel))


def close(actual: Tensor, expected: Tensor, rounding: float = ROUNDING) -> bool:
    return bool((actual - expected).norm() <= rounding * (1 + expected.norm()))


def assert_exact(
    kernel: Tensor, image_size: Size, padding_mode: str, rounding: float = ROUNDING
) -> ConvolutionFactors:
    """Value, gradient, a second derivative and solves are those of the matrix."""
    jacobian = matrix(kernel, image_size, padding_mode)
    direction = torch.randn_like(kernel)
    images = torch.randn(3, len(kernel), *image_size)
    factors = ConvolutionFactors(kernel, image_size, padding_mode)
    results = []
    for function in (
        lambda kernel: torch.linalg.slogdet(matrix(kernel, image_size, padding_mode)).logabsdet,
        lambda kernel: log_abs_det(kernel, factors),
    ):
        parameter = kernel.clone().requires_grad_()
        value = function(parameter)
        (gradient,) = torch.autograd.grad(value, parameter, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction).sum(), parameter)
        results.append((value, gradient, product))
    for expected, actual in zip(*results, strict=True):
        assert close(actual, expected, rounding)
    assert close(factors.log_abs_det, results[0][0], rounding)
    assert close(factors.gradient, results[0][1], rounding)
    for transposed in (False, True):
        solved = torch.linalg.solve(jacobian.mT if transposed else jacobian, images.flatten(1).mT)
        before = images.clone()
        assert close(factors.solve(images, transposed), solved.mT.view_as(images), rounding)
        assert torch.equal(images, before)
    return factors


@pytest.mark.parametrize(
    ("kernel_size", "image_size", "channels", "padding_mode", "scale"),
    [
        *[
            (*one, count, mode, 0.5)
            for one in SHAPES
            for count in (1, 2, 3)
            for mode in PADDING_MODES
        ],
        ((3, 5), (24, 15), 2, "zeros", 0.5),
        ((3, 5), (15, 24), 2, "zeros", 0.5),
        ((3, 5), (24, 15), 2, "circular", 0.5),
    ],
)
def test_everything_is_that_of_the_matrix(
    kernel_size: Size, image_size: Size, channels: int, padding_mode: str, scale: float
) -> None:
    assert_exact(make_kernel(channels, kernel_size, scale), image_size, padding_mode)


@PADDED
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_ill_conditioned(condition: float, channels: int, padding_mode: str) -> None:
    kernel = make_ill_conditioned(channels, (8, 9), padding_mode, condition)
    # The second derivative's condition number is the square.
    rounding = ROUNDING * max(1.0, condition / 1e3)
    factors = assert_exact(kernel, (8, 9), padding_mode, rounding)
    assert condition / 10 < factors.condition < 10 * condition


@pytest.mark.parametrize("offset", [0.0, 1e-12, 1e-6, 1e-3])
def test_convolution_that_is_singular_with_a_periodic_boundary(offset: float) -> None:
    # x − ¼ (its four neighbours): of the constant image, nothing is left but at the edges.
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[..., [0, 1, 1, 2], [1, 0, 2, 1]] = -0.25
    kernel[..., 1, 1] = 1 + offset
    assert_exact(kernel, (6, 8), "zeros")


@pytest.mark.parametrize(
    ("channels", "entries", "size"),
    [
        (12, [0.3, 1.0, -0.2], 32),
        (1, [0.3, 1.0, -0.2], 256),
        # Singular with a periodic boundary: only factors of the whole sparse matrix serve, of 4356
        # unknowns.
        (1, [-1.0, 1.0, 0.0], 66),
    ],
    ids=["many channels", "many pixels", "pivots"],
)
def test_large_images(channels: int, entries: list[float], size: int) -> None:
    # J = M ⊗ A ⊗ B of a separable kernel.
    mixing, row = make_kernel(channels, (1, 1))[:, :, 0, 0], torch.tensor(entries)
    column = row.flip(0)
    kernel = torch.einsum("oi,a,b->oiab", mixing, column, row).requires_grad_()
    factors = ConvolutionFactors(kernel, (size, size), "zeros")
    parts = [mixing]
    for line in (column, row):
        shifts = [torch.diag(torch.ones(size - abs(k)), k) for k in (-1, 0, 1)]
        parts.append(sum(number * shift for number, shift in zip(line, shifts, strict=True)))
    dim = channels * size**2
    expected = sum(dim / len(part) * torch.linalg.slogdet(part).logabsdet for part in parts)
    assert close(factors.log_abs_det, expected)
    traces = [torch.linalg.inv(parts[0]).mT]
    for part in parts[1:]:
        inverse = torch.linalg.inv(part)
        traces.append(torch.stack([(inverse @ shift).trace() for shift in shifts]))
    assert close(factors.gradient, torch.einsum("oi,a,b->oiab", *traces))
    images = torch.randn(2, channels, size, size)
    for transposed in (False, True):
        solution = factors.solve(images, transposed)
        matrices = [part.mT if transposed else part for part in parts]
        assert close(torch.einsum("oi,ap,bq,nipq->noab", *matrices, solution), images)
    if row.sum() == 0:
        (gradient,) = torch.autograd.grad(log_abs_det(kernel, factors), kernel, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 3), (3, 1), (1, 1)])
def test_inverse_kernel_of_periodic_images(kernel_size: Size) -> None:
    kernel, images = make_kernel(2, kernel_size), torch.randn(2, 2, 5, 7)
    factors = ConvolutionFactors(kernel, (5, 7), "circular")
    inverse = factors.inverse_kernel((5, 7))
    assert close(convolve(images, inverse, "circular"), factors.solve(images))
    # A smaller window is a part of the larger one.
    assert close(factors.inverse_kernel((3, 1)), inverse[:, :, 1:4, 3:4])
    with pytest.raises(ValueError, match="expected padding_mode='circular'; got 'zeros'"):
        ConvolutionFactors(kernel, (5, 7), "zeros").inverse_kernel((3, 3))


@PADDED
@pytest.mark.parametrize("condition", [3.0, 100.0, 1e4, 1e9])
def test_float32_is_as_accurate_as_the_kernel(condition: float, padding_mode: str) -> None:
    kernel = make_ill_conditioned(2, (8, 9), padding_mode, condition)
    factors = ConvolutionFactors(kernel.float(), (8, 9), padding_mode)
    if condition > 1e8:
        ConvolutionFactors(kernel, (8, 9), padding_mode).log_abs_det.item()
        with pytest.raises(torch.linalg.LinAlgError, match=r"singular in torch\.float32"):
            _ = factors.log_abs_det
        return
    expected = ConvolutionFactors(kernel.float().double(), (8, 9), padding_mode)
    for name in ("log_abs_det", "gradient"):
        assert getattr(factors, name).dtype == torch.float32
        assert close(getattr(factors, name), getattr(expected, name), ROUNDING_FLOAT32)
    images = torch.randn(2, 2, 8, 9, dtype=torch.float32)
    solution = factors.solve(images)
    assert solution.dtype == torch.float32
    assert close(solution, expected.solve(images.double()), ROUNDING_FLOAT32 * condition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PADDED
@pytest.mark.parametrize("kind", ["zero frequency", "proportional channels", "nan", "inf"])
def test_singular_convolution_and_one_that_is_not_finite_are_refused(
    kind: str, padding_mode: str, dtype: torch.dtype
) -> None:
    channels, message = 3, f"the convolution is singular in {dtype}"
    kernel = make_kernel(channels, (3, 3)).to(dtype)
    if kind == "proportional channels":
        kernel[1] = 2 * kernel[0]
    elif kind == "zero frequency":  # the sum of the four neighbours, with a null vector on squares
        channels, kernel = 1, torch.zeros(1, 1, 3, 3, dtype=dtype)
        kernel[..., [0, 1, 1, 2], [1, 0, 2, 1]] = 1
    else:
        kernel[0, 1, 2, 0], message = float(kind), "NaN or infinite"
    factors = ConvolutionFactors(kernel, (4, 4), padding_mode)
    for use in (
        lambda: factors.log_abs_det,
        lambda: factors.gradient,
        lambda: factors.solve(torch.ones(1, channels, 4, 4, dtype=dtype)),
    ):
        with pytest.raises(torch.linalg.LinAlgError, match=message):
            use()


def test_flops() -> None:
    zeros = factorization_flops((3, 3), 4, (16, 32), "zeros")
    assert zeros == factorization_flops((3, 3), 4, (32, 16), "zeros")
    assert factorization_flops((3, 3), 4, (16, 32), "circular") < zeros
    # Rows that do not interact are factorized once.
    one_row = factorization_flops((1, 3), 4, (16, 32), "zeros")
    assert one_row == factorization_flops((1, 3), 4, (1, 32), "zeros")

"""ConvFactors against torch's own linear algebra of the whole matrix, all derivatives included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_snf.conv import exact
from pyro_snf.conv.block_tridiagonal import BlockTridiagonal
from pyro_snf.conv.exact import ConvFactors, factorization_flops
from pyro_snf.conv.kernels import PADDING_MODES, convolve, matrix

# float64, condition numbers up to 1e3 and thousands of entries; where no pivoting is needed, errors
# are of the order of 1e-13.
ROUNDING = 1e-9

# float32 results are those of float64, rounded.
ROUNDING_FLOAT32 = 1e-6

KERNEL_SIZES = [(1, 1), (3, 3), (3, 5), (5, 3), (1, 3), (3, 1), (5, 5), (7, 3), (9, 1)]
IMAGE_SIZES = [(3, 3), (4, 4), (5, 4), (4, 7), (6, 8), (7, 7), (7, 9), (12, 5), (3, 13)]
SHAPES = [
    (kernel_size, image_size)
    for kernel_size in KERNEL_SIZES
    for image_size in IMAGE_SIZES
    if kernel_size[0] <= image_size[0] and kernel_size[1] <= image_size[1]
]


def make_kernel(channels: int, kernel_size: tuple[int, int], scale: float = 0.5) -> Tensor:
    """``δ`` and noise: of a small condition number."""
    height, width = kernel_size
    generator = torch.Generator().manual_seed(channels)
    kernel = torch.randn(channels, channels, height, width, generator=generator)
    kernel *= scale / math.sqrt(channels * height * width)
    kernel[:, :, height // 2, width // 2] += torch.eye(channels)
    return kernel


def make_ill_conditioned(
    channels: int, image_size: tuple[int, int], padding_mode: str, condition: float
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
    low, high = 0.0, -1 / values.min().item()
    for _ in range(60):
        middle = (low + high) / 2
        if torch.linalg.cond(matrix(delta + middle * noise, image_size, padding_mode)) < condition:
            low = middle
        else:
            high = middle
    return delta + low * noise


def corners() -> Tensor:
    """Of ones: J is regular on images of even size, and its block T is zero by rows and columns."""
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[..., ::2, ::2] = 1
    return kernel


def assert_exact(
    kernel: Tensor, image_size: tuple[int, int], padding_mode: str, rounding: float = ROUNDING
) -> ConvFactors:
    """Value, gradient, a second derivative and solves are those of the matrix."""
    jacobian = matrix(kernel, image_size, padding_mode)
    direction = torch.randn_like(kernel)
    images = torch.randn(3, len(kernel), *image_size)
    factors = ConvFactors(kernel, image_size, padding_mode)

    def close(actual: Tensor, expected: Tensor) -> bool:
        return bool((actual - expected).norm() <= rounding * (1 + expected.norm()))

    results = []
    for by_factors in (False, True):
        parameter = kernel.clone().requires_grad_()
        if by_factors:
            value = factors.differentiable_log_abs_det(parameter)
        else:
            value = torch.linalg.slogdet(matrix(parameter, image_size, padding_mode)).logabsdet
        (gradient,) = torch.autograd.grad(value, parameter, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction).sum(), parameter)
        results.append((value, gradient, product))
    for expected, actual in zip(*results, strict=True):
        assert close(actual, expected)
    assert close(factors.log_abs_det, results[0][0])
    assert close(factors.kernel_gradient, results[0][1])
    for transposed in (False, True):
        solved = torch.linalg.solve(jacobian.mT if transposed else jacobian, images.flatten(1).mT)
        before = images.clone()
        assert close(factors.solve(images, transposed), solved.mT.view_as(images))
        assert torch.equal(images, before)
    return factors


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(("kernel_size", "image_size"), SHAPES)
def test_everything_is_that_of_the_matrix(
    kernel_size: tuple[int, int], image_size: tuple[int, int], channels: int, padding_mode: str
) -> None:
    assert_exact(make_kernel(channels, kernel_size), image_size, padding_mode)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_larger_images(by_columns: bool, padding_mode: str) -> None:
    size = (24, 15) if by_columns else (15, 24)
    assert_exact(make_kernel(2, (3, 5)), size, padding_mode)


@pytest.mark.parametrize("number", range(1, 18))
@pytest.mark.parametrize("by_columns", [False, True])
def test_every_number_of_blocks(number: int, by_columns: bool) -> None:
    kernel = make_kernel(1, (5, 5))
    for height in (2 * number - 1, 2 * number):  # the last one short, or not
        size = (4, height) if by_columns else (height, 4)
        factors = BlockTridiagonal(kernel, size, by_columns)
        jacobian = matrix(kernel, size, "zeros")
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(factors.log_abs_det, expected, rtol=ROUNDING, atol=ROUNDING)
        # |det J| is homogeneous of degree D in the kernel: Euler's theorem.
        degree = (factors.kernel_gradient * kernel).sum()
        assert torch.allclose(degree, torch.tensor(4.0 * height), rtol=ROUNDING)
        image = torch.randn(2, 1, *size)
        residual = convolve(factors.solve(image), kernel, "zeros") - image
        assert residual.abs().max() < ROUNDING


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_ill_conditioned(condition: float, channels: int, padding_mode: str) -> None:
    kernel = make_ill_conditioned(channels, (8, 9), padding_mode, condition)
    # The second derivative's condition number is the square.
    rounding = ROUNDING * max(1.0, condition / 1e3)
    factors = assert_exact(kernel, (8, 9), padding_mode, rounding)
    assert condition / 10 < factors.condition < 10 * condition


def test_early_end_of_the_elimination() -> None:
    kernel, size = make_kernel(1, (3, 3), scale=0.1), (300, 4)
    factors = BlockTridiagonal(kernel, size, by_columns=False)
    jacobian = matrix(kernel, size, "zeros")
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(factors.log_abs_det, expected, rtol=ROUNDING, atol=ROUNDING)
    _, levels, rest = factors._elimination
    assert len(levels) < 5 < math.floor(math.log2(300))
    assert rest.number > 1
    assert_exact(kernel, size, "zeros")


def test_singular_block_of_a_regular_matrix() -> None:
    # T = 0 for blocks of rows, not for blocks of columns.
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 0] = torch.tensor([0.1, 1.0, 0.2])
    kernel[0, 0, 2] = torch.tensor([-0.3, 1.0, 0.1])
    factors = assert_exact(kernel, (6, 9), "zeros")
    method = factors._method
    assert isinstance(method, BlockTridiagonal)
    assert method.by_columns


def test_pivoted_factorization_where_there_is_no_other() -> None:
    factors = assert_exact(corners(), (6, 8), "zeros")
    assert isinstance(factors._method, exact._Dense)


def test_sparse_factorization_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ConvFactors(corners(), (6, 8), "zeros")
    assert isinstance(expected._method, exact._Dense)
    monkeypatch.setattr(exact, "_MAX_DENSE", 10)
    factors = ConvFactors(corners(), (6, 8), "zeros")
    assert isinstance(factors._method, exact._Sparse)
    assert torch.allclose(factors.log_abs_det, expected.log_abs_det)
    assert torch.allclose(factors.kernel_gradient, expected.kernel_gradient)
    images = torch.randn(2, 1, 6, 8)
    for transposed in (False, True):
        solutions = factors.solve(images, transposed)
        assert torch.allclose(solutions, expected.solve(images, transposed))
    kernel = corners().requires_grad_()
    value = factors.differentiable_log_abs_det(kernel)
    (gradient,) = torch.autograd.grad(value, kernel, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(("channels", "size"), [(12, 32), (1, 256)])
def test_large_matrix_against_scipy(channels: int, size: int) -> None:
    kernel = make_kernel(channels, (3, 3))
    factors = ConvFactors(kernel, (size, size), "zeros")
    assert isinstance(factors._method, BlockTridiagonal)
    reference = exact._Sparse(kernel, (size, size))
    assert torch.allclose(factors.log_abs_det, reference.log_abs_det, rtol=ROUNDING)
    dim = torch.tensor(float(channels * size**2))
    assert torch.allclose((factors.kernel_gradient * kernel).sum(), dim, rtol=ROUNDING)
    images = torch.randn(1, channels, size, size)
    assert torch.allclose(factors.solve(images), reference.solve(images), atol=ROUNDING)


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("image_size", [(5, 7), (6, 8), (5, 8)])
def test_inverse_kernel(kernel_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    kernel = make_kernel(2, kernel_size)
    factors = ConvFactors(kernel, image_size, "circular")
    images = torch.randn(2, 2, *image_size)
    window = (image_size[0] // 2 * 2 + 1, image_size[1] // 2 * 2 + 1)
    inverse = factors.inverse_kernel(window)
    assert inverse.shape == (2, 2, *window)
    exact_solution = factors.solve(images)
    assert torch.allclose(convolve(images, inverse, "circular"), exact_solution, atol=ROUNDING)
    # A smaller window is a part of the larger one.
    part = inverse[
        :, :, window[0] // 2 - 1 : window[0] // 2 + 2, window[1] // 2 : window[1] // 2 + 1
    ]
    assert torch.allclose(factors.inverse_kernel((3, 1)), part, atol=ROUNDING)


def test_inverse_kernel_is_that_of_a_torus() -> None:
    factors = ConvFactors(make_kernel(1, (3, 3)), (4, 4), "zeros")
    with pytest.raises(ValueError, match="expected padding_mode='circular'; got 'zeros'"):
        factors.inverse_kernel((3, 3))


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("condition", [3.0, 100.0, 1e4])
def test_float32_is_as_accurate_as_the_kernel(condition: float, padding_mode: str) -> None:
    kernel = make_ill_conditioned(2, (8, 9), padding_mode, condition).float()
    factors = ConvFactors(kernel, (8, 9), padding_mode)
    reference = ConvFactors(kernel.double(), (8, 9), padding_mode)
    assert factors.log_abs_det.dtype == factors.kernel_gradient.dtype == torch.float32
    error = (factors.log_abs_det - reference.log_abs_det).abs()
    assert error <= ROUNDING_FLOAT32 * (1 + reference.log_abs_det.abs())
    error = (factors.kernel_gradient - reference.kernel_gradient).norm()
    assert error <= ROUNDING_FLOAT32 * reference.kernel_gradient.norm()
    images = torch.randn(2, 2, 8, 9, dtype=torch.float32)
    solution, expected = factors.solve(images), reference.solve(images.double())
    assert solution.dtype == torch.float32
    assert (solution - expected).norm() <= ROUNDING_FLOAT32 * condition * expected.norm()


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_half_precision_counts_as_float32(padding_mode: str) -> None:
    kernel = make_kernel(2, (3, 3)).bfloat16().requires_grad_()
    factors = ConvFactors(kernel, (4, 5), padding_mode)
    assert factors.log_abs_det.dtype == torch.float32
    factors.differentiable_log_abs_det(kernel).backward()
    assert torch.equal(kernel.grad, factors.kernel_gradient.bfloat16())
    assert factors.solve(torch.ones(1, 2, 4, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_singular_convolution_is_refused(
    channels: int, padding_mode: str, dtype: torch.dtype
) -> None:
    kernel = make_kernel(channels, (3, 3)).to(dtype)
    if channels > 1:
        kernel[1] = 2 * kernel[0]
    else:  # the sum of the four neighbours: zero at a frequency, and has a null vector on squares
        kernel.zero_()[..., [0, 1, 1, 2], [1, 0, 2, 1]] = 1
    factors = ConvFactors(kernel, (4, 4), padding_mode)
    with pytest.raises(torch.linalg.LinAlgError, match=f"the convolution is singular in {dtype}"):
        _ = factors.log_abs_det
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        factors.solve(torch.ones(1, channels, 4, 4, dtype=dtype))


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_singular_in_float32_is_regular_in_float64(padding_mode: str) -> None:
    kernel = make_ill_conditioned(1, (8, 9), padding_mode, 1e9)
    ConvFactors(kernel, (8, 9), padding_mode).log_abs_det.item()
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular in torch\.float32"):
        _ = ConvFactors(kernel.float(), (8, 9), padding_mode).log_abs_det


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_kernel_that_is_not_finite_is_refused(entry: float, padding_mode: str) -> None:
    kernel = make_kernel(2, (3, 3))
    kernel[0, 1, 2, 0] = entry
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinite"):
        _ = ConvFactors(kernel, (4, 4), padding_mode).kernel_gradient


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_devices(device: torch.device, padding_mode: str) -> None:
    kernel = make_kernel(2, (3, 3))
    images = torch.randn(3, 2, 6, 7)
    expected = ConvFactors(kernel, (6, 7), padding_mode)
    factors = ConvFactors(kernel.to(device), (6, 7), padding_mode)
    for name in ("log_abs_det", "kernel_gradient"):
        actual = getattr(factors, name)
        assert actual.device.type == device.type
        assert torch.allclose(actual.cpu(), getattr(expected, name), atol=ROUNDING)
    solution = factors.solve(images.to(device), True).cpu()
    assert torch.allclose(solution, expected.solve(images, True), atol=ROUNDING)


def test_flops() -> None:
    zeros = factorization_flops((3, 3), 4, (16, 32), "zeros")
    assert zeros == factorization_flops((3, 3), 4, (32, 16), "zeros")
    assert factorization_flops((3, 3), 4, (16, 32), "circular") < zeros
    # Rows that do not interact are factorized once.
    one_row = factorization_flops((1, 3), 4, (16, 32), "zeros")
    assert one_row == factorization_flops((1, 3), 4, (1, 32), "zeros")

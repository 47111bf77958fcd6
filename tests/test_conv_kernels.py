"""The algebra of kernels, against dense matrices and loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_snf.conv import kernels
from pyro_snf.conv.exact import ConvFactors
from pyro_snf.conv.learned import LearnedKernel
from pyro_snf.conv.refined import torus_gradient
from tests.registry import conv, relative_error

# Float64, sums of some hundred products.
EXACT = 1e-12

Size = tuple[int, int]

KERNELS = [(1, 1), (3, 3), (3, 5), (5, 3)]
IMAGES = [(4, 4), (4, 5), (5, 6), (7, 9)]
PADDED = pytest.mark.parametrize("mode", kernels.PADDING_MODES)


def fits(kernel: Size, image: Size, mode: str) -> bool:
    """Beyond the edges of a smaller torus a kernel would meet itself."""
    return mode == "zeros" or (kernel[0] <= image[0] and kernel[1] <= image[1])


CONVOLUTIONS = [
    (mode, kernel, image)
    for mode in kernels.PADDING_MODES
    for kernel in KERNELS
    for image in IMAGES
    if fits(kernel, image, mode)
]
EVERY_CONVOLUTION = pytest.mark.parametrize(("mode", "kernel", "image"), CONVOLUTIONS)


def positions(kernel: Size, image: Size, mode: str) -> list[tuple[Size, Size, Size]]:
    """All ``(a, p, q)``: entry ``a`` of a kernel takes pixel q of the input to p of the output."""
    result = []
    for row in range(image[0]):
        for column in range(image[1]):
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    source = (row + i - kernel[0] // 2, column + j - kernel[1] // 2)
                    if mode == "circular":
                        source = (source[0] % image[0], source[1] % image[1])
                    if 0 <= source[0] < image[0] and 0 <= source[1] < image[1]:
                        result.append(((i, j), (row, column), source))
    return result


def matrix_by_hand(kernel: Tensor, image: Size, mode: str) -> Tensor:
    channels = len(kernel)
    matrix = torch.zeros(channels, *image, channels, *image)
    for a, p, q in positions((kernel.shape[-2], kernel.shape[-1]), image, mode):
        matrix[:, p[0], p[1], :, q[0], q[1]] += kernel[:, :, a[0], a[1]]
    dim = channels * math.prod(image)
    return matrix.view(dim, dim)


@EVERY_CONVOLUTION
def test_matrix_is_the_definition(mode: str, kernel: Size, image: Size) -> None:
    weight = torch.randn(2, 2, *kernel)
    expected = matrix_by_hand(weight, image, mode)
    assert relative_error(kernels.matrix(weight, image, mode), expected) < EXACT


@EVERY_CONVOLUTION
def test_convolutions_are_products_with_the_matrix(mode: str, kernel: Size, image: Size) -> None:
    weight, x = torch.randn(2, 2, *kernel), torch.randn(3, 2, *image)
    matrix = matrix_by_hand(weight, image, mode)
    product = kernels.convolve(x, weight, mode)
    assert product.shape == x.shape
    assert relative_error(product.flatten(1), x.flatten(1) @ matrix.mT) < EXACT
    transposed = kernels.convolve_transposed(x, weight, mode)
    assert relative_error(transposed.flatten(1), x.flatten(1) @ matrix) < EXACT


@PADDED
def test_bias_is_one_number_a_channel(mode: str) -> None:
    weight, x, bias = torch.randn(2, 2, 3, 5), torch.randn(3, 2, 5, 6), torch.randn(2)
    expected = kernels.convolve(x, weight, mode) + bias[:, None, None]
    assert relative_error(kernels.convolve(x, weight, mode, bias), expected) < EXACT


@EVERY_CONVOLUTION
def test_flipped_kernel_is_that_of_the_transposed(mode: str, kernel: Size, image: Size) -> None:
    weight = torch.randn(2, 2, *kernel)
    flipped = matrix_by_hand(kernels.flip(weight), image, mode)
    assert torch.equal(flipped, matrix_by_hand(weight, image, mode).mT)
    assert torch.equal(kernels.flip(kernels.flip(weight)), weight)


@EVERY_CONVOLUTION
def test_kernel_gradient_is_autograds(mode: str, kernel: Size, image: Size) -> None:
    weight = torch.randn(2, 2, *kernel, requires_grad=True)
    x, cotangent = torch.randn(3, 2, *image), torch.randn(3, 2, *image)
    (expected,) = torch.autograd.grad((cotangent * kernels.convolve(x, weight, mode)).sum(), weight)
    actual = kernels.kernel_gradient(x, cotangent, kernel, mode)
    assert relative_error(actual, expected) < EXACT


# --- m ------------------------------------------------------------------------------------------


def multiplicity(kernel: Size, image: Size, mode: str) -> Tensor:
    return kernels.multiplicity(kernel, image, mode, torch.float64, torch.device("cpu"))


@EVERY_CONVOLUTION
def test_multiplicity_counts_the_entries_of_the_matrix(
    mode: str, kernel: Size, image: Size
) -> None:
    counts = torch.zeros(kernel)
    for a, _, _ in positions(kernel, image, mode):
        counts[a] += 1
    assert torch.equal(multiplicity(kernel, image, mode), counts)


@pytest.mark.parametrize("kernel", KERNELS)
def test_multiplicity_is_the_convolution_of_images_of_ones(kernel: Size) -> None:
    # As the paper has it.
    ones = torch.ones(1, 1, 7, 9)
    expected = kernels.kernel_gradient(ones, ones, kernel, "zeros")[0, 0]
    assert torch.equal(multiplicity(kernel, (7, 9), "zeros"), expected)


def test_entries_that_reach_over_the_whole_image_stand_nowhere() -> None:
    counts = multiplicity((7, 3), (2, 4), "zeros")
    assert torch.equal(counts[:, 1], torch.tensor([0.0, 0.0, 4.0, 8.0, 4.0, 0.0, 0.0]))


def test_multiplicity_is_made_once_a_size() -> None:
    first = multiplicity((3, 3), (5, 6), "zeros")
    assert multiplicity((3, 3), (5, 6), "zeros") is first


def test_multiplicity_from_inference_mode_serves_outside_of_it() -> None:
    kernels.multiplicity.cache_clear()
    with torch.inference_mode():
        counts = multiplicity((3, 3), (5, 7), "zeros")
    (torch.ones(3, 3, requires_grad=True) * counts).sum().backward()  # or it would be refused


# --- Traces of products -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kernel", "image", "inverse"),
    [
        (*convolution, inverse)
        for convolution in CONVOLUTIONS
        for inverse in [(1, 1), (3, 3), (5, 3), (7, 7)]
        if fits(inverse, convolution[2], convolution[0])
    ],
)
def test_gradient_of_the_trace_of_a_product(
    mode: str, kernel: Size, image: Size, inverse: Size
) -> None:
    # ∂ tr(RA)/∂a = flip(r) ⊙ m, whatever the sizes of the two kernels.
    maps = LearnedKernel(
        2,
        inverse,
        padding_mode=mode,
        mixture=0.5,
        reconstruction_weight=1.0,
        reconstruction="both",
    )
    theta = torch.randn(2, 2, *kernel, requires_grad=True)
    phi = torch.randn(2, 2, *inverse)
    product = matrix_by_hand(kernels.near_identity(phi), image, mode) @ kernels.matrix(
        kernels.near_identity(theta), image, mode
    )
    (expected,) = torch.autograd.grad(product.trace(), theta)
    actual = maps.trace_gradient(theta.detach(), phi, torch.zeros(1, 2, *image))
    assert relative_error(actual, expected) < EXACT


@pytest.mark.parametrize("image", [(4, 5), (5, 7), (6, 9)])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 5)])
def test_gradient_of_the_trace_with_the_inverse_on_a_torus(kernel: Size, image: Size) -> None:
    weight = kernels.near_identity(conv(2, kernel_size=kernel).theta.detach())
    inverse = torch.linalg.inv(matrix_by_hand(weight, image, "circular"))
    moving = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        (inverse @ kernels.matrix(moving, image, "zeros")).trace(), moving
    )
    actual = torus_gradient(ConvFactors(weight, image, "circular"), "zeros")
    assert relative_error(actual, expected) < EXACT


# --- The parametrization ------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_of_zero_is_the_identity(kernel: Size) -> None:
    weight = kernels.near_identity(torch.zeros(3, 3, *kernel))
    assert torch.equal(kernels.matrix(weight, (5, 6), "zeros"), torch.eye(90))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_linear_in_theta(kernel: Size) -> None:
    theta = torch.randn(3, 3, *kernel)
    identity = kernels.near_identity(torch.zeros_like(theta))
    expected = identity + theta / math.sqrt(3 * kernel[0] * kernel[1])
    assert relative_error(kernels.near_identity(theta), expected) < EXACT
    assert kernels.theta_scale(theta) == pytest.approx(1 / math.sqrt(3 * math.prod(kernel)))


@pytest.mark.parametrize("new", [(1, 1), (3, 3), (5, 3), (1, 7), (9, 9)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_resized_kernel_keeps_its_centre(kernel: Size, new: Size) -> None:
    weight = torch.randn(2, 2, *kernel)
    resized = kernels.resize(weight, new)
    assert resized.shape == (2, 2, *new)
    for i in range(-4, 5):
        for j in range(-4, 5):
            old_place, place = ((i + size[0] // 2, j + size[1] // 2) for size in (kernel, new))
            if 0 <= place[0] < new[0] and 0 <= place[1] < new[1]:
                inside = 0 <= old_place[0] < kernel[0] and 0 <= old_place[1] < kernel[1]
                expected = weight[:, :, old_place[0], old_place[1]] if inside else torch.zeros(2, 2)
                assert torch.equal(resized[:, :, place[0], place[1]], expected)

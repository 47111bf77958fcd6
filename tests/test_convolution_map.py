"""The convolution as a linear map, against matrices that are made of shifts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_snf.maps import Convolution, convolution, convolution_solve, kernels
from pyro_snf.surrogate import implicit_solve
from tests.registry import conv, relative_error

# Float64, sums of some hundred products.
EXACT = 1e-12
# Of a solve, relative to its solution: rounding, a few dozen times it, times the condition number.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}

Size = tuple[int, int]

KERNELS = [(1, 1), (3, 3), (3, 5), (5, 3)]
IMAGES = [(4, 4), (4, 5), (5, 6), (7, 9)]
PADDED = pytest.mark.parametrize("mode", kernels.PADDING_MODES)
BOTH_WAYS = pytest.mark.parametrize("transposed", [False, True], ids=["A", "transposed"])


def fits(kernel: Size, image: Size, mode: str) -> bool:
    """On a smaller periodic image a kernel would overlap itself."""
    return mode == "zeros" or all(one <= other for one, other in zip(kernel, image, strict=True))


CONVOLUTIONS = [
    (mode, kernel, image)
    for mode in kernels.PADDING_MODES
    for kernel in KERNELS
    for image in IMAGES
    if fits(kernel, image, mode)
]
EVERY_CONVOLUTION = pytest.mark.parametrize(("mode", "kernel", "image"), CONVOLUTIONS)


def shift(offset: int, size: int, mode: str) -> Tensor:
    """The matrix that takes the number at q to p = q − offset."""
    if mode == "circular":
        return torch.eye(size).roll(offset, 1)
    return torch.ones(size, size).tril(offset).triu(offset)


def matrix_by_hand(kernel: Tensor, image: Size, mode: str) -> Tensor:
    height, width = kernel.shape[-2:]
    rows = [shift(index - height // 2, image[0], mode) for index in range(height)]
    columns = [shift(index - width // 2, image[1], mode) for index in range(width)]
    dim = len(kernel) * math.prod(image)
    factors = kernel, torch.stack(rows), torch.stack(columns)
    return torch.einsum("oiab,apq,bst->opsiqt", *factors).reshape(dim, dim)


def random_theta(channels: int = 2, kernel: Size = (3, 3)) -> Tensor:
    """That of a convolution of condition number 3 at most, on images of any size."""
    return conv(channels, kernel_size=kernel).theta.detach()


def neighbours(coupling: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The θ of ``x ↦ x − c (its four neighbours)``, nearly singular for c near ¼."""
    cross = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=dtype)
    kernel = -coupling * cross
    kernel[1, 1] = 1
    return Convolution("zeros").theta_of(kernel.view(1, 1, 3, 3))


@EVERY_CONVOLUTION
def test_products_are_those_of_the_matrix(mode: str, kernel: Size, image: Size) -> None:
    part, theta, x = Convolution(mode), torch.randn(2, 2, *kernel), torch.randn(3, 2, *image)
    weight = part.weight(theta)
    matrix = matrix_by_hand(weight, image, mode)
    assert relative_error(kernels.matrix(weight, image, mode), matrix) < EXACT
    assert torch.equal(matrix_by_hand(kernels.flip(weight), image, mode), matrix.mT)
    assert part.norm_bound(theta) >= torch.linalg.matrix_norm(matrix, 2) * (1 - EXACT)
    expected, transposed = ((x.flatten(1) @ one).view_as(x) for one in (matrix.mT, matrix))
    log_scale, bias = torch.randn(2), torch.randn(2)
    scaled = log_scale.exp().view(-1, 1, 1) * expected
    cotangent, leaf = torch.randn(3, 2, *image), theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((cotangent * part.multiply(leaf, x)).sum(), leaf)
    for actual, right in [
        (part.multiply(theta, x), expected),
        (part.apply_weight(weight, x), expected),
        (part.multiply_transposed(theta, x), transposed),
        (part.apply_weight(weight, x, transposed=True), transposed),
        (part.affine(theta, log_scale, None, x), scaled),
        (part.affine(theta, log_scale, bias, x), scaled + bias[:, None, None]),
        (part.gradient(theta, x, cotangent), gradient),
    ]:
        assert relative_error(actual, right) < EXACT


@pytest.mark.parametrize(("mode", "kernel", "image"), [*CONVOLUTIONS, ("zeros", (7, 3), (2, 4))])
def test_multiplicity_counts_entries(mode: str, kernel: Size, image: Size) -> None:
    counts = torch.zeros(kernel)
    for entry in torch.eye(counts.numel()).view(-1, 1, 1, *kernel):
        counts += matrix_by_hand(entry, image, mode).sum() * entry[0, 0]
    actual = kernels.multiplicity(kernel, image, mode, torch.float64, torch.device("cpu"))
    assert torch.equal(actual, counts)


def test_multiplicity_from_inference_mode_serves_outside_of_it() -> None:
    kernels.multiplicity.cache_clear()
    part, theta = Convolution("zeros"), torch.randn(1, 1, 3, 3)
    parameter = theta.clone().requires_grad_()
    with torch.inference_mode():
        part.trace_gradient(theta, theta, torch.Size([1, 5, 7]))
    # Autograd refuses to save an inference tensor.
    (part.trace_gradient(theta, theta, torch.Size([1, 5, 7])) * parameter).sum().backward()


@pytest.mark.parametrize(
    ("mode", "kernel", "image", "inverse"),
    [
        (*convolution, inverse)
        for convolution in CONVOLUTIONS
        for inverse in [(1, 1), (3, 3), (5, 3), (7, 7)]
        if fits(inverse, convolution[2], convolution[0])
    ],
)
def test_gradient_of_a_trace(mode: str, kernel: Size, image: Size, inverse: Size) -> None:
    part = Convolution(mode, inverse)
    theta, other = torch.randn(2, 2, *kernel, requires_grad=True), torch.randn(2, 2, *inverse)
    matrices = [kernels.matrix(part.weight(one), image, mode) for one in (other, theta)]
    (expected,) = torch.autograd.grad((matrices[0] @ matrices[1]).trace(), theta)
    actual = part.trace_gradient(theta.detach(), other, torch.Size([2, *image]))
    assert relative_error(actual, expected) < EXACT


@pytest.mark.parametrize("kernel", KERNELS)
def test_weight_is_linear_in_theta_and_starts_as_the_identity(kernel: Size) -> None:
    part, theta = Convolution("zeros"), torch.randn(3, 3, *kernel)
    identity = part.weight(torch.zeros_like(theta))
    assert torch.equal(matrix_by_hand(identity, (5, 6), "zeros"), torch.eye(90))
    scale = 1 / math.sqrt(3 * math.prod(kernel))
    assert part.theta_scale(theta) == pytest.approx(scale)
    assert relative_error(part.weight(theta), identity + scale * theta) < EXACT
    assert relative_error(part.theta_of(part.weight(theta)), theta) < EXACT


@pytest.mark.parametrize("new", [(1, 1), (3, 3), (5, 3), (1, 7), (9, 9)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_resized_kernel_keeps_its_centre(kernel: Size, new: Size) -> None:
    weight = torch.randn(2, 2, *kernel)
    large = torch.zeros(2, 2, 9, 9)
    rows, columns = (slice(4 - size // 2, 5 + size // 2) for size in kernel)
    large[:, :, rows, columns] = weight
    rows, columns = (slice(4 - size // 2, 5 + size // 2) for size in new)
    assert torch.equal(kernels.resize(weight, new), large[:, :, rows, columns])


def test_control_variate_with_a_periodic_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the factors of A cost too much, which they do for thousands of channels times columns.
    monkeypatch.setattr(convolution, "_MAX_COST_IN_PRODUCTS", 0.0)
    part, theta, shape = Convolution("zeros"), random_theta(3), torch.Size([3, 16, 16])
    found = part.control_variate(theta, shape, num_probes=1)
    assert not found.is_exact
    weight = part.weight(theta)
    periodic = kernels.matrix(weight, (16, 16), "circular")
    expected = torch.linalg.slogdet(periodic).logabsdet
    assert found.factors.log_abs_det.item() == pytest.approx(expected.item(), rel=EXACT)
    weight.requires_grad_()
    trace = (torch.linalg.inv(periodic) @ kernels.matrix(weight, (16, 16), "zeros")).trace()
    (expected,) = torch.autograd.grad(trace, weight)
    assert relative_error(found.trace_gradient, expected) < EXACT


@pytest.mark.parametrize(
    ("mode", "channels", "image", "is_exact", "is_cheap"),
    [
        ("zeros", 1, (28, 28), True, True),
        ("zeros", 2, (4, 5), True, True),
        ("zeros", 1, (256, 256), True, True),
        ("zeros", 32, (32, 32), True, True),
        ("zeros", 64, (64, 64), True, False),
        ("zeros", 512, (16, 16), False, False),
        ("circular", 32, (32, 32), True, True),
    ],
)
def test_factors_are_made_where_they_pay(
    mode: str, channels: int, image: Size, is_exact: bool, is_cheap: bool
) -> None:
    part, theta = Convolution(mode), torch.zeros(channels, channels, 3, 3, dtype=torch.float32)
    shape = torch.Size([channels, *image])
    assert part.is_cheap_to_factorize(theta, shape) == is_cheap
    assert part.pays_in_training(theta, shape, num_probes=8) == is_exact


def dense_solve(part: Convolution, theta: Tensor, images: Tensor, transposed: bool) -> Tensor:
    size = (images.shape[-2], images.shape[-1])
    matrix = kernels.matrix(part.weight(theta.double()), size, part.padding_mode)
    rows = images.double().flatten(1)
    return torch.linalg.solve(matrix.mT if transposed else matrix, rows.mT).mT.view(images.shape)


@BOTH_WAYS
@pytest.mark.parametrize("dtype", [*ROUNDING, torch.bfloat16, torch.float16], ids=str)
@PADDED
@pytest.mark.parametrize(
    ("channels", "kernel", "image"),
    [(2, (3, 3), (4, 5)), (1, (3, 5), (6, 7)), (2, (1, 3), (3, 6)), (3, (5, 5), (12, 9))],
)
def test_iterative_solution_is_exact(
    channels: int, kernel: Size, image: Size, mode: str, dtype: torch.dtype, transposed: bool
) -> None:
    part, theta = Convolution(mode), random_theta(channels, kernel).to(dtype)
    images = torch.randn(6, channels, *image).to(dtype)
    solution = part.iterative_solver(theta, images.shape[1:])(images, transposed)
    assert solution.dtype == dtype
    if dtype in ROUNDING:
        expected, tolerance = dense_solve(part, theta, images, transposed), ROUNDING[dtype]
    else:  # solved in float32, for the kernel as it is in half precision
        weight = part.weight(theta).double()
        expected = dense_solve(part, part.theta_of(weight), images, transposed)
        tolerance = torch.finfo(dtype).eps
    assert relative_error(solution.double(), expected) < tolerance


@BOTH_WAYS
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_ill_conditioned_residual_is_rounding(dtype: torch.dtype, transposed: bool) -> None:
    # The condition number is 10³ with a periodic boundary, a few dozen with zeros.
    part, theta = Convolution("zeros"), neighbours(0.2495, dtype)
    images = torch.randn(4, 1, 9, 9, dtype=dtype)
    solution = part.iterative_solver(theta, images.shape[1:])(images, transposed)
    multiply = part.multiply_transposed if transposed else part.multiply
    residual = multiply(theta.double(), solution.double()) - images
    level = torch.finfo(dtype).eps * solution.flatten(1).norm(dim=1)
    assert (residual.flatten(1).norm(dim=1) < 10 * level).all()


@PADDED
def test_iterative_solutions_do_not_depend_on_each_other(mode: str) -> None:
    part, theta, images = Convolution(mode), random_theta(), torch.randn(7, 2, 4, 5)
    solve = part.iterative_solver(theta, images.shape[1:])
    expected = solve(images, False)
    images[1] *= 1e100
    images[2] *= 1e-100
    images[3] = 0
    for index, value in [(4, math.nan), (5, math.inf)]:
        images[index, 0, 2, 2] = value
    solution = solve(images, False)
    for index, factor in [(0, 1.0), (1, 1e100), (2, 1e-100), (6, 1.0)]:
        assert relative_error(solution[index], factor * expected[index]) < ROUNDING[torch.float64]
    assert not solution[3].any()
    assert torch.isnan(solution[4:6]).all()
    assert torch.isnan(solve(images[4:5], False)).all()


@pytest.mark.parametrize("group", [1, 3])
def test_images_are_solved_for_in_groups(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    part, theta, images = Convolution("zeros"), random_theta(), torch.randn(7, 2, 4, 5)
    numbers = group * 2 * convolution_solve._KRYLOV_STEPS * 40
    monkeypatch.setattr(convolution_solve, "_MAX_NUMBERS", numbers)
    solution = part.iterative_solver(theta, images.shape[1:])(images, False)
    expected = dense_solve(part, theta, images, False)
    assert relative_error(solution, expected) < ROUNDING[torch.float64]


def test_convolution_whose_preconditioner_is_singular_is_solved_for_all_the_same() -> None:
    # x ↦ x − (its right neighbour): with a periodic boundary, a constant image goes to 0.
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1] = torch.tensor([0.0, 1.0, -1.0])
    part, images = Convolution("zeros"), torch.randn(3, 1, 4, 5)
    theta = part.theta_of(kernel)
    solution = part.iterative_solver(theta, images.shape[1:])(images, False)
    expected = dense_solve(part, theta, images, False)
    assert relative_error(solution, expected) < ROUNDING[torch.float64]


@pytest.mark.parametrize("kind", ["singular", "NaN"])
@PADDED
def test_singular_convolution_is_an_error(mode: str, kind: str) -> None:
    part, shape = Convolution(mode, (3, 3)), torch.Size([2, 4, 5])
    kernel = part.weight(random_theta())
    if kind == "singular":
        kernel[1] = kernel[0]
    else:
        kernel[0, 0, 0, 0] = math.nan
        with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinite"):
            part.inverse_weight(part.theta_of(kernel), shape)
    solve = part.iterative_solver(part.theta_of(kernel), shape)
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular|NaN"):
        solve(torch.randn(3, 2, 4, 5), False)


@PADDED
def test_solver_keeps_its_parameter_and_is_differentiable(mode: str) -> None:
    part, theta = Convolution(mode), random_theta(1, (1, 3)).requires_grad_()
    y = torch.randn(1, 1, 2, 3, requires_grad=True)

    def solve(theta: Tensor, y: Tensor) -> Tensor:
        return implicit_solve(theta, y, part.iterative_solver(theta, y.shape[1:]), part.gradient)

    # The small least-squares problems of LAPACK are not the same to the last digit.
    assert gradcheck(solve, (theta, y), nondet_tol=1e-12)
    assert gradgradcheck(solve, (theta, y), nondet_tol=1e-12)
    solver, expected = part.iterative_solver(theta, y.shape[1:]), solve(theta, y)
    with torch.no_grad():
        theta.mul_(-1)
        assert relative_error(solver(y, False), expected) < ROUNDING[torch.float64]


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 5), (7, 7)])
def test_inverse_weight_is_that_of_least_squares(size: Size) -> None:
    part, theta, image = Convolution("zeros", size), random_theta(), (7, 8)
    fitted = part.inverse_weight(theta, torch.Size([2, *image]))
    assert fitted.shape == (2, 2, *size)
    # The best of all: R ↦ R A is linear, here as a matrix.
    basis = torch.eye(fitted.numel()).view(-1, *fitted.shape)
    forward = kernels.matrix(part.weight(theta), image, "zeros")
    columns = [(kernels.matrix(one, image, "zeros") @ forward).flatten() for one in basis]
    design, target = torch.stack(columns, dim=1), torch.eye(len(forward))
    solution = torch.linalg.lstsq(design, target.view(-1, 1), driver="gelsd").solution
    best = solution.view_as(fitted)
    # White images are a sample: 16 equations for each unknown, a thirty-second in a norm.
    errors = [
        torch.linalg.matrix_norm(kernels.matrix(one, image, "zeros") @ forward - target)
        for one in (fitted, best)
    ]
    assert errors[0] < 1.1 * errors[1]
    again = part.inverse_weight(theta, torch.Size([2, *image]))
    assert relative_error(again, fitted) < ROUNDING[torch.float64]  # by the same images


@pytest.mark.parametrize("size", [None, 5, 13])
def test_inverse_weight_of_periodic_images_is_a_window_of_the_inverse(size: int | None) -> None:
    part, theta = Convolution("circular", None if size is None else (size, size)), random_theta()
    fitted = part.inverse_weight(theta, torch.Size([2, 9, 10]))
    length = {None: 7, 5: 5, 13: 9}[size]  # no larger than the image
    assert fitted.shape == (2, 2, length, length)
    factors = part.factorize(theta, torch.Size([2, 9, 10]))
    assert torch.equal(fitted, factors.inverse_kernel((length, length)))
    if size == 13:  # with zeros too, if 25 × 25 entries for each of 2 channels are too many to fit
        parts = [Convolution(mode, (25, 25)) for mode in kernels.PADDING_MODES]
        assert torch.equal(*[one.inverse_weight(theta, torch.Size([2, 26, 26])) for one in parts])

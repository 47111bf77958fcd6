"""Solves with a convolution without its factors: to rounding, one image apart from the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_snf.conv import kernels, solve
from pyro_snf.conv.exact import ConvFactors
from pyro_snf.conv.solve import KernelSolver, KrylovSolver, is_affordable
from pyro_snf.transforms import conv as conv_module
from tests.registry import conv, density_by_inverse, density_by_transform, relative_error

# Of a solve, relative to its solution: rounding, a few dozen times it, times the condition number.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}

SIZES = {
    "3×3": (2, (3, 3), (4, 5)),
    "3×5": (1, (3, 5), (6, 7)),
    "one row": (2, (1, 3), (3, 6)),
    "larger": (3, (5, 5), (12, 9)),
}
EVERY_SIZE = pytest.mark.parametrize("size", SIZES)
PADDED = pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)
BOTH_WAYS = pytest.mark.parametrize("transposed", [False, True], ids=["J", "transposed"])


def random_kernel(channels: int, kernel_size: tuple[int, int]) -> Tensor:
    """One of condition number 3 at most, on images of any size."""
    return kernels.near_identity(conv(channels, kernel_size=kernel_size).theta.detach())


def dense_solve(kernel: Tensor, images: Tensor, padding_mode: str, transposed: bool) -> Tensor:
    size = (images.shape[-2], images.shape[-1])
    matrix = kernels.matrix(kernel.double(), size, padding_mode)
    rows = images.double().flatten(1)
    solution = torch.linalg.solve(matrix.mT if transposed else matrix, rows.mT).mT
    return solution.reshape(images.shape)


def factors_were_made(solver: KrylovSolver) -> bool:
    """Those of J itself; the torus' are cheap."""
    return "_made" in solver.factors.__dict__


# --- Krylov spaces ------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@PADDED
@EVERY_SIZE
def test_solution_is_exact_without_factors(
    size: str, padding_mode: str, dtype: torch.dtype, transposed: bool
) -> None:
    channels, kernel_size, image_size = SIZES[size]
    kernel = random_kernel(channels, kernel_size).to(dtype)
    images = torch.randn(6, channels, *image_size, dtype=dtype)
    solver = KrylovSolver(kernel, image_size, padding_mode)
    solution = solver(images, transposed)
    assert solution.dtype == dtype
    expected = dense_solve(kernel, images, padding_mode, transposed)
    assert relative_error(solution.double(), expected) < ROUNDING[dtype]
    assert not factors_were_made(solver)


@BOTH_WAYS
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_ill_conditioned_kernels_leave_a_residual_of_rounding(
    dtype: torch.dtype, transposed: bool
) -> None:
    # x ↦ x − c (neighbours): of condition number 10³ on a torus, a few dozen beyond it.
    kernel = torch.zeros(1, 1, 3, 3, dtype=dtype)
    kernel[0, 0, 1, 1] = 1
    for place in ((0, 1), (2, 1), (1, 0), (1, 2)):
        kernel[0, 0, place[0], place[1]] = -0.2495
    images = torch.randn(4, 1, 9, 9, dtype=dtype)
    solver = KrylovSolver(kernel, (9, 9), "zeros")
    solution = solver(images, transposed)
    multiply = kernels.convolve_transposed if transposed else kernels.convolve
    residual = multiply(solution.double(), kernel.double(), "zeros") - images
    level = torch.finfo(dtype).eps * solution.flatten(1).norm(dim=1)
    assert (residual.flatten(1).norm(dim=1) < 10 * level).all()
    assert not factors_were_made(solver)


def test_sizes_of_images_do_not_matter() -> None:
    kernel, images = random_kernel(2, (3, 3)), torch.randn(5, 2, 4, 5)
    images[1] *= 1e100
    images[2] *= 1e-100
    images[3] = 0
    solution = KrylovSolver(kernel, (4, 5), "zeros")(images, False)
    expected = dense_solve(kernel, images, "zeros", False)
    for index in (0, 1, 2, 4):
        assert relative_error(solution[index], expected[index]) < ROUNDING[torch.float64]
    assert not solution[3].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@PADDED
def test_bad_image_stops_no_other(padding_mode: str, value: float) -> None:
    kernel, images = random_kernel(2, (3, 3)), torch.randn(3, 2, 4, 5)
    solver = KrylovSolver(kernel, (4, 5), padding_mode)
    expected = solver(images, False)
    images[1, 0, 2, 2] = value
    solution = solver(images, False)
    assert torch.isnan(solution[1]).all()
    others = [0, 2]
    assert relative_error(solution[others], expected[others]) < ROUNDING[torch.float64]
    assert not factors_were_made(solver)
    assert torch.isnan(solver(images[1:2], False)).all()


@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_images_are_solved_for_in_groups(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, images = random_kernel(2, (3, 3)), torch.randn(7, 2, 4, 5)
    solver = KrylovSolver(kernel, (4, 5), "zeros")
    expected = solver(images, False)
    sizes = []
    solve_group = solver._solve
    monkeypatch.setattr(
        solver, "_solve", lambda part, *args: (sizes.append(len(part)), solve_group(part, *args))[1]
    )
    monkeypatch.setattr(solve, "_MAX_NUMBERS", group * 2 * solve._MAX_ITERATIONS * 40)
    solution = solver(images, False)
    assert sum(sizes) == 7
    assert max(sizes) == min(group, 7)
    assert relative_error(solution, expected) < ROUNDING[torch.float64]


@BOTH_WAYS
def test_restarts_finish_what_a_small_space_cannot(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "_MAX_ITERATIONS", 3)
    kernel, images = random_kernel(2, (3, 3)), torch.randn(4, 2, 4, 5)
    solver = KrylovSolver(kernel, (4, 5), "zeros")
    solution = solver(images, transposed)
    expected = dense_solve(kernel, images, "zeros", transposed)
    assert relative_error(solution, expected) < ROUNDING[torch.float64]
    assert not factors_were_made(solver)


@BOTH_WAYS
def test_factors_take_over_where_it_does_not_converge(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "_MAX_ITERATIONS", 1)
    kernel, images = random_kernel(2, (3, 3)), torch.randn(4, 2, 4, 5)
    images[2] = math.nan
    solver = KrylovSolver(kernel, (4, 5), "zeros")
    # A preconditioner that leads nowhere.
    monkeypatch.setattr(solver.torus, "solve", lambda images, transposed: torch.randn_like(images))
    solution = solver(images, transposed)
    expected = dense_solve(kernel, images, "zeros", transposed)
    others = [0, 1, 3]
    assert relative_error(solution[others], expected[others]) < ROUNDING[torch.float64]
    assert torch.isnan(solution[2]).all()
    assert factors_were_made(solver)


def test_kernel_that_is_singular_on_a_torus_is_solved_for_all_the_same() -> None:
    # x ↦ x − (its neighbour): the preconditioner does not exist, the solution does.
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1] = torch.tensor([0.0, 1.0, -1.0])
    images = torch.randn(3, 1, 4, 5)
    solution = KrylovSolver(kernel, (4, 5), "zeros")(images, False)
    expected = dense_solve(kernel, images, "zeros", False)
    assert relative_error(solution, expected) < ROUNDING[torch.float64]


@pytest.mark.parametrize("kind", ["singular", "NaN"])
@PADDED
def test_singular_kernel_is_an_error(padding_mode: str, kind: str) -> None:
    kernel = random_kernel(2, (3, 3))
    if kind == "singular":
        kernel[1] = kernel[0]
    else:
        kernel[0, 0, 0, 0] = math.nan
    solver = KrylovSolver(kernel, (4, 5), padding_mode)
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular|NaN"):
        solver(torch.randn(3, 2, 4, 5), False)


def test_solver_keeps_the_kernel_that_it_was_made_for() -> None:
    layer = conv(2)
    kernel = kernels.near_identity(layer.theta.detach())
    solver = KrylovSolver(kernels.near_identity(layer.theta.detach()), (4, 5), "zeros")
    images = torch.randn(3, 2, 4, 5)
    with torch.no_grad():
        layer.theta.mul_(-1)
    expected = dense_solve(kernel, images, "zeros", False)
    assert relative_error(solver(images, False), expected) < ROUNDING[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_solved_in_float32(dtype: torch.dtype) -> None:
    kernel, images = random_kernel(2, (3, 3)).to(dtype), torch.randn(3, 2, 4, 5).to(dtype)
    solution = KrylovSolver(kernel, (4, 5), "zeros")(images, False)
    assert solution.dtype == dtype
    expected = dense_solve(kernel, images, "zeros", False)
    assert relative_error(solution.double(), expected) < torch.finfo(dtype).eps


# --- One pass -----------------------------------------------------------------------------------


@BOTH_WAYS
@PADDED
def test_one_pass_is_a_convolution(padding_mode: str, transposed: bool) -> None:
    kernel, images = torch.randn(2, 2, 5, 3), torch.randn(3, 2, 6, 7)
    matrix = kernels.matrix(kernel, (6, 7), padding_mode)
    expected = images.flatten(1) @ (matrix if transposed else matrix.mT)
    actual = KernelSolver(kernel, padding_mode)(images, transposed)
    assert relative_error(actual.flatten(1), expected) < ROUNDING[torch.float64]


# --- In the layer -------------------------------------------------------------------------------


def test_affordable_is_what_takes_seconds() -> None:
    assert is_affordable((3, 3), 1, (256, 256), "zeros")
    assert is_affordable((3, 3), 12, (32, 32), "zeros")
    assert is_affordable((5, 5), 48, (64, 64), "circular")
    assert not is_affordable((3, 3), 64, (64, 64), "zeros")


@pytest.fixture
def expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """``inverse="refined"`` iterates, as it does where factors would be very large."""
    monkeypatch.setattr(conv_module, "is_affordable", lambda *_: False)


@pytest.mark.usefixtures("expensive")
@pytest.mark.parametrize("log_det", ["refined", "learned", "exact"])
@PADDED
def test_layer_that_iterates_equals_one_that_factorizes(log_det: str, padding_mode: str) -> None:
    results = []
    for inverse in ("refined", "exact"):
        layer = conv(2, log_det=log_det, inverse=inverse, padding_mode=padding_mode)
        y = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x = layer.inv(y)
        loss = density_by_transform(layer, y).mean() + density_by_inverse(layer, y).mean()
        loss = loss + x.sin().sum()
        gradients = torch.autograd.grad(loss, [y, layer.theta, layer.log_scale, layer.bias])
        with torch.no_grad():
            pushed = layer.push_score(x, y, y)
        results.append([x, pushed, *gradients])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-11


@pytest.mark.usefixtures("expensive")
def test_layer_that_iterates_has_all_derivatives() -> None:
    layer = conv(1).with_cache(0)
    y = torch.randn(1, 1, 3, 4, requires_grad=True)
    inputs = (*layer.parameters(), y)
    # The small least-squares problems of LAPACK are not the same to the last digit.
    assert gradcheck(lambda *_: layer.inv(y), inputs, nondet_tol=1e-12)
    assert gradgradcheck(lambda *_: layer.inv(y), inputs, nondet_tol=1e-12)


def test_layer_does_not_factorize_what_is_not_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, y = conv(2), torch.randn(3, 2, 4, 5)
    expected = layer.inv(y)
    made = []
    factorize = ConvFactors._makers

    def makers(factors: ConvFactors) -> list[object]:
        made.append(factors.padding_mode)
        return factorize(factors)

    monkeypatch.setattr(conv_module, "is_affordable", lambda *_: False)
    monkeypatch.setattr(ConvFactors, "_makers", makers)
    layer.clear_cache()
    with torch.no_grad():
        layer.theta.add_(0)  # a new version, the same kernel
    assert relative_error(layer.inv(y), expected) < ROUNDING[torch.float64]
    assert set(made) == {"circular"}


# --- One pass -----------------------------------------------------------------------------------


def error_of(inverse: Tensor, kernel: Tensor, image_size: tuple[int, int]) -> float:
    """``‖I − R J‖_F``."""
    forward = kernels.matrix(kernel, image_size, "zeros")
    product = kernels.matrix(inverse, image_size, "zeros") @ forward
    return (torch.eye(len(forward)) - product).norm().item()


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 5), (7, 7)])
def test_one_pass_kernel_is_that_of_least_squares(size: tuple[int, int]) -> None:
    kernel, image_size = random_kernel(2, (3, 3)), (7, 8)
    fitted = solve.one_pass_kernel(kernel, size, image_size, "zeros")
    assert fitted.shape == (2, 2, *size)
    # The best of all: every column of J's adjoint action on a basis of kernels.
    basis = torch.eye(fitted.numel()).view(-1, *fitted.shape)
    forward = kernels.matrix(kernel, image_size, "zeros")
    columns = [(kernels.matrix(one, image_size, "zeros") @ forward).flatten() for one in basis]
    design, target = torch.stack(columns, dim=1), torch.eye(len(forward)).flatten()
    best = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution.view_as(fitted)
    # White images are a sample: 16 equations for each unknown, a thirty-second in a norm.
    assert error_of(fitted, kernel, image_size) < 1.1 * error_of(best, kernel, image_size)
    again = solve.one_pass_kernel(kernel, size, image_size, "zeros")
    assert relative_error(again, fitted) < ROUNDING[torch.float64]  # the same images


def test_one_pass_kernel_of_very_many_entries_is_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "_MAX_UNKNOWNS", 1)
    kernel = random_kernel(2, (3, 3))
    window = solve.one_pass_kernel(kernel, (5, 5), (6, 6), "zeros")
    assert torch.equal(window, solve.one_pass_kernel(kernel, (5, 5), (6, 6), "circular"))


def test_one_pass_kernel_of_a_kernel_that_is_not_finite_is_an_error() -> None:
    kernel = torch.full((1, 1, 3, 3), math.nan)
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinite"):
        solve.one_pass_kernel(kernel, (3, 3), (5, 5), "zeros")

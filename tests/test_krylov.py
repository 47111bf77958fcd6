"""Krylov spaces against dense solves and logarithms of matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import logm
from torch import Tensor

from pyro_snf.krylov import Operator, _LeastSquares, bidiagonalize, gcr, krylov, quadrature_of
from tests.registry import relative_error

# Float64, condition numbers below 10, spaces of a dozen vectors.
EXACT = 1e-10

SHAPE = (2, 2, 3)
DIM = 12


def product(matrix: Tensor, images: Tensor) -> Tensor:
    return (images.flatten(1) @ matrix.mT).view_as(images)


def solved(
    solver: Callable[..., Any],
    matrix: Tensor,
    images: Tensor,
    *,
    inverse: Tensor | None = None,
    tolerance: float = 0.0,
    max_steps: int = DIM,
) -> Any:
    """For J = ``matrix`` and P⁻¹ = ``inverse``, in the whole space, unless told otherwise."""
    return solver(
        lambda vectors: product(matrix, vectors),
        lambda vectors: vectors if inverse is None else product(inverse, vectors),
        images,
        tolerance=tolerance,
        max_steps=max_steps,
    )


space = partial(solved, krylov)
coarse = partial(solved, gcr)


def near_identity(size: float, seed: int = 0) -> Tensor:
    noise = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.eye(DIM) + size * noise / torch.linalg.matrix_norm(noise, 2)


def right_sides(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(7))


def residuals(matrix: Tensor, images: Tensor, solution: Tensor) -> Tensor:
    """``‖v − J u‖/‖v‖``, in float64."""
    rows, solved = images.double().flatten(1), solution.double().flatten(1)
    return (rows - solved @ matrix.double().mT).norm(dim=1) / rows.norm(dim=1)


def second_order_log(matrix: Tensor, images: Tensor) -> Tensor:
    """``vᵀ(log A − A + I)v``, by SciPy."""
    logarithm = torch.from_numpy(logm(matrix.numpy())).real
    rows = images.flatten(1)
    return ((rows @ (logarithm - matrix + torch.eye(len(matrix)))) * rows).sum(1)


def half_log(matrix: Tensor, images: Tensor) -> Tensor:
    """``½ vᵀ log(JᵀJ) v``, by an eigendecomposition."""
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return 0.5 * ((images.flatten(1) @ vectors).square() @ values.log())


def log_quadrature(
    operator: Operator, transposed: Operator, vectors: Tensor, max_steps: int
) -> Tensor:
    return quadrature_of(bidiagonalize(operator, transposed, vectors, max_steps=max_steps))


def quadrature(matrix: Tensor, images: Tensor, max_steps: int = DIM) -> Tensor:
    return log_quadrature(
        lambda vectors: product(matrix, vectors),
        lambda vectors: product(matrix.mT, vectors),
        images,
        max_steps=max_steps,
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 5, DIM])
def test_residual_is_the_smallest_in_the_space(steps: int) -> None:
    # Right preconditioning: u = P⁻¹x, x in the span of v, Av, A²v, …
    matrix, inverse, images = near_identity(0.8), near_identity(0.3, seed=1), right_sides()
    result = space(matrix, images, inverse=inverse, max_steps=steps)
    assert result.hessenberg.shape == (4, steps, steps)
    expected = residuals(matrix, images, result.solution)
    assert torch.allclose(result.residual, expected, rtol=EXACT, atol=EXACT)
    for index, row in enumerate(images.flatten(1)):
        columns = [matrix @ inverse @ row]
        for _ in range(steps - 1):
            columns.append(matrix @ inverse @ columns[-1])
        basis = torch.stack(columns, dim=1)
        best = torch.linalg.lstsq(basis, row[:, None]).solution
        smallest = (row[:, None] - basis @ best).norm() / row.norm()
        assert result.residual[index].item() == pytest.approx(smallest.item(), rel=1e-6, abs=EXACT)
    if steps == DIM:
        expected = torch.linalg.solve(matrix, images.flatten(1).mT).mT
        assert relative_error(result.solution.flatten(1), expected) < EXACT


def test_stops_when_all_residuals_are_small() -> None:
    matrix, images = near_identity(0.3), right_sides()
    result = space(matrix, images, tolerance=1e-3)
    assert (result.residual <= 1e-3).all()
    assert (residuals(matrix, images, result.solution) <= 1e-3 * (1 + EXACT)).all()
    steps = result.hessenberg.shape[-1]
    assert 1 < steps < DIM
    before = space(matrix, images, max_steps=steps - 1)
    assert not (before.residual <= 1e-3).all()


def test_coarse_solution_stops_when_the_mean_of_the_residuals_is_small() -> None:
    # One of many rows takes more steps than all the others.
    matrix, images = torch.eye(DIM), right_sides(100)
    matrix[:, 0] = torch.linspace(1, 4, DIM)
    images[1:] *= torch.tensor([0.0] + [1.0] * (DIM - 1)).view(SHAPE)
    mean, largest = coarse(matrix, images, tolerance=0.1), space(matrix, images, tolerance=0.1)
    assert mean.num_steps == 1 < largest.num_steps
    found = residuals(matrix, images, mean.solution)
    assert found.max() > 0.1 >= found.square().mean().sqrt()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, DIM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coarse_solution_is_the_best_in_the_space(steps: int, dtype: torch.dtype) -> None:
    matrix, inverse, images = near_identity(0.8), near_identity(0.3, seed=1), right_sides()
    expected = space(matrix, images, inverse=inverse, max_steps=steps).solution
    narrow = (one.to(dtype) for one in (matrix, images, inverse))
    matrix, images, inverse = narrow
    result = coarse(matrix, images, inverse=inverse, max_steps=steps)
    assert result.num_steps == steps
    assert result.solution.dtype == dtype
    assert relative_error(result.solution, expected) < (EXACT if dtype == torch.float64 else 1e-5)


def test_coarse_solution_of_an_exhausted_space() -> None:
    # Of one, two and three dimensions, and of none; the steps go on after that.
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0] * 4))
    images = torch.zeros(4, *SHAPE)
    for row in range(4):
        images.flatten(1)[row, :row] = 1
    for dtype in (torch.float32, torch.float64):
        result = coarse(matrix.to(dtype), images.to(dtype))
        expected = torch.linalg.solve(matrix, images.flatten(1).mT).mT.view_as(images)
        tolerance = 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(result.solution.double(), expected, rtol=0, atol=tolerance)
    # Where steps gain nothing, and where the matrix is singular.
    for matrix in (torch.roll(torch.eye(DIM), 1, 0), torch.zeros(DIM, DIM)):
        one = torch.eye(DIM)[:4].view(4, *SHAPE)
        assert torch.equal(coarse(matrix, one, max_steps=5).solution, torch.zeros_like(one))


def test_coarse_solutions_do_not_depend_on_each_other() -> None:
    matrix, images = near_identity(0.5), right_sides()
    images[1] *= 1e8
    images[2] *= 1e-8
    together = coarse(matrix, images, max_steps=4).solution
    for index in range(4):
        alone = coarse(matrix, images[index : index + 1], max_steps=4).solution
        assert relative_error(together[index], alone[0]) < EXACT


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("size", [0.1, 0.3, 0.8])
def test_last_step_is_predicted(size: float, tolerance: float) -> None:
    # J P⁻¹ is near the identity, J alone is not.
    scale, images = torch.linspace(0.5, 2, DIM), right_sides(100)
    matrix, inverse = near_identity(size) * scale, torch.diag(1 / scale)
    counts = {"matrix": 0, "inverse": 0}

    def counted(name: str, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        def multiply(vectors: Tensor) -> Tensor:
            counts[name] += 1
            return product(matrix, vectors)

        return multiply

    result = gcr(
        counted("matrix", matrix),
        counted("inverse", inverse),
        images,
        tolerance=tolerance,
        max_steps=DIM,
    )
    steps = result.num_steps
    before, plain = (
        space(matrix, images, inverse=inverse, max_steps=max(number, 1))
        for number in (steps - 1, steps)
    )
    last = torch.ones(100) if steps == 1 else before.residual
    rest = images - product(matrix, plain.solution)
    rest[plain.residual >= last / 2] = 0
    is_corrected = counts["inverse"] > steps
    assert is_corrected == (plain.residual.square().mean().sqrt() > tolerance)
    expected = plain.solution + is_corrected * product(inverse, rest)
    assert relative_error(result.solution, expected) < EXACT
    assert counts == {"matrix": steps, "inverse": steps + is_corrected}
    found = residuals(matrix, images, result.solution)
    assert found.square().mean().sqrt() <= tolerance


def test_no_last_step_is_predicted_where_steps_gain_little() -> None:
    turn = torch.roll(torch.eye(DIM), 1, 0)  # of which powers are orthogonal to each other
    images = torch.eye(DIM)[:4].view(4, *SHAPE)
    result = coarse(turn, images, tolerance=0.5, max_steps=3)
    assert torch.equal(result.solution, torch.zeros_like(images))


def test_last_step_is_not_made_where_the_step_before_has_gained_little() -> None:
    # In the first of two blocks each step gains a digit, and in the second one nothing; one of 100
    # right-hand sides is of the second.
    turn = torch.roll(torch.eye(6), 1, 0)
    matrix = torch.block_diag(torch.eye(6) + 0.1 * turn, turn)
    rows = torch.eye(DIM)[torch.arange(100) % 6]
    rows[0] = torch.eye(DIM)[7]
    images = rows.view(100, *SHAPE)
    for tolerance, steps in [(0.13, 1), (0.12, 2)]:
        result = coarse(matrix, images, tolerance=tolerance, max_steps=3)
        assert result.num_steps == steps
        found = residuals(matrix, images, result.solution)
        assert found[0] == 1
        assert found[1:].max() < 0.02
        assert found.square().mean().sqrt() <= tolerance


def test_rows_do_not_depend_on_each_other() -> None:
    matrix, images = near_identity(0.5), right_sides()
    images[1] *= 1e8
    images[2] *= 1e-8
    together, logs = space(matrix, images, max_steps=4).solution, quadrature(matrix, images, 4)
    for index in range(4):
        row = images[index : index + 1]
        alone = space(matrix, row, max_steps=4).solution[0]
        assert relative_error(together[index], alone) < EXACT
        assert logs[index].item() == pytest.approx(quadrature(matrix, row, 4).item(), rel=EXACT)


def test_same_numbers_give_the_same_to_the_last_bit() -> None:
    # A run that is resumed goes on as it would have, and all ranks of a distributed run alike.
    matrix, images = near_identity(0.8), right_sides(20)
    expected = space(matrix, images, max_steps=4)
    for index in range(100):
        for size in (1, 2, 3, 4):  # freed memory that an uninitialized tensor would show
            torch.full((size,), index, dtype=torch.int32)
        result = space(matrix, images, max_steps=4)
        assert torch.equal(result.solution, expected.solution)
        assert torch.equal(result.residual, expected.residual)


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
def test_multiple_of_the_identity_takes_one_step(value: float) -> None:
    # What rounding leaves of the next vector is noise.
    images, rotation = right_sides(), torch.linalg.qr(near_identity(0.9)).Q
    squares = images.flatten(1).square().sum(1)
    result = space(value * torch.eye(DIM), images, tolerance=EXACT)
    assert result.hessenberg.shape[-1] == 1
    assert relative_error(result.solution, images / value) < EXACT
    expected = (math.log(abs(value)) - value + 1) * squares
    assert torch.allclose(result.second_order_log(), expected, rtol=EXACT, atol=EXACT)
    for matrix in (value * torch.eye(DIM), value * rotation):
        for steps in (1, 3, DIM):
            actual = quadrature(matrix, images, steps)
            assert torch.allclose(actual, math.log(abs(value)) * squares, rtol=EXACT, atol=EXACT)


def test_least_squares_of_columns_that_come_one_by_one() -> None:
    generator = np.random.default_rng(0)
    matrices = np.triu(generator.standard_normal((6, 5, 4)), -1)
    matrices[1, :, 0] = 0  # singular: a column of zeros,
    matrices[2, :, 2] = matrices[2, :, 1]  # two equal ones,
    matrices[3, 1, 1] = matrices[3, 0, 1] * matrices[3, 1, 0] / matrices[3, 0, 0]
    matrices[3, 2, 1] = 0  # or at the end of the space
    matrices[4, 0, 1] = math.nan
    problem = _LeastSquares(len(matrices))
    lengths = np.ones(len(matrices))
    for size in range(1, 5):
        residuals = problem.add(matrices[:, : size + 1, size - 1].T, lengths)
        for index, (matrix, residual) in enumerate(zip(matrices, residuals, strict=True)):
            part, target = matrix[: size + 1, :size], np.eye(size + 1)[0]
            if not np.isfinite(part).all():
                assert residual == math.inf
                assert np.isnan(problem.solution()[:, index]).all()
                continue
            best = np.linalg.lstsq(part, target, rcond=1e-12)[0]
            found = part @ problem.solution()[:, index] - target
            assert np.linalg.norm(found) == pytest.approx(residual, abs=1e-12)
            if index not in (1, 2, 3):
                assert np.allclose(problem.solution()[:, index], best, rtol=1e-9, atol=1e-9)
            assert residual >= np.linalg.norm(part @ best - target) - 1e-12
    assert np.array_equal(problem.hessenberg()[0], matrices[0, :4])


@pytest.mark.parametrize("tolerance", [EXACT, -1.0])
def test_rank_one_change_of_the_identity(tolerance: float) -> None:
    # Two vectors span the space. Further steps, where they are asked for, must do no harm.
    left, right = torch.randn(2, DIM, 1, generator=torch.Generator().manual_seed(3))
    matrix, images = torch.eye(DIM) + 0.1 * left @ right.mT, right_sides()
    result = space(matrix, images, tolerance=tolerance)
    assert result.hessenberg.shape[-1] == (2 if tolerance > 0 else DIM)
    assert (residuals(matrix, images, result.solution) < EXACT).all()
    expected = second_order_log(matrix, images)
    assert torch.allclose(result.second_order_log(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_space_that_is_exhausted_before_the_others(dtype: torch.dtype) -> None:
    # J is the identity on the first half; the first two vectors lie in one of the halves.
    matrix, images = torch.eye(DIM), right_sides()
    matrix[6:, 6:] = near_identity(0.5)[6:, 6:]
    images[0].view(-1)[6:] = 0
    images[1].view(-1)[:6] = 0
    low, tolerance = (matrix.to(dtype), images.to(dtype)), {8: EXACT, 4: 1e-4}[dtype.itemsize]
    result = space(*low)
    assert result.solution.dtype == dtype
    assert (residuals(*low, result.solution) < tolerance).all()
    matrix, images = (tensor.double() for tensor in low)
    logs = [(result.second_order_log(), second_order_log(matrix, images))]
    logs.append((quadrature(*low), half_log(matrix, images)))
    for actual, expected in logs:
        assert torch.allclose(actual, expected, rtol=100 * tolerance, atol=100 * tolerance)
    assert logs[1][0][0].abs() < 10 * tolerance


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_right_sides_and_products_of_zeros(tolerance: float) -> None:
    matrix, images = near_identity(0.5), right_sides()
    images[1] = 0
    for right_side in (images, torch.zeros(2, *SHAPE)):
        result = space(matrix, right_side)
        for zero in (result.solution, result.residual, result.second_order_log()):
            assert not zero[1].any()
        others = right_side.flatten(1).any(1)
        assert (residuals(matrix, right_side, result.solution)[others] < EXACT).all()
    # A product of zeros is no sign of an exhausted space.
    images = right_sides()
    for singular in (torch.zeros(DIM, DIM), torch.diag((torch.arange(DIM) < 6).double())):
        images[0].view(-1)[:6] = 0  # all of it where the second matrix has zeros
        result = space(singular, images, tolerance=tolerance)
        expected = residuals(singular, images, result.solution)
        assert torch.allclose(result.residual, expected, atol=EXACT)
        assert result.residual[0] == 1
    result = space(matrix, images, inverse=torch.zeros(DIM, DIM), tolerance=tolerance)
    assert not result.solution.any()
    assert torch.equal(result.residual, torch.ones(4))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_no_more_steps_than_dimensions(dim: int) -> None:
    matrix, images = near_identity(0.5)[:dim, :dim], torch.randn(3, 1, 1, dim)
    result = space(matrix, images, max_steps=20)
    assert result.hessenberg.shape[-1] <= dim
    assert (residuals(matrix, images, result.solution) < EXACT).all()
    actual = quadrature(matrix, images, 20)
    assert torch.allclose(actual, half_log(matrix, images), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [0.01, 0.3, 0.9])
def test_logarithms_of_the_whole_space_are_exact(size: float, sign: int) -> None:
    # Of size², with errors of order 1; their traces over a basis give log|det A|.
    matrix, images, basis = near_identity(size), right_sides(), torch.eye(DIM).view(DIM, *SHAPE)
    if sign == 1:  # the logarithm of a matrix of negative determinant is complex
        expected = second_order_log(matrix, images)
        assert relative_error(space(matrix, images).second_order_log(), expected) < 1e-8
    matrix[0] *= sign
    for steps in (DIM, DIM + 5):
        actual = quadrature(matrix, images, steps)
        assert actual.shape == (4,)
        assert actual.dtype == torch.float64
        assert relative_error(actual, half_log(matrix, images)) < 1e-8
    expected = torch.linalg.slogdet(matrix).logabsdet.item()
    assert quadrature(matrix, basis).sum().item() == pytest.approx(expected, abs=1e-8)
    total = space(matrix, basis).second_order_log().sum() + matrix.trace() - DIM
    assert total.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("size", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["one block", "chain", "triangular"])
def test_logarithm_of_a_defective_matrix(kind: str, size: float) -> None:
    # I + N with a nilpotent N has no basis of eigenvectors: kernels that move in one channel as
    # another sees it, or to one side. Where N² = 0, log(I + N) = N exactly.
    change = torch.triu(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3)), 1)
    if kind == "one block":
        change[6:] = 0
        change[:, :6] = 0
    elif kind == "chain":
        change = torch.diag(torch.ones(DIM - 1), 1)
    matrix = torch.eye(DIM) + size * change / torch.linalg.matrix_norm(change, 2)
    images = right_sides().sign()
    images[0].fill_(1.0)
    series, power = torch.zeros(DIM, DIM), matrix - torch.eye(DIM)
    for order in range(2, DIM):
        power = power @ (matrix - torch.eye(DIM))
        series += (-1) ** (order + 1) / order * power
    rows = images.flatten(1)
    expected = ((rows @ series) * rows).sum(1)
    for tolerance in (0.0, 1e-6):
        actual = space(matrix, images, tolerance=tolerance).second_order_log()
        # Eigenvectors of a condition number of 10⁷ cost as many digits.
        assert torch.allclose(actual, expected, atol=1e-6 if tolerance == 0 else 1e-4)


def test_logarithms_converge_and_the_quadrature_from_above() -> None:
    # Gauss' rule for a logarithm, whose even derivatives are all negative.
    matrix, images = near_identity(0.9), right_sides(50)
    expected = half_log(matrix, images)
    bounds = [quadrature(matrix, images, count) for count in (1, 2, 3, 4, 6, DIM)]
    rows = images.flatten(1)
    length, size = (rows @ matrix.mT).norm(dim=1), rows.norm(dim=1)
    assert torch.allclose(bounds[0], size.square() * (length / size).log(), rtol=EXACT)
    assert (bounds[0] > expected + 0.01).all()
    for before, after in itertools.pairwise(bounds):
        assert (after <= before + EXACT).all()
        assert (after >= expected - 1e-8).all()
    errors = [(bound - expected).mean() for bound in bounds]
    matrix = near_identity(0.3)
    logs = [space(matrix, images, max_steps=count).second_order_log() for count in (1, 2, 3, 4)]
    others = [(log - second_order_log(matrix, images)).norm() for log in logs]
    for found in (errors[:-1], others):
        assert all(after < 0.5 * before for before, after in itertools.pairwise(found))


def test_numbers_of_products() -> None:
    matrix, inverse, images = near_identity(0.8), near_identity(0.3, seed=1), right_sides()
    expected, calls = space(matrix, images, inverse=inverse, max_steps=3), []

    def counted(name: str, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda vectors: calls.append(name) or product(matrix, vectors)

    operator, solve = counted("J", matrix), counted("P⁻¹", inverse)
    known = product(inverse, images)  # a preconditioned right side saves a product
    result = krylov(operator, solve, images, preconditioned=known, tolerance=0.0, max_steps=3)
    assert calls.count("P⁻¹") == 2
    assert relative_error(result.solution, expected.solution) < EXACT
    calls.clear()
    found = gcr(operator, solve, images, preconditioned=known, tolerance=0.0, max_steps=3)
    assert (calls.count("P⁻¹"), calls.count("J")) == (2, 3)
    assert relative_error(found.solution, expected.solution) < EXACT
    calls.clear()
    log_quadrature(operator, counted("Jᵀ", matrix.mT), images, max_steps=5)
    assert sorted(calls) == ["J"] * 5 + ["Jᵀ"] * 4


def test_singular_matrices() -> None:
    images = right_sides()
    for rank in (0, 1, 6):
        matrix = torch.diag((torch.arange(DIM) < rank).double())
        assert torch.equal(quadrature(matrix, images), torch.full((4,), -math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["vector", "J", "Jᵀ", "P⁻¹"])
def test_bad_row_is_nan_and_stops_no_other(what: str, value: float) -> None:
    matrix, images, others = near_identity(0.8), right_sides(), [0, 2, 3]
    expected, bad = space(matrix, images, max_steps=4), images.clone()
    if what == "vector":
        bad[1, 0, 0, 0] = value

    def spoiled(name: str, matrix: Tensor, where: Tensor) -> Callable[[Tensor], Tensor]:
        """The product, not finite for vectors that are parallel to a given one."""

        def multiply(vectors: Tensor) -> Tensor:
            result, rows, one = product(matrix, vectors), vectors.flatten(1), where.flatten()
            is_bad = (rows @ one).abs() > 0.999 * rows.norm(dim=1) * one.norm()
            return torch.where(is_bad.view(-1, 1, 1, 1), value, result) if what == name else result

        return multiply

    operator = spoiled("J", matrix, images[1])
    if what != "Jᵀ":
        precondition = spoiled("P⁻¹", torch.eye(DIM), images[1])
        result = krylov(operator, precondition, bad, tolerance=0.0, max_steps=4)
        assert torch.isnan(result.solution[1]).all()
        assert result.residual[1] == math.inf
        assert torch.isfinite(result.hessenberg).all()
        assert relative_error(result.solution[others], expected.solution[others]) < EXACT
        result = krylov(operator, precondition, bad, tolerance=0.9, max_steps=4)
        assert (result.residual[others] <= 0.9).all()
        found = gcr(operator, precondition, bad, tolerance=0.0, max_steps=4)
        assert torch.isnan(found.solution[1]).all()
        assert relative_error(found.solution[others], expected.solution[others]) < EXACT
    if what != "P⁻¹":
        transposed = spoiled("Jᵀ", matrix.mT, product(matrix, images)[1])
        actual = log_quadrature(operator, transposed, bad, max_steps=4)
        assert torch.isnan(actual[1])
        assert torch.allclose(actual[others], quadrature(matrix, images, 4)[others], rtol=EXACT)

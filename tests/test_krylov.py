"""Krylov spaces against dense solves and logarithms of matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.linalg import logm
from torch import Tensor

from pyro_snf.krylov import KrylovSpace, krylov, log_quadrature
from tests.registry import relative_error

# Float64, condition numbers below 10, spaces of a dozen vectors.
EXACT = 1e-10
# The same in float32.
SINGLE = 1e-4

SHAPE = (2, 2, 3)
DIM = 12


def product(matrix: Tensor, images: Tensor) -> Tensor:
    return (images.flatten(1) @ matrix.mT).view_as(images)


def space(
    matrix: Tensor,
    images: Tensor,
    *,
    inverse: Tensor | None = None,
    tolerance: float = 0.0,
    max_iterations: int = DIM,
    preconditioned: Tensor | None = None,
) -> KrylovSpace:
    """That of J = ``matrix`` and P⁻¹ = ``inverse``; the whole one, unless told otherwise."""
    return krylov(
        lambda vectors: product(matrix, vectors),
        lambda vectors: vectors if inverse is None else product(inverse, vectors),
        images,
        preconditioned=preconditioned,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


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


# --- Solutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [None, "near", "exact"])
def test_whole_space_has_the_solution(preconditioner: str | None) -> None:
    matrix, images = near_identity(0.8), right_sides()
    error = {None: 0.0, "near": 0.1, "exact": 0.0}[preconditioner]
    inverse = None
    if preconditioner is not None:
        inverse = torch.linalg.inv(matrix) @ near_identity(error, seed=1)
    result = space(matrix, images, inverse=inverse)
    expected = torch.linalg.solve(matrix, images.flatten(1).mT).mT
    assert relative_error(result.solution.flatten(1), expected) < EXACT
    assert result.solution.shape == images.shape
    assert (result.residual < EXACT).all()


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_reported_residuals_are_true(iterations: int) -> None:
    matrix, images = near_identity(0.8), right_sides()
    result = space(matrix, images, max_iterations=iterations)
    assert result.hessenberg.shape == (4, iterations, iterations)
    expected = residuals(matrix, images, result.solution)
    assert torch.allclose(result.residual, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_no_other_solution_in_the_space_has_a_smaller_residual(iterations: int) -> None:
    # Right preconditioning: u = P⁻¹x, x in the span of v, Av, A²v, …
    matrix, inverse, images = near_identity(0.8), near_identity(0.3, seed=1), right_sides(1)
    result = space(matrix, images, inverse=inverse, max_iterations=iterations)
    vectors = [images.flatten(1)]
    for _ in range(iterations - 1):
        vectors.append(vectors[-1] @ (matrix @ inverse).mT)
    basis = torch.cat(vectors) @ (matrix @ inverse).mT
    rows = images.flatten(1)
    best = torch.linalg.lstsq(basis.mT, rows.mT).solution
    expected = (rows.mT - basis.mT @ best).norm() / rows.norm()
    assert result.residual.item() == pytest.approx(expected.item(), rel=1e-6)


def test_stops_when_all_residuals_are_small() -> None:
    matrix, images = near_identity(0.3), right_sides()
    result = space(matrix, images, tolerance=1e-3)
    assert (result.residual <= 1e-3).all()
    assert (residuals(matrix, images, result.solution) <= 1e-3 * (1 + EXACT)).all()
    iterations = result.hessenberg.shape[-1]
    assert 1 < iterations < DIM
    before = space(matrix, images, max_iterations=iterations - 1)
    assert not (before.residual <= 1e-3).all()


def test_preconditioned_right_side_saves_a_product() -> None:
    matrix, inverse, images = near_identity(0.8), near_identity(0.3, seed=1), right_sides()
    calls = []

    def precondition(vectors: Tensor) -> Tensor:
        calls.append(1)
        return product(inverse, vectors)

    results = []
    for at_hand in (None, product(inverse, images)):
        calls.clear()
        results.append(
            krylov(
                lambda vectors: product(matrix, vectors),
                precondition,
                images,
                preconditioned=at_hand,
                tolerance=0.0,
                max_iterations=3,
            )
        )
        assert len(calls) == (3 if at_hand is None else 2)
    assert relative_error(results[1].solution, results[0].solution) < EXACT


def test_right_sides_do_not_depend_on_each_other() -> None:
    matrix, images = near_identity(0.5), right_sides()
    images[1] *= 1e8
    images[2] *= 1e-8
    together = space(matrix, images, max_iterations=4).solution
    for index in range(4):
        alone = space(matrix, images[index : index + 1], max_iterations=4).solution[0]
        assert relative_error(together[index], alone) < EXACT


def test_same_numbers_give_the_same_to_the_last_bit() -> None:
    # A run that is resumed goes on as it would have, and all ranks of a distributed run alike.
    matrix, images = near_identity(0.8), right_sides(20)
    expected = space(matrix, images, max_iterations=4)
    for index in range(300):
        for size in (1, 2, 3, 4):  # what is left in memory that nobody uses any more
            torch.full((size,), index, dtype=torch.int32)
        result = space(matrix, images, max_iterations=4)
        assert torch.equal(result.solution, expected.solution)
        assert torch.equal(result.residual, expected.residual)


def test_float32() -> None:
    matrix, images = near_identity(0.5).float(), right_sides().float()
    result = space(matrix, images, tolerance=1e-6)
    assert result.solution.dtype == torch.float32
    assert (residuals(matrix, images, result.solution) < SINGLE).all()
    expected = second_order_log(matrix.double(), images.double())
    assert torch.allclose(result.second_order_log(), expected, rtol=SINGLE, atol=SINGLE)


# --- Spaces that end early ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
def test_multiple_of_the_identity_is_done_at_once(value: float) -> None:
    images = right_sides()
    result = space(value * torch.eye(DIM), images, tolerance=EXACT)
    assert result.hessenberg.shape[-1] == 1
    assert relative_error(result.solution, images / value) < EXACT
    expected = (torch.tensor(value).abs().log() - value + 1) * images.flatten(1).square().sum(1)
    assert torch.allclose(result.second_order_log(), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("tolerance", [EXACT, 0.0])
def test_rank_one_change_of_the_identity(tolerance: float) -> None:
    # Two vectors span the space. What comes after, where it is asked for, must do no harm.
    left, right = torch.randn(2, DIM, 1, generator=torch.Generator().manual_seed(3))
    matrix, images = torch.eye(DIM) + 0.1 * left @ right.mT, right_sides()
    result = space(matrix, images, tolerance=tolerance)
    assert result.hessenberg.shape[-1] == (2 if tolerance else DIM)
    assert (residuals(matrix, images, result.solution) < EXACT).all()
    expected = second_order_log(matrix, images)
    assert torch.allclose(result.second_order_log(), expected, rtol=1e-8, atol=1e-8)


def test_exhausted_space_waits_for_the_others() -> None:
    # J is the identity on the first half, where the first right-hand side lives alone.
    matrix, images = torch.eye(DIM), right_sides()
    matrix[6:, 6:] = near_identity(0.5)[6:, 6:]
    images[0].view(-1)[6:] = 0
    for dtype, tolerance in [(torch.float64, EXACT), (torch.float32, SINGLE)]:
        low = matrix.to(dtype), images.to(dtype)
        result = space(*low)
        assert (residuals(*low, result.solution) < tolerance).all()
        assert torch.allclose(
            result.second_order_log(),
            second_order_log(low[0].double(), low[1].double()),
            rtol=tolerance,
            atol=10 * tolerance,
        )


def test_right_side_of_zeros_is_solved_by_zeros() -> None:
    matrix, images = near_identity(0.5), right_sides()
    images[1] = 0
    result = space(matrix, images)
    assert not result.solution[1].any()
    assert result.residual[1] == 0
    assert result.second_order_log()[1] == 0
    others = [0, 2, 3]
    assert (residuals(matrix, images, result.solution)[others] < EXACT).all()
    nothing = space(matrix, torch.zeros(2, *SHAPE))
    assert not nothing.solution.any()
    assert not nothing.second_order_log().any()


def test_vector_that_the_operator_annihilates_is_not_solved_for() -> None:
    # A product of zeros is no sign of an exhausted space: nothing has been solved.
    images = right_sides()
    for matrix in (torch.zeros(DIM, DIM), torch.diag((torch.arange(DIM) < 6).double())):
        images[0].view(-1)[:6] = 0  # all of it where the second matrix has zeros
        for tolerance in (0.0, 0.5):
            result = space(matrix, images, tolerance=tolerance)
            expected = residuals(matrix, images, result.solution)
            assert torch.allclose(result.residual, expected, atol=EXACT)
            assert result.residual[0] == 1


def test_preconditioner_of_zeros_solves_nothing() -> None:
    images = right_sides()
    result = space(near_identity(0.5), images, inverse=torch.zeros(DIM, DIM))
    assert not result.solution.any()
    assert torch.equal(result.residual, torch.ones(4))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_no_more_iterations_than_dimensions(dim: int) -> None:
    matrix = near_identity(0.5)[:dim, :dim]
    images = torch.randn(3, 1, 1, dim)
    result = space(matrix, images, max_iterations=20)
    assert result.hessenberg.shape[-1] <= dim
    assert (residuals(matrix, images, result.solution) < EXACT).all()


# --- Logarithms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.01, 0.3, 0.9])
def test_logarithm_of_the_whole_space_is_exact(size: float) -> None:
    matrix, images = near_identity(size), right_sides()
    expected = second_order_log(matrix, images)
    actual = space(matrix, images).second_order_log()
    assert relative_error(actual, expected) < 1e-8  # of size², with errors of order 1


def test_trace_over_a_basis_is_the_log_determinant() -> None:
    # With a negative determinant too: it is that of |det A|.
    matrix = near_identity(0.3)
    for sign in (1, -1):
        matrix[0] *= sign
        basis = torch.eye(DIM).view(DIM, *SHAPE)
        total = space(matrix, basis).second_order_log().sum() + matrix.trace() - DIM
        assert total.item() == pytest.approx(torch.linalg.slogdet(matrix).logabsdet.item())


def test_logarithm_converges_with_the_iterations() -> None:
    matrix, images = near_identity(0.3), right_sides()
    expected = second_order_log(matrix, images)
    errors = [
        relative_error(space(matrix, images, max_iterations=count).second_order_log(), expected)
        for count in (1, 2, 3, 4)
    ]
    assert all(after < 0.5 * before for before, after in itertools.pairwise(errors))


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


def test_smallest_eigenvalue() -> None:
    matrix = torch.eye(DIM)
    matrix[3, 3] = 1e-3
    images = right_sides()
    assert space(matrix, images).smallest_eigenvalue == pytest.approx(1e-3)
    assert space(torch.eye(DIM), images).smallest_eigenvalue == pytest.approx(1.0)


# --- What is not finite -------------------------------------------------------------------------


def spoil(result: Tensor, vectors: Tensor, where: Tensor, value: float) -> Tensor:
    """The result, not finite for those of the vectors that are near one of a batch, or its like."""
    rows, one = vectors.flatten(1), where.flatten()
    is_bad = (rows @ one).abs() > 0.999 * rows.norm(dim=1) * one.norm()
    return torch.where(is_bad.view(-1, 1, 1, 1), value, result)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["vector", "product", "preconditioned"])
def test_bad_row_is_nan_and_stops_no_other(what: str, value: float) -> None:
    matrix, images = near_identity(0.8), right_sides()
    expected, others = space(matrix, images, max_iterations=4), [0, 2, 3]
    bad = images.clone()
    if what == "vector":
        bad[1, 0, 0, 0] = value

    def operator(vectors: Tensor) -> Tensor:
        result = product(matrix, vectors)
        return spoil(result, vectors, images[1], value) if what == "product" else result

    def precondition(vectors: Tensor) -> Tensor:
        return spoil(vectors, vectors, images[1], value) if what == "preconditioned" else vectors

    result = krylov(operator, precondition, bad, tolerance=0.0, max_iterations=4)
    assert torch.isnan(result.solution[1]).all()
    assert result.residual[1] == math.inf
    assert torch.isfinite(result.hessenberg).all()
    assert relative_error(result.solution[others], expected.solution[others]) < EXACT
    assert torch.allclose(result.residual[others], expected.residual[others], rtol=EXACT)


def test_bad_rows_do_not_stop_the_iterations_of_others() -> None:
    matrix, images = near_identity(0.3), right_sides()
    images[1] = math.nan
    result = space(matrix, images, tolerance=1e-3)
    assert (result.residual[[0, 2, 3]] <= 1e-3).all()


# --- log|det J| of J itself ---------------------------------------------------------------------


def half_log(matrix: Tensor, images: Tensor) -> Tensor:
    """``½ vᵀ log(JᵀJ) v``, by an eigendecomposition."""
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return 0.5 * ((images.flatten(1) @ vectors).square() @ values.log())


def quadrature(matrix: Tensor, images: Tensor, max_iterations: int = DIM) -> Tensor:
    return log_quadrature(
        lambda vectors: product(matrix, vectors),
        lambda vectors: product(matrix.mT, vectors),
        images,
        max_iterations=max_iterations,
    )


@pytest.mark.parametrize("size", [0.01, 0.3, 0.9])
def test_quadrature_of_the_whole_space_is_exact(size: float) -> None:
    matrix, images = near_identity(size), right_sides()
    for iterations in (DIM, DIM + 5):
        actual = quadrature(matrix, images, iterations)
        assert actual.shape == (4,)
        assert actual.dtype == torch.float64
        assert relative_error(actual, half_log(matrix, images)) < 1e-8  # of size², as above


def test_quadratures_of_a_basis_are_the_log_determinant() -> None:
    matrix, basis = near_identity(0.8), torch.eye(DIM).view(DIM, *SHAPE)
    for sign in (1, -1):
        matrix[0] *= sign
        expected = torch.linalg.slogdet(matrix).logabsdet.item()
        assert quadrature(matrix, basis).sum().item() == pytest.approx(expected, abs=1e-8)


def test_quadrature_is_an_upper_bound_that_falls_with_the_iterations() -> None:
    # Gauss' rule for a logarithm, whose even derivatives are all negative.
    matrix, images = near_identity(0.9), right_sides(50)
    expected = half_log(matrix, images)
    bounds = [quadrature(matrix, images, count) for count in (1, 2, 3, 4, 6, DIM)]
    assert (bounds[0] > expected + 0.01).all()
    for before, after in itertools.pairwise(bounds):
        assert (after <= before + EXACT).all()
        assert (after >= expected - 1e-8).all()
    errors = [(bound - expected).mean() for bound in bounds]
    assert all(after < 0.5 * before for before, after in itertools.pairwise(errors[:-1]))


def test_one_iteration_of_the_quadrature_is_the_length_of_a_product() -> None:
    matrix, images = near_identity(0.8), right_sides()
    rows = images.flatten(1)
    length, size = (rows @ matrix.mT).norm(dim=1), rows.norm(dim=1)
    expected = size.square() * (length / size).log()
    assert torch.allclose(quadrature(matrix, images, 1), expected, rtol=EXACT)


def test_quadrature_takes_as_many_products_as_it_says() -> None:
    matrix, images, calls = near_identity(0.8), right_sides(), []

    def counted(matrix: Tensor, name: str, vectors: Tensor) -> Tensor:
        calls.append(name)
        return product(matrix, vectors)

    log_quadrature(
        lambda vectors: counted(matrix, "J", vectors),
        lambda vectors: counted(matrix.mT, "Jᵀ", vectors),
        images,
        max_iterations=5,
    )
    assert sorted(calls) == ["J"] * 5 + ["Jᵀ"] * 4


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
def test_quadrature_of_a_multiple_of_the_identity(value: float) -> None:
    # The space is exhausted at once, by rounding alone what comes after would be noise.
    images = right_sides()
    rotation = torch.linalg.qr(near_identity(0.9)).Q
    expected = math.log(abs(value)) * images.flatten(1).square().sum(1)
    for matrix in (value * torch.eye(DIM), value * rotation):
        for iterations in (1, 3, DIM):
            actual = quadrature(matrix, images, iterations)
            assert torch.allclose(actual, expected, rtol=EXACT, atol=EXACT)


def test_exhausted_quadrature_waits_for_the_others() -> None:
    matrix, images = torch.eye(DIM), right_sides()
    matrix[6:, 6:] = near_identity(0.5)[6:, 6:]
    images[0].view(-1)[6:] = 0
    images[1].view(-1)[:6] = 0
    for dtype, tolerance in [(torch.float64, 1e-8), (torch.float32, SINGLE)]:
        actual = quadrature(matrix.to(dtype), images.to(dtype))
        expected = half_log(matrix, images)
        assert torch.allclose(actual, expected, rtol=tolerance, atol=10 * tolerance)
        assert actual[0].abs() < 10 * tolerance


def test_quadratures_do_not_depend_on_each_other() -> None:
    matrix, images = near_identity(0.5), right_sides()
    images[1] *= 1e4
    images[2] *= 1e-4
    together = quadrature(matrix, images, 4)
    for index in range(4):
        alone = quadrature(matrix, images[index : index + 1], 4)[0]
        assert together[index].item() == pytest.approx(alone.item(), rel=EXACT)


def test_quadrature_of_a_singular_matrix_is_minus_infinity() -> None:
    images = right_sides()
    for rank in (0, 1, 6):
        matrix = torch.diag((torch.arange(DIM) < rank).double())
        assert torch.equal(quadrature(matrix, images), torch.full((4,), -math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["J", "Jᵀ"])
def test_quadrature_of_what_is_not_finite_is_nan_in_its_row(what: str, value: float) -> None:
    matrix, images = near_identity(0.8), right_sides()
    expected = quadrature(matrix, images, 4)
    image = product(matrix, images)[1]

    def operator(vectors: Tensor) -> Tensor:
        result = product(matrix, vectors)
        return spoil(result, vectors, images[1], value) if what == "J" else result

    def transposed(vectors: Tensor) -> Tensor:
        result = product(matrix.mT, vectors)
        return spoil(result, vectors, image, value) if what == "Jᵀ" else result

    actual = log_quadrature(operator, transposed, images, max_iterations=4)
    assert torch.isnan(actual[1])
    others = [0, 2, 3]
    assert torch.allclose(actual[others], expected[others], rtol=EXACT)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_quadrature_in_few_dimensions(dim: int) -> None:
    matrix = near_identity(0.5)[:dim, :dim]
    images = torch.randn(3, 1, 1, dim)
    actual = quadrature(matrix, images, 20)
    assert torch.allclose(actual, half_log(matrix, images), rtol=1e-8, atol=1e-8)

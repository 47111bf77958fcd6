"""Krylov spaces for many vectors at once: linear systems, and logarithms of determinants.

GMRES with a preconditioner on the right: ``u = P⁻¹ x`` with ``A x = v``, ``A = J P⁻¹``. Arnoldi's
process builds an orthonormal basis Q of ``span(v, A v, A² v, …)`` and a small Hessenberg matrix
``H = Qᵀ A Q``. The best x in the space has the residual ``‖v‖ e₁ − H y``; and

    vᵀ log(A) v  ≈  ‖v‖² [log H]₁₁

in the same space, so that one computation gives the solution and the log-determinant
``tr log A = E[vᵀ log(A) v]``. (:func:`krylov`)

Where a coarse solution is all that is needed, generalized conjugate residuals give that of GMRES
without a basis that is orthonormal, in a sixth of the time besides products. (:func:`gcr`)

Where there is no preconditioner whose determinant is known, log|det J| is computed from J itself.
The process of Golub and Kahan (1965) builds orthonormal bases with ``J Q = P B``, B being
bidiagonal, so that ``BᵀB`` is the matrix of Lanczos' process for ``JᵀJ``. With
``B = U diag(σ) Wᵀ``,

    ½ vᵀ log(JᵀJ) v  ≈  ‖v‖² Σᵢ W₁ᵢ² log σᵢ.

This is a Gauss quadrature of a logarithm. It is an upper bound, which decreases with every vector
(Golub and Meurant, 2010, §6). (:func:`bidiagonalize`, :func:`quadrature_of`)

The vectors stay on their device. The small matrices are factorized on the CPU, in float64, and
copied there at once: a GPU is waited for once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_snf.transfer import read, send

__all__ = [
    "KrylovSpace",
    "Solution",
    "bidiagonalize",
    "gcr",
    "krylov",
    "quadrature_of",
    "recent_steps",
]

Operator = Callable[[Tensor], Tensor]

# The condition number of a matrix of eigenvectors up to which these are used. A kernel that has
# changed only in the entries by which one of two channels depends on the other has E² = 0, and no
# basis of eigenvectors.
_MAX_CONDITION = 1e7

# How much larger a mean residual may be than what is predicted: 1.1 times was seen at a tenth.
_PREDICTION_ERROR = 1.2

# The nodes of Gauss' rule. It is exact to rounding for eigenvalues between 0.1 and 10.
_NUM_NODES = 24


@dataclass(frozen=True)
class KrylovSpace:
    """The solution of ``J u = v`` in a Krylov space, for B right-hand sides v at once."""

    solution: Tensor
    """u, of the shape of v."""
    residual: Tensor
    """``‖v − J u‖/‖v‖``, shape ``(B,)``, in float64 on the CPU."""
    hessenberg: Tensor
    """H, shape ``(B, n, n)``, in float64 on the CPU."""
    size: Tensor
    """‖v‖, shape ``(B,)``, in float64 on the CPU."""
    beside: Tensor
    """A copy of the tensor that was to be read beside it, in float64 on the CPU."""

    @property
    def num_steps(self) -> int:
        """n, the dimension of the space."""
        return self.hessenberg.shape[-1]

    def second_order_log(self) -> Tensor:
        """``vᵀ(log|A| − A + I) v`` for every v, shape ``(B,)``, in float64 on the CPU.

        That is ``vᵀ log|A| v`` less its term of first order in ``A − I``.
        """
        values, vectors = torch.linalg.eig(self.hessenberg)
        inverse = torch.linalg.inv_ex(vectors).inverse
        weights = vectors[:, 0] * inverse[:, :, 0]
        logarithm = (weights * values.log()).sum(-1).real  # det A < 0 adds a πi to tr log A
        # The vectors are of length 1.
        condition = self.num_steps**0.5 * torch.linalg.matrix_norm(inverse)
        is_defective = ~(condition < _MAX_CONDITION)
        if is_defective.any():
            logarithm = torch.where(is_defective, _first_entry_of_log(self.hessenberg), logarithm)
        return self.size.square() * (logarithm - self.hessenberg[:, 0, 0] + 1)


def _first_entry_of_log(matrices: Tensor) -> Tensor:
    """``[log M]₁₁`` without eigenvectors, for eigenvalues off the negative axis, shape ``(B,)``.

    With ``N = M − I``, ``log(I + N) = ∫₀¹ N (I + tN)⁻¹ dt`` by Gauss' rule (a Padé approximant).
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(_NUM_NODES))
    times = ((nodes + 1) / 2).view(-1, 1, 1, 1)
    columns = torch.linalg.solve_ex(eye + times * (matrices - eye), eye[:, :1]).result
    return weights / 2 @ ((matrices - eye)[:, :1] @ columns).flatten(1)


def recent_steps(first: int) -> deque[int]:
    """The numbers of steps of the latest eight solves: the most of them is expected of the next.

    :param int first: what to expect of the first one.
    """
    return deque([first], maxlen=8)


@torch.no_grad()
def krylov(
    operator: Operator,
    preconditioner: Operator,
    vectors: Tensor,
    *,
    preconditioned: Tensor | None = None,
    tolerance: float,
    max_steps: int,
    expected_steps: int = 1,
    beside: Tensor | None = None,
) -> KrylovSpace:
    """Solve ``J u = v`` for every v, until the residuals are below the tolerance.

    Where v or a product is not finite, the solution is NaN, and the residual infinite.

    :param operator: J, on batches of vectors, which may be of any shape, images say.
    :param preconditioner: ``P⁻¹``, likewise.
    :param Tensor vectors: v, shape ``(B, *event)``.
    :param preconditioned: ``P⁻¹ v``, if it is known.
    :param float tolerance: of ``‖v − J u‖/‖v‖``.
    :param int max_steps: the largest dimension of the space, at least 1.
    :param int expected_steps: on a GPU, which is waited for after so many steps, and then after
        each. The result is that of the fewest steps that suffice, and does not depend on it.
    :param beside: numbers that are to be read when the GPU is waited for.
    """
    rows = vectors.flatten(1)
    rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, torch.nan)
    count, dim = rows.shape
    max_steps = min(max_steps, dim)
    first_look = min(expected_steps, max_steps) if rows.is_cuda else 1
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # The solution for a right-hand side of zeros is zero.
    divisor = size.clamp_min(torch.finfo(rows.dtype).tiny)
    basis = rows.new_empty(count, max_steps, dim)
    basis[:, 0] = (rows / divisor).nan_to_num(0.0)
    images_of_basis = torch.empty_like(basis)  # P⁻¹ Q, which spans the solutions
    unread = [size]  # and then the columns of H, shape (B, step + 2)
    columns: list[NDArray[np.float64]] = []  # with the batch last
    problem = _LeastSquares(count)
    residual = np.ones(count)
    beside = rows.new_empty(0) if beside is None else beside
    for step in range(max_steps):
        if step == 0 and preconditioned is not None:
            image = preconditioned.flatten(1) / divisor
        else:
            image = preconditioner(basis[:, step].view_as(vectors)).flatten(1)
        images_of_basis[:, step] = image
        vector = operator(image.view_as(vectors)).flatten(1)
        direction, rest, column = _orthogonalize(vector, basis[:, : step + 1])
        unread.append(torch.cat([column, rest], dim=1))
        if step + 1 >= first_look:
            known_beside, *known = read(beside, *unread)
            unread.clear()
            columns += [one.mT.numpy() for one in known]
            while problem.num_steps <= step:
                before, latest = columns[problem.num_steps : problem.num_steps + 2]
                residual = problem.add(latest, before[-1])
                is_done = residual.max(initial=0.0) <= tolerance
                if is_done:
                    break
            if is_done or step + 1 == max_steps:
                break
        basis[:, step + 1] = direction
    weights = send(torch.from_numpy(problem.solution()).mT, rows).unsqueeze(1)  # (B, 1, n)
    solution = (weights @ images_of_basis[:, : problem.num_steps]).squeeze(1) * size
    return KrylovSpace(
        solution=solution.view_as(vectors),
        residual=torch.from_numpy(residual),
        hessenberg=torch.from_numpy(problem.hessenberg()),
        size=torch.from_numpy(columns[0][0]),
        beside=known_beside,
    )


class Solution(NamedTuple):
    """The results of :func:`gcr`."""

    solution: Tensor
    """u, of the shape of v."""
    num_steps: int
    """Products with J."""
    beside: Tensor
    """A copy of the tensor that was to be read beside it, in float64 on the CPU."""


@torch.no_grad()
def gcr(
    operator: Operator,
    preconditioner: Operator,
    vectors: Tensor,
    *,
    preconditioned: Tensor | None = None,
    tolerance: float,
    max_steps: int,
    expected_steps: int = 1,
    beside: Tensor | None = None,
) -> Solution:
    """Solve ``J u = v`` coarsely for every v, by generalized conjugate residuals.

    The steps end when the root mean square of the residuals ``‖v − J u‖/‖v‖`` over all v is within
    the tolerance, or is predicted to be so after a last step ``u + P⁻¹ (v − J u)``, without a
    product with J. That is predicted to make a residual as much smaller as the step before has made
    it, with a margin. Where the step before has not halved the residual of a v, its u is left as it
    is.

    Where v or a product is not finite, the solution is NaN.

    :param operator: J, as for :func:`krylov`, like all arguments.
    :param float tolerance: of the root mean square.

    Reference: Eisenstat, Elman, Schultz. Variational Iterative Methods for Nonsymmetric Systems of
    Linear Equations. SIAM J. Numer. Anal. 20 (1983).
    """
    rows = vectors.flatten(1)
    max_steps = min(max_steps, rows.shape[1])
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # The solution for a right-hand side of zeros is zero.
    size = size.clamp_min(torch.finfo(rows.dtype).tiny)
    # The square of what is within rounding, relative: then the space is exhausted.
    rounding = (10 * torch.finfo(rows.dtype).eps) ** 2
    solution, rest, residual = torch.zeros_like(rows), rows, torch.ones_like(size)
    searched: list[tuple[Tensor, Tensor, Tensor]] = []  # p, J p, and ‖J p‖², or 0 for none
    found: list[tuple[Tensor, Tensor]] = []  # the solutions, and what a last step would solve for
    unread = [rows.new_empty(0) if beside is None else beside]
    known: list[Tensor] = []  # the tensor beside, and two root mean squares of each step
    first_look = min(expected_steps, max_steps) if rows.is_cuda else 1
    for step in range(max_steps):
        if step == 0 and preconditioned is not None:
            direction = preconditioned.flatten(1)
        else:
            direction = preconditioner(rest.view_as(vectors)).flatten(1)
        image = operator(direction.view_as(vectors)).flatten(1)
        square = before = _inner(image, image)
        for other, other_image, other_square in searched:
            share = _ratio(_inner(other_image, image), other_square)
            direction = torch.addcmul(direction, share, other, value=-1)
            image = torch.addcmul(image, share, other_image, value=-1)
        if searched:
            square = _inner(image, image)
            square = square.masked_fill(square < rounding * before, 0)
        searched.append((direction, image, square))
        share = _ratio(_inner(image, rest), square)
        solution = torch.addcmul(solution, share, direction)
        rest = torch.addcmul(rest, share, image, value=-1)
        last, residual = residual, torch.linalg.vector_norm(rest, dim=1, keepdim=True) / size
        is_halved = residual < last / 2
        predicted = torch.where(is_halved, residual * residual / last, residual)
        found.append((solution, torch.where(is_halved, rest, 0)))
        unread.append(torch.cat([residual, predicted], dim=1).square().mean(0).sqrt())
        if step + 1 < first_look:
            continue
        known += read(*unread)
        unread = []
        errors = [(now, _PREDICTION_ERROR * after) for now, after in map(Tensor.tolist, known[1:])]
        enough = [number for number, pair in enumerate(errors) if min(pair) <= tolerance]
        if enough:
            break
    number = enough[0] if enough else step
    solution, rest = found[number]
    if enough and not errors[number][0] <= tolerance:
        solution = solution + preconditioner(rest.view_as(vectors)).flatten(1)
    return Solution(solution.view_as(vectors), number + 1, known[0])


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """``⟨·, ·⟩`` for every row, shape ``(B, 1)``."""
    return torch.linalg.vecdot(first, second, dim=1).unsqueeze(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, or 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0, numerator / denominator)


class _LeastSquares:
    """The y that minimize ``‖e₁ − H y‖`` for B matrices H, which grow by a column in each step.

    By Givens' rotations, each for all B matrices at once: LAPACK, called for one matrix after the
    other, takes seven times as long for 256 of 5 × 4. Where H is singular, so that y is not unique,
    elements of it are 0.

    :param int count: B.
    """

    def __init__(self, count: int) -> None:
        # Columns of H, and of R, which is H after the rotations, with the batch last.
        self._columns: list[NDArray[np.float64]] = []
        self._upper: list[NDArray[np.float64]] = []
        self._rotations: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        self._target = [np.ones(count)]  # the entries of the rotated e₁
        self._largest = np.zeros(count)
        self._left_over = np.zeros(count)
        self._has_failed = np.zeros(count, dtype=bool)

    @property
    def num_steps(self) -> int:
        """n, the number of columns."""
        return len(self._columns)

    def add(self, column: NDArray[np.float64], length: NDArray[np.float64]) -> NDArray[np.float64]:
        """The residuals ``‖e₁ − H y‖``, shape ``(B,)``, with one more column.

        They are infinite from the first column on that is not finite, or whose vector is not.

        :param column: shape ``(n + 2, B)``.
        :param length: of the vector, before it was divided by that, shape ``(B,)``: the last entry
            of the column before it, or ‖v‖.
        """
        step = self.num_steps
        is_finite = np.isfinite(column).all(0) & np.isfinite(length)
        self._has_failed |= ~is_finite
        column = np.where(is_finite, column, 0)
        # The column of an exhausted space is zero. With a 1 on the diagonal, H stays regular, and
        # the solution is the same.
        column[step, length == 0] = 1
        self._columns.append(column.copy())
        self._largest = np.maximum(self._largest, np.abs(column).max(0))
        for row, (cosine, sine) in enumerate(self._rotations):
            first, second = column[row], column[row + 1]
            column[row], column[row + 1] = (
                cosine * first + sine * second,
                cosine * second - sine * first,
            )
        diagonal = np.hypot(column[step], column[step + 1])
        is_singular = diagonal <= np.finfo(float).eps * (step + 1) * self._largest
        diagonal = np.where(is_singular, np.inf, diagonal)  # by which that element of y is 0
        cosine = np.where(is_singular, 1, column[step] / diagonal)
        sine = column[step + 1] / diagonal
        target = self._target[step]
        self._upper.append(np.concatenate([column[:step], diagonal[None]]))
        self._rotations.append((cosine, sine))
        self._target[step:] = [cosine * target, -sine * target]
        self._left_over += np.where(is_singular, target**2, 0)
        residual = np.sqrt(self._left_over + self._target[-1] ** 2)
        return np.where(self._has_failed, np.inf, residual)

    def solution(self) -> NDArray[np.float64]:
        """y, shape ``(n, B)``; NaN where the residual is infinite."""
        size = self.num_steps
        weights = np.zeros((size, len(self._largest)))
        for step in reversed(range(size)):
            known = sum(
                self._upper[other][step] * weights[other] for other in range(step + 1, size)
            )
            weights[step] = (self._target[step] - known) / self._upper[step][step]
        return np.where(self._has_failed, np.nan, weights)

    def hessenberg(self) -> NDArray[np.float64]:
        """The upper part of H, shape ``(B, n, n)``."""
        matrices = np.zeros((len(self._largest), self.num_steps, self.num_steps))
        for step, column in enumerate(self._columns):
            rows = min(step + 2, self.num_steps)
            matrices[:, :rows, step] = column[:rows].T
        return matrices


@torch.no_grad()
def bidiagonalize(
    operator: Operator, transposed: Operator, vectors: Tensor, *, max_steps: int
) -> Tensor:
    """The bidiagonal matrix of every v, for :func:`quadrature_of`; no GPU is waited for.

    :param operator: J, on batches of vectors.
    :param transposed: Jᵀ, likewise.
    :param Tensor vectors: v, shape ``(B, *event)``, none of them 0.
    :param int max_steps: products with J, and with Jᵀ one less.
    :return: the bidiagonal matrix of every v, flattened, and ‖v‖, shape ``(B, n² + 1)``, float64.
    """
    rows = vectors.flatten(1)
    count, dim = rows.shape
    max_steps = min(max_steps, dim)
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    right = rows.new_zeros(count, max_steps, dim)  # Q
    left = torch.zeros_like(right)  # P
    right[:, 0] = rows / size
    bidiagonal = rows.new_zeros(count, max_steps, max_steps, dtype=torch.float64)
    # Whether the space is not exhausted.
    is_open = torch.ones(count, 1, dtype=torch.bool, device=rows.device)
    for step in range(max_steps):
        vector = operator(right[:, step].view_as(vectors)).flatten(1)
        left[:, step], length, _ = _orthogonalize(vector, left[:, :step])
        # In an exhausted space, the 1 on the diagonal has no weight in the quadrature.
        bidiagonal[:, step, step] = torch.where(is_open, length, 1).squeeze(1).double()
        if step + 1 < max_steps:
            vector = transposed(left[:, step].view_as(vectors)).flatten(1)
            right[:, step + 1], length, _ = _orthogonalize(vector, right[:, : step + 1])
            bidiagonal[:, step, step + 1] = length.squeeze(1).double()
            is_open = is_open & (length != 0)
    return torch.cat([bidiagonal.flatten(1), size.double()], dim=1)


def quadrature_of(numbers: Tensor) -> Tensor:
    """``½ vᵀ log(JᵀJ) v`` for every v, shape ``(B,)``, in float64 on the CPU.

    Its mean over v with ``E[v vᵀ] = I`` is ``log|det J|``: an upper bound for few steps, and exact
    for D steps. It is −∞ where J is found to be singular, and NaN where a product is not finite.

    :param Tensor numbers: from :func:`bidiagonalize`, on the CPU.
    """
    bidiagonal, size = numbers[:, :-1], numbers[:, -1]
    steps = math.isqrt(bidiagonal.shape[1])
    bidiagonal = bidiagonal.view(-1, steps, steps)
    finite = torch.isfinite(bidiagonal).flatten(1).all(1)
    eye = torch.eye(steps, dtype=bidiagonal.dtype, device=bidiagonal.device)
    bidiagonal = torch.where(finite.view(-1, 1, 1), bidiagonal, eye)
    _, values, right_vectors = torch.linalg.svd(bidiagonal)
    logarithm = torch.xlogy(right_vectors[:, :, 0].square(), values).sum(-1)
    return torch.where(finite, size.square() * logarithm, torch.nan)


def _orthogonalize(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonalize a vector against a basis: direction and length, and the coefficients.

    :param Tensor vector: shape ``(B, D)``.
    :param Tensor basis: of orthonormal rows, or rows of zeros, shape ``(B, n, D)``.
    :return: shapes ``(B, D)``, ``(B, 1)`` and ``(B, n)``. The first two are 0 where the remainder
        is within rounding, that is, where the space is exhausted; and where a vector is not finite,
        the first is 0, and the second NaN.
    """
    before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    column = torch.zeros_like(basis[:, :, 0])
    for _ in range(2):  # Gram-Schmidt; twice is enough
        # Not by matrix products: on a CPU, they take twice as long for so few vectors.
        part = torch.linalg.vecdot(basis, vector.unsqueeze(1))
        vector = vector - (part.unsqueeze(2) * basis).sum(1)
        column = column + part
    length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    is_kept = length > 10 * torch.finfo(vector.dtype).eps * before
    # A length that is not finite is kept, so that it is noticed.
    length = torch.where(is_kept, length, 0 * before)
    return torch.where(is_kept, vector / length, 0), length, column

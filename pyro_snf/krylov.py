"""Krylov spaces for many vectors at once: linear systems, and logarithms of determinants.

GMRES with a preconditioner on the right: ``u = P⁻¹ x`` with ``A x = v``, ``A = J P⁻¹``. Arnoldi's
process builds an orthonormal basis Q of ``span(v, A v, A² v, …)`` and a small Hessenberg matrix
``H = Qᵀ A Q``. The best x in the space has the residual ``‖v‖ e₁ − H y``; and

    vᵀ log(A) v  ≈  ‖v‖² [log H]₁₁

in the same space, so that one computation gives the solution and the log-determinant
``tr log A = E[vᵀ log(A) v]``. (:func:`krylov`)

Where there is no preconditioner whose determinant is known, log|det J| is computed from J itself.
The process of Golub and Kahan (1965) builds orthonormal bases with ``J Q = P B``, B being
bidiagonal, so that ``BᵀB`` is the matrix of Lanczos' process for ``JᵀJ``. With
``B = U diag(σ) Wᵀ``,

    ½ vᵀ log(JᵀJ) v  ≈  ‖v‖² Σᵢ W₁ᵢ² log σᵢ.

This is a Gauss quadrature of a logarithm. It is an upper bound, which decreases with every vector
(Golub and Meurant, 2010, §6). (:func:`log_quadrature`)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["KrylovSpace", "krylov", "log_quadrature"]

Operator = Callable[[Tensor], Tensor]

# The condition number of a matrix of eigenvectors up to which these are used. A kernel that has
# changed only in the entries by which one of two channels depends on the other has E² = 0, and no
# basis of eigenvectors.
_MAX_CONDITION = 1e7

# The nodes of Gauss' rule. It is exact to rounding for eigenvalues between 0.1 and 10.
_NUM_NODES = 24


@dataclass(frozen=True)
class KrylovSpace:
    """The solution of ``J u = v`` in a Krylov space, for B right-hand sides v at once."""

    solution: Tensor
    """u, of the shape of v."""
    residual: Tensor
    """``‖v − J u‖/‖v‖``, shape ``(B,)``."""
    hessenberg: Tensor
    """H, shape ``(B, n, n)``, in float64 on the CPU."""
    size: Tensor
    """‖v‖, shape ``(B,)``, in float64 on the CPU."""

    @cached_property
    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eig(self.hessenberg)

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest absolute value of an eigenvalue of any H.

        It is an estimate of the smallest one of A, from above.
        """
        return self._eigenpairs[0].abs().min().item()

    def second_order_log(self) -> Tensor:
        """``vᵀ(log|A| − A + I) v`` for every v, shape ``(B,)``, in float64 on the CPU.

        That is ``vᵀ log|A| v`` less its term of first order in ``A − I``.
        """
        values, vectors = self._eigenpairs
        start = torch.zeros_like(values)
        start[:, 0] = 1
        weights = vectors[:, 0] * torch.linalg.solve_ex(vectors, start).result
        logarithm = (weights * values.log()).sum(-1).real  # det A < 0 adds a πi to tr log A
        is_defective = ~(torch.linalg.cond(vectors) < _MAX_CONDITION)
        if is_defective.any():
            logarithm = torch.where(is_defective, _first_entry_of_log(self.hessenberg), logarithm)
        return self.size.square() * (logarithm - self.hessenberg[:, 0, 0] + 1)


def _first_entry_of_log(matrices: Tensor) -> Tensor:
    """``[log M]₁₁`` without eigenvectors, for eigenvalues off the negative axis, shape ``(B,)``.

    With ``N = M − I``, ``log(I + N) = ∫₀¹ N (I + tN)⁻¹ dt`` by Gauss' rule (a Padé approximant).
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(_NUM_NODES))
    times = ((nodes + 1) / 2).view(-1, 1, 1, 1)
    columns = torch.linalg.solve_ex(eye + times * (matrices - eye), eye[:, :1]).result
    return weights / 2 @ ((matrices - eye)[:, :1] @ columns).flatten(1)


@torch.no_grad()
def krylov(
    operator: Operator,
    preconditioner: Operator,
    vectors: Tensor,
    *,
    preconditioned: Tensor | None = None,
    tolerance: float,
    max_steps: int,
) -> KrylovSpace:
    """Solve ``J u = v`` for every v, until the residuals are below the tolerance.

    Where v or a product is not finite, the solution is NaN, and the residual infinite.

    :param operator: J, on batches of vectors, which may be of any shape, images say.
    :param preconditioner: ``P⁻¹``, likewise.
    :param Tensor vectors: v, shape ``(B, *event)``.
    :param preconditioned: ``P⁻¹ v``, if it is known.
    :param float tolerance: of ``‖v − J u‖/‖v‖``.
    :param int max_steps: the largest dimension of the space, at least 1.
    """
    rows = vectors.flatten(1)
    failed = ~torch.isfinite(rows).all(1)
    rows = torch.where(failed.unsqueeze(1), 0, rows)
    count, dim = rows.shape
    max_steps = min(max_steps, dim)
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # The solution for a right-hand side of zeros is zero.
    divisor = size.clamp_min(torch.finfo(rows.dtype).tiny)
    basis = rows.new_empty(count, max_steps, dim)
    basis[:, 0] = rows / divisor
    images_of_basis = torch.empty_like(basis)  # P⁻¹ Q, which spans the solutions
    hessenberg = torch.zeros(count, max_steps + 1, max_steps, dtype=torch.float64)
    target = torch.zeros(count, max_steps + 1, 1, dtype=torch.float64)
    target[:, 0] = 1
    for step in range(max_steps):
        if step == 0 and preconditioned is not None:
            image = preconditioned.flatten(1) / divisor
        else:
            image = preconditioner(basis[:, step].view_as(vectors)).flatten(1)
        images_of_basis[:, step] = image
        vector = operator(image.view_as(vectors)).flatten(1)
        finite = torch.isfinite(vector).all(1)
        failed |= ~finite
        vector = torch.where(finite.unsqueeze(1), vector, 0)
        direction, rest, column = _orthogonalize(vector, basis[:, : step + 1])
        hessenberg[:, : step + 2, step] = torch.cat([column, rest], dim=1).double().cpu()
        # The column of an exhausted space is zero. With a 1 on the diagonal, H stays regular, and
        # the solution is the same.
        is_exhausted = ~(basis[:, step] != 0).any(1)
        hessenberg[:, step, step].masked_fill_(is_exhausted.cpu(), 1.0)
        current = hessenberg[:, : step + 2, : step + 1]
        # The default driver, gelsy, reads pivots that torch leaves uninitialized, so that the last
        # digits would differ from run to run.
        weights = torch.linalg.lstsq(current, target[:, : step + 2], driver="gelsd").solution
        residual = torch.linalg.vector_norm(target[:, : step + 2] - current @ weights, dim=(1, 2))
        if residual.max() <= tolerance or step + 1 == max_steps:
            break
        basis[:, step + 1] = direction
    weights = weights.to(rows).mT  # (B, 1, n)
    solution = (weights @ images_of_basis[:, : step + 1]).squeeze(1) * size
    solution = torch.where(failed.unsqueeze(1), torch.nan, solution)
    return KrylovSpace(
        solution=solution.view_as(vectors),
        residual=residual.masked_fill(failed.cpu(), torch.inf),
        hessenberg=hessenberg[:, : step + 1, : step + 1],
        size=size.flatten().double().cpu(),
    )


@torch.no_grad()
def log_quadrature(
    operator: Operator, transposed: Operator, vectors: Tensor, *, max_steps: int
) -> Tensor:
    """``½ vᵀ log(JᵀJ) v`` for every v, shape ``(B,)``, in float64 on the CPU.

    Its mean over v with ``E[v vᵀ] = I`` is ``log|det J|``: an upper bound for few steps, and exact
    for D steps. It is −∞ where J is found to be singular, and NaN where a product is not finite.

    :param operator: J, on batches of vectors.
    :param transposed: Jᵀ, likewise.
    :param Tensor vectors: v, shape ``(B, *event)``, none of them 0.
    :param int max_steps: products with J, and with Jᵀ one less.
    """
    rows = vectors.flatten(1)
    count, dim = rows.shape
    max_steps = min(max_steps, dim)
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    right = rows.new_zeros(count, max_steps, dim)  # Q
    left = torch.zeros_like(right)  # P
    right[:, 0] = rows / size
    bidiagonal = torch.zeros(count, max_steps, max_steps, dtype=torch.float64)
    is_open = torch.ones(
        count, 1, dtype=torch.bool, device=rows.device
    )  # the space is not exhausted
    for step in range(max_steps):
        vector = operator(right[:, step].view_as(vectors)).flatten(1)
        left[:, step], length, _ = _orthogonalize(vector, left[:, :step])
        # In an exhausted space, the 1 on the diagonal has no weight in the quadrature.
        bidiagonal[:, step, step] = torch.where(is_open, length, 1).squeeze(1).double().cpu()
        if step + 1 < max_steps:
            vector = transposed(left[:, step].view_as(vectors)).flatten(1)
            right[:, step + 1], length, _ = _orthogonalize(vector, right[:, : step + 1])
            bidiagonal[:, step, step + 1] = length.squeeze(1).double().cpu()
            is_open = is_open & (length != 0)
    finite = torch.isfinite(bidiagonal).flatten(1).all(1)
    eye = torch.eye(max_steps, dtype=torch.float64)
    bidiagonal = torch.where(finite.view(-1, 1, 1), bidiagonal, eye)
    _, values, right_vectors = torch.linalg.svd(bidiagonal)
    logarithm = torch.xlogy(right_vectors[:, :, 0].square(), values).sum(-1)
    return torch.where(finite, size.squeeze(1).double().cpu().square() * logarithm, torch.nan)


def _orthogonalize(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonalize a vector against a basis: direction and length, and the coefficients.

    :param Tensor vector: shape ``(B, D)``.
    :param Tensor basis: of orthonormal rows, or rows of zeros, shape ``(B, n, D)``.
    :return: shapes ``(B, D)``, ``(B, 1)`` and ``(B, n)``. The first two are 0 where the remainder
        is within rounding, that is, where the space is exhausted.
    """
    before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    column = torch.zeros_like(basis[:, :, 0])
    for _ in range(2):  # Gram-Schmidt; twice is enough
        part = (basis @ vector.unsqueeze(-1)).squeeze(-1)
        vector = vector - (part.unsqueeze(1) @ basis).squeeze(1)
        column = column + part
    length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    # A remainder that is not finite is kept, so that it is noticed.
    is_rounding = (length <= 10 * torch.finfo(vector.dtype).eps * before) & torch.isfinite(before)
    length = torch.where(is_rounding, 0, length)
    return torch.where(is_rounding, 0, vector / length), length, column

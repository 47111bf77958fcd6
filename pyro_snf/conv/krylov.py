"""Solves with many images at once by Krylov spaces, and logarithms of determinants from the same.

GMRES with a preconditioner on the right: ``u = P⁻¹ x`` with ``A x = v``, ``A = J P⁻¹``. Arnoldi's
process builds an orthonormal basis Q of ``span(v, A v, A² v, …)`` and a small Hessenberg matrix
``H = Qᵀ A Q``. The best x in the space has the residual ``‖v‖ e₁ − H y``; and

    vᵀ log(A) v  ≈  ‖v‖² [log H]₁₁

by the same space, which makes the solve and the log-determinant ``tr log A = E[vᵀ log(A) v]`` one
computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["KrylovSpace", "krylov"]

Operator = Callable[[Tensor], Tensor]

# Of a matrix of eigenvectors, up to which they are independent enough. A kernel that has moved in
# one of two channels as the other sees it, and no more, has E² = 0 and no basis of eigenvectors.
_MAX_CONDITION = 1e7

# Of Gauss' rule; exact to rounding for eigenvalues between 0.1 and 10.
_NUM_NODES = 24


@dataclass(frozen=True)
class KrylovSpace:
    """What a Krylov space knows of ``J u = v``, for B right-hand sides v at once."""

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
        """The smallest absolute eigenvalue of all H. In some direction, A shrinks by it or more."""
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
    images: Tensor,
    *,
    preconditioned: Tensor | None = None,
    tolerance: float,
    max_iterations: int,
) -> KrylovSpace:
    """Solve ``J u = v`` for every image v, until the residuals are below the tolerance.

    :param operator: J, on batches of images.
    :param preconditioner: ``P⁻¹``, likewise.
    :param Tensor images: v, shape ``(B, C, H, W)``.
    :param preconditioned: ``P⁻¹ v``, if it is at hand.
    :param float tolerance: of ``‖v − J u‖/‖v‖``.
    :param int max_iterations: after which to stop with what there is, at least 1.
    """
    rows = images.flatten(1)
    count, dim = rows.shape
    max_iterations = min(max_iterations, dim)
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # A right-hand side of zeros is solved by zeros.
    divisor = size.clamp_min(torch.finfo(rows.dtype).tiny)
    basis = rows.new_empty(count, max_iterations, dim)
    basis[:, 0] = rows / divisor
    images_of_basis = torch.empty_like(basis)  # P⁻¹ Q, which the solution is put together of
    hessenberg = torch.zeros(count, max_iterations + 1, max_iterations, dtype=torch.float64)
    target = torch.zeros(count, max_iterations + 1, 1, dtype=torch.float64)
    target[:, 0] = 1
    negligible = 10 * torch.finfo(rows.dtype).eps
    for step in range(max_iterations):
        if step == 0 and preconditioned is not None:
            image = preconditioned / divisor.view(-1, 1, 1, 1)
        else:
            image = preconditioner(basis[:, step].view_as(images))
        images_of_basis[:, step] = image.flatten(1)
        vector = operator(image).flatten(1)
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        span = basis[:, : step + 1]
        column = torch.zeros_like(span[:, :, 0])
        for _ in range(2):  # Gram-Schmidt; twice is enough
            part = (span @ vector.unsqueeze(-1)).squeeze(-1)
            vector = vector - (part.unsqueeze(1) @ span).squeeze(1)
            column = column + part
        rest = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        # Where the space is exhausted, what is left is rounding.
        rest = torch.where(rest > negligible * length, rest, 0)
        hessenberg[:, : step + 2, step] = torch.cat([column, rest], dim=1).double().cpu()
        # A space that was exhausted before has a column of zeros: 1 on the diagonal is as good.
        hessenberg[:, step, step].masked_fill_(length.cpu().flatten() == 0, 1.0)
        current = hessenberg[:, : step + 2, : step + 1]
        weights = torch.linalg.lstsq(current, target[:, : step + 2]).solution
        residual = torch.linalg.vector_norm(target[:, : step + 2] - current @ weights, dim=(1, 2))
        if residual.max() <= tolerance or step + 1 == max_iterations:
            break
        basis[:, step + 1] = torch.where(rest > 0, vector / rest, 0)
    weights = weights.to(rows).mT  # (B, 1, n)
    solution = (weights @ images_of_basis[:, : step + 1]).squeeze(1) * size
    return KrylovSpace(
        solution=solution.view_as(images),
        residual=residual,
        hessenberg=hessenberg[:, : step + 1, : step + 1],
        size=size.flatten().double().cpu(),
    )

"""Exact log-determinants and inverses of a matrix A in O(D³): oracle and fallback."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_snf.precision import at_least_float32, check_finite
from pyro_snf.surrogate import implicit_solve

__all__ = ["ExactFactors"]

# Of inverse iteration, to estimate ‖A⁻¹‖: where it matters, it is huge and seen at once.
_CONDITION_STEPS = 3


class ExactFactors:
    """The LU factors of one A, made when they are first needed: log-determinant, inverse, solves.

    Whatever needs the factors raises ``torch.linalg.LinAlgError`` if A is not finite, or singular
    at the precision of its type. Half-precision matrices are factorized in float32.

    :param Tensor matrix: A, shape ``(D, D)``; not to be written to afterwards.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.detach()

    @cached_property
    @torch.no_grad()
    def _unchecked_factors(self) -> tuple[Tensor, Tensor]:
        matrix = at_least_float32(self.matrix)
        check_finite(matrix)
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        if info != 0:
            raise torch.linalg.LinAlgError(
                f"the weight is singular: pivot {int(info)} of its LU factorization is zero"
            )
        return lu, pivots

    @cached_property
    @torch.no_grad()
    def _factors(self) -> tuple[Tensor, Tensor]:
        lu, pivots = self._unchecked_factors
        condition = _estimate_condition(self.matrix.to(lu.dtype), lu, pivots)
        if not condition * torch.finfo(lu.dtype).eps < 1:
            raise torch.linalg.LinAlgError(
                f"the weight is singular in {lu.dtype}: its condition number is about "
                f"{condition:.1g}"
            )
        return lu, pivots

    @cached_property
    @torch.no_grad()
    def log_abs_det(self) -> Tensor:
        """``log|det A|``, shape ``()``."""
        lu, _ = self._factors
        return lu.diagonal().abs().log().sum()

    @cached_property
    @torch.no_grad()
    def inverse_t(self) -> Tensor:
        """``A⁻ᵀ``, shape ``(D, D)``, contiguous."""
        lu, pivots = self._unchecked_factors
        eye = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
        inverse_t = torch.linalg.lu_solve(lu, pivots, eye, adjoint=True).contiguous()
        # With the inverse at hand, a bound of the condition number is cheaper than the estimate.
        bound = torch.linalg.matrix_norm(self.matrix.to(lu.dtype)) * torch.linalg.matrix_norm(
            inverse_t
        )
        if bound * torch.finfo(lu.dtype).eps < 1:
            self.__dict__["_factors"] = lu, pivots
        else:
            _ = self._factors  # raises, unless the bound was too large by far
        return inverse_t

    @torch.no_grad()
    def solve(self, rows: Tensor, transposed: bool = False) -> Tensor:
        """``A⁻¹ h`` (or ``A⁻ᵀ h``) for every row ``h`` of ``rows``, shape ``(B, D)``."""
        lu, pivots = self._factors
        solution = torch.linalg.lu_solve(lu, pivots, rows.to(lu.dtype).mT, adjoint=transposed)
        return solution.mT.to(rows.dtype)

    def differentiable_log_abs_det(self, matrix: Tensor) -> Tensor:
        """``log|det A|``, shape ``()``, with all its derivatives in ``matrix``.

        :param Tensor matrix: the A that was factorized, with its autograd graph.
        """
        return _FactorizedLogDet.apply(matrix, self)


def _estimate_condition(matrix: Tensor, lu: Tensor, pivots: Tensor) -> float:
    """``‖A‖_F ‖A⁻¹‖₂``, the latter from below, by inverse iteration on ``AᵀA``: O(D²)."""
    vector = torch.ones_like(matrix[:, :1])
    vector[1::2] = -1 / 2  # not an eigenvector of anything common
    for _ in range(_CONDITION_STEPS):
        vector = torch.linalg.lu_solve(lu, pivots, vector / vector.norm(), adjoint=True)
        vector = torch.linalg.lu_solve(lu, pivots, vector / vector.norm())
    return (matrix.norm() * vector.norm()).item()


class _FactorizedLogDet(Function):
    @staticmethod
    def forward(matrix: Tensor, factors: ExactFactors) -> Tensor:
        return factors.log_abs_det.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, ctx.factors = inputs
        ctx.save_for_backward(matrix)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        inverse_t = ctx.factors.inverse_t
        if torch.is_grad_enabled():  # create_graph=True: A⁻ᵀ as a function of A
            # The solutions A⁻¹ eᵢ are the columns of A⁻¹: as rows, A⁻ᵀ.
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            inverse_t = implicit_solve(matrix, eye, ctx.factors.solve)
        return (cotangent * inverse_t).to(matrix.dtype), None

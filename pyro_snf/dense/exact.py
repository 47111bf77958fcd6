"""Exact log-determinants and inverses of ``A = I + Θ/√D`` in O(D³): oracle and fallback."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_snf.dense import near_identity
from pyro_snf.surrogate import implicit_solve

__all__ = ["ExactFactors"]

# Of inverse iteration, to estimate ‖A⁻¹‖: where it matters, it is huge and seen at once.
_CONDITION_STEPS = 3


class ExactFactors:
    """The LU factors of one ``A``: its log-determinant, inverse and solves.

    Half-precision input is factorized in float32.

    :param Tensor theta: ``Θ``, shape ``(D, D)``; the factors do not follow its later changes.
    :raises torch.linalg.LinAlgError: if ``A`` is not finite, or singular at the precision of its
        type.
    """

    @torch.no_grad()
    def __init__(self, theta: Tensor) -> None:
        theta = theta.detach()
        if theta.dtype in (torch.bfloat16, torch.float16):
            theta = theta.float()
        near_identity.check_finite(theta)
        self._lu, self._pivots, info = torch.linalg.lu_factor_ex(near_identity.matrix(theta))
        if info != 0:
            raise torch.linalg.LinAlgError(
                f"the weight is singular: pivot {int(info)} of its LU factorization is zero"
            )
        #: ``log|det A|``, shape ``()``.
        self.log_abs_det = self._lu.diagonal().abs().log().sum()
        condition = self._estimate_condition(theta)
        if not condition * torch.finfo(theta.dtype).eps < 1:
            raise torch.linalg.LinAlgError(
                f"the weight is singular in {theta.dtype}: its condition number is about "
                f"{condition:.1g}"
            )

    @cached_property
    @torch.no_grad()
    def inverse_t(self) -> Tensor:
        """``A⁻ᵀ``, shape ``(D, D)``, contiguous."""
        eye = torch.eye(self._lu.shape[-1], dtype=self._lu.dtype, device=self._lu.device)
        return torch.linalg.lu_solve(self._lu, self._pivots, eye, adjoint=True).contiguous()

    def solve(self, rows: Tensor, transposed: bool = False) -> Tensor:
        """``A⁻¹ h`` (or ``A⁻ᵀ h``) for every row ``h`` of ``rows``, shape ``(B, D)``."""
        columns = rows.to(self._lu.dtype).mT
        solution = torch.linalg.lu_solve(self._lu, self._pivots, columns, adjoint=transposed)
        return solution.mT.to(rows.dtype)

    def _estimate_condition(self, theta: Tensor) -> float:
        """``‖A‖_F ‖A⁻¹‖₂``, the latter by inverse iteration: O(D²), from below."""
        vector = torch.ones_like(theta[:1])
        vector[:, 1::2] = -1 / 2  # not an eigenvector of anything common
        for _ in range(_CONDITION_STEPS):
            vector = self.solve(vector / vector.norm(), transposed=True)
            vector = self.solve(vector / vector.norm())
        return (near_identity.matrix(theta).norm() * vector.norm()).item()

    def differentiable_log_abs_det(self, theta: Tensor) -> Tensor:
        """``log|det A|``, shape ``()``, with all its derivatives in ``theta``.

        :param Tensor theta: the ``Θ`` that was factorized.
        """
        return _FactorizedLogDet.apply(near_identity.matrix(theta), self)


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

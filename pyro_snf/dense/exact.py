"""Exact log-determinants and inverses of ``A = I + Θ/√D`` in O(D³): oracle and fallback."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from pyro_snf.dense import near_identity

__all__ = ["ExactFactors", "ExactLogDet"]


class ExactFactors:
    """The LU factors of one ``A``: its log-determinant, inverse and solves.

    Half-precision input is factorized in float32.

    :param Tensor theta: ``Θ``, shape ``(D, D)``; the factors do not follow its later changes.
    :raises torch.linalg.LinAlgError: if ``A`` is singular or not finite.
    """

    @torch.no_grad()
    def __init__(self, theta: Tensor) -> None:
        theta = theta.detach()
        if theta.dtype in (torch.bfloat16, torch.float16):
            theta = theta.float()
        if not torch.isfinite(theta).all():
            raise torch.linalg.LinAlgError("the weight has NaN or infinite entries")
        self._lu, self._pivots, info = torch.linalg.lu_factor_ex(near_identity.matrix(theta))
        if info != 0:
            raise torch.linalg.LinAlgError(
                f"the weight is singular: pivot {int(info)} of its LU factorization is zero"
            )
        #: ``log|det A|``, shape ``()``.
        self.log_abs_det = self._lu.diagonal().abs().log().sum()

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


class ExactLogDet(nn.Module):
    """``log|det A|`` by ``slogdet`` and its exact gradient, at O(D³) a step."""

    #: What :meth:`training_log_abs_det` returns.
    training_value = "exact"

    def multiply(self, theta: Tensor, rows: Tensor) -> Tensor:
        """``A x`` for every row, shape ``(B, D)``."""
        return near_identity.multiply(theta, rows)

    def training_log_abs_det(self, theta: Tensor, rows: Tensor) -> Tensor:
        """``log|det A|``, shape ``()``; its value and all its derivatives are exact.

        :raises torch.linalg.LinAlgError: if ``A`` is singular or not finite.
        """
        if theta.dtype in (torch.bfloat16, torch.float16):
            theta = theta.float()
        value = torch.linalg.slogdet(near_identity.matrix(theta)).logabsdet
        if not torch.isfinite(value):
            raise torch.linalg.LinAlgError("the weight is singular or not finite")
        return value

"""The dense matrix ``A = I + Θ/√D``, and its LU factors.

With a raw matrix, one Adam step of rate ``lr`` moves it by ``lr·D`` in Frobenius norm against a
norm of ``√D``, so a good learning rate shrinks as D grows. In this form it does not: a step on
``Θ`` at rate ``lr·√D`` equals a step on a raw matrix at ``lr``.

Events are rows here, as PyTorch stores batches. No product builds ``A``.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from pyro_snf.maps.base import Factors, LinearMap
from pyro_snf.precision import at_least_float32, check_finite, singular
from pyro_snf.surrogate import implicit_solve

__all__ = ["Dense", "LUFactors"]

# Factors cost (2/3) D³ operations; to refine the solution of one row costs about ten products of D²
# operations at half their speed. So factors pay from D/16 rows.
_ROWS_WORTH_FACTORS = 16

# Steps of inverse iteration to estimate ‖A⁻¹‖. A norm that matters is huge, and found at once.
_CONDITION_STEPS = 3


class Dense(LinearMap):
    """``A = I + Θ/√D``; Θ has shape ``(D, D)``, events shape ``(D,)``."""

    event_dim = 1

    def weight(self, theta: Tensor) -> Tensor:
        eye = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
        return torch.add(eye, theta, alpha=self.theta_scale(theta))

    def theta_scale(self, theta: Tensor) -> float:
        return 1 / math.sqrt(theta.shape[-1])

    def multiply(self, theta: Tensor, x: Tensor) -> Tensor:
        # The rows are scaled, not the product: else autograd would scale the D² gradient, too.
        return torch.addmm(x, x * self.theta_scale(theta), theta.mT)

    def multiply_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(x, x * self.theta_scale(theta), theta)

    def apply_weight(self, weight: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
        return x @ (weight if transposed else weight.mT)

    def norm_bound(self, theta: Tensor) -> Tensor:
        return _norm_bound(self.weight(theta))

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        return self.factorize(theta, event_shape).gradient.mT

    def gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        return (cotangent * self.theta_scale(theta)).mT @ x

    def trace_gradient(self, theta: Tensor, other: Tensor, event_shape: torch.Size) -> Tensor:
        return self.weight(other).mT * self.theta_scale(theta)

    def factorize(self, theta: Tensor, event_shape: torch.Size) -> LUFactors:
        return LUFactors(self.weight(theta.detach()))

    def exact_log_abs_det(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        return torch.linalg.slogdet(self.weight(at_least_float32(theta))).logabsdet

    def exact_solve(self, theta: Tensor, right_side: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight(theta), right_side.mT).mT

    def multiply_input(self, theta: Tensor, left: Tensor, right: Tensor) -> None:
        """``A ← A (I + P Qᵀ)`` in place, from ``Pᵀ`` and ``Qᵀ``, each of shape ``(r, D)``."""
        images = self.multiply(theta, left)  # (A P)ᵀ
        theta.addmm_(images.mT, right, alpha=1 / self.theta_scale(theta))

    def scale_output(self, theta: Tensor, log_factors: Tensor) -> None:
        """``A ← diag(e^c) A`` in place."""
        self.set_weight(theta, self.weight(theta) * torch.exp(log_factors).unsqueeze(-1))

    def set_weight(self, theta: Tensor, weight: Tensor) -> None:
        """``A ← weight`` in place, the inverse of :meth:`weight`."""
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        theta.copy_((weight - eye) / self.theta_scale(theta))

    def matrix_of(self, theta: Tensor) -> Tensor:
        return theta

    def refinement_pays(self, num_events: int, event_shape: torch.Size) -> bool:
        return _ROWS_WORTH_FACTORS * num_events < event_shape.numel()


class LUFactors(Factors):
    """The LU factors of a matrix A, shape ``(D, D)``: O(D³). Events are rows."""

    @cached_property
    @torch.no_grad()
    def _unchecked_factors(self) -> tuple[Tensor, Tensor]:
        matrix = at_least_float32(self.weight)
        check_finite(matrix)
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        if info != 0:
            raise singular(
                f"the weight is singular: pivot {int(info)} of its LU factorization is zero"
            )
        return lu, pivots

    @cached_property
    @torch.no_grad()
    def condition(self) -> float:
        """``‖A‖ ‖A⁻¹‖₂``, the latter from below, by inverse iteration on ``AᵀA``: O(D²)."""
        lu, pivots = self._unchecked_factors
        vector = torch.ones_like(lu[:, :1])
        vector[1::2] = -1 / 2  # which is no eigenvector of a common matrix
        for _ in range(_CONDITION_STEPS):
            vector = torch.linalg.lu_solve(lu, pivots, vector / vector.norm(), adjoint=True)
            vector = torch.linalg.lu_solve(lu, pivots, vector / vector.norm())
        return (_norm_bound(self.weight.to(lu.dtype)) * vector.norm()).item()

    @cached_property
    @torch.no_grad()
    def _factors(self) -> tuple[Tensor, Tensor]:
        lu, pivots = self._unchecked_factors
        if not self.condition * torch.finfo(lu.dtype).eps < 1:
            raise singular(
                f"the weight is singular in {lu.dtype}: its condition number is about "
                f"{self.condition:.1g}"
            )
        return lu, pivots

    @cached_property
    @torch.no_grad()
    def log_abs_det(self) -> Tensor:
        lu, _ = self._factors
        return lu.diagonal().abs().log().sum()

    @cached_property
    @torch.no_grad()
    def gradient(self) -> Tensor:
        """``A⁻ᵀ``, shape ``(D, D)``, contiguous."""
        lu, pivots = self._unchecked_factors
        eye = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
        inverse_t = torch.linalg.lu_solve(lu, pivots, eye, adjoint=True).contiguous()
        # With the inverse, a bound of the condition number is cheaper than the estimate.
        norm = torch.linalg.matrix_norm
        bound = norm(self.weight.to(lu.dtype)) * norm(inverse_t)
        if bound * torch.finfo(lu.dtype).eps < 1:
            self.__dict__["_factors"] = lu, pivots
        else:
            _ = self._factors  # raises, unless the bound was far too large
        return inverse_t

    @torch.no_grad()
    def solve(self, right_side: Tensor, transposed: bool = False) -> Tensor:
        lu, pivots = self._factors
        columns = right_side.to(lu.dtype).mT
        return torch.linalg.lu_solve(lu, pivots, columns, adjoint=transposed).mT.to(
            right_side.dtype
        )

    def differentiable_gradient(self, weight: Tensor) -> Tensor:
        # The solutions A⁻¹ eᵢ are the columns of A⁻¹: as rows, A⁻ᵀ.
        eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        return implicit_solve(weight, eye, self.solve, lambda weight, x, v: v.mT @ x)


def _norm_bound(matrix: Tensor) -> Tensor:
    """An upper bound of ``‖A‖₂``, shape ``()``: ``(‖A‖₁ ‖A‖_∞)^½``."""
    norm = torch.linalg.matrix_norm
    return (norm(matrix, 1) * norm(matrix, torch.inf)).sqrt()

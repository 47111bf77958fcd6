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
from pyro_snf.surrogate import Solver, implicit_solve
from pyro_snf.transfer import read

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
        return torch.add(self.identity(theta), theta, alpha=self.theta_scale(theta))

    def identity(self, theta: Tensor) -> Tensor:
        """The identity, of Θ's shape and type, and where it is."""
        return torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)

    def theta_scale(self, theta: Tensor) -> float:
        return 1 / math.sqrt(theta.shape[-1])

    def multiply(self, theta: Tensor, x: Tensor) -> Tensor:
        # The rows are scaled, not the product: else autograd would scale the D² gradient, too.
        return torch.addmm(x, x * self.theta_scale(theta), theta.mT)

    def multiply_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(x, x * self.theta_scale(theta), theta)

    def apply_weight(self, weight: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
        return x @ (weight if transposed else weight.mT)

    def add_product(self, matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> None:
        """``M ← M + α L Q`` in place, from ``Lᵀ`` and ``Q``, each of shape ``(r, D)``."""
        matrix.addmm_(left.mT, right, alpha=alpha)

    def inner(self, matrix: Tensor, other: Tensor) -> Tensor:
        """``⟨M, N⟩``, the sum of the products of their entries, shape ``()``."""
        return torch.dot(matrix.view(-1), other.reshape(-1))

    def trace(self, matrix: Tensor) -> Tensor:
        """``tr M``, shape ``()``, in float64."""
        return matrix.diagonal().sum(dtype=torch.float64)

    def norm_bound(self, theta: Tensor) -> Tensor:
        return _norm_bound(self.weight(theta))

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        return self.factorize(theta, event_shape).gradient.mT

    def gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        return (cotangent * self.theta_scale(theta)).mT @ x

    def trace_gradient(self, theta: Tensor, other: Tensor, event_shape: torch.Size) -> Tensor:
        # A copy in Θ's own layout: transposing is slow in any other operation than a copy.
        scale = self.theta_scale(theta)
        gradient = other.mT.clone(memory_format=torch.contiguous_format).mul_(scale**2)
        gradient.diagonal().add_(scale)
        return gradient

    def factorize(self, theta: Tensor, event_shape: torch.Size) -> Factors:
        return LUFactors(self.weight(theta.detach()))

    def exact_log_abs_det(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        return torch.linalg.slogdet(self.weight(at_least_float32(theta))).logabsdet

    def exact_solve(self, theta: Tensor, right_side: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight(theta), right_side.mT).mT

    def multiply_input(self, theta: Tensor, left: Tensor, right: Tensor) -> None:
        """``A ← A (I + P Qᵀ)`` in place, from ``Pᵀ`` and ``Qᵀ``, each of shape ``(r, D)``."""
        images = self.multiply(theta, left)  # (A P)ᵀ
        self.add_product(theta, images, right, alpha=1 / self.theta_scale(theta))

    def scale_output(self, theta: Tensor, log_factors: Tensor) -> None:
        """``A ← diag(e^c) A`` in place."""
        theta.copy_(self.theta_of(self.scale_rows(self.weight(theta), log_factors.exp())))

    def matrix_of(self, theta: Tensor) -> Tensor:
        return theta

    def refinement_pays(self, num_events: int, event_shape: torch.Size) -> bool:
        return _ROWS_WORTH_FACTORS * num_events < event_shape.numel()


class LUFactors(Factors):
    """The LU factors of a matrix A, shape ``(D, D)``: O(D³). Events are rows."""

    @cached_property
    @torch.no_grad()
    def _unchecked_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """LU, its pivots, and the number of a pivot that is zero, or 0."""
        return torch.linalg.lu_factor_ex(at_least_float32(self.weight))

    def _checked(self, number: Tensor) -> float:
        """A number that was computed from the factors, if they exist. A GPU is waited for once."""
        matrix, info = at_least_float32(self.weight), self._unchecked_factors[2]
        is_finite, pivot, value = (
            one.item() for one in read(torch.isfinite(matrix).all(), info, number)
        )
        if not is_finite:
            check_finite(matrix)  # raises
        if pivot != 0:
            raise singular(
                f"the weight is singular: pivot {int(pivot)} of its LU factorization is zero"
            )
        return value

    @cached_property
    @torch.no_grad()
    def condition(self) -> float:
        """``‖A‖ ‖A⁻¹‖₂``, the latter from below, by inverse iteration on ``AᵀA``: O(D²)."""
        lu, _, _ = self._unchecked_factors
        norm = _norm_bound(self.weight.to(lu.dtype)) * norm_of_inverse(self._solve, lu)
        return self._checked(norm)

    def _solve(self, right_side: Tensor, transposed: bool) -> Tensor:
        lu, pivots, _ = self._unchecked_factors
        return torch.linalg.lu_solve(lu, pivots, right_side.mT, adjoint=transposed).mT

    @cached_property
    @torch.no_grad()
    def _factors(self) -> tuple[Tensor, Tensor]:
        lu, pivots, _ = self._unchecked_factors
        check_condition(self.condition, lu.dtype)
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
        lu, pivots, _ = self._unchecked_factors
        eye = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
        inverse_t = torch.linalg.lu_solve(lu, pivots, eye, adjoint=True).contiguous()
        # With the inverse, a bound of the condition number is cheaper than the estimate.
        norm = torch.linalg.matrix_norm
        bound = self._checked(norm(self.weight.to(lu.dtype)) * norm(inverse_t))
        if bound * torch.finfo(lu.dtype).eps < 1:
            self.__dict__["_factors"] = lu, pivots
        else:
            _ = self._factors  # raises, unless the bound was far too large
        return inverse_t

    @torch.no_grad()
    def solve(self, right_side: Tensor, transposed: bool = False) -> Tensor:
        lu, _ = self._factors
        return self._solve(right_side.to(lu.dtype), transposed).to(right_side.dtype)

    def differentiable_gradient(self, weight: Tensor) -> Tensor:
        # The solutions A⁻¹ eᵢ are the columns of A⁻¹: as rows, A⁻ᵀ.
        eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        return implicit_solve(weight, eye, self.solve, lambda weight, x, v: v.mT @ x)


def norm_of_inverse(solve: Solver, like: Tensor) -> Tensor:
    """``‖A⁻¹‖₂`` from below, shape ``()``, by inverse iteration on ``AᵀA``.

    :param Solver solve: with A, for rows of shape ``(B, D)``.
    :param Tensor like: a matrix of A's shape, type and device.
    """
    vector = torch.ones(1, like.shape[-1], dtype=like.dtype, device=like.device)
    vector[:, 1::2] = -1 / 2  # which is no eigenvector of a common matrix
    for _ in range(_CONDITION_STEPS):
        vector = solve(vector / vector.norm(), True)
        vector = solve(vector / vector.norm(), False)
    return vector.norm()


def check_condition(condition: float, dtype: torch.dtype) -> None:
    """Raise unless a matrix with this condition number is regular at a type's precision.

    :raises torch.linalg.LinAlgError: if it is not.
    """
    if not condition * torch.finfo(dtype).eps < 1:
        raise singular(
            f"the weight is singular in {dtype}: its condition number is about {condition:.1g}"
        )


def _norm_bound(matrix: Tensor) -> Tensor:
    """An upper bound of ``‖A‖₂``, shape ``()``: ``(‖A‖₁ ‖A‖_∞)^½``."""
    norm = torch.linalg.matrix_norm
    return (norm(matrix, 1) * norm(matrix, torch.inf)).sqrt()

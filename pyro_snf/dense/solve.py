"""Solves with a matrix A whose inverse is known approximately."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_snf.dense.exact import ExactFactors

__all__ = ["OnePassSolver", "RefinedSolver"]

# A step of iterative refinement at least halves the residual, or the exact solve takes over. So
# this many are enough for float64, and an R that is good enough to train with needs far fewer.
_MAX_REFINEMENTS = 60


class OnePassSolver:
    """``u = R h``: as good as R is.

    :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
    """

    def __init__(self, inverse_t: Tensor) -> None:
        self.inverse_t = inverse_t

    @torch.no_grad()
    def __call__(self, rows: Tensor, transposed: bool) -> Tensor:
        """``R h`` (or ``Rᵀ h``) for every row ``h`` of ``rows``, shape ``(B, D)``."""
        inverse_t = self.inverse_t.to(rows.dtype)
        return rows @ (inverse_t.mT if transposed else inverse_t)


class RefinedSolver:
    """``A u = h`` to rounding: ``u ← u + R(h − Au)`` from ``u = Rh``, or by LU if that fails.

    It keeps the matrix that it was made for, and no reference to a layer: a backward pass solves
    with the A of its forward pass, whatever has become of the parameters.

    :param ExactFactors factors: of A; factorized only if they are needed.
    :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``; that of a later A serves as well.
    """

    def __init__(self, factors: ExactFactors, inverse_t: Tensor) -> None:
        self.factors = factors
        self.one_pass = OnePassSolver(inverse_t)

    @torch.no_grad()
    def __call__(self, rows: Tensor, transposed: bool) -> Tensor:
        """The solutions with A (or ``Aᵀ``) for every row of ``rows``, shape ``(B, D)``."""
        matrix = self.factors.matrix if transposed else self.factors.matrix.mT
        solution = self.one_pass(rows, transposed)
        # What a backward stable solve leaves of a residual is eps ‖A‖ ‖u‖ at most.
        precision = torch.finfo(rows.dtype)
        level = precision.eps * self.factors.matrix.norm()
        # A row that is not finite never will be: it passes through, and stops no other.
        finite = torch.isfinite(rows).all(-1)
        previous = math.inf
        for _ in range(_MAX_REFINEMENTS):
            residual = rows - solution @ matrix
            size = (level * solution.norm(dim=-1)).clamp_min(precision.tiny)
            excess = (residual.norm(dim=-1) / size)[finite]
            largest = excess.max().item() if len(excess) else 0.0
            if largest == 0:
                return solution
            # Below 1 the residual is rounding; one step more costs little and often gains.
            if not largest <= previous / 2:
                break
            solution = solution + self.one_pass(residual, transposed)
            previous = largest
        if previous < 1:
            return solution
        return self.factors.solve(rows, transposed)

"""Iterative solution of ``F(x) = y``, for each event of a batch on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_snf.precision import at_least_float32

__all__ = ["Iterate", "refine_linear_solution"]


class Iterate:
    """Approximate solutions x of ``F(x) = y`` for B events, and their residuals ``y − F(x)``.

    An event y that is not finite has no solution; its x is NaN, and no other event is affected.

    :param evaluate: ``evaluate(x, rows)`` is F for some events; ``rows`` are their indices.
    :param Tensor y: shape ``(B, *event)``.
    :param solve: ``solve(y)`` gives the x to start from.
    :param scale: ``scale(x, rows)``, shape ``(len(rows),)``: the unit of the residuals' lengths.
    :param float tolerance: the length of a residual, in that unit, at which an event is solved.
    """

    def __init__(
        self,
        evaluate: Callable[[Tensor, Tensor], Tensor],
        y: Tensor,
        solve: Callable[[Tensor], Tensor],
        *,
        scale: Callable[[Tensor, Tensor], Tensor],
        tolerance: float,
    ) -> None:
        self.evaluate = evaluate
        self.scale = scale
        self.tolerance = tolerance
        self.is_finite = torch.isfinite(y.flatten(1)).all(1)
        self._per_event = (-1, *[1] * (y.dim() - 1))
        self.y = torch.where(self.is_finite.view(self._per_event), y, 0)
        start = solve(self.y)
        self.x = torch.where(torch.isfinite(start), start, 0).to(y.dtype)
        self.residual = self.y - evaluate(self.x, self.all_rows())

    def all_rows(self) -> Tensor:
        return torch.arange(len(self.y), device=self.y.device)

    def unsolved(self, rows: Tensor) -> Tensor:
        """The indices, among these, of events whose residual is above the tolerance."""
        return rows[self._is_unsolved(rows)]

    def _is_unsolved(self, rows: Tensor) -> Tensor:
        return self.length(self.residual[rows], self.x[rows], rows) > self.tolerance

    def length(self, residual: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """The lengths of residuals at x, in the unit; infinite where they are not finite."""
        norm = torch.linalg.vector_norm(at_least_float32(residual).flatten(1), dim=1)
        return torch.nan_to_num(norm / self.scale(x, rows), nan=torch.inf, posinf=torch.inf)

    def try_move(self, rows: Tensor, trial: Tensor, factor: float) -> Tensor:
        """Go to the trial where it reduces the residual to ``factor`` of it or less.

        :param Tensor trial: another x for these events.
        :return: whether it does, for each of the rows.
        """
        residual = self.y[rows] - self.evaluate(trial, rows)
        before = torch.linalg.vector_norm(at_least_float32(self.residual[rows]).flatten(1), dim=1)
        after = torch.linalg.vector_norm(at_least_float32(residual).flatten(1), dim=1)
        # An infinite residual is reduced by any finite one.
        is_better = torch.isfinite(after) & ((after <= factor * before) | ~torch.isfinite(before))
        # Not by indices of the better ones, for which a GPU would be waited for.
        moves = is_better.view(self._per_event)
        self.x[rows] = torch.where(moves, trial, self.x[rows])
        self.residual[rows] = torch.where(moves, residual, self.residual[rows])
        return is_better

    def iterate(self, correct: Callable[[Tensor, Tensor], Tensor]) -> None:
        """``x ← x + correct(residual, rows)``, for as long as that at least halves a residual."""
        rows = self.unsolved(self.all_rows())
        while len(rows) > 0:
            trial = self.x[rows] + correct(self.residual[rows], rows)
            has_moved = self.try_move(rows, trial, 0.5)
            rows = rows[has_moved & self._is_unsolved(rows)]

    def solution(self) -> Tensor:
        """x, shape ``(B, *event)``."""
        return torch.where(self.is_finite.view(self._per_event), self.x, torch.nan)


@torch.no_grad()
def refine_linear_solution(
    multiply: Callable[[Tensor], Tensor],
    solve_approximately: Callable[[Tensor], Tensor],
    solve_exactly: Callable[[Tensor], Tensor],
    right_side: Tensor,
    *,
    norm: Tensor,
) -> Tensor:
    """Solve ``A u = h`` to rounding by iterative refinement: ``u ← u + P (h − A u)``, u = P h.

    :param multiply: A.
    :param solve_approximately: P, an approximate inverse.
    :param solve_exactly: used for the events that do not converge.
    :param Tensor right_side: h, shape ``(B, *event)``.
    :param Tensor norm: of A, or a bound of it, shape ``()``.
    :return: u, shape ``(B, *event)``; NaN where h is not finite.
    """
    precision = torch.finfo(right_side.dtype)

    def scale(solution: Tensor, rows: Tensor) -> Tensor:
        # The residual that a backward stable solver leaves is at most about eps ‖A‖ ‖u‖.
        length = torch.linalg.vector_norm(solution.flatten(1), dim=1)
        return (precision.eps * norm * length).clamp_min(precision.tiny)

    state = Iterate(
        lambda solution, rows: multiply(solution),
        right_side,
        solve_approximately,
        scale=scale,
        tolerance=1.0,
    )
    state.iterate(lambda residual, rows: solve_approximately(residual))
    every = state.all_rows()
    # One more step is cheap, and often reduces what rounding has left.
    state.try_move(every, state.x + solve_approximately(state.residual), 1.0)
    failed = state.unsolved(every)
    if len(failed) > 0:
        state.x[failed] = solve_exactly(state.y[failed]).to(state.x)
    return state.solution()

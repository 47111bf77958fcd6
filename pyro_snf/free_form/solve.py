"""The inverse of a network to rounding, from an approximate one, and its implicit gradient.

``y = f(x)`` is solved for x from ``x₀ = g(y)``, every event on its own, by

1. the fixed point of ``x ← x + g(y) − g(f(x))``, for as long as it halves the residual ``y − f(x)``
   at least: the error shrinks by ``‖I − J_g J_f‖`` each time, for a pass of f and one of g;
2. Newton's method, with ``J_f d = y − f(x)`` solved in a Krylov space that ``J_g`` preconditions
   (where that does not get there, densely), and a step along d that is halved until the residual
   falls.

The derivative of ``x = f⁻¹(y; θ)`` is that of ``y − f(x; θ) = 0``: ``dx = J⁻¹ (dy − ∂_θ f dθ)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_snf.free_form.linearization import Context, Linearization, Network, linearize
from pyro_snf.krylov import krylov
from pyro_snf.precision import at_least_float32
from pyro_snf.surrogate import first_order_only

__all__ = ["Convergence", "Inversion", "implicit_inverse", "invert"]

_MAX_NEWTON_STEPS = 50
_MAX_HALVINGS = 10

# Of a Krylov space, before a dense solve takes over.
_MAX_ITERATIONS = 20

# Of Newton's directions: each step that the linear system describes well gains three digits.
_DIRECTION_TOLERANCE = 1e-3

# Numbers in the Jacobians that are in memory at a time.
_MAX_NUMBERS = 2**24


class Convergence(NamedTuple):
    """How many samples an inverse was found for."""

    num_samples: int
    num_converged: int
    """Samples whose residual is within the tolerance."""
    largest_residual: float
    """Of ``‖y − f(x)‖ / (‖y‖ + √D)``."""


class Inversion(NamedTuple):
    """What came of solving ``y = f(x)`` for a batch of B events."""

    x: Tensor
    """The solutions, shape ``(B, *event)``; NaN where y is not finite, or no ``f(x)`` was."""
    residual: Tensor
    """``‖y − f(x)‖ / (‖y‖ + √D)``, shape ``(B,)``."""
    converged: Tensor
    """Whether the residual is within the tolerance, shape ``(B,)``."""


@torch.no_grad()
def invert(
    forward: Network, inverse: Network, y: Tensor, context: Context, *, tolerance: float
) -> Inversion:
    """Solve ``y = f(x)`` for every y.

    :param forward: f.
    :param inverse: g.
    :param Tensor y: shape ``(B, *event)``.
    :param float tolerance: of the residual, as :class:`Inversion` has it.
    """
    state = _State(forward, y, context, tolerance)
    start = inverse(state.y, *context)
    state.x.copy_(torch.where(torch.isfinite(start), start, 0))
    state.residual.copy_(state.y - forward(state.x, *context))
    _iterate_to_fixed_point(inverse, state)
    _iterate_by_newton(inverse, state)
    length = state.length(state.residual)
    is_known = state.is_finite & torch.isfinite(length)
    return Inversion(
        x=torch.where(is_known.view(-1, *[1] * (y.dim() - 1)), state.x, torch.nan),
        residual=length.masked_fill(~state.is_finite, torch.nan),
        converged=(length <= tolerance) & state.is_finite,
    )


class _State:
    """Where the iterations are."""

    def __init__(self, forward: Network, y: Tensor, context: Context, tolerance: float) -> None:
        self.forward = forward
        self.context = context
        self.tolerance = tolerance
        # An event that is not finite has no solution, and stops no other.
        self.is_finite = torch.isfinite(y.flatten(1)).all(1)
        self.y = torch.where(self.is_finite.view(-1, *[1] * (y.dim() - 1)), y, 0)
        self.x = torch.empty_like(self.y)
        self.residual = torch.empty_like(self.y)
        norm = torch.linalg.vector_norm(at_least_float32(self.y).flatten(1), dim=1)
        self.scale = norm + y[0].numel() ** 0.5

    def length(self, residual: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Of residuals, relative to y; infinite where they are not finite."""
        norm = torch.linalg.vector_norm(at_least_float32(residual).flatten(1), dim=1)
        return torch.nan_to_num(norm / self.scale[rows], nan=torch.inf, posinf=torch.inf)

    def all_rows(self) -> Tensor:
        return torch.arange(len(self.y), device=self.y.device)

    def open_among(self, rows: Tensor) -> Tensor:
        """The indices of events, among these, that are to be solved for yet."""
        return rows[self.length(self.residual[rows], rows) > self.tolerance]

    def context_of(self, rows: Tensor) -> Context:
        return tuple(one[rows] for one in self.context)

    def try_move(self, rows: Tensor, trial: Tensor, factor: float) -> Tensor:
        """Go to the trial where it reduces the residual to ``factor`` of it or less.

        :return: whether it does, for each of the rows.
        """
        residual = self.y[rows] - self.forward(trial, *self.context_of(rows))
        before, after = self.length(self.residual[rows], rows), self.length(residual, rows)
        is_better = (after <= factor * before) & torch.isfinite(after)
        better = rows[is_better]
        self.x[better] = trial[is_better]
        self.residual[better] = residual[is_better]
        return is_better


def _iterate_to_fixed_point(inverse: Network, state: _State) -> None:
    rows = state.open_among(state.all_rows())
    while len(rows) > 0:
        context, y = state.context_of(rows), state.y[rows]
        correction = inverse(y, *context) - inverse(y - state.residual[rows], *context)
        rows = state.open_among(rows[state.try_move(rows, state.x[rows] + correction, 0.5)])


def _iterate_by_newton(inverse: Network, state: _State) -> None:
    rows = state.open_among(state.all_rows())
    for _ in range(_MAX_NEWTON_STEPS):
        if len(rows) == 0:
            return
        context, residual = state.context_of(rows), state.residual[rows]
        near = linearize(state.forward, state.x[rows], context)
        back = linearize(inverse, state.y[rows] - residual, context)
        direction = _solve(near, back, residual, context, state.forward, _DIRECTION_TOLERANCE)
        is_open = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        start = state.x[rows]
        for halving in range(_MAX_HALVINGS):
            left = is_open.nonzero().squeeze(1)
            if len(left) == 0:
                break
            step = 0.5**halving
            # What a step is to gain at least, of what the linear system promises (Armijo's rule).
            is_open[left] = ~state.try_move(
                rows[left], start[left] + step * direction[left], 1 - 1e-4 * step
            )
        rows = state.open_among(rows[~is_open])


def _solve(
    near: Linearization,
    back: Linearization,
    right_side: Tensor,
    context: Context,
    forward: Network,
    tolerance: float,
    *,
    transposed: bool = False,
) -> Tensor:
    """``J u = h`` (or ``Jᵀ u = h``) for every h: in Krylov spaces, or densely where they fail."""
    dtype = right_side.dtype

    def product(linearization: Linearization, vectors: Tensor) -> Tensor:
        multiply = linearization.transposed if transposed else linearization.product
        return multiply(vectors.to(dtype)).to(vectors)

    space = krylov(
        lambda vectors: product(near, vectors),
        lambda vectors: product(back, vectors),
        at_least_float32(right_side),
        tolerance=tolerance,
        max_iterations=_MAX_ITERATIONS,
    )
    solution = space.solution
    failed = (space.residual > tolerance).nonzero().squeeze(1).to(solution.device)
    size = max(1, _MAX_NUMBERS // right_side[0].numel() ** 2)
    for rows in failed.split(size) if len(failed) else ():
        x = near.source.detach()[rows]
        jacobian = linearize(forward, x, tuple(one[rows] for one in context)).jacobian()
        jacobian = at_least_float32(jacobian.mT if transposed else jacobian)
        column = at_least_float32(right_side[rows]).flatten(1).unsqueeze(2)
        exact = torch.linalg.solve_ex(jacobian, column).result.view_as(x).to(solution)
        is_usable = torch.isfinite(exact.flatten(1)).all(1)  # else J is singular
        solution[rows[is_usable]] = exact[is_usable]
    return solution.to(dtype)


class _ImplicitInverse(Function):
    @staticmethod
    def forward(
        residual: Tensor,
        x: Tensor,
        forward: Network,
        inverse: Network,
        context: Context,
        tolerance: float,
    ) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        residual, x, ctx.forward_map, ctx.inverse_map, context, ctx.tolerance = inputs
        ctx.save_for_backward(residual, x, *context)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        residual, x, *rest = ctx.saved_tensors
        context = tuple(one.detach() for one in rest)
        near = linearize(ctx.forward_map, x, context)
        back = linearize(ctx.inverse_map, near.output, context)
        with torch.no_grad():
            gradient = _solve(
                near, back, cotangent, context, ctx.forward_map, ctx.tolerance, transposed=True
            )
        if torch.is_grad_enabled():  # create_graph=True
            gradient = first_order_only(
                gradient, residual, error="a refined inverse has no second derivative"
            )
        return gradient, None, None, None, None, None


def implicit_inverse(
    forward: Network,
    inverse: Network,
    y: Tensor,
    x: Tensor,
    context: Context,
    *,
    tolerance: float,
) -> Tensor:
    """x, with the gradient of ``f⁻¹(y)`` in y, the context and the parameters of f.

    :param Tensor y: shape ``(B, *event)``.
    :param Tensor x: the solutions of ``y = f(x)``, a constant.
    :param float tolerance: of the linear systems for the gradient, relative.
    """
    residual = y - forward(x, *context)
    return _ImplicitInverse.apply(residual, x, forward, inverse, context, tolerance)

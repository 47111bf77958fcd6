"""The inverse of a network to rounding, from an approximate one, and its implicit gradient.

``y = f(x)`` is solved for x from ``x₀ = g(y)``, every event on its own, by

1. the fixed-point iteration ``x ← x + g(y) − g(f(x))``, as long as it at least halves the residual
   ``y − f(x)``. A step reduces the error by a factor of about ``‖I − J_g J_f‖``, for a pass of f
   and one of g;
2. Newton's method. ``J_f d = y − f(x)`` is solved by GMRES, preconditioned by ``J_g``, or densely
   where that does not converge. The step along d is halved until the residual decreases.

The derivative of ``x = f⁻¹(y; θ)`` is that of ``y − f(x; θ) = 0``: ``dx = J⁻¹ (dy − ∂_θ f dθ)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_snf.free_form.linearization import Context, Linearization, Network, linearize
from pyro_snf.iteration import Iterate
from pyro_snf.krylov import krylov
from pyro_snf.precision import at_least_float32
from pyro_snf.surrogate import first_order_only

__all__ = ["Convergence", "Inversion", "implicit_inverse", "invert"]

_MAX_NEWTON_STEPS = 50
_MAX_HALVINGS = 10

# The most steps of a Krylov solve, before a dense one is tried.
_KRYLOV_STEPS = 20

# The relative residual of Newton's directions. Where the linear model is accurate, a step gains
# three digits.
_DIRECTION_TOLERANCE = 1e-3

# The most entries of Jacobians that are in memory at a time.
_MAX_NUMBERS = 2**24


class Convergence(NamedTuple):
    """The number of samples whose inverse was found."""

    num_samples: int
    num_converged: int
    """Samples whose residual is within the tolerance."""
    largest_residual: float
    """Of ``‖y − f(x)‖ / (‖y‖ + √D)``."""


class Inversion(NamedTuple):
    """The results of solving ``y = f(x)`` for a batch of B events."""

    x: Tensor
    """The solutions, shape ``(B, *event)``; NaN where y, or every ``f(x)``, is not finite."""
    residual: Tensor
    """``‖y − f(x)‖ / (‖y‖ + √D)``, shape ``(B,)``."""
    converged: Tensor
    """Whether the residual is within the tolerance, shape ``(B,)``."""


@torch.no_grad()
def invert(
    forward: Network,
    inverse: Network,
    y: Tensor,
    context: Context,
    *,
    tolerance: float,
    start: Tensor | None = None,
) -> Inversion:
    """Solve ``y = f(x)`` for every y.

    :param forward: f.
    :param inverse: g.
    :param Tensor y: shape ``(B, *event)``.
    :param float tolerance: of the residual, as :class:`Inversion` has it.
    :param start: the x to start from, by default g(y).
    """
    norm = torch.linalg.vector_norm(at_least_float32(y).flatten(1), dim=1)
    scale = torch.nan_to_num(norm, nan=0.0, posinf=0.0) + y[0].numel() ** 0.5
    state = Iterate(
        lambda x, rows: forward(x, *_rows_of(context, rows)),
        y,
        lambda y: inverse(y, *context) if start is None else start,
        scale=lambda x, rows: scale[rows],
        tolerance=tolerance,
    )

    def correct(residual: Tensor, rows: Tensor) -> Tensor:
        contexts, targets = _rows_of(context, rows), state.y[rows]
        return inverse(targets, *contexts) - inverse(targets - residual, *contexts)

    state.iterate(correct)
    _iterate_by_newton(forward, inverse, state, context)
    every = state.all_rows()
    length = state.length(state.residual, state.x, every)
    is_known = torch.isfinite(length).view(-1, *[1] * (y.dim() - 1))
    return Inversion(
        x=torch.where(is_known, state.solution(), torch.nan),
        residual=length.masked_fill(~state.is_finite, torch.nan),
        converged=(length <= tolerance) & state.is_finite,
    )


def _rows_of(context: Context, rows: Tensor) -> Context:
    return tuple(one[rows] for one in context)


def _iterate_by_newton(
    forward: Network, inverse: Network, state: Iterate, context: Context
) -> None:
    rows = state.unsolved(state.all_rows())
    for _ in range(_MAX_NEWTON_STEPS):
        if len(rows) == 0:
            return
        contexts, residual = _rows_of(context, rows), state.residual[rows]
        near = linearize(forward, state.x[rows], contexts)
        back = linearize(inverse, state.y[rows] - residual, contexts)
        direction = _solve(near, back, residual, contexts, forward, _DIRECTION_TOLERANCE)
        is_open = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        start = state.x[rows]
        for halving in range(_MAX_HALVINGS):
            left = is_open.nonzero().squeeze(1)
            if len(left) == 0:
                break
            step = 0.5**halving
            # Armijo's rule: a step has to achieve this share of the predicted reduction.
            is_open[left] = ~state.try_move(
                rows[left], start[left] + step * direction[left], 1 - 1e-4 * step
            )
        rows = state.unsolved(rows[~is_open])


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
    """Solve ``J u = h``, or ``Jᵀ u = h``, for every h, by GMRES, or densely where that fails."""
    dtype = right_side.dtype

    def product(linearization: Linearization, vectors: Tensor) -> Tensor:
        multiply = linearization.vjp if transposed else linearization.jvp
        return multiply(vectors.to(dtype)).to(vectors)

    space = krylov(
        lambda vectors: product(near, vectors),
        lambda vectors: product(back, vectors),
        at_least_float32(right_side),
        tolerance=tolerance,
        max_steps=_KRYLOV_STEPS,
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
                gradient, residual, error="an iterative inverse has no second derivative"
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

"""A value with another's gradient: the pure pieces that every surrogate is made of.

Self Normalizing Flows (Keller et al., ICML 2021) replace the expensive factor of

    ∂ log|det J_f| / ∂θ = Tr(J_f⁻¹ ∂J_f/∂θ)  ≈  Tr(J_g ∂J_f/∂θ),

so a layer knows the *gradient* of its log-determinant without differentiating its *value*.
The functions here tie the two together for autograd and know nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "Outer",
    "Solver",
    "attach_penalty",
    "first_order_only",
    "gated",
    "implicit_solve",
    "with_gradient",
    "with_surrogate",
]

#: ``solver(h, transposed)`` solves ``A u = h`` (or ``Aᵀ u = h``) for every h of a batch.
Solver = Callable[[Tensor, bool], Tensor]

#: ``outer(l, r)`` is the gradient of ``Σ ⟨l, A r⟩``, summed over a batch, in A's parameter.
Outer = Callable[[Tensor, Tensor], Tensor]


class _FirstOrderOnly(Function):
    @staticmethod
    def forward(gradient: Tensor, parameter: Tensor, error: str) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.error = inputs[2]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(ctx.error)


def first_order_only(
    gradient: Tensor,
    parameter: Tensor,
    *,
    error: str = "a surrogate gradient has no second derivative; use eval() mode or "
    "log_det='exact' for second-order methods",
) -> Tensor:
    """A surrogate's gradient, where a backward pass records a graph (``create_graph=True``).

    :param Tensor gradient: the gradient, of ``parameter``'s shape.
    :param Tensor parameter: what the gradient is a function of, in truth.
    :param str error: what to say where it is differentiated.
    :return: ``gradient``; to differentiate it again is a RuntimeError.
    """
    return _FirstOrderOnly.apply(gradient, parameter, error)


class _WithGradient(Function):
    @staticmethod
    def forward(value: Tensor, parameter: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.parameter, gradient, ctx.scale = inputs
        # Saved through autograd, so that a gradient changed in place before the backward pass
        # is an error and not a wrong number. The gradient is a constant to autograd.
        ctx.save_for_backward(gradient)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        gradient = (ctx.scale * cotangent * gradient).to(ctx.parameter.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = first_order_only(gradient, ctx.parameter)
        return cotangent, gradient, None, None


def with_gradient(
    value: Tensor, parameter: Tensor, gradient: Tensor, *, scale: float = 1.0
) -> Tensor:
    """``value``, whose derivative in ``parameter`` is additionally ``scale · gradient``.

    The cotangent that arrives is honoured: any reduction, scale, plate or sign downstream
    multiplies the gradient. Calls nest, one for each parameter.

    :param Tensor value: a scalar, shape ``()``.
    :param Tensor parameter: the tensor that receives the gradient, any shape.
    :param Tensor gradient: the gradient, of ``parameter``'s shape; a constant.
    :param float scale: a constant factor, applied in the backward pass.
    :return: ``value``, shape ``()``.
    :raises RuntimeError: where the gradient is differentiated once more.
    """
    return _WithGradient.apply(value, parameter, gradient, scale)


class _WithSurrogate(Function):
    @staticmethod
    def forward(value: Tensor, surrogate: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradient = cotangent
        if torch.is_grad_enabled():  # create_graph=True
            for one in inputs:
                gradient = first_order_only(gradient, one)
        return cotangent, gradient, *[None] * len(inputs)


def with_surrogate(value: Tensor, surrogate: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """``value``, whose derivative is additionally that of a surrogate that has a graph.

    As :func:`with_gradient`, where the gradient is cheaper to compute with the cotangent than
    without: that of a batch of events in all parameters of a network, say.

    :param Tensor value: any shape.
    :param Tensor surrogate: of the same shape; its own value is of no account.
    :param inputs: what the surrogate is computed from, parameters and events.
    :return: ``value``.
    :raises RuntimeError: where the gradient is differentiated once more, in one of the inputs.
    """
    return _WithSurrogate.apply(value, surrogate, *[one for one in inputs if one.requires_grad])


class _AttachPenalty(Function):
    @staticmethod
    def forward(value: Tensor, penalty: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return cotangent, cotangent.abs()


def attach_penalty(value: Tensor, penalty: Tensor) -> Tensor:
    """``value``, with a penalty to be *minimized* riding on its gradient.

    The backward pass adds ``|∂loss/∂value| · ∂penalty``: the penalty scales with whatever scales
    the value (means, plates, particles), and is minimized whether the value is maximized (a
    density model) or minimized (the entropy of a guide).

    :param Tensor value: the value that is returned, any shape.
    :param Tensor penalty: the penalty, of the same shape, with its own autograd graph.
    :return: ``value``, unchanged.
    """
    return _AttachPenalty.apply(value, penalty)


class _Gated(Function):
    @staticmethod
    def forward(events: Tensor, is_open: Tensor) -> Tensor:
        return events.view_as(events)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.is_open = inputs  # not saved through autograd: it is written to later

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        is_open = ctx.is_open.view(-1, *[1] * (cotangent.dim() - 1))
        return torch.where(is_open, cotangent, 0), None


def gated(events: Tensor, is_open: Tensor) -> Tensor:
    """Events, whose gradient goes on for those that are marked, and ends at the others.

    :param Tensor events: shape ``(B, *event)``.
    :param Tensor is_open: the marks, shape ``(B,)``, as they are in the backward pass: what they
        depend on may be computed from the result.
    :return: ``events``.
    """
    return _Gated.apply(events, is_open)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """``Σ ∂⟨l, A r⟩/∂A`` over rows l and r."""
    return left.mT @ right


class _ImplicitSolve(Function):
    @staticmethod
    def forward(
        parameter: Tensor, right_side: Tensor, solver: Solver, outer: Outer, transposed: bool
    ) -> Tensor:
        return solver(right_side, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        parameter, _, ctx.solver, ctx.outer, ctx.transposed = inputs
        ctx.save_for_backward(parameter, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # A u = h  ⇒  du = A⁻¹(dh − dA u)  ⇒  ∂h = v, ∂A = −v uᵀ  with  Aᵀ v = ∂u.
        # The solve for v is itself differentiable, so higher derivatives are right too.
        parameter, solution = ctx.saved_tensors
        adjoint = _ImplicitSolve.apply(
            parameter, cotangent, ctx.solver, ctx.outer, not ctx.transposed
        )
        grad_parameter = None
        if ctx.needs_input_grad[0]:
            left, right = (solution, adjoint) if ctx.transposed else (adjoint, solution)
            grad_parameter = -ctx.outer(left, right)
        return grad_parameter, adjoint, None, None, None


def implicit_solve(
    parameter: Tensor,
    right_side: Tensor,
    solver: Solver,
    *,
    outer: Outer = _outer,
    transposed: bool = False,
) -> Tensor:
    """Solve ``A u = h`` for every h of a batch, differentiably in h and in what A is linear in.

    The solver is used as it is, forward and (transposed) backward; no gradient passes through
    its iterations. The gradient is as exact as the solves are.

    :param Tensor parameter: ``A`` itself, shape ``(D, D)``, or another parameter of it.
    :param Tensor right_side: the right-hand sides, as rows of shape ``(B, D)`` for a matrix.
    :param Solver solver: ``solver(right_side, transposed)`` returns the solutions.
    :param Outer outer: ``outer(l, r)`` is ``Σ ∂⟨l, A r⟩/∂parameter``, differentiably.
    :param bool transposed: solve with ``Aᵀ`` instead.
    :return: the solutions, of the shape of ``right_side``.
    """
    return _ImplicitSolve.apply(parameter, right_side, solver, outer, transposed)

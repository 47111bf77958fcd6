"""Values whose gradients are not those of autograd: the parts that all surrogates are made of.

Self Normalizing Flows (Keller et al., ICML 2021) replace the expensive factor of

    ∂ log|det J_f| / ∂θ = Tr(J_f⁻¹ ∂J_f/∂θ)  ≈  Tr(J_g ∂J_f/∂θ),

so a layer knows the *gradient* of its log-determinant without differentiating its *value*.
The functions here tie the two together for autograd and know nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from pyro_snf.caching import version
from pyro_snf.tracing import is_transformed

__all__ = [
    "ProductGradient",
    "SharedParameter",
    "Solver",
    "Surrogate",
    "attach_penalty",
    "can_share",
    "first_order_only",
    "implicit_solve",
    "share_gradient",
    "with_gradient",
    "with_surrogate",
]

#: ``solver(h, transposed)`` solves ``A u = h`` (or ``Aᵀ u = h``) for every h of a batch.
Solver = Callable[[Tensor, bool], Tensor]

#: ``gradient(parameter, r, l)`` is that of ``Σ ⟨l, A r⟩``, summed over a batch, in A's parameter.
ProductGradient = Callable[[Tensor, Tensor, Tensor], Tensor]


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


class Surrogate:
    """A value whose derivative in some parameter is not that of autograd: ``scale · gradient``.

    The gradient is multiplied with the cotangent of the value, so that any reduction, scale, plate
    or sign downstream applies to it.

    :param Tensor value: a scalar, shape ``()``.
    :param gradient: of the parameter's shape, a constant, or a function that returns it in the
        backward pass.
    :param float scale: a constant factor.
    :param derivative: the gradient as a function of the parameter, where there are second
        derivatives; by default there are none, and a RuntimeError says so.
    """

    def __init__(
        self,
        value: Tensor,
        gradient: Tensor | Callable[[], Tensor],
        scale: float = 1.0,
        *,
        derivative: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.value = value
        self.scale = scale
        self.derivative = derivative
        self._gradient = gradient
        self._version = version(gradient) if isinstance(gradient, Tensor) else None

    def attach_to(self, parameter: Tensor) -> Tensor:
        """The value with its derivative in a parameter, shape ``()``."""
        if isinstance(self._gradient, Tensor):
            return with_gradient(self.value, parameter, self._gradient, scale=self.scale)
        return _WithLazyGradient.apply(self.value, parameter, self)

    def gradient(self) -> Tensor:
        """The gradient without the scale; a RuntimeError if it has been written to."""
        if not isinstance(self._gradient, Tensor):
            return self._gradient()
        if version(self._gradient) != self._version:
            raise RuntimeError(
                "the surrogate gradient of log|det J| has been modified by an inplace operation "
                "between its evaluation and the backward pass"
            )
        return self._gradient

    def backward(self, cotangent: Tensor) -> Tensor:
        """``cotangent · scale · gradient``."""
        return self.scale * cotangent * self.gradient()

    def differentiable_backward(self, cotangent: Tensor, parameter: Tensor) -> Tensor:
        """The same in the parameter's type, for a backward pass that records a graph."""
        if self.derivative is not None:
            return (self.scale * cotangent * self.derivative(parameter)).to(parameter.dtype)
        return first_order_only(self.backward(cotangent).to(parameter.dtype), parameter)


class _WithLazyGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, parameter: Tensor, surrogate: Surrogate) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, parameter, ctx.surrogate = inputs
        ctx.save_for_backward(parameter)  # checked for writes in place where it is used
        ctx.dtype = parameter.dtype

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            gradient = ctx.surrogate.differentiable_backward(cotangent, ctx.saved_tensors[0])
        else:
            gradient = ctx.surrogate.backward(cotangent).to(ctx.dtype)
        return cotangent, gradient, None


class _WithGradient(Function):
    @staticmethod
    def forward(value: Tensor, parameter: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.parameter, gradient, ctx.scale = inputs
        # Saved by autograd, which checks it for writes in place, and frees it with the graph.
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

    Calls nest, one for each parameter.

    :param Tensor value: a scalar, shape ``()``.
    :param Tensor parameter: the tensor that receives the gradient, any shape.
    :param Tensor gradient: of the parameter's shape, a constant.
    :param float scale: a constant factor, applied in the backward pass.
    :raises RuntimeError: where the gradient is differentiated once more.
    """
    return _WithGradient.apply(value, parameter, gradient, scale)


class _Pending:
    """The surrogate of a shared parameter. Its node holds this, so it must not lead back there."""

    surrogate: Surrogate
    #: Whether a backward pass has used it.
    is_used = False


class _ShareGradient(Function):
    # Without setup_context, with which torch inspects the signature at every call, for as long as
    # a small layer takes for its product.
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, pending: _Pending) -> tuple[Tensor, Tensor]:
        ctx.pending = pending
        ctx.save_for_backward(parameter)  # checked for writes in place where it is used
        ctx.dtype = parameter.dtype
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        # Not parameter.new_zeros, which is sharded if the parameter is.
        zero = torch.zeros((), dtype=dtype, device=parameter.device)
        return parameter.view_as(parameter), zero

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, cotangent: Tensor | None
    ) -> tuple[Tensor | None, None]:
        ctx.pending.is_used = True
        if cotangent is None:
            return gradient, None
        surrogate = ctx.pending.surrogate
        if torch.is_grad_enabled():  # create_graph=True
            own = surrogate.differentiable_backward(cotangent, ctx.saved_tensors[0])
            return own if gradient is None else gradient + own, None
        if gradient is None:
            return surrogate.backward(cotangent).to(ctx.dtype), None
        factor = (surrogate.scale * cotangent).to(gradient.dtype)
        return gradient.addcmul_(surrogate.gradient().to(gradient.dtype), factor), None


class SharedParameter(NamedTuple):
    """A parameter as a map uses it, to whose gradient that of a surrogate is added in place.

    With :meth:`Surrogate.attach_to` the two gradients would be two buffers, and a sum of them.
    """

    parameter: Tensor
    zero: Tensor
    """A zero, shape ``()``, of the same node of the graph."""
    pending: _Pending

    def attach(self, surrogate: Surrogate) -> Tensor:
        """The surrogate's value with its derivative."""
        self.pending.surrogate = surrogate
        return surrogate.value + self.zero

    @property
    def handle(self) -> None:
        """None: :attr:`pending` says whether a backward pass has used the graph."""
        return None


def can_share(parameter: Tensor, x: Tensor) -> bool:
    """Whether a value and its log-determinant may have a node of autograd's graph in common.

    Not under autocast, which casts the gradients; nor in forward mode, which a surrogate does not
    have; nor in the functional transforms of ``torch.func``.
    """
    if torch.is_autocast_enabled(x.device.type) or is_transformed():
        return False
    return unpack_dual(x).tangent is None and unpack_dual(parameter).tangent is None


def share_gradient(parameter: Tensor, x: Tensor) -> SharedParameter | None:
    """A view of the parameter to compute with, to whose gradient a surrogate's is added in place.

    What is computed from the view must send it gradients in tensors of their own, as products do.

    :param Tensor parameter: requires a gradient.
    :param Tensor x: the other input of what is to be computed.
    :return: None unless :func:`can_share`.
    """
    if not can_share(parameter, x):
        return None
    pending = _Pending()
    view, zero = _ShareGradient.apply(parameter, pending)
    return SharedParameter(view, zero, pending)


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
    :param Tensor surrogate: of the same shape; its value is not used.
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
    """``value``, unchanged, whose backward pass also minimizes a penalty.

    The backward pass adds ``|∂loss/∂value| · ∂penalty``: the penalty scales with whatever scales
    the value (means, plates, particles), and is minimized whether the value is maximized (a
    density model) or minimized (the entropy of a guide).

    :param Tensor value: the value that is returned, any shape.
    :param Tensor penalty: the penalty, of the same shape, with its own autograd graph.
    :return: ``value``, unchanged.
    """
    return _AttachPenalty.apply(value, penalty)


class _ImplicitSolve(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        parameter: Tensor,
        right_side: Tensor,
        solver: Solver,
        product_gradient: ProductGradient,
        transposed: bool,
    ) -> Tensor:
        return solver(right_side, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        parameter, _, ctx.solver, ctx.product_gradient, ctx.transposed = inputs
        ctx.save_for_backward(parameter, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # A u = h  ⇒  du = A⁻¹(dh − dA u)  ⇒  ∂h = v, ∂A = −v uᵀ  with  Aᵀ v = ∂u.
        # The solve for v is itself differentiable, so higher derivatives are right too.
        parameter, solution = ctx.saved_tensors
        adjoint = _ImplicitSolve.apply(
            parameter, cotangent, ctx.solver, ctx.product_gradient, not ctx.transposed
        )
        gradient = None
        if ctx.needs_input_grad[0]:
            x, v = (adjoint, solution) if ctx.transposed else (solution, adjoint)
            gradient = -ctx.product_gradient(parameter, x, v)
        return gradient, adjoint, None, None, None


def implicit_solve(
    parameter: Tensor, right_side: Tensor, solver: Solver, product_gradient: ProductGradient
) -> Tensor:
    """Solve ``A u = h`` for every h of a batch, differentiably in h and in A's parameter.

    The solver is used as it is, forward and (transposed) backward; no gradient passes through
    its iterations. The gradient is as exact as the solves are.

    :param Tensor parameter: in which A is linear up to a constant, such as A itself.
    :param Tensor right_side: h, shape ``(B, *event)``.
    :param Solver solver: ``solver(right_side, transposed)`` returns the solutions.
    :param product_gradient: ``product_gradient(parameter, r, l)`` is ``Σ ∂⟨l, A r⟩/∂parameter``,
        differentiably.
    :return: the solutions, of the shape of ``right_side``.
    """
    return _ImplicitSolve.apply(parameter, right_side, solver, product_gradient, False)

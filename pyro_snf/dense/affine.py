"""One autograd node for ``y = diag(e^s) A x + b`` and for the gradient of its log-determinant.

The data and the log-determinant both send a gradient of D² numbers to Θ. As two nodes of the graph
they would be two buffers and a pass more to add them. Here the one is accumulated onto the other,
by the same matrix product that a plain linear layer needs anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from pyro_snf.caching import version
from pyro_snf.dense import near_identity
from pyro_snf.surrogate import first_order_only

__all__ = ["DeferredLogDet", "affine", "can_defer", "scale_and_shift"]


def can_defer() -> bool:
    """Whether the node fits: it knows reverse mode alone, outside autocast and tracing."""
    return not (
        torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch._C._are_functorch_transforms_active()  # as Function.apply itself asks
        or forward_ad._current_level >= 0
    )


def affine(
    rows: Tensor, theta: Tensor, log_scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, DeferredLogDet]:
    """``diag(e^s) A x + b`` for every row, shape ``(B, D)``, and its ``log|det|`` to be.

    :param Tensor rows: x as rows, shape ``(B, D)``.
    :param Tensor theta: Θ of ``A = I + Θ/√D``, shape ``(D, D)``.
    :param Tensor log_scale: s, shape ``(D,)``.
    :param bias: b, shape ``(D,)``, or None.
    """
    surrogate = _Surrogate()
    y, handle = _Affine.apply(rows, theta, log_scale, bias, surrogate)
    return y, DeferredLogDet(handle, surrogate)


class DeferredLogDet:
    """``log|det W|`` of a map that was evaluated, for when its value is known."""

    def __init__(self, handle: Tensor, surrogate: _Surrogate) -> None:
        #: A zero, shape ``()``, through which the gradient gets to the node of the map.
        self.handle = handle
        self._surrogate = surrogate

    def evaluate(self, value: Tensor, inverse_t: Tensor, *, exact: bool) -> Tensor:
        """``value``, whose gradient is ``inverse_t`` in A and 1 in every ``s``.

        :param Tensor value: shape ``()``; a constant.
        :param Tensor inverse_t: ``Rᵀ ≈ A⁻ᵀ``, shape ``(D, D)``; to be left as it is until the
            backward pass.
        :param bool exact: whether R is A⁻¹, so that there are second derivatives too.
        """
        self._surrogate.set(inverse_t, exact)
        return value + self.handle


class _Surrogate:
    """The inverse that stands for the gradient of the log-determinant.

    An object of its own, for the node holds it: it must not lead back to the node.
    """

    def set(self, inverse_t: Tensor, exact: bool) -> None:
        self.is_exact = exact
        self._inverse_t = inverse_t
        self._version = version(inverse_t)

    def gradient(self, cotangent: Tensor, dtype: torch.dtype) -> Tensor:
        """What the log-determinant sends to Θ, ``cotangent · Rᵀ/√D``, in a new tensor."""
        if version(self._inverse_t) != self._version:
            raise RuntimeError(
                "the inverse that stands for the gradient of log|det W| has been modified by an "
                "inplace operation between its evaluation and the backward pass"
            )
        scale = cotangent / math.sqrt(len(self._inverse_t))
        return (self._inverse_t * scale).to(dtype)


class _Affine(Function):
    # Without setup_context: not all that it keeps are inputs or outputs.
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        theta: Tensor,
        log_scale: Tensor,
        bias: Tensor | None,
        surrogate: _Surrogate,
    ) -> tuple[Tensor, Tensor]:
        product = near_identity.multiply(theta, rows)
        scale = log_scale.exp()
        ctx.set_materialize_grads(False)
        ctx.surrogate, ctx.dim, ctx.dtype = surrogate, rows.shape[-1], rows.dtype
        ctx.save_for_backward(rows, theta, log_scale, bias, product, scale)
        handle = scale.new_zeros((), dtype=torch.promote_types(scale.dtype, torch.float32))
        return scale_and_shift(product, scale, bias), handle

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, cotangent: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, gradient, cotangent), None
        needs_rows, needs_theta, needs_scale, needs_bias, _ = ctx.needs_input_grad
        grad_rows = grad_theta = grad_scale = grad_bias = None
        if cotangent is not None:
            if needs_theta:
                grad_theta = ctx.surrogate.gradient(cotangent, ctx.dtype)
            if needs_scale:
                grad_scale = cotangent.to(ctx.dtype).expand(ctx.dim)
        if gradient is None:
            # The log-determinant alone. An earlier backward pass may have freed what was saved.
            return None, grad_theta, grad_scale, None, None
        rows, theta, _, _, product, scale = ctx.saved_tensors
        inner = gradient * scale  # the gradient in A x
        if needs_rows:
            grad_rows = near_identity.multiply_transposed(theta, inner)
        if needs_theta:
            grad_theta = _accumulate(grad_theta, inner, rows)
        if needs_scale:
            own = (inner * product).sum(0)
            grad_scale = own if grad_scale is None else own + grad_scale
        if needs_bias:
            grad_bias = gradient.sum(0)
        return grad_rows, grad_theta, grad_scale, grad_bias, None


def _accumulate(gradient: Tensor | None, inner: Tensor, rows: Tensor) -> Tensor:
    """``gradient + innerᵀ rows/√D``, in the buffer of ``gradient`` if there is one."""
    alpha = 1 / math.sqrt(rows.shape[-1])
    if gradient is None:
        return (alpha * inner).mT @ rows
    if len(rows) == 1:  # an outer product; addmm_ would be slower
        return gradient.addr_(inner[0], rows[0], alpha=alpha)
    return gradient.addmm_(inner.mT, rows, alpha=alpha)


def scale_and_shift(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``diag(scale) h + b`` for every row ``h`` of the product, shape ``(B, D)``."""
    return product * scale if bias is None else torch.addcmul(bias, product, scale)


def _alias(tensor: Any) -> Any:
    return None if tensor is None else tensor.view_as(tensor)


def _differentiable_gradients(
    ctx: Any, gradient: Tensor | None, cotangent: Tensor | None
) -> list[Tensor | None]:
    """The gradients as functions: those of y can be differentiated again."""
    # Aliases: x may be a function of the same parameters, and its gradient is not for here.
    rows, theta, log_scale, bias = map(_alias, ctx.saved_tensors[:4])
    y = scale_and_shift(near_identity.multiply(theta, rows), log_scale.exp(), bias)
    outputs, cotangents = [y], [gradient]
    if cotangent is not None:
        outputs.append(log_scale.sum())
        cotangents.append(cotangent.to(log_scale.dtype))
        if ctx.surrogate.is_exact:
            outputs.append(near_identity.log_abs_det(theta))
            cotangents.append(cotangent)
        else:
            surrogate = ctx.surrogate.gradient(cotangent, theta.dtype)
            outputs.append(theta.view_as(theta))
            cotangents.append(first_order_only(surrogate, theta))
    found = [index for index, output in enumerate(cotangents) if output is not None]
    needed = [index for index in range(4) if ctx.needs_input_grad[index]]
    inputs = [rows, theta, log_scale, bias]
    gradients: list[Tensor | None] = [None] * 4
    for index, value in zip(
        needed,
        torch.autograd.grad(
            [outputs[index] for index in found],
            [inputs[index] for index in needed],
            [cotangents[index] for index in found],
            create_graph=True,
            allow_unused=True,
        ),
        strict=True,
    ):
        gradients[index] = value
    return gradients

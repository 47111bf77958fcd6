"""A network linearized at a batch of events: products with its Jacobian J, and with Jᵀ.

Both are computed in reverse mode, from one graph that is built once and kept. A product ``Jᵀ v``
(:meth:`~Linearization.vjp`) is a backward pass. It is linear in v, so that a backward pass through
*its* graph is a product with the transpose of Jᵀ, which is J (:meth:`~Linearization.jvp`). The
network has to be twice differentiable for that, as the surrogate gradient requires anyway. It need
not be differentiable in forward mode.

Forward mode would evaluate the network again for each v, which is three to five times as expensive
(``benchmarks/free_form.py products``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Context", "Linearization", "Network", "differentiable_twice", "linearize"]

#: The other arguments of a network, besides events: a batch of contexts, or none.
Context = tuple[Tensor, ...]

#: ``network(x, *context)``, on events of shape ``(B, *event)``.
Network = Callable[..., Tensor]

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def differentiable_twice() -> AbstractContextManager[None]:
    """A context in which recorded graphs can be differentiated twice.

    Graphs of fused attention cannot. Where a graph is recorded, torch's plain version is used.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else _NO_CONTEXT


class Linearization:
    """``y = f(x)`` for every x of a batch, and products with the Jacobians J of f there.

    :param Tensor source: x, shape ``(B, *event)``, which requires a gradient.
    :param Tensor output: y, of the same shape, computed from the source.
    """

    def __init__(self, source: Tensor, output: Tensor) -> None:
        self.source = source
        self.output = output
        self._transposed_graph: tuple[Tensor, Tensor] | None = None

    def vjp(self, vectors: Tensor, *, create_graph: bool = False) -> Tensor:
        """``Jᵀ v``.

        :param Tensor vectors: v, of y's shape, or several for each event: ``(k, B, *event)``.
        :param bool create_graph: whether the result is to be differentiable in all that f is.
        :return: of the shape of v.
        """
        if vectors.dim() > self.output.dim():
            parts = [self.vjp(part, create_graph=create_graph) for part in vectors]
            return torch.stack(parts)
        (result,) = torch.autograd.grad(
            self.output,
            self.source,
            vectors,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,  # 0 where y does not depend on x
        )
        return result

    def jvp(self, vectors: Tensor) -> Tensor:
        """``J v``, for v as in :meth:`vjp`."""
        if self._transposed_graph is None:
            with torch.inference_mode(False), torch.enable_grad():  # this product needs a graph
                argument = torch.zeros_like(self.output).requires_grad_()
                self._transposed_graph = argument, self.vjp(argument, create_graph=True)
        if vectors.dim() > self.output.dim():
            return torch.stack([self.jvp(part) for part in vectors])
        argument, result = self._transposed_graph
        if not result.requires_grad:  # f does not depend on x at all
            return torch.zeros_like(vectors)
        (product,) = torch.autograd.grad(
            result, argument, vectors, retain_graph=True, materialize_grads=True
        )
        return product

    def jacobian(self, *, num_copies: int = 1, create_graph: bool = False) -> Tensor:
        """J itself, shape ``(B, D, D)``.

        :param int num_copies: c, if the batch is c copies of B events, one after the other. Each
            copy computes a share of the rows, in fewer and larger backward passes.
        :param bool create_graph: as in :meth:`vjp`.
        """
        dim = self.output[0].numel()
        rows = []
        for start in range(0, dim, num_copies):
            units = self.output.new_zeros(num_copies, len(self.output) // num_copies, dim)
            # By a view: a number written to indices would be copied to a GPU, and waited for.
            units[:, :, start:].diagonal(dim1=0, dim2=2).fill_(1)
            products = self.vjp(units.view_as(self.output), create_graph=create_graph)
            rows.append(products.reshape(units.shape)[: dim - start])
        return torch.cat(rows).movedim(0, 1)


def linearize(
    network: Network,
    x: Tensor,
    context: Context = (),
    *,
    num_copies: int = 1,
    keep_graph: bool = False,
) -> Linearization:
    """The network, linearized at x.

    :param Tensor x: shape ``(B, *event)``.
    :param context: of the same number of events.
    :param int num_copies: of the batch, one after the other.
    :param bool keep_graph: whether x and the context keep their graphs; else they are constants.
    """
    if not keep_graph:
        # No graph can be recorded in inference mode, nor with tensors that were made in it.
        with torch.inference_mode(False):
            x, *rest = (
                one.clone() if one.is_inference() else one.detach() for one in (x, *context)
            )
            context = tuple(rest)
    with torch.inference_mode(False), torch.enable_grad():
        if num_copies > 1:
            x, *rest = (one.repeat(num_copies, *[1] * (one.dim() - 1)) for one in (x, *context))
            context = tuple(rest)
        # Not x itself, which may have hooks.
        source = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        with differentiable_twice():
            output = network(source, *context)
        if not output.requires_grad:  # a constant, whose Jacobian is 0
            output = output + 0 * source
        return Linearization(source, output)

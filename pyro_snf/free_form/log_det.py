"""``log|det J|`` of a network, exactly and by probes, and the surrogate of its gradient.

Let f be a network with the Jacobian J at an event x, and θ all that f depends on: its parameters,
x, and a context. Then::

    ∂ log|det J|/∂θ = tr(∂J J⁻¹) = E[wᵀ ∂J v],      Jᵀ w = v,    E[v vᵀ] = I.         (1)

Self normalization (Keller et al., 2021) replaces J⁻¹ by the Jacobian of an approximate inverse g,
that is, ``w = J_gᵀ v``; :func:`probe_gradient` does so with ``krylov_steps=0``. The residual of the
system, ``‖v − Jᵀ w‖/‖v‖``, measures the error of the method, and costs nothing extra. A few Krylov
steps, preconditioned by ``J_gᵀ``, reduce it.

(1) is computed as the gradient of ``⟨v, Jᵀ w⟩`` with w constant. Free-form flows (Draxler et al.,
2024) use ``⟨vᵀ J, u⟩``, ``u = J_g v`` in forward mode. The two have the same mean; (1) is cheaper,
because ``J_gᵀ v`` is a backward pass through the graph of the reconstruction.

Felix Draxler, Peter Sorrenson, Lea Zimmermann, Armand Rousselot, Ullrich Köthe. Free-form Flows:
Make Any Architecture a Normalizing Flow. AISTATS 2024. [arXiv:2310.16624]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_snf.free_form.linearization import Context, Linearization, Network, linearize
from pyro_snf.krylov import bidiagonalize, gcr, quadrature_of
from pyro_snf.precision import at_least_float32
from pyro_snf.transfer import read, send

__all__ = [
    "ProbeGradient",
    "ValueEstimate",
    "exact_slogdet",
    "probe_gradient",
]

# The most entries of Jacobians that are in memory at a time.
_MAX_NUMBERS = 2**24

# Events in a backward pass. A smaller batch is copied, and the copies share the rows of the
# Jacobians. Above this size, a pass of twice the size takes twice the time.
_ROWS = 256


def exact_slogdet(
    network: Network, x: Tensor, context: Context, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The sign of ``det J`` and ``log|det J|`` for every x, shapes ``(B,)``.

    They take D backward passes, and an LU factorization for each event. Where gradients are
    recorded, the logarithm is differentiable to any order in x, the context and the parameters. It
    is −∞ where J is singular.

    :param Tensor x: shape ``(B, *event)``.
    :param parameters: of the network.
    """
    dim = x[0].numel()
    tensors = (x, *context, *parameters)
    is_recorded = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    size = max(1, _MAX_NUMBERS // dim**2)
    chunks = list(zip(*(one.split(size) for one in (x, *context)), strict=True))
    evaluate = partial(_exact_slogdet, network, is_recorded)
    if is_recorded and len(chunks) > 1:
        # Only one chunk's graph is in memory at a time: each is recorded again when it is needed.
        pairs = [
            checkpoint(evaluate, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    else:
        pairs = [evaluate(*chunk) for chunk in chunks]
    signs, values = zip(*pairs, strict=True)
    return torch.cat(signs), torch.cat(values)


def _exact_slogdet(
    network: Network, is_recorded: bool, x: Tensor, *context: Tensor
) -> tuple[Tensor, Tensor]:
    num_copies = max(1, min(x[0].numel(), _ROWS // len(x)))
    near = linearize(network, x, context, num_copies=num_copies, keep_graph=is_recorded)
    jacobian = near.jacobian(num_copies=num_copies, create_graph=is_recorded)
    sign, logarithm = torch.linalg.slogdet(at_least_float32(jacobian))
    return sign.detach(), logarithm


class ProbeGradient(NamedTuple):
    """The results of :func:`probe_gradient`."""

    surrogate: Tensor
    """``⟨v, Jᵀ w⟩`` (whose value is not that of a log-determinant), the mean over the probes, shape
    ``(B,)``."""
    residual: Tensor
    """``‖v − Jᵀ w‖/‖v‖``, shape ``(k, B)``."""
    num_steps: int
    """Of the Krylov steps, those that were needed."""
    beside: Tensor
    """A copy of the tensor that was to be read beside the solves, in float64 on the CPU."""


class ValueEstimate:
    """An estimate of ``log|det J|`` for every x, a constant, of two halves.

    See :func:`~pyro_snf.krylov.quadrature_of`. Where the Jacobians themselves take no more
    products, the value is exact. A GPU is waited for in between; so one can read :attr:`numbers`
    together with other ones.

    :param near: f, linearized at x.
    :param Tensor probes: v, shape ``(k, B, *event)``.
    :param int lanczos_steps: for each probe.
    """

    @torch.no_grad()
    def __init__(self, near: Linearization, probes: Tensor, *, lanczos_steps: int) -> None:
        like = at_least_float32(near.output)
        self._num_probes = len(probes)
        self._known: Tensor | None = None
        #: What :meth:`value` needs to know.
        self.numbers = like.new_empty(0)
        if near.output[0].numel() <= 2 * lanczos_steps * len(probes):
            self._known = torch.linalg.slogdet(at_least_float32(near.jacobian())).logabsdet
        else:
            self.numbers = bidiagonalize(
                lambda vectors: _batched(near.jvp, vectors, probes),
                lambda vectors: _batched(near.vjp, vectors, probes),
                at_least_float32(probes).flatten(0, 1),
                max_steps=lanczos_steps,
            )

    def value(self, numbers: Tensor, like: Tensor) -> Tensor:
        """The estimate, shape ``(B,)``.

        :param Tensor numbers: a copy of :attr:`numbers` on the CPU.
        :param Tensor like: of the device and the dtype that the value is to have.
        """
        if self._known is not None:
            return self._known.to(like)
        return send(quadrature_of(numbers).view(self._num_probes, -1).mean(0), like)


def probe_gradient(
    near: Linearization,
    inverse: Linearization,
    probes: Tensor,
    *,
    tolerance: float,
    krylov_steps: int,
    expected_steps: int = 1,
    beside: Tensor | None = None,
) -> ProbeGradient:
    """A function of θ whose expected gradient is that of ``log|det J|``, up to the residual.

    :param near: f, linearized at x, with the graph of all that is to have a gradient.
    :param inverse: g, linearized at ``f(x)``.
    :param Tensor probes: v, shape ``(k, B, *event)``.
    :param float tolerance: the root mean square of ``‖v − Jᵀ w‖/‖v‖`` over the batch, at which the
        Krylov steps end: the gradient is a mean over the batch too.
    :param int krylov_steps: the most; 0 for none.
    :param int expected_steps: see :func:`~pyro_snf.krylov.gcr`, like ``beside``.
    """
    num_steps = 0
    with torch.no_grad():
        solution = inverse.vjp(probes)
        if krylov_steps > 0:
            found = gcr(
                lambda vectors: _batched(near.vjp, vectors, probes),
                lambda vectors: _batched(inverse.vjp, vectors, probes),
                at_least_float32(probes).flatten(0, 1),
                preconditioned=at_least_float32(solution).flatten(0, 1),
                tolerance=tolerance,
                max_steps=krylov_steps,
                expected_steps=expected_steps,
                beside=beside,
            )
            solution = found.solution.view_as(probes).to(probes)
            num_steps, known = found.num_steps, found.beside
        else:
            known = probes.new_empty(0) if beside is None else read(beside)[0]
    product = near.vjp(solution, create_graph=True)
    with torch.no_grad():
        residual = torch.linalg.vector_norm((probes - product).flatten(2), dim=2)
        residual = residual / torch.linalg.vector_norm(probes.flatten(2), dim=2)
    surrogate = at_least_float32(product * probes).flatten(2).sum(2).mean(0)
    return ProbeGradient(surrogate, residual, num_steps, known)


def _batched(product: Network, vectors: Tensor, probes: Tensor) -> Tensor:
    """``product`` of vectors in the order of the flattened probes, in the network's dtype."""
    return product(vectors.view_as(probes).to(probes)).to(vectors).view_as(vectors)

"""``log|det J|`` of a network, exactly and by probes, and the surrogate of its gradient.

For a network f with the Jacobian J at an event x, and all that f depends on (its parameters, x, a
context) called θ::

    ∂ log|det J|/∂θ = tr(∂J J⁻¹) = E[wᵀ ∂J v],      Jᵀ w = v,    E[v vᵀ] = I.         (1)

Self normalization (Keller et al., 2021) puts the Jacobian of an approximate inverse g in the place
of J⁻¹, that is ``w = J_gᵀ v``; :func:`probe_gradient` does so with ``max_iterations=0``. What that
leaves of the system, ``‖v − Jᵀ w‖/‖v‖``, is the error of the method, and known at no cost. A few
Krylov iterations, preconditioned by ``J_gᵀ``, reduce it.

(1) is differentiated as ``⟨v, Jᵀ w⟩`` with w constant. Free-form flows (Draxler et al., 2024) have
``⟨vᵀ J, u⟩``, ``u = J_g v`` in forward mode. The two have the same mean; (1) is cheaper, for
``J_gᵀ v`` is a backward pass through what reconstruction needs anyway.

Felix Draxler, Peter Sorrenson, Lea Zimmermann, Armand Rousselot, Ullrich Köthe. Free-form Flows:
Make Any Architecture a Normalizing Flow. AISTATS 2024. [arXiv:2310.16624]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_snf.free_form.linearization import Context, Linearization, Network, linearize
from pyro_snf.krylov import krylov, log_quadrature
from pyro_snf.precision import at_least_float32

__all__ = ["estimated_log_abs_det", "exact_slogdet", "probe_gradient"]

# Numbers in the Jacobians that are in memory at a time.
_MAX_NUMBERS = 2**24

# Events in a backward pass: with fewer, copies of them share the rows of their Jacobians. From here
# on, a pass of twice the size takes twice the time.
_ROWS = 256


def exact_slogdet(
    network: Network, x: Tensor, context: Context, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The sign of ``det J`` and ``log|det J|`` for every x, shapes ``(B,)``.

    By D backward passes and an LU factorization for each. The logarithm is differentiable to any
    order in x, the context and the parameters, where gradients are recorded; it is −∞ where
    J is singular.

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
        # Only one chunk's graph is in memory at a time: the others are recorded again when needed.
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


@torch.no_grad()
def estimated_log_abs_det(near: Linearization, probes: Tensor, *, max_iterations: int) -> Tensor:
    """An estimate of ``log|det J|`` for every x, shape ``(B,)``, a constant.

    See :func:`~pyro_snf.krylov.log_quadrature`. It is exact where that is cheaper.

    :param near: f near x.
    :param Tensor probes: v, shape ``(k, B, *event)``.
    :param int max_iterations: of Lanczos' process, for each probe.
    """
    num_products = 2 * max_iterations * len(probes)
    if near.output[0].numel() <= num_products:
        return torch.linalg.slogdet(at_least_float32(near.jacobian())).logabsdet
    values = log_quadrature(
        lambda vectors: _batched(near.product, vectors, probes),
        lambda vectors: _batched(near.transposed, vectors, probes),
        at_least_float32(probes).flatten(0, 1),
        max_iterations=max_iterations,
    )
    return values.view(len(probes), -1).mean(0).to(at_least_float32(near.output))


def probe_gradient(
    near: Linearization,
    inverse: Linearization,
    probes: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """A function of θ with the gradient of ``log|det J|`` in expectation, up to what g leaves.

    :param near: f near x, with the graph of all that is to have a gradient.
    :param inverse: g near ``f(x)``.
    :param Tensor probes: v, shape ``(k, B, *event)``.
    :param float tolerance: of ``‖v − Jᵀ w‖/‖v‖``.
    :param int max_iterations: to reduce it; 0 for none.
    :return: ``⟨v, Jᵀ w⟩`` (whose value is that of no log-determinant), the mean over the probes,
        shape ``(B,)``; and the residuals, shape ``(k, B)``.
    """
    with torch.no_grad():
        solution = inverse.transposed(probes)
        if max_iterations > 0:
            space = krylov(
                lambda vectors: _batched(near.transposed, vectors, probes),
                lambda vectors: _batched(inverse.transposed, vectors, probes),
                at_least_float32(probes).flatten(0, 1),
                preconditioned=at_least_float32(solution).flatten(0, 1),
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
            solution = space.solution.view_as(probes).to(probes)
    product = near.transposed(solution, create_graph=True)
    with torch.no_grad():
        residual = torch.linalg.vector_norm((probes - product).flatten(2), dim=2)
        residual = residual / torch.linalg.vector_norm(probes.flatten(2), dim=2)
    return at_least_float32(product * probes).flatten(2).sum(2).mean(0), residual


def _batched(product: Network, vectors: Tensor, probes: Tensor) -> Tensor:
    """``product`` of vectors in the order of the flattened probes, in the network's dtype."""
    return product(vectors.view_as(probes).to(probes)).to(vectors).view_as(vectors)

"""The paper's method: a second matrix ``R ≈ A⁻¹``, trained beside ``A = I + Θ/√D``.

Keller et al. (2021) maximize, for every layer ``f`` with approximate inverse ``g``,

    (1 − m) log p^f(x) + m log p^g(x) − λ ‖g(f(x)) − x‖²,

where ``p^f`` is the density under the map ``f``, and ``p^g`` the one under ``g⁻¹``. Here the
objective is divided by ``1 − m``. Up to that constant it is the same, and the gradients in ``A``
and in ``x`` are those of ``log p^f`` itself: equal to the exact ones where ``R = A⁻¹``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pyro_snf.caching import ParameterCache
from pyro_snf.dense import near_identity
from pyro_snf.dense.exact import check_finite
from pyro_snf.geco import GECO
from pyro_snf.precision import at_least_float32, without_autocast
from pyro_snf.surrogate import attach_penalty, with_gradient

__all__ = ["LearnedInverse"]


class _MixtureMultiply(Function):
    """``h = A x``, with the share of ``log p^g`` in the gradient of ``R``.

    The map of ``p^g`` is ``h = R⁻¹ x``; ``dh = −R⁻¹ dR R⁻¹ x ≈ −A dR h``, so a cotangent ``ḡ`` at
    ``h`` gives ``∂R = −(Aᵀ ḡ) hᵀ``: the cotangent of ``x``, computed anyway, times ``h``.
    """

    @staticmethod
    def forward(rows: Tensor, theta: Tensor, inverse_theta: Tensor, weight: float) -> Tensor:
        return near_identity.multiply(theta, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, theta, _, weight = inputs
        ctx.save_for_backward(rows, theta, output)
        ctx.weight = weight

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        rows, theta, product = ctx.saved_tensors
        scale = 1 / math.sqrt(theta.shape[-1])  # dA/dΘ = dR/dΦ = 1/√D
        grad_rows = grad_theta = grad_inverse = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_rows = near_identity.multiply_transposed(theta, cotangent)
        if ctx.needs_input_grad[1]:
            grad_theta = (scale * cotangent).mT @ rows
        if ctx.needs_input_grad[2] and grad_rows is not None:
            grad_inverse = (-ctx.weight * scale * grad_rows).mT @ product
        return grad_rows, grad_theta, grad_inverse, None


class LearnedInverse(nn.Module):
    """``R = I + Φ/√D``, a parameter, trained by the mixture objective and the penalty.

    The surrogate gradient of ``log|det A|`` is ``Rᵀ``; that of ``−log|det R|`` is ``−Aᵀ``. There
    is no O(D²) estimate of the *value* in this method: during training the term adds exactly 0.

    :param int dim: D.
    :param float mixture: m, the share of ``log p^g``, in ``[0, 1)``.
    :param reconstruction_weight: λ ≥ 0, or a :class:`~pyro_snf.GECO` that controls it.
    :param str reconstruction: what the penalty is and trains: ``"both"`` matrices by
        ``E = ‖RAx − x‖²``; the ``"inverse"`` R alone by E; or ``"symmetric"``, both matrices by
        ``½E + ½‖h − ARh‖²`` with ``h = Ax``.
    """

    RECONSTRUCTIONS = ("both", "inverse", "symmetric")

    def __init__(
        self,
        dim: int,
        *,
        mixture: float,
        reconstruction_weight: float | GECO,
        reconstruction: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        self.reconstruction_weight = reconstruction_weight
        self.reconstruction = reconstruction
        self.theta = nn.Parameter(torch.zeros(dim, dim, device=device, dtype=dtype))
        # The controller takes one step for each step of the optimizer, however often a
        # log-determinant is asked for in between.
        self._controlled: ParameterCache[bool] = ParameterCache()

    @property
    def _share(self) -> float:
        """The weight of ``log p^g`` next to ``log p^f``: ``m/(1 − m)`` in training, else 0."""
        # A trace has the exact log-det, and so no share of log p^g at all.
        if not self.training or torch.jit.is_tracing():
            return 0.0
        return self.mixture / (1 - self.mixture)

    def multiply(self, theta: Tensor, rows: Tensor) -> Tensor:
        """``A x`` for every row, shape ``(B, D)``."""
        if not self._share:
            return near_identity.multiply(theta, rows)
        # A custom function runs backward outside autocast: so must it run forward.
        with without_autocast(rows.device):
            return _MixtureMultiply.apply(rows.to(theta.dtype), theta, self.theta, self._share)

    def training_log_abs_det(self, theta: Tensor, rows: Tensor) -> Tensor:
        """Zeros of shape ``(B,)``, with the surrogate gradients and the penalty.

        :param Tensor rows: ``x``, shape ``(B, D)``: the penalty is a sample's own.
        :raises torch.linalg.LinAlgError: if ``A`` is not finite. A singular ``A`` goes unseen.
        """
        check_finite(theta)
        scale = 1 / math.sqrt(theta.shape[-1])
        zero = at_least_float32(theta.new_zeros(()))
        value = with_gradient(zero, theta, self.inverse_t(), scale=scale)
        if self._share:
            forward_t = near_identity.matrix(theta.detach()).mT
            value = with_gradient(value, self.theta, forward_t, scale=-self._share * scale)
        value = value.expand(len(rows))

        error = self._reconstruction_error(theta, rows.detach().to(theta.dtype))
        penalty_weight = self._penalty_weight(theta, error)
        penalty = penalty_weight / (1 - self.mixture) * error
        return attach_penalty(value, penalty.to(value.dtype))

    def inverse_t(self) -> Tensor:
        """``Rᵀ``, shape ``(D, D)``; a constant to autograd."""
        return near_identity.matrix(self.theta.detach()).mT

    def apply_inverse(self, rows: Tensor) -> Tensor:
        """``R h`` for every row ``h``: one pass through g, differentiable in R."""
        return near_identity.multiply(self.theta, rows)

    def mixture_solution(self, solution: Tensor, rows: Tensor) -> Tensor:
        """``solution``, with the share of ``log p^g`` where the inverse map is differentiated.

        There ``x = A⁻¹ h``, and the map of ``p^g`` is ``x = R h`` itself: a cotangent ``x̄`` gives
        ``∂R = x̄ hᵀ``.
        """
        if not self._share:
            return solution
        own = near_identity.multiply(self.theta, rows.detach())
        return solution + self._share * (own - own.detach())

    def _reconstruction_error(self, theta: Tensor, rows: Tensor) -> Tensor:
        if self.reconstruction == "inverse":
            theta = theta.detach()
        product = near_identity.multiply(theta, rows)
        error = (near_identity.multiply(self.theta, product) - rows).square().sum(-1)
        if self.reconstruction == "symmetric":
            target = product.detach()
            round_trip = near_identity.multiply(theta, near_identity.multiply(self.theta, target))
            error = (error + (round_trip - target).square().sum(-1)) / 2
        return error

    def _penalty_weight(self, theta: Tensor, error: Tensor) -> Tensor | float:
        if not isinstance(self.reconstruction_weight, GECO):
            return self.reconstruction_weight
        controller = self.reconstruction_weight
        mean_square = error.detach().mean() / theta.shape[-1]
        self._controlled.get([theta, self.theta], lambda: controller.update(mean_square))
        return controller.weight

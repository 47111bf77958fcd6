"""The paper's method: a second map ``R ≈ A⁻¹``, trained beside the linear map ``A``.

Keller et al. (2021) maximize, for every layer ``f`` with approximate inverse ``g``,

    (1 − m) log p^f(x) + m log p^g(x) − λ ‖g(f(x)) − x‖²,

where ``p^f`` is the density under the map ``f``, and ``p^g`` the one under ``g⁻¹``. Here the
objective is divided by ``1 − m``. Up to that constant it is the same, and the gradients in ``A``
and in ``x`` are those of ``log p^f`` itself: equal to the exact ones where ``R = A⁻¹``.

What kind of a map it is, a matrix or a convolution, is the business of subclasses:
:mod:`pyro_snf.dense.learned`, :mod:`pyro_snf.conv.learned`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pyro_snf.caching import ParameterCache
from pyro_snf.geco import GECO
from pyro_snf.precision import at_least_float32, check_finite, without_autocast
from pyro_snf.surrogate import attach_penalty, with_gradient

__all__ = ["LearnedInverse"]


class _MixtureMultiply(Function):
    """``h = A x``, with the share of ``log p^g`` in the gradient of ``R``.

    The map of ``p^g`` is ``h = R⁻¹ x``; ``dh = −R⁻¹ dR R⁻¹ x ≈ −A dR h``, so a cotangent ``ḡ`` at
    ``h`` gives R the gradient of ``−⟨Aᵀ ḡ, R h⟩``: for a matrix, the cotangent of ``x``, computed
    anyway, times ``h``.
    """

    @staticmethod
    def forward(
        x: Tensor, theta: Tensor, inverse_theta: Tensor, maps: LearnedInverse, weight: float
    ) -> Tensor:
        return maps.product(theta, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, theta, inverse_theta, ctx.maps, ctx.weight = inputs
        ctx.save_for_backward(x, theta, inverse_theta, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, inverse_theta, product = ctx.saved_tensors
        grad_x = grad_theta = grad_inverse = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_x = ctx.maps.product_transposed(theta, cotangent)
        if ctx.needs_input_grad[1]:
            grad_theta = ctx.maps.product_gradient(theta, x, cotangent)
        if ctx.needs_input_grad[2] and grad_x is not None:
            grad_inverse = ctx.maps.product_gradient(inverse_theta, product, -ctx.weight * grad_x)
        return grad_x, grad_theta, grad_inverse, None, None


class LearnedInverse(nn.Module):
    """A map R, given by a parameter, that is trained by the mixture objective and the penalty.

    The surrogate gradient of ``log|det A|`` is that of ``tr(R A)``, R being constant; that of
    ``−log|det R|`` is that of ``−tr(A R)``, A being constant. There is no cheap estimate of the
    *value* in this method: during training the term adds exactly 0.

    Subclasses define the maps that a parameter stands for, A's and R's alike.

    :param Tensor theta: what R is to start from; it becomes the parameter.
    :param float mixture: m, the share of ``log p^g``, in ``[0, 1)``.
    :param reconstruction_weight: λ ≥ 0, or a :class:`~pyro_snf.GECO` that controls it.
    :param str reconstruction: what the penalty is and trains: ``"both"`` maps by
        ``E = ‖RAx − x‖²``; the ``"inverse"`` R alone by E; or ``"symmetric"``, both maps by
        ``½E + ½‖h − ARh‖²`` with ``h = Ax``.
    """

    RECONSTRUCTIONS = ("both", "inverse", "symmetric")

    #: The number of dimensions of an event.
    event_dim: ClassVar[int]

    def __init__(
        self,
        theta: Tensor,
        *,
        mixture: float,
        reconstruction_weight: float | GECO,
        reconstruction: str,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        self.reconstruction_weight = reconstruction_weight
        self.reconstruction = reconstruction
        self.theta = nn.Parameter(theta)
        # The controller takes one step for each step of the optimizer, however often a
        # log-determinant is asked for in between.
        self._controlled: ParameterCache[bool] = ParameterCache()

    @abstractmethod
    def product(self, theta: Tensor, x: Tensor) -> Tensor:
        """``M x`` for every event of a batch, M being the map that ``theta`` stands for."""

    @abstractmethod
    def product_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        """``Mᵀ x`` for every event of a batch."""

    @abstractmethod
    def product_gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        """``Σ ∂⟨v, M x⟩/∂theta`` over a batch of events x and cotangents v."""

    @abstractmethod
    def trace_gradient(self, theta: Tensor, other: Tensor, x: Tensor) -> Tensor:
        """``∂ tr(N M)/∂theta``, N being the map of ``other``, on events such as those of x."""

    @property
    def _share(self) -> float:
        """The weight of ``log p^g`` next to ``log p^f``: ``m/(1 − m)`` in training, else 0."""
        # A trace has the exact log-det, and so no share of log p^g at all.
        if not self.training or torch.jit.is_tracing():
            return 0.0
        return self.mixture / (1 - self.mixture)

    def multiply(self, theta: Tensor, x: Tensor) -> Tensor:
        """``A x`` for every event, of the shape of ``x``, with the share of ``log p^g``."""
        if not self._share:
            return self.product(theta, x)
        # A custom function runs backward outside autocast: so must it run forward.
        with without_autocast(x.device):
            return _MixtureMultiply.apply(x.to(theta.dtype), theta, self.theta, self, self._share)

    def training_log_abs_det(self, theta: Tensor, x: Tensor) -> Tensor:
        """Zeros of shape ``(B,)``, with the surrogate gradients and the penalty.

        :param Tensor x: a batch of B events: the penalty is a sample's own.
        :raises torch.linalg.LinAlgError: if ``A`` is not finite. A singular ``A`` goes unseen.
        """
        check_finite(theta)
        zero = at_least_float32(theta.new_zeros(()))
        fixed, fixed_inverse = theta.detach(), self.theta.detach()
        value = with_gradient(zero, theta, self.trace_gradient(fixed, fixed_inverse, x))
        if self._share:
            gradient = self.trace_gradient(fixed_inverse, fixed, x)
            value = with_gradient(value, self.theta, gradient, scale=-self._share)
        value = value.expand(len(x))

        error = self._reconstruction_error(theta, x.detach().to(theta.dtype))
        size = x[0].numel()
        penalty = self._penalty_weight(theta, error, size) / (1 - self.mixture) * error
        return attach_penalty(value, penalty.to(value.dtype))

    def apply_inverse(self, h: Tensor) -> Tensor:
        """``R h`` for every event: one pass through g, differentiable in R."""
        return self.product(self.theta, h)

    def mixture_solution(self, solution: Tensor, h: Tensor) -> Tensor:
        """``solution``, with the share of ``log p^g`` where the inverse map is differentiated.

        There ``x = A⁻¹ h``, and the map of ``p^g`` is ``x = R h`` itself: a cotangent ``x̄`` gives
        R the gradient of ``⟨x̄, R h⟩``.
        """
        if not self._share:
            return solution
        own = self.product(self.theta, h.detach())
        return solution + self._share * (own - own.detach())

    def _reconstruction_error(self, theta: Tensor, x: Tensor) -> Tensor:
        if self.reconstruction == "inverse":
            theta = theta.detach()
        axes = tuple(range(-self.event_dim, 0))
        product = self.product(theta, x)
        error = (self.product(self.theta, product) - x).square().sum(axes)
        if self.reconstruction == "symmetric":
            target = product.detach()
            round_trip = self.product(theta, self.product(self.theta, target))
            error = (error + (round_trip - target).square().sum(axes)) / 2
        return error

    def _penalty_weight(self, theta: Tensor, error: Tensor, size: int) -> Tensor | float:
        if not isinstance(self.reconstruction_weight, GECO):
            return self.reconstruction_weight
        controller = self.reconstruction_weight
        mean_square = error.detach().mean() / size
        self._controlled.get([theta, self.theta], lambda: controller.update(mean_square))
        return controller.weight

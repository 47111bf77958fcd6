"""The paper's method: a second map ``R ≈ A⁻¹``, trained beside the linear map ``A``.

Keller et al. (2021) maximize, for every layer ``f`` with approximate inverse ``g``,

    (1 − m) log p^f(x) + m log p^g(x) − λ ‖g(f(x)) − x‖²,

where ``p^f`` is the density under the map ``f``, and ``p^g`` the one under ``g⁻¹``. Here the
objective is divided by ``1 − m``. Up to that constant it is the same, and the gradients in ``A``
and in ``x`` are those of ``log p^f`` itself: equal to the exact ones where ``R = A⁻¹``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pyro_snf.caching import TensorState
from pyro_snf.log_dets.base import LogDetMethod
from pyro_snf.maps.base import LinearMap
from pyro_snf.options import as_number, check_choice
from pyro_snf.penalty import GECO, PenaltyWeight, StepCounter, as_penalty_weight, penalty_factor
from pyro_snf.precision import at_least_float32, without_autocast, zero_if_finite
from pyro_snf.surrogate import Solver, attach_penalty, with_gradient

__all__ = ["Learned"]


class _MixtureMultiply(Function):
    """``h = A x``, with the share of ``log p^g`` in the gradient of ``R``.

    The map of ``p^g`` is ``h = R⁻¹ x``; ``dh = −R⁻¹ dR R⁻¹ x ≈ −A dR h``, so a cotangent ``ḡ`` at
    ``h`` gives R the gradient of ``−⟨Aᵀ ḡ, R h⟩``: for a matrix, the cotangent of ``x``, which is
    computed anyway, times ``h``.
    """

    @staticmethod
    def forward(
        x: Tensor, theta: Tensor, inverse_theta: Tensor, linear_map: LinearMap, share: float
    ) -> Tensor:
        return linear_map.multiply(theta, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, theta, inverse_theta, ctx.linear_map, ctx.share = inputs
        ctx.save_for_backward(x, theta, inverse_theta, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, inverse_theta, h = ctx.saved_tensors
        linear_map = ctx.linear_map
        grad_x = grad_theta = grad_inverse = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_x = linear_map.multiply_transposed(theta, cotangent)
        if ctx.needs_input_grad[1]:
            grad_theta = linear_map.gradient(theta, x, cotangent)
        if ctx.needs_input_grad[2] and grad_x is not None:
            grad_inverse = linear_map.gradient(inverse_theta, h, -ctx.share * grad_x)
        return grad_x, grad_theta, grad_inverse, None, None


class Learned(LogDetMethod):
    r"""A map R of the same kind as A, trained by a mixture objective and a penalty (Keller et al.,
    2021): ``log_det="learned"``.

    The surrogate gradient of :math:`\log|\det A|` is that of :math:`\operatorname{tr}(RA)`, R being
    constant; that of :math:`-\log|\det R|` is that of :math:`-\operatorname{tr}(AR)`, A being
    constant. Both are biased where R is not the inverse. There is no cheap estimate of the *value*:
    in training the term adds exactly 0. The penalty, with h = Ax, is

    .. math::
        \lambda\,\|R A x - x\|^2 \quad\text{or, if symmetric,}\quad
        \tfrac\lambda2\,\|R A x - x\|^2 + \tfrac\lambda2\,\|h - A R h\|^2 .

    It is weighed by the size of the log-determinant's cotangent, changes no value, and sends no
    gradient to x. R starts as the identity.

    >>> layer = SelfNormalizingLinear(3, log_det=Learned(mixture=0.0, reconstruction_weight=2.0))

    :param float mixture: m, the share of the inverse's density :math:`\log p^g`, in [0, 1).
    :param reconstruction_weight: λ: a number, a function of the number of steps taken, or a
        :class:`~pyro_snf.GECO`.
    :param str reconstruction: what the penalty trains: ``"both"`` maps, the ``"inverse"`` R alone,
        or both by the ``"symmetric"`` form.
    :raises ValueError: for options that are not of these.

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    training_value = "0"
    inverses = ("iterative", "exact", "one_pass")

    RECONSTRUCTIONS = ("both", "inverse", "symmetric")

    def __init__(
        self,
        *,
        mixture: float = 0.5,
        reconstruction_weight: PenaltyWeight = 1.0,
        reconstruction: str = "both",
    ) -> None:
        super().__init__()
        self.mixture = as_number("mixture in [0, 1)", mixture, lambda number: 0 <= number < 1)
        self.reconstruction_weight = as_penalty_weight(
            "reconstruction_weight", reconstruction_weight
        )
        check_choice("reconstruction", reconstruction, self.RECONSTRUCTIONS)
        self.reconstruction = reconstruction

    def setup(self, linear_map: LinearMap, theta: Tensor) -> None:
        super().setup(linear_map, theta)
        self.steps = StepCounter()
        if isinstance(self.reconstruction_weight, GECO):
            self.reconstruction_weight.to(theta.device)
        #: The parameter of R, as θ is of A.
        self.theta = nn.Parameter(theta.new_empty(linear_map.inverse_shape(theta.shape)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.theta.zero_()

    def extra_repr(self) -> str:
        weight = self.reconstruction_weight
        return (
            f"mixture={self.mixture}, reconstruction_weight={weight}, "
            f"reconstruction={self.reconstruction!r}"
        )

    def training_log_abs_det(self, theta: Tensor, x: Tensor, state: TensorState) -> Tensor:
        """Zeros of shape ``(B,)``, with the surrogate gradients and the penalty.

        On a GPU, which is not waited for, they are NaN if A is not finite.

        :raises torch.linalg.LinAlgError: if A is not finite. A singular A is not noticed.
        """
        event_shape = x.shape[1:]
        fixed, fixed_inverse = theta.detach(), self.theta.detach()
        gradient = self.linear_map.trace_gradient(fixed, fixed_inverse, event_shape)
        value = with_gradient(at_least_float32(zero_if_finite(fixed)), theta, gradient)
        if self._share:
            gradient = self.linear_map.trace_gradient(fixed_inverse, fixed, event_shape)
            value = with_gradient(value, self.theta, gradient, scale=-self._share)

        error = self._reconstruction_error(theta, x.detach().to(theta.dtype))
        factor = self._factor(state, error.detach().mean() / event_shape.numel())
        penalty = factor / (1 - self.mixture) * error
        return attach_penalty(value.expand(len(x)), penalty.to(value.dtype))

    def affine(
        self,
        theta: Tensor,
        log_scale: Tensor,
        bias: Tensor | None,
        x: Tensor,
        *,
        is_training: bool,
    ) -> Tensor:
        # Scale and bias are applied apart in either case: T(x) is the same to the last digit.
        if is_training and self._share:
            # A custom function runs backward outside autocast: so must it run forward.
            with without_autocast(x.device):
                x = x.to(theta.dtype)
                h = _MixtureMultiply.apply(x, theta, self.theta, self.linear_map, self._share)
        else:
            h = self.linear_map.multiply(theta, x)
        return self.linear_map.scale_and_shift(h, log_scale, bias)

    def invert(self, theta: Tensor, h: Tensor, inverse: str, *, is_training: bool) -> Tensor:
        if inverse == "one_pass":
            return self.linear_map.multiply(self.theta, h)  # differentiable in R's parameter
        solution = super().invert(theta, h, inverse, is_training=is_training)
        if not (is_training and self._share):
            return solution
        # In this direction the map of p^g is x = R h itself: a cotangent x̄ gives R the gradient of
        # ⟨x̄, R h⟩.
        own = self.linear_map.multiply(self.theta, h.detach())
        return solution + self._share * (own - own.detach())

    def score_solver(
        self, theta: Tensor, event_shape: torch.Size, state: TensorState, *, is_training: bool
    ) -> Solver:
        # The inverse of a larger kernel is no small kernel: one pass would be too inaccurate.
        if is_training and self.linear_map.matrix_of(theta) is not None:
            return self.one_pass_solver(theta, event_shape)
        return super().score_solver(theta, event_shape, state, is_training=is_training)

    def follows_inverse(self, theta: Tensor) -> bool:
        return True

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        return self.linear_map.weight(self.theta.detach())

    @torch.no_grad()
    def refactorize(self, theta: Tensor) -> None:
        """Set R to A⁻¹, for a matrix, dense or of a 1 × 1 convolution. Otherwise do nothing.

        The inverse of another convolution is none of a small kernel.
        """
        if self.linear_map.matrix_of(theta) is None:
            return
        event_shape = torch.Size([len(theta)] + [1] * (self.linear_map.event_dim - 1))
        inverse = self.linear_map.inverse_weight(theta, event_shape)
        self.theta.copy_(self.linear_map.theta_of(inverse))

    @property
    def _share(self) -> float:
        """The weight of ``log p^g`` next to ``log p^f`` in training."""
        return self.mixture / (1 - self.mixture)

    def _reconstruction_error(self, theta: Tensor, x: Tensor) -> Tensor:
        """Of every event, shape ``(B,)``."""
        if self.reconstruction == "inverse":
            theta = theta.detach()
        multiply, axes = self.linear_map.multiply, tuple(range(1, x.dim()))
        h = multiply(theta, x)
        error = (multiply(self.theta, h) - x).square().sum(axes)
        if self.reconstruction == "symmetric":
            target = h.detach()
            round_trip = multiply(theta, multiply(self.theta, target))
            error = (error + (round_trip - target).square().sum(axes)) / 2
        return error

    def _factor(self, state: TensorState, mean_square_error: Tensor) -> float | Tensor:
        """The current λ."""
        if isinstance(self.reconstruction_weight, float):
            return self.reconstruction_weight
        is_new = self.steps.count((state, TensorState(self.theta)))
        return penalty_factor(
            "reconstruction_weight",
            self.reconstruction_weight,
            self.steps.num_states - 1,
            mean_square_error,
            is_new=is_new,
        )

"""The paper's method: a second map ``R ≈ A⁻¹``, trained beside the linear map ``A``.

Keller et al. (2021) maximize, for every layer ``f`` with approximate inverse ``g``,

    (1 − m) log p^f(x) + m log p^g(x) − λ ‖g(f(x)) − x‖²,

where ``p^f`` is the density under the map ``f``, and ``p^g`` the one under ``g⁻¹``. Here the
objective is divided by ``1 − m``. Up to that constant it is the same, and the gradients in ``A``
and in ``x`` are those of ``log p^f`` itself: equal to the exact ones where ``R = A⁻¹``.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pyro_snf.caching import Memo, TensorState, version
from pyro_snf.log_dets.base import LogDetMethod
from pyro_snf.maps.base import LinearMap
from pyro_snf.options import as_number, check_choice
from pyro_snf.penalty import GECO, PenaltyWeight, StepCounter, as_penalty_weight, penalty_factor
from pyro_snf.precision import at_least_float32, without_autocast, zero_if_finite
from pyro_snf.surrogate import Solver, attach_penalty, can_share, first_order_only

__all__ = ["Learned"]


class _Multiply(Function):
    """``h = A x`` and two zeros, by which gradients of the log-determinant come to the same node.

    So there is one product for all gradients in A, and one for all in R, instead of two or three of
    either and their sums. What the cotangents mean:

    - ``ḡ``, of h. The map of ``p^g`` is ``h = R⁻¹ x``; ``dh = −R⁻¹ dR R⁻¹ x ≈ −A dR h``, so R has
      the gradient of ``−⟨Aᵀ ḡ, R h⟩``: for a matrix, the cotangent of ``x``, which is computed
      anyway, times ``h``. It is weighed by the share of ``log p^g``.
    - ``r̄``, of the first zero, of h's shape: that of ``R A x``, x being constant.
    - ``c``, of the second one, a scalar: that of ``log|det A|``, with the gradients of ``tr(R A)``
      in A, and by the share that of ``−tr(A R)`` in R.
    """

    # Without setup_context, which costs a small layer as much as its product.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        theta: Tensor,
        inverse_theta: Tensor,
        linear_map: LinearMap,
        share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = linear_map.multiply(theta, x)
        ctx.linear_map, ctx.share, ctx.device = linear_map, share, x.device
        ctx.save_for_backward(x, theta, inverse_theta, h)
        ctx.set_materialize_grads(False)
        zero = x.new_zeros(())
        return h, zero.expand_as(h), at_least_float32(zero.clone())

    @staticmethod
    def backward(
        ctx: Any, of_h: Tensor | None, of_back: Tensor | None, of_log_det: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with without_autocast(ctx.device):  # as forward, wherever this is called
            return (*_gradients(ctx, of_h, of_back, of_log_det), None, None)


def _gradients(
    ctx: Any, of_h: Tensor | None, of_back: Tensor | None, of_log_det: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in x, in A's parameter and in R's; see :class:`_Multiply`."""
    x, theta, inverse_theta, h = ctx.saved_tensors
    linear_map, share = ctx.linear_map, ctx.share
    needs_x, needs_theta, needs_inverse = ctx.needs_input_grad[:3]
    grad_x = grad_theta = grad_inverse = None
    if of_h is not None and (needs_x or (needs_inverse and share)):
        grad_x = linear_map.multiply_transposed(theta, of_h)
    if needs_theta:
        products = [(x, of_h)]
        if of_back is not None:
            cotangent = linear_map.multiply_transposed(inverse_theta, of_back)
            products.append((x.detach(), cotangent))
        grad_theta = _gradient(linear_map, theta, inverse_theta, products, of_log_det)
    if needs_inverse:
        weighed = (grad_x, of_log_det) if share else (None, None)
        of_mixture, of_trace = (None if one is None else -share * one for one in weighed)
        products = [(h, of_mixture)]
        if of_back is not None:
            # The penalty takes x for a constant, also where it is differentiated twice.
            is_twice = torch.is_grad_enabled()
            own = linear_map.multiply(theta, x.detach()) if is_twice else h
            products.append((own, of_back))
        grad_inverse = _gradient(linear_map, inverse_theta, theta, products, of_trace)
    return grad_x, grad_theta, grad_inverse


def _gradient(
    linear_map: LinearMap,
    theta: Tensor,
    other: Tensor,
    products: list[tuple[Tensor, Tensor | None]],
    of_log_det: Tensor | None,
) -> Tensor | None:
    """``Σ ∂⟨v, A x⟩/∂θ + c ∂ tr(N A)/∂θ``, N being the map of the parameter ``other``.

    :param products: pairs ``(x, v)`` of batches. All x are the same, but for their graphs.
    :param of_log_det: c, shape ``()``. Like a v, it may be None, which stands for 0.
    """
    given = [(x, cotangent) for x, cotangent in products if cotangent is not None]
    records_graph = torch.is_grad_enabled()  # create_graph=True
    if given and not records_graph:
        given = [(given[0][0], reduce(torch.add, [cotangent for _, cotangent in given]))]
    terms = [linear_map.gradient(theta, x, cotangent) for x, cotangent in given]
    if of_log_det is not None:
        event_shape = products[0][0].shape[1:]
        trace = linear_map.trace_gradient(theta.detach(), other.detach(), event_shape)
        factor = of_log_det.to(trace.dtype)
        if terms and not records_graph:
            return terms[0].addcmul_(trace, factor)  # which no one else has
        trace = factor * trace
        terms.append(first_order_only(trace, theta) if records_graph else trace)
    return reduce(torch.add, terms) if terms else None


class _Product(NamedTuple):
    """``h = A x`` with the zeros of its node, see :class:`_Multiply`."""

    h: Tensor
    zeros: Tensor
    zero: Tensor
    inverse_theta: Tensor
    inverse_version: int

    def is_of(self, inverse_theta: Tensor) -> bool:
        """Whether this is the parameter of R, as the node has saved it."""
        is_same = inverse_theta is self.inverse_theta
        return is_same and version(inverse_theta) == self.inverse_version

    @property
    def handle(self) -> Tensor:
        return self.zero


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
        product = self._multiply(theta, x.detach().to(theta.dtype))
        return self._log_abs_det(theta, x, state, product)

    def log_abs_det_with_memo(
        self, theta: Tensor, x: Tensor, state: TensorState, memo: Memo | None
    ) -> Tensor:
        if isinstance(memo, _Product) and memo.is_of(self.theta):
            return self._log_abs_det(theta, x, state, memo)
        return self.training_log_abs_det(theta, x, state)

    def _log_abs_det(
        self, theta: Tensor, x: Tensor, state: TensorState, product: _Product
    ) -> Tensor:
        value = zero_if_finite(theta) + product.zero
        error = self._reconstruction_error(theta, x.detach().to(theta.dtype), product)
        factor = self._factor(state, error.detach().mean() / x[0].numel())
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
                h = self._multiply(theta, x.to(theta.dtype)).h
        else:
            h = self.linear_map.multiply(theta, x)
        return self.linear_map.scale_and_shift(h, log_scale, bias)

    def affine_with_memo(
        self, theta: Tensor, log_scale: Tensor, bias: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Memo | None]:
        if not can_share(theta, x):
            return super().affine_with_memo(theta, log_scale, bias, x)
        product = self._multiply(theta, x)
        return self.linear_map.scale_and_shift(product.h, log_scale, bias), product

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

    def _multiply(self, theta: Tensor, x: Tensor) -> _Product:
        inverse_theta = self.theta
        arguments = x, theta, inverse_theta, self.linear_map, self._share
        h, zeros, zero = _Multiply.apply(*arguments)
        return _Product(h, zeros, zero, inverse_theta, version(inverse_theta))

    def _reconstruction_error(self, theta: Tensor, x: Tensor, product: _Product) -> Tensor:
        """The squared error of every event, shape ``(B,)``."""
        multiply, axes = self.linear_map.multiply, tuple(range(1, x.dim()))
        target = product.h.detach()
        back = multiply(self.theta, target)  # a function of R alone
        round_trip = back if self.reconstruction == "inverse" else back.detach() + product.zeros
        error = (round_trip - x).square().sum(axes)
        if self.reconstruction == "symmetric":
            error = (error + (multiply(theta, back) - target).square().sum(axes)) / 2
        return error

    def _factor(self, state: TensorState, mean_square_error: Tensor) -> float | Tensor:
        """The current λ."""
        return penalty_factor(
            "reconstruction_weight",
            self.reconstruction_weight,
            self.steps,
            lambda: (state, TensorState(self.theta)),
            mean_square_error,
        )

"""Elementwise activations between linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributions import constraints
from torch.distributions.constraints import Constraint, dependent_property

from pyro_snf import rational_quadratic
from pyro_snf.caching import TensorMemo
from pyro_snf.options import (
    as_event_shape,
    as_number,
    as_positive,
    check_device,
    check_dtype,
    check_flag,
)
from pyro_snf.precision import at_least_float32
from pyro_snf.tracing import is_traced
from pyro_snf.transforms.base import InvertibleTransformModule, check_input

__all__ = [
    "RationalQuadraticSpline",
    "SmoothLeakyReLU",
    "rational_quadratic_spline",
    "smooth_leaky_relu",
]

# Started to the right of the root, Newton's method converges monotonically and quadratically. It
# took 5 to 21 steps for α from 0.9 to 1e-8; the limit bounds the loop for input such as NaN.
_MAX_NEWTON_STEPS = 25

# On a GPU the end is looked for, and waited for, after each so many steps: more change nothing.
_STEPS_UNTIL_LOOK = 8


class SmoothLeakyReLU(InvertibleTransformModule):
    r"""The smooth leaky rectifier, elementwise.

    .. math::
        T(x) = \alpha x + (1 - \alpha) \log(1 + e^x), \qquad
        T'(x) = \alpha + (1 - \alpha)\,\sigma(x) \in (\alpha, 1).

    Value and log-det are exact. The inverse is exact to rounding: a safeguarded Newton iteration,
    whose gradients are those of the implicit function theorem. All cost O(D).

    >>> activation = SmoothLeakyReLU(0.3)
    >>> torch.allclose(activation.inv(activation(torch.ones(3))), torch.ones(3))
    True

    :param float alpha: the slope at −∞, in (0, 1).
    :param bool learnable: whether α is learned, by its logit.
    :param device: of α.
    :param dtype: of α.
    :raises ValueError: for options outside these ranges, and for inputs that are empty or not
        floating-point tensors.

    References:

    T. Anderson Keller et al. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    domain = constraints.real
    codomain = constraints.real
    sign = 1
    has_continuous_log_det = True

    def __init__(
        self,
        alpha: float = 0.3,
        *,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        alpha = as_number("alpha in (0, 1)", alpha, lambda number: 0 < number < 1)
        check_flag("learnable", learnable)
        check_device(device)
        check_dtype(dtype)
        self._first_logit_alpha = math.log(alpha) - math.log1p(-alpha)
        logit = torch.empty((), device=device, dtype=dtype)
        if learnable:
            self.logit_alpha = nn.Parameter(logit)
        else:
            self.register_buffer("logit_alpha", logit)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """α as it was given."""
        self.logit_alpha.fill_(self._first_logit_alpha)
        self.clear_cache()

    def extra_repr(self) -> str:
        learnable = isinstance(self.logit_alpha, nn.Parameter)
        return f"alpha={self.alpha.item():.4g}, learnable={learnable}"

    def _call(self, x: Tensor) -> Tensor:
        check_input(self, x, ())
        return _smooth_leaky_relu(x, self.alpha)

    def _inverse(self, y: Tensor) -> Tensor:
        check_input(self, y, ())
        return _InverseSmoothLeakyReLU.apply(y, self.alpha)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        check_input(self, x, ())
        return _slope(x, self.alpha).log()

    @property
    def alpha(self) -> Tensor:
        """The slope at −∞, shape ``()``."""
        return torch.sigmoid(self.logit_alpha)

    def _map_parameters(self) -> list[Tensor]:
        return [self.logit_alpha]


def _softplus(x: Tensor) -> Tensor:
    # Above its threshold, torch returns x. At the default of 20 the error is e⁻²⁰ = 2e-9, which is
    # far above the rounding of float64.
    return F.softplus(x, threshold=40)


def _smooth_leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return alpha * x + (1 - alpha) * _softplus(x)


def _slope(x: Tensor, alpha: Tensor) -> Tensor:
    return alpha + (1 - alpha) * torch.sigmoid(x)


class _InverseSmoothLeakyReLU(Function):
    """Newton's method forward, the implicit function theorem backward.

    T is increasing and convex, and exceeds ``max(x, αx)`` by at most ``(1 − α) log 2``. So the
    inverse of ``max(x, αx)`` is an upper bound of the root. From there Newton's iterates decrease
    monotonically; a step upwards is a rounding error and ends the iteration.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, alpha: Tensor) -> Tensor:
        x = torch.where(y > 0, y, y / alpha)
        lowest = x - (1 - alpha) * math.log(2) / alpha  # a lower bound of the root
        for count in range(1, _MAX_NEWTON_STEPS + 1):
            step = (_smooth_leaky_relu(x, alpha) - y) / _slope(x, alpha)
            # Only downwards, and not below the lower bound; infinities stay where they are.
            smaller = torch.where(step > 0, x - step, x).clamp_min(lowest)
            looks = not is_traced() and (not x.is_cuda or count % _STEPS_UNTIL_LOOK == 0)
            if looks and not (smaller < x).any():
                break
            x = torch.where(smaller < x, smaller, x)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, alpha = inputs
        ctx.save_for_backward(output, alpha)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # y = T(x; α)  ⇒  dx = (dy − ∂T/∂α dα) / T'(x), by differentiable operations on the output
        # x, so that higher derivatives are exact too.
        x, alpha = ctx.saved_tensors
        grad_y = cotangent / _slope(x, alpha)
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_alpha = -(grad_y * (x - _softplus(x))).sum()
        return grad_y, grad_alpha


def smooth_leaky_relu(alpha: float = 0.3, **kwargs: Any) -> SmoothLeakyReLU:
    """A :class:`SmoothLeakyReLU`, in the style of Pyro's helper functions.

    :param float alpha: the slope at −∞, in (0, 1).
    :param kwargs: the keyword arguments of :class:`SmoothLeakyReLU`.
    """
    return SmoothLeakyReLU(alpha, **kwargs)


class RationalQuadraticSpline(InvertibleTransformModule):
    r"""An increasing spline for every element of an event (Durkan et al., 2019), with K bins on
    [−B, B] and the identity outside.

    In a bin from :math:`(x_k, y_k)` to
    :math:`(x_{k+1}, y_{k+1})` with the slopes :math:`d_k` and :math:`d_{k+1}` at its ends,

    .. math::
        T(x) = y_k + (y_{k+1} - y_k)\,
            \frac{s \xi^2 + d_k \xi (1 - \xi)}{s + (d_{k+1} + d_k - 2 s)\,\xi (1 - \xi)}, \qquad
        \xi = \frac{x - x_k}{x_{k+1} - x_k}, \quad s = \frac{y_{k+1} - y_k}{x_{k+1} - x_k}.

    The knots and the inner slopes are learned, 3K − 1 numbers for each element; at −B and B the
    slope is 1. The spline starts as the identity. Value, log-det and inverse are exact (the inverse
    solves a quadratic equation). All cost O(KD).

    >>> spline = RationalQuadraticSpline((1, 4, 4))
    >>> torch.allclose(spline(torch.ones(2, 1, 4, 4)), torch.ones(2, 1, 4, 4))
    True

    :param event_shape: the trailing shape of inputs, such as ``(C, H, W)``, or D for ``(D,)``.
    :param int num_bins: K, from 2 to 1000.
    :param float bound: B, positive.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options outside these ranges, and for inputs of other shapes or dtypes.

    References:

    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS
    2019. [arXiv:1906.04032]
    """

    # Why not Pyro's Spline(order="quadratic"), which is the same family: its slope at the bounds is
    # 0.999, so it cannot start as the identity and its log-det jumps there; it keeps a tensor with
    # its graph, so it cannot be copied after training; its inverse asserts inequalities that
    # rounding can violate; and a step takes 1.5 times as long.

    sign = 1
    has_continuous_log_det = True

    @dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    codomain = domain

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        num_bins: int = 5,
        bound: float = 10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_event_shape(event_shape)
        check_device(device)
        check_dtype(dtype)
        self.num_bins = rational_quadratic.as_num_bins(num_bins)
        self.bound = as_positive("bound", bound)

        def empty(count: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*self.event_shape, count, device=device, dtype=dtype))

        self.unnormalized_widths = empty(self.num_bins)
        self.unnormalized_heights = empty(self.num_bins)
        self.unnormalized_slopes = empty(self.num_bins - 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity."""
        for parameter in self.parameters():
            parameter.zero_()
        self.clear_cache()

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, num_bins={self.num_bins}, bound={self.bound:g}"

    def _call(self, x: Tensor) -> Tensor:
        return self._call_with_memo(x)[0]

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, TensorMemo]:
        values = self._values(x)
        bins = rational_quadratic.of_elements(values, self._knots())
        y, log_slope = rational_quadratic.apply(values, bins)
        return y.to(x.dtype), TensorMemo(log_slope.sum(tuple(range(-len(self.event_shape), 0))))

    def _inverse(self, y: Tensor) -> Tensor:
        values = self._values(y)
        bins = rational_quadratic.of_elements(values, self._knots(), inverse=True)
        return rational_quadratic.apply_inverse(values, bins).to(y.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        memo = self._memo_of(x, y)
        return (self._call_with_memo(x)[1] if memo is None else memo).handle

    def _knots(self) -> rational_quadratic.Knots:
        """The knots of all elements, each field of shape ``(*event_shape, K + 1)``."""
        return rational_quadratic.knots_between(
            self.unnormalized_widths,
            self.unnormalized_heights,
            self.unnormalized_slopes,
            self.bound,
            dim=-1,
        )

    def _values(self, x: Tensor) -> Tensor:
        check_input(self, x, self.event_shape, self.unnormalized_widths.dtype)
        return at_least_float32(x)


def rational_quadratic_spline(
    event_shape: int | Sequence[int], **kwargs: Any
) -> RationalQuadraticSpline:
    """A :class:`RationalQuadraticSpline`, in the style of Pyro's helper functions.

    :param event_shape: the trailing shape of inputs, such as ``(C, H, W)``, or D for ``(D,)``.
    :param kwargs: the keyword arguments of :class:`RationalQuadraticSpline`.
    """
    return RationalQuadraticSpline(event_shape, **kwargs)

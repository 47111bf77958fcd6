"""Elementwise activations between linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributions import constraints

from pyro_snf.transforms.base import InvertibleTransformModule, check_input

__all__ = ["SmoothLeakyReLU", "smooth_leaky_relu"]

# Newton's method from the right converges monotonically and quadratically; 4 to 7 steps were
# seen for α from 0.5 to 0.01. The bound only keeps bad input from looping.
_MAX_NEWTON_STEPS = 50


class SmoothLeakyReLU(InvertibleTransformModule):
    r"""The smooth leaky rectifier, elementwise:

    .. math::
        T(x) = \alpha x + (1 - \alpha) \log(1 + e^x), \qquad
        T'(x) = \alpha + (1 - \alpha)\,\sigma(x) \in (\alpha, 1).

    Value, log-det and inverse are exact (the inverse to rounding, by a safeguarded Newton
    iteration, with implicit gradients); all cost O(D).

    >>> activation = SmoothLeakyReLU(0.3)
    >>> torch.allclose(activation.inv(activation(torch.ones(3))), torch.ones(3))
    True

    :param float alpha: the slope at −∞, in (0, 1).
    :param bool learnable: whether α is learned, by its logit.
    :param device: of α.
    :param dtype: of α.
    :raises ValueError: for an α outside (0, 1), and for inputs that are empty or not floating.

    References:

    T. Anderson Keller et al. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    domain = constraints.real
    codomain = constraints.real
    sign = 1

    def __init__(
        self,
        alpha: float = 0.3,
        *,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"expected alpha in (0, 1); got {alpha}")
        logit = torch.tensor(math.log(alpha) - math.log1p(-alpha), device=device, dtype=dtype)
        if learnable:
            self.logit_alpha = nn.Parameter(logit)
        else:
            self.register_buffer("logit_alpha", logit)

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
    # Above its threshold, by default 20, torch returns x: off by e⁻²⁰ = 2e-9, much in float64.
    return F.softplus(x, threshold=40)


def _smooth_leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return alpha * x + (1 - alpha) * _softplus(x)


def _slope(x: Tensor, alpha: Tensor) -> Tensor:
    return alpha + (1 - alpha) * torch.sigmoid(x)


class _InverseSmoothLeakyReLU(Function):
    """Newton's method forward, the implicit function theorem backward.

    T is increasing and convex, and lies above ``max(x, αx)`` by at most ``(1 − α) log 2``. So the
    inverse of the kinked function starts to the right of the root, from where Newton's method
    decreases monotonically; rounding alone can make it step up again, which ends it.
    """

    @staticmethod
    def forward(y: Tensor, alpha: Tensor) -> Tensor:
        x = torch.where(y > 0, y, y / alpha)
        lowest = torch.where(y > 0, y, y / alpha) - (1 - alpha) * math.log(2) / alpha
        for _ in range(_MAX_NEWTON_STEPS):
            step = (_smooth_leaky_relu(x, alpha) - y) / _slope(x, alpha)
            # Not to follow a rounding error up, nor past the bracket; infinities stay.
            smaller = torch.where(step > 0, x - step, x).clamp_min(lowest)
            if not (smaller < x).any():
                break
            x = torch.where(smaller < x, smaller, x)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, alpha = inputs
        ctx.save_for_backward(output, alpha)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # y = T(x; α)  ⇒  dx = (dy − ∂T/∂α dα) / T'(x);  in differentiable operations of the
        # output x, so that higher derivatives are right too.
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

"""Rational-quadratic splines: increasing, with a closed inverse (Gregory and Delbourgo, 1982).

In a bin from (x₀, y₀) to (x₁, y₁) with the slopes d₀ and d₁ at its ends, and with
ξ = (x − x₀)/(x₁ − x₀) and s = (y₁ − y₀)/(x₁ − x₀)::

    y = y₀ + (y₁ − y₀) (s ξ² + d₀ ξ(1 − ξ)) / (s + (d₁ + d₀ − 2s) ξ(1 − ξ))

Outside the bins, splines go on as straight lines with the slopes at their ends.

J. A. Gregory, R. Delbourgo. Piecewise Rational Quadratic Interpolation to Monotonic Data. IMA
Journal of Numerical Analysis 2(2), 1982.

Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.
[arXiv:1906.04032]
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_snf.options import expect, is_count
from pyro_snf.precision import at_least_float32

__all__ = [
    "Bin",
    "Knots",
    "apply",
    "apply_inverse",
    "as_num_bins",
    "knots_between",
    "of_batch",
    "of_elements",
]

# As in Durkan et al.: the smallest share of the interval that a bin takes, and the smallest slope.
_MIN_SHARE = 1e-3
_MIN_SLOPE = 1e-3


class Knots(NamedTuple):
    """K + 1 knots of splines with K bins."""

    x: Tensor
    """Increasing."""
    y: Tensor
    """Increasing."""
    slope: Tensor
    """Positive."""


class Bin(NamedTuple):
    """The bin that each value lies in, each field of the values' shape; those outside are in the
    first or the last bin."""

    x: Tensor
    y: Tensor
    slope: Tensor
    next_x: Tensor
    next_y: Tensor
    next_slope: Tensor


def as_num_bins(value: Any) -> int:
    """A number of bins, as a Python ``int``.

    :raises ValueError: unless it is an integer from 2 to 1000.
    """
    # With more bins, their smallest shares would be more than there is.
    expect("num_bins, an integer from 2 to 1000", is_count(value, 2) and value <= 1000, value)
    return int(value)


def knots_between(widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, dim: int) -> Knots:
    """Knots from (−B, −B) to (B, B), with slopes of 1 at both; the identity, where all are 0.

    :param Tensor widths: the logarithms of the K bins' widths, up to a constant.
    :param Tensor heights: likewise.
    :param Tensor slopes: K − 1 numbers, for the slopes at the inner knots.
    :param float bound: B.
    :param int dim: the dimension of the bins, from the end: −1 or −2.
    """
    offset = math.log(math.expm1(1 - _MIN_SLOPE))  # makes the slope 1 where the number is 0
    inner = _MIN_SLOPE + F.softplus(at_least_float32(slopes) + offset)
    padding = [0, 0] * (-1 - dim) + [1, 1]
    return Knots(
        _positions(widths, bound, dim),
        _positions(heights, bound, dim),
        F.pad(inner, padding, value=1.0),
    )


def _positions(logarithms: Tensor, bound: float, dim: int) -> Tensor:
    num_bins = logarithms.shape[dim]
    shares = torch.softmax(at_least_float32(logarithms), dim)
    shares = _MIN_SHARE + (1 - _MIN_SHARE * num_bins) * shares
    inner = bound * (2 * shares.narrow(dim, 0, num_bins - 1).cumsum(dim) - 1)
    before = [0, 0] * (-1 - dim)
    return F.pad(F.pad(inner, [*before, 1, 0], value=-bound), [*before, 0, 1], value=bound)


def of_elements(values: Tensor, knots: Knots, *, inverse: bool = False) -> Bin:
    """The bins of values, where each element of an event has a spline of its own.

    :param Tensor values: shape ``(..., *event)``.
    :param Knots knots: each field of shape ``(*event, K + 1)``.
    :param bool inverse: whether the values are y.
    """
    *event_shape, num_knots = knots.x.shape
    index = torch.zeros(values.shape, dtype=torch.long, device=values.device)
    for inner_knot in (knots.y if inverse else knots.x).detach()[..., 1:-1].unbind(-1):
        index = index + (values >= inner_knot)
    offsets = torch.arange(0, knots.x.numel(), num_knots, device=values.device)
    first = (index + offsets.view(event_shape)).flatten()
    # In one dimension, index_select has torch's fastest gather and, backward, fastest scatter.
    return Bin(
        *(
            field.flatten().index_select(0, position).view(values.shape)
            for position in (first, first + 1)
            for field in knots
        )
    )


def of_batch(values: Tensor, knots: Knots, *, inverse: bool = False) -> Bin:
    """The bins of values, where each value has a spline of its own.

    :param Tensor values: shape ``(..., D)``.
    :param Knots knots: each field of shape ``(..., K + 1, D)``.
    :param bool inverse: whether the values are y.
    """
    inner_knots = (knots.y if inverse else knots.x).detach()[..., 1:-1, :]
    first = (values.unsqueeze(-2) >= inner_knots).sum(-2, keepdim=True)
    return Bin(
        *(
            field.gather(-2, position).squeeze(-2)
            for position in (first, first + 1)
            for field in knots
        )
    )


def apply(x: Tensor, bins: Bin) -> tuple[Tensor, Tensor]:
    """y and log dy/dx."""
    width, height = bins.next_x - bins.x, bins.next_y - bins.y
    inside = x.clamp(bins.x, bins.next_x)
    xi = (inside - bins.x) / width
    s = height / width
    product = xi * (1 - xi)
    denominator = s + (bins.next_slope + bins.slope - 2 * s) * product
    y = bins.y + height * (s * xi**2 + bins.slope * product) / denominator
    numerator = bins.next_slope * xi**2 + 2 * s * product + bins.slope * (1 - xi) ** 2
    slope = numerator * (s / denominator).square()
    # With the slope d₀ or d₁ outside, where ξ is 0 or 1.
    return y + slope * (x - inside), slope.log()


def apply_inverse(y: Tensor, bins: Bin) -> Tensor:
    """x, by the root ξ in [0, 1] of ``a ξ² + b ξ + c``.

    Of the two formulas for the root, the sign of b chooses the one without cancellation; b < 0
    occurs near the upper end of a bin with a steep slope there.
    """
    width, height = bins.next_x - bins.x, bins.next_y - bins.y
    inside = y.clamp(bins.y, bins.next_y)
    s = height / width
    eta = inside - bins.y
    curvature = eta * (bins.next_slope + bins.slope - 2 * s)
    a = height * (s - bins.slope) + curvature
    b = height * bins.slope - curvature
    c = -s * eta
    root = (b**2 - 4 * a * c).clamp_min(0).sqrt()  # rounding can make it negative
    q = -(b + torch.where(b >= 0, root, -root)) / 2
    xi = torch.where(b >= 0, c, q) / torch.where(b >= 0, q, a)
    slope = torch.where(y < bins.y, bins.slope, bins.next_slope)
    return bins.x + xi * width + (y - inside) / slope

"""A Gaussian copula: an increasing function of each feature, and a dense layer."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.special import ndtr, ndtri

from pyro_snf import rational_quadratic
from pyro_snf.options import as_count, as_number
from pyro_snf.precision import at_least_float32, without_autocast
from pyro_snf.processes import gather
from pyro_snf.tracing import is_traced
from pyro_snf.transforms.base import check_input
from pyro_snf.transforms.first_batch import FirstBatchTransform
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = ["GaussianCopula", "gaussian_copula"]

# Rows that the first values are computed from. More would make them hardly more accurate.
_MAX_ROWS = 20_000

# Fewer rows than this many for each feature do not tell how features depend on each other.
_ROWS_PER_FEATURE = 4

# Before data are seen, the knots reach from −4 to 4.
_FIRST_BOUND = 4.0

# The narrowest bin to start from, in roundings of its place: values of many rows make it 0 wide.
_ROUNDINGS = 8

# In standard deviations of most rows: how far an outlier is away, and where a column's own does not
# serve as a unit. (In units of 1e4, log-normal columns in float32 lose 0.3 nats each.)
_OUTLYING = 1e3

# A density of numbers that are equal in so many rows is not bounded, and its training runs away.
_SHARE_OF_TIES = 0.05


class _Memo(NamedTuple):
    """Of a call: the sum of the splines' log slopes, shape ``(...)``, and their values."""

    handle: Tensor
    values: Tensor


class GaussianCopula(FirstBatchTransform):
    r"""An increasing spline of each feature, and a dense layer.

    .. math::
        T(x) = W\, h(x) + b, \qquad h_i(x) = S_i\bigl((x_i - \mu_i) / \sigma_i\bigr).

    The density of :math:`T^{-1}(z)` with a standard normal z is a Gaussian copula with marginals of
    its own: a good place to start from for tables, whose columns are skewed, bounded, or have gaps
    and peaks. Each S is a rational-quadratic spline with K bins that goes on as a straight line
    outside; the values and slopes at its knots are learned. The knots, the slopes of the lines, μ
    and σ are constants.

    **The first batch initializes it**, as it does :class:`~pyro_snf.ActNorm`, in training; or
    :meth:`initialize` does, with all of the data. μ and σ become the mean and the standard
    deviation; or where these say nothing about most rows, because others are further away by orders
    of magnitude, the median and the typical distance from it. S becomes the function that makes the
    feature normal, by its quantiles; or it remains the identity, if with that a normal distribution
    of h fits better, as with features that depend on each other linearly. W and b become those that
    make the covariance of T(x) the identity, W lower triangular; of fewer than 4 rows for each
    feature, W = I.

    Pyro's parameter store has no buffers, and so neither μ and σ nor the knots: save the
    ``state_dict``.

    Value and inverse are exact, and so is the log-det of S. That of W is the dense layer's
    (:class:`~pyro_snf.SelfNormalizingLinear`).

    >>> copula = GaussianCopula(2)
    >>> columns = torch.linspace(-2.0, 2.0, 100), torch.linspace(-1.0, 1.0, 100) ** 2
    >>> y = copula(torch.stack(columns, dim=1))
    >>> torch.allclose(y.mT.cov(correction=0), torch.eye(2), atol=1e-3)
    True

    :param int input_dim: D, the number of features. Inputs have shape ``(..., D)``.
    :param int num_bins: K, from 2 to 1000.
    :param float min_gain: at least 0, in nats: the logarithm of how much narrower a feature has to
        become for other features to be subtracted from it. Else it is only scaled.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param options: of the dense layer, such as ``log_det``.
    :raises ValueError: for options outside these ranges; for inputs of other shapes or dtypes; and
        for a first batch that is not finite, or has columns that are constant or linear functions
        of others.
    :warns UserWarning: for a first batch with a column in which one value is that of many rows; and
        where parameters are set, but no batch has set the buffers.

    References:

    Scott S. Chen, Ramesh A. Gopinath. Gaussianization. NIPS 2000.

    Han Liu, John Lafferty, Larry Wasserman. The Nonparanormal: Semiparametric Estimation of High
    Dimensional Undirected Graphs. JMLR 10, 2009.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    has_continuous_log_det = True

    mean: Tensor
    deviation: Tensor
    knots: Tensor
    end_slopes: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        num_bins: int = 16,
        min_gain: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.input_dim = as_count("input_dim", input_dim)
        self.num_bins = rational_quadratic.as_num_bins(num_bins)
        self.min_gain = as_number("min_gain >= 0", min_gain, lambda gain: gain >= 0)
        #: W and b.
        self.linear = SelfNormalizingLinear(input_dim, device=device, dtype=dtype, **options)

        def empty(*count: int) -> Tensor:
            return torch.empty(self.input_dim, *count, device=device, dtype=dtype)

        self.register_buffer("mean", empty())  # μ
        self.register_buffer("deviation", empty())  # σ
        # Where the knots are in x is not learned: peaks are narrow, and to move a knot by a
        # thousandth of a deviation would be to miss one.
        self.register_buffer("knots", empty(self.num_bins + 1))
        self.first_y = nn.Parameter(empty())
        self.log_heights = nn.Parameter(empty(self.num_bins))
        self.log_slopes = nn.Parameter(empty(self.num_bins - 1))
        # Nor are the slopes of the straight lines beyond the data: the few rows at the ends would
        # make them steep, and a larger number would be hundreds of deviations away.
        self.register_buffer("end_slopes", empty(2))
        self._make_initialized(device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity, until the next first batch."""
        self.mean.zero_()
        self.deviation.fill_(1.0)
        knots = torch.linspace(-_FIRST_BOUND, _FIRST_BOUND, self.num_bins + 1)
        self._set_knots(slice(None), knots, knots, torch.ones_like(knots))
        self.linear.reset_parameters()
        self._reset_initialized()
        self._has_warned = False

    def extra_repr(self) -> str:
        sizes = f"{self.input_dim}, num_bins={self.num_bins}, min_gain={self.min_gain:g}"
        return f"{sizes}, linear={self.linear}"

    def __call__(self, x: Tensor) -> Tensor:
        self._check_buffers()  # before parameters that are set count as initialized
        return super().__call__(x)

    def _call(self, x: Tensor) -> Tensor:
        return self._call_with_memo(x)[0]

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, _Memo]:
        z = self._standardized(x)
        with without_autocast(x.device):
            values, log_slope = self._splines(z)
            values = values.to(self.mean.dtype)
        return self.linear(values), _Memo(log_slope.sum(-1), values)

    def _inverse(self, y: Tensor) -> Tensor:
        check_input(self, y, (self.input_dim,), self.mean.dtype)
        self._check_buffers()
        values = at_least_float32(self.linear.inv(y))
        bins = rational_quadratic.of_elements(values, self._knots(), inverse=True)
        x = rational_quadratic.apply_inverse(values, bins)
        return (x * self.deviation + self.mean).to(self.mean.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        memo = self._memo_of(x, y)
        if memo is None:
            y, memo = self._call_with_memo(x)
        log_det = self.linear.log_abs_det_jacobian(memo.values, y)
        return log_det + memo.handle - at_least_float32(self.deviation).log().sum()

    def clear_cache(self) -> None:
        """Drop the cached pairs, the dense layer's, too."""
        super().clear_cache()
        self.linear.clear_cache()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Fit the copula to a batch, the larger the better: all of the data, if they are at hand.

        In more than one process, all have to call it; the batch of the first one is what counts.

        :param Tensor x: shape ``(..., D)``.
        :raises ValueError: if it is not finite, or has columns that are constant or linear
            functions of others.
        :raises RuntimeError: if the parameters have been sharded.
        """
        self._check_not_sharded()
        check_input(self, x, (self.input_dim,), self.mean.dtype)
        rows = x.detach().reshape(-1, self.input_dim)
        if len(rows) > _MAX_ROWS:
            # At random, for rows in the order of time may repeat a pattern.
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            rows = rows[order[:_MAX_ROWS].to(rows.device)]
        rows = rows.double()
        # In units, powers of 2, in which no square is too large or too small to be a number.
        unit = torch.ldexp(torch.ones_like(rows[0]), torch.frexp(rows.abs().amax(0)).exponent)
        rows = rows / unit
        self._check_columns(rows, torch.finfo(x.dtype).eps ** 0.5)
        location, scale = _location_and_scale(rows)
        z = (rows - location) / scale
        self.mean.copy_(location * unit)
        self.deviation.copy_(scale * unit)

        levels, quantiles = _normal_quantiles(z, self.num_bins + 1)
        rounding = torch.finfo(self.knots.dtype).eps
        self._set_knots(slice(None), *_knots_through(quantiles, levels, rounding))
        values, log_slope = (one.double() for one in self._splines(z.to(self.knots)))
        dependent = len(rows) >= _ROWS_PER_FEATURE * self.input_dim
        is_normalized = _choose(z, values, log_slope.mean(0), dependent=dependent)
        identity = levels.expand(self.input_dim, -1)
        self._set_knots(~is_normalized, identity[~is_normalized], identity[~is_normalized])
        values = torch.where(is_normalized, values, z)
        covariance = values.mT.cov(correction=0).view(self.input_dim, self.input_dim)
        weight = scales = covariance.diagonal().rsqrt().diag()
        if dependent:
            weight = torch.linalg.inv(torch.linalg.cholesky(covariance))
            gain = (weight.diagonal() / scales.diagonal()).log()
            is_worth_it = (gain >= self.min_gain) | (gain.mean() >= self.min_gain)
            weight = torch.where(is_worth_it.unsqueeze(1), weight, scales)
        self.linear.reset_parameters()
        if self.linear.bias is not None:
            self.linear.bias.copy_(-weight @ values.mean(0))
        self.linear.set_weight(weight)
        buffers = (self.mean, self.deviation, self.knots, self.end_slopes)
        for tensor in (*self.parameters(), *buffers):
            tensor.copy_(gather(tensor)[0])
        self.linear.refactorize()
        self._note_initialized()

    def _check_columns(self, rows: Tensor, smallest: float) -> None:
        if not torch.isfinite(rows).all():
            columns = (~torch.isfinite(rows)).any(0).nonzero().flatten().tolist()
            raise ValueError(
                f"{self._name()}: expected finite data; got NaN or infinity in the columns "
                f"{columns}: drop or impute these rows"
            )
        if len(rows) == 1:
            raise ValueError(f"{self._name()}: expected at least two rows; got one")
        constant = (rows == rows[0]).all(0).nonzero().flatten().tolist()
        if constant:
            raise ValueError(
                f"{self._name()}: expected columns that vary; got equal values in the columns "
                f"{constant}, which have no density: drop them, x[:, keep], and keep the constants "
                "to put them back into samples"
            )
        ties = rows.sort(0).values
        share = max(2, int(_SHARE_OF_TIES * len(rows)))
        tied = (ties[share:] == ties[:-share]).any(0).nonzero().flatten().tolist()
        if tied and len(rows) > 2 * share:
            warnings.warn(
                f"{self._name()}: in the columns {tied}, one value is that of more than 5 % of the "
                "rows. A density has no bound there, and its likelihood says nothing. If numbers "
                "are rounded, add noise of the size of the rounding: x + step * torch.rand_like(x)",
                stacklevel=5,
            )
        if len(rows) <= self.input_dim:
            return
        is_redundant = _left_over(rows) < smallest
        # A row of outliers in several columns is far away in one direction, which by itself makes
        # these columns all but proportional.
        median, scale = _median_and_scale(rows)
        usual = rows[((rows - median).abs() <= _OUTLYING * scale).all(1)]
        if len(usual) > self.input_dim:
            is_redundant &= _left_over(usual) < smallest
        redundant = is_redundant.nonzero().flatten().tolist()
        if redundant:
            raise ValueError(
                f"{self._name()}: expected columns that are not linear functions of others; got "
                f"such ones, copies perhaps, in the columns {redundant}, which have no density "
                "given the columns before them: drop them, x[:, keep], or add noise of the size of "
                "their rounding"
            )

    def _name(self) -> str:
        return f"{type(self).__name__}({self.input_dim})"

    def _is_as_reset(self) -> bool:
        return not self.linear.theta.any() and bool((self.deviation == 1).all())

    @torch.no_grad()
    def _check_buffers(self) -> None:
        """Warn, once, of parameters from elsewhere without the buffers that go with them."""
        if is_traced() or self.initialized.is_meta or self._has_warned:
            return
        if not self._has_been_initialized() and not self._is_as_reset():
            self._has_warned = True
            warnings.warn(
                f"{self._name()}: its parameters are set, but no batch has set its units and knots "
                "(buffers, which Pyro's parameter store has not): save and load the state_dict",
                stacklevel=5,
            )

    def _standardized(self, x: Tensor) -> Tensor:
        check_input(self, x, (self.input_dim,), self.mean.dtype)
        return (at_least_float32(x) - self.mean) / self.deviation

    def _splines(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """h and its log slopes, each of z's shape."""
        return rational_quadratic.apply(z, rational_quadratic.of_elements(z, self._knots()))

    def _knots(self) -> rational_quadratic.Knots:
        """Each field of shape ``(D, K + 1)``."""
        first = at_least_float32(self.first_y).unsqueeze(-1)
        heights = at_least_float32(self.log_heights).exp()
        left, right = at_least_float32(self.end_slopes).split(1, dim=-1)
        return rational_quadratic.Knots(
            at_least_float32(self.knots),
            torch.cat([first, first + heights.cumsum(-1)], dim=-1),
            torch.cat([left, at_least_float32(self.log_slopes).exp(), right], dim=-1),
        )

    def _set_knots(self, columns: Any, x: Tensor, y: Tensor, slopes: Tensor | None = None) -> None:
        slopes = torch.ones_like(x) if slopes is None else slopes
        self.knots[columns] = x.to(self.knots)
        self.first_y[columns] = y[..., 0].to(self.first_y)
        self.log_heights[columns] = y.diff(dim=-1).log().to(self.first_y)
        self.log_slopes[columns] = slopes[..., 1:-1].log().to(self.first_y)
        self.end_slopes[columns] = slopes[..., [0, -1]].to(self.end_slopes)

    def _map_parameters(self) -> list[Tensor]:
        splines = [self.knots, self.first_y, self.log_heights, self.log_slopes, self.end_slopes]
        return [self.mean, self.deviation, *splines, *self.linear._map_parameters()]


def _median_and_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The median of columns, and the median distance from it, of the rows that are not equal to it,
    as a standard deviation of a normal variable; each of shape ``(D,)``."""
    median = rows.median(0).values
    distance = (rows - median).abs()
    typical = distance.masked_fill(distance == 0, torch.nan).nanmedian(0).values
    return median, typical / ndtri(typical.new_tensor(0.75))


def _location_and_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of columns or, where outliers are most of these, what
    most of the rows have; each of shape ``(D,)``."""
    mean, deviation = rows.mean(0), rows.std(0)
    median, scale = _median_and_scale(rows)
    is_outlying = deviation > _OUTLYING * scale
    return torch.where(is_outlying, median, mean), torch.where(is_outlying, scale, deviation)


def _left_over(rows: Tensor) -> Tensor:
    """The standard deviation of columns, in their own, of what is not a linear function of those
    before them, shape ``(D,)``; NaN for columns of equal values."""
    z = (rows - rows.mean(0)) / rows.std(0)
    return torch.linalg.qr(z, mode="r").R.diagonal().abs() / len(rows) ** 0.5


def _normal_quantiles(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Quantiles of columns at the levels of a normal variable that are evenly spaced.

    :return: the levels, shape ``(count,)``, and the quantiles, shape ``(D, count)``.
    """
    ordered = z.sort(0).values
    num_rows = len(ordered)
    last = -ndtri(torch.tensor(0.5 / num_rows, dtype=z.dtype, device=z.device))
    levels = last * torch.linspace(-1, 1, count, dtype=z.dtype, device=z.device)
    place = (ndtr(levels) * num_rows - 0.5).clamp(0, num_rows - 1)
    before = place.floor().long().clamp_max(max(num_rows - 2, 0))
    weight = (place - before).unsqueeze(1)
    after = (before + 1).clamp_max(num_rows - 1)
    return levels, ((1 - weight) * ordered[before] + weight * ordered[after]).mT


def _knots_through(x: Tensor, y: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """Knots of increasing splines through the points, each of x's shape ``(D, K + 1)``.

    A slope is the geometric mean of the slopes on both sides, and at most thrice the smaller one.
    At the ends, from where straight lines go on, it is at most 1: on a steep line, a number only a
    little larger than those of the first batch would be a great many deviations away.
    """
    smallest = _ROUNDINGS * rounding * (1 + x.abs())
    widths = torch.maximum(x.diff(dim=-1), torch.maximum(smallest[..., :-1], smallest[..., 1:]))
    x = x[..., :1] + torch.nn.functional.pad(widths.cumsum(-1), (1, 0))
    y = y.expand_as(x)
    secants = y.diff(dim=-1) / widths
    left, right = secants[..., :-1], secants[..., 1:]
    inner = torch.minimum((left * right).sqrt(), 3 * torch.minimum(left, right))
    ends = secants.clamp_max(1)
    return x, y, torch.cat([ends[..., :1], inner, ends[..., -1:]], dim=-1)


def _choose(z: Tensor, normalized: Tensor, gain: Tensor, *, dependent: bool) -> Tensor:
    """Of which columns to take the normalized values, shape ``(D,)``, for the greatest likelihood
    of a normal distribution of all; of each column by itself, unless they are ``dependent``.

    One column after the other is exchanged if that helps, from either end.

    :param Tensor z: columns, shape ``(N, D)``.
    :param Tensor gain: the mean log slope of the normalized values in z, shape ``(D,)``.
    """
    dim = z.shape[1]
    covariance = torch.cat([z, normalized], dim=1).mT.cov(correction=0)
    columns = torch.arange(dim, device=z.device)

    def loss(chosen: Tensor) -> float:
        index = columns + dim * chosen
        part = covariance[index][:, index]
        if not dependent:
            part = part.diagonal().diag()
        return (torch.linalg.slogdet(part).logabsdet / 2 - gain[chosen].sum()).item()

    candidates = []
    for start in (False, True):
        chosen = torch.full((dim,), start, device=z.device)
        best = loss(chosen)
        for column in range(dim):
            other = chosen.clone()
            other[column] = ~other[column]
            if (value := loss(other)) < best:
                chosen, best = other, value
        candidates.append((best, chosen))
    return min(candidates, key=lambda one: one[0])[1]


def gaussian_copula(input_dim: int, **kwargs: Any) -> GaussianCopula:
    """A :class:`GaussianCopula`, in the style of Pyro's helper functions.

    :param int input_dim: D, the number of features.
    :param kwargs: the keyword arguments of :class:`GaussianCopula`.
    """
    return GaussianCopula(input_dim, **kwargs)

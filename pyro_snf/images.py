r"""From images of integers to logits, and back: what stands between data and a flow of images.

A density of pixels needs pixels that fill an interval. Uniform noise u makes them so,

.. math::
    \log P(k) = \log \int_{[0, 1)^D} p(k + u)\, du \;\ge\; \mathbb{E}_u[\log p(k + u)],

where k are integers and P is the probability that the density p gives them. So the likelihood of
dequantized images is a lower bound of that of the integers, and their bits per dimension an upper
bound (Theis et al., 2016). All Jacobians counted, p is a density of pixels from 0 to 256:

>>> pixels = dequantize(torch.tensor([[[0, 255]]]))
>>> base = dist.Normal(torch.zeros(1, 1, 2), 1.0).to_event(3)
>>> density = dist.TransformedDistribution(base, [LogitTransform().inv])
>>> bits_per_dim(density.log_prob(pixels), (1, 1, 2)).shape
torch.Size([])
>>> quantize(pixels)
tensor([[[  0, 255]]], dtype=torch.uint8)

Lucas Theis, Aäron van den Oord, Matthias Bethge. A note on the evaluation of generative models.
ICLR 2016. [arXiv:1511.01844]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint, dependent_property

from pyro_snf.precision import at_least_float32
from pyro_snf.transforms.base import InvertibleTransformModule, check_input
from pyro_snf.transforms.options import check_count

__all__ = ["LogitTransform", "bits_per_dim", "dequantize", "logit_transform", "quantize"]


class LogitTransform(InvertibleTransformModule):
    r"""Dequantized pixels to logits, elementwise, the interval squeezed by α so that its ends are
    not infinite (Dinh et al., 2017):

    .. math::
        y = \log p - \log q, \qquad p = (1 - 2\alpha)(x / L + \alpha), \quad q = 1 - p,

    for L levels. Pixels are in [0, L]; the domain, which is mapped to all real numbers, is a little
    wider, by αL below and above. The log-det, :math:`\log((1 - 2\alpha)/L) - \log p - \log q`, is
    summed over the event.

    Value and log-det are accurate to about 1e-6 in float32, at any pixel. The inverse is to
    rounding *of x*: of logits above 12, float32 pixels hold few digits. Half-precision numbers do
    not hold pixels; they are taken as float32.

    >>> LogitTransform(event_dim=1)(torch.tensor([0.0, 128.0, 256.0]))
    tensor([-13.8155,   0.0000,  13.8155])

    :param int num_levels: L, of integers from 0 to L − 1.
    :param int event_dim: 3 for images, 1 for rows of pixels.
    :param float alpha: α, in (0, 0.5).
    :raises ValueError: for options that are not of these, and for inputs that are not floating,
        empty, or of fewer dimensions. A pixel outside the domain is a NaN here, and an error where
        a distribution validates it.

    References:

    Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using Real NVP. ICLR 2017.
    [arXiv:1605.08803]
    """

    # torch's AffineTransform and inverse SigmoidTransform would be the same map. But they clip what
    # is out of range, so that images of another scale get a likelihood that says nothing. And their
    # 1 − p, in float32, is off by up to 1 % in the brightest pixels, a likelihood by 3e-5 nats a
    # pixel.

    sign = 1

    @dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        interval = constraints.interval(*self._bounds())
        return constraints.independent(interval, self._event_dim)

    @dependent_property(is_discrete=False)
    def codomain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    def __init__(self, num_levels: int = 256, event_dim: int = 3, alpha: float = 1e-6) -> None:
        super().__init__()
        check_count("num_levels", num_levels, 2)
        check_count("event_dim", event_dim, 0)
        if not isinstance(alpha, float) or not 0 < alpha < 0.5:
            raise ValueError(f"expected alpha in (0, 0.5); got {alpha!r}")
        self.num_levels = num_levels
        self.alpha = alpha
        self._event_dim = event_dim

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, event_dim={self._event_dim}, alpha={self.alpha}"

    def _call(self, x: Tensor) -> Tensor:
        p, q = self._shares(x)
        return p.log() - q.log()

    def _inverse(self, y: Tensor) -> Tensor:
        y = self._checked(y)
        p = torch.sigmoid(y)
        x = self.num_levels * (p / (1 - 2 * self.alpha) - self.alpha)
        # The ends themselves have no logit: keep off, by what T can tell from them.
        lower, upper = x.new_tensor(self._bounds())
        eps = torch.finfo(x.dtype).eps
        return x.clamp(lower * (1 - 4 * eps), torch.nextafter(upper, lower))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        p, q = self._shares(x)
        log_slope = math.log((1 - 2 * self.alpha) / self.num_levels) - p.log() - q.log()
        return sum_rightmost(log_slope, self._event_dim)

    def _shares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p and q, both to their last digits: x is near one end of the interval only."""
        x = self._checked(x)
        alpha, levels = self.alpha, self.num_levels
        p = (x / levels + alpha) * (1 - 2 * alpha)
        # 1 − (x/L + α)(1 − 2α), where L − x is exact for x > L/2
        q = (levels - x) / levels * (1 - 2 * alpha) + (alpha + 2 * alpha**2)
        return p, q

    def _bounds(self) -> tuple[float, float]:
        """Where p is 0, and where it is 1."""
        alpha, levels = self.alpha, self.num_levels
        return -alpha * levels, levels * (1 / (1 - 2 * alpha) - alpha)

    def _checked(self, x: Tensor) -> Tensor:
        check_input(self, x, ())
        if x.dim() < self._event_dim:
            raise ValueError(
                f"{self}: expected at least {self._event_dim} dimensions; got {tuple(x.shape)}"
            )
        return at_least_float32(x)


def logit_transform(
    num_levels: int = 256, event_dim: int = 3, alpha: float = 1e-6
) -> LogitTransform:
    """A :class:`LogitTransform`, in the style of Pyro's helper functions.

    :param int num_levels: L, of integers from 0 to L − 1.
    :param int event_dim: 3 for images, 1 for rows of pixels.
    :param float alpha: α, in (0, 0.5).
    """
    return LogitTransform(num_levels, event_dim, alpha)


def dequantize(
    pixels: Tensor, *, num_levels: int = 256, generator: torch.Generator | None = None
) -> Tensor:
    """``k + u``, u being uniform on [0, 1), for pixels k.

    The sum is below k + 1, also where it would be rounded up: ``quantize`` gives k back.

    :param Tensor pixels: integers from 0 to L − 1, of any shape and type that holds them.
    :param int num_levels: L.
    :param torch.Generator generator: of the noise, which is drawn on its device; torch's global one
        on that of the pixels, if None.
    :return: of the same shape, and type if that is float32 or float64; else of the default type.
    :raises ValueError: for pixels that are not integers from 0 to L − 1.
    """
    check_count("num_levels", num_levels, 2)
    if not isinstance(pixels, Tensor) or pixels.is_complex() or pixels.dtype == torch.bool:
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"expected a tensor of integers; got {got}")
    if pixels.dtype != torch.uint8 or num_levels < 256:  # else there is nothing else in it
        is_level = (pixels >= 0) & (pixels < num_levels) & (pixels == pixels.floor())
        if not is_level.all():
            wrong = pixels[~is_level].flatten()[0].item()
            raise ValueError(f"expected integers from 0 to {num_levels - 1}; got {wrong}")
    has_digits = pixels.dtype in (torch.float32, torch.float64)
    dtype = pixels.dtype if has_digits else torch.get_default_dtype()
    pixels = pixels.to(dtype)
    device = pixels.device if generator is None else generator.device
    noise = torch.rand(pixels.shape, generator=generator, device=device, dtype=dtype)
    largest = torch.nextafter(pixels + 1, pixels)
    return torch.minimum(pixels + noise.to(pixels.device), largest)


def quantize(x: Tensor, *, num_levels: int = 256) -> Tensor:
    """The integers ``⌊x⌋`` from 0 to L − 1, what is outside being moved to the next of them.

    :param Tensor x: dequantized pixels or samples of them, floating, of any shape.
    :param int num_levels: L.
    :return: of the same shape; uint8, or int64 for more than 256 levels.
    :raises ValueError: for NaNs, and for a tensor that is not floating.
    """
    check_count("num_levels", num_levels, 2)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected a floating-point tensor; got {got}")
    if x.isnan().any():
        raise ValueError("expected pixels; got NaN")
    integers = x.floor().clamp(0, num_levels - 1)
    return integers.to(torch.uint8 if num_levels <= 256 else torch.int64)


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int]) -> Tensor:
    """``−log p / (D log 2)``, D being the number of pixels and channels of an image.

    :param Tensor log_prob: in nats, of any shape, that of 0–255 pixels.
    :param event_shape: of an image, such as ``(C, H, W)``.
    :raises ValueError: for a shape that is not made of positive integers.
    """
    for size in event_shape:
        check_count("sizes of event_shape", size)
    return -log_prob / (math.prod(event_shape) * math.log(2))

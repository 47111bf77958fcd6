r"""Images of integers to logits and back, as flows of images need it.

A density needs pixels of continuous values. Dequantization adds uniform noise u to the integers k,

.. math::
    \log P(k) = \log \int_{[0, 1)^D} p(k + u)\, du \;\ge\; \mathbb{E}_u[\log p(k + u)],

where P(k) is the probability that the density p assigns to k. So the expected log-likelihood of
dequantized images is a lower bound of that of the integers, and their bits per dimension are an
upper bound (Theis et al., 2016). With all Jacobians included, p is a density of pixels in [0, 256]:

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

from pyro_snf.options import as_count, as_number, expect, has_values
from pyro_snf.precision import at_least_float32
from pyro_snf.transforms.base import InvertibleTransformModule, check_events

__all__ = ["LogitTransform", "bits_per_dim", "dequantize", "logit_transform", "quantize"]


class LogitTransform(InvertibleTransformModule):
    r"""Dequantized pixels to logits, elementwise, of an interval that is shrunk by α so that the
    logits of its ends are finite (Dinh et al., 2017):

    .. math::
        y = \log p - \log q, \qquad p = (1 - 2\alpha)(x / L + \alpha), \quad q = 1 - p,

    for L levels. Pixels lie in [0, L]. The domain, which is mapped to all real numbers, is wider by
    about αL on either side. The log-det, :math:`\log((1 - 2\alpha)/L) - \log p - \log q`, is summed
    over the event.

    Value and log-det are accurate to about 1e-6 in float32, for all pixels. The inverse is accurate
    to the rounding *of x*: float32 pixels determine logits above 12 to few digits. Half precision
    cannot represent dequantized pixels; such input is converted to float32.

    >>> LogitTransform(event_dim=1)(torch.tensor([0.0, 128.0, 256.0]))
    tensor([-13.8155,   0.0000,  13.8155])

    :param int num_levels: L, of integers from 0 to L − 1.
    :param int event_dim: 3 for images, 1 for rows of pixels.
    :param float alpha: α, in (0, 0.5).
    :raises ValueError: for options outside these ranges, and for inputs that are empty, not
        floating-point tensors, or of fewer dimensions. A pixel outside the domain gives NaN here,
        and an error where a distribution validates it.

    References:

    Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using Real NVP. ICLR 2017.
    [arXiv:1605.08803]
    """

    # Why not torch's AffineTransform and inverse SigmoidTransform, which give the same map: they
    # clip values that are out of range, so that images of another scale get a meaningless
    # likelihood; and their 1 − p, in float32, has an error of up to 1 % in the brightest pixels,
    # which changes the likelihood by 3e-5 nats a pixel.

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
        self.num_levels = as_count("num_levels", num_levels, 2)
        self.alpha = as_number("alpha in (0, 0.5)", alpha, lambda number: 0 < number < 0.5)
        self._event_dim = as_count("event_dim", event_dim, 0)

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, event_dim={self._event_dim}, alpha={self.alpha}"

    def _call(self, x: Tensor) -> Tensor:
        p, q = self._shares(x)
        return p.log() - q.log()

    def _inverse(self, y: Tensor) -> Tensor:
        y = self._checked(y)
        p = torch.sigmoid(y)
        x = self.num_levels * (p / (1 - 2 * self.alpha) - self.alpha)
        # The logits of the bounds are infinite: keep a distance at which p and q are still > 0.
        lower, upper = x.new_tensor(self._bounds())
        eps = torch.finfo(x.dtype).eps
        return x.clamp(lower * (1 - 4 * eps), torch.nextafter(upper, lower))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        p, q = self._shares(x)
        log_slope = math.log((1 - 2 * self.alpha) / self.num_levels) - p.log() - q.log()
        return sum_rightmost(log_slope, self._event_dim)

    def _shares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p and q; of pixels in [0, L], both have a relative error of a few units of rounding."""
        x = self._checked(x)
        alpha, levels = self.alpha, self.num_levels
        p = (x / levels + alpha) * (1 - 2 * alpha)
        # 1 − (x/L + α)(1 − 2α), where L − x is exact for x > L/2
        q = (levels - x) / levels * (1 - 2 * alpha) + (alpha + 2 * alpha**2)
        return p, q

    def _bounds(self) -> tuple[float, float]:
        """The pixels at which p is 0 and 1."""
        alpha, levels = self.alpha, self.num_levels
        return -alpha * levels, levels * (1 / (1 - 2 * alpha) - alpha)

    def _checked(self, x: Tensor) -> Tensor:
        check_events(self, x, self._event_dim)
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
    """``k + u`` for pixels k and noise u that is uniform on [0, 1).

    Sums that rounding would raise to k + 1 are lowered to the next smaller number, so that
    :func:`quantize` returns k.

    :param Tensor pixels: integers from 0 to L − 1, of any shape and of any real dtype.
    :param int num_levels: L.
    :param torch.Generator generator: for the noise, which is drawn on its device. None for torch's
        global generator on the device of the pixels.
    :return: of the same shape; of the same dtype if that is float32 or float64, else of torch's
        default dtype.
    :raises ValueError: for pixels that are not integers from 0 to L − 1.
    """
    num_levels = as_count("num_levels", num_levels, 2)
    fits = generator is None or isinstance(generator, torch.Generator)
    expect("generator, a torch.Generator or None", fits, generator)
    if not has_values(pixels) or pixels.is_complex() or pixels.dtype == torch.bool:
        raise ValueError(f"expected a tensor of integers; got {_kind(pixels)}")
    if pixels.dtype != torch.uint8 or num_levels < 256:  # uint8 has no other values
        is_level = (pixels >= 0) & (pixels < num_levels) & (pixels == pixels.floor())
        if not is_level.all():
            wrong = pixels[~is_level].flatten()[0].item()
            raise ValueError(f"expected integers from 0 to {num_levels - 1}; got {wrong}")
    if pixels.dtype not in (torch.float32, torch.float64):
        pixels = pixels.to(torch.get_default_dtype())
    device = pixels.device if generator is None else generator.device
    noise = torch.rand(pixels.shape, generator=generator, device=device, dtype=pixels.dtype)
    largest = torch.nextafter(pixels + 1, pixels)
    return torch.minimum(pixels + noise.to(pixels.device), largest)


def quantize(x: Tensor, *, num_levels: int = 256) -> Tensor:
    """The integers ``⌊x⌋``, clamped to the range from 0 to L − 1.

    :param Tensor x: dequantized pixels or samples of them, a floating-point tensor of any shape.
    :param int num_levels: L.
    :return: of the same shape; uint8, or int64 for more than 256 levels.
    :raises ValueError: for NaNs, and for other tensors.
    """
    num_levels = as_count("num_levels", num_levels, 2)
    if not has_values(x) or not x.is_floating_point():
        raise ValueError(f"expected a floating-point tensor; got {_kind(x)}")
    if x.isnan().any():
        raise ValueError("expected pixels; got NaN")
    integers = x.floor().clamp(0, num_levels - 1)
    return integers.to(torch.uint8 if num_levels <= 256 else torch.int64)


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int]) -> Tensor:
    """``−log p / (D log 2)``, where D is the product of the sizes of an image.

    :param Tensor log_prob: ``log p`` in nats, of any shape, for a density of pixels from 0 to 256.
    :param event_shape: of an image, such as ``(C, H, W)``.
    :raises ValueError: for sizes that are not positive integers, and for other log-densities.
    """
    if not isinstance(log_prob, Tensor) or not log_prob.is_floating_point():
        raise ValueError(f"expected log_prob, a floating-point tensor; got {_kind(log_prob)}")
    fits = isinstance(event_shape, Sequence) and not isinstance(event_shape, str | bytes)
    expect("event_shape, a list of sizes", fits and len(event_shape) > 0, event_shape)
    dim = math.prod(as_count("sizes of event_shape", size) for size in event_shape)
    return -log_prob / (dim * math.log(2))


def _kind(value: object) -> str:
    """What a tensor is of, or the name of the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype}, {value.layout}, on {value.device}"
    return type(value).__name__

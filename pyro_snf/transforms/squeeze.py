"""Space to depth: fewer positions, more channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_snf.options import as_count
from pyro_snf.precision import at_least_float32
from pyro_snf.transforms.base import InvertibleTransformModule, check_image

__all__ = ["Squeeze2d", "squeeze2d"]


class Squeeze2d(InvertibleTransformModule):
    r"""Space to depth (Dinh et al., 2017): every f × f square of a channel becomes f² channels.

    .. math::
        y_{c f^2 + i f + j,\, h,\, w} = x_{c,\, f h + i,\, f w + j}, \qquad 0 \le i, j < f.

    It is a permutation, so value and inverse are exact and the log-det is 0. Images of shape
    ``(..., C, H, W)`` become ``(..., C·f², H/f, W/f)``.

    >>> Squeeze2d()(torch.arange(4.0).view(1, 2, 2)).flatten()
    tensor([0., 1., 2., 3.])
    >>> Squeeze2d().forward_shape(torch.Size([3, 32, 32]))
    torch.Size([12, 16, 16])

    :param int factor: f.
    :raises ValueError: for a factor below 1, and for inputs that are not floating-point images, or
        whose H or W is not divisible by f (for the inverse, whose C is not divisible by f²).

    References:

    Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using Real NVP. ICLR 2017.
    [arXiv:1605.08803]
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = as_count("factor", factor)

    def extra_repr(self) -> str:
        return f"{self.factor}"

    def _call(self, x: Tensor) -> Tensor:
        check_image(self, x)
        self.forward_shape(x.shape)
        return F.pixel_unshuffle(x, self.factor)

    def _inverse(self, y: Tensor) -> Tensor:
        check_image(self, y)
        self.inverse_shape(y.shape)
        return F.pixel_shuffle(y, self.factor)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        check_image(self, x)
        return torch.zeros_like(at_least_float32(x[..., 0, 0, 0]))

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        *batch_shape, channels, height, width = self._checked(shape)
        f = self.factor
        if height % f or width % f:
            raise ValueError(f"{self}: expected H and W divisible by {f}; got {tuple(shape)}")
        return torch.Size((*batch_shape, channels * f**2, height // f, width // f))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        *batch_shape, channels, height, width = self._checked(shape)
        f = self.factor
        if channels % f**2:
            raise ValueError(f"{self}: expected C divisible by {f**2}; got {tuple(shape)}")
        return torch.Size((*batch_shape, channels // f**2, height * f, width * f))

    def _checked(self, shape: torch.Size) -> torch.Size:
        if len(shape) < 3:
            raise ValueError(f"{self}: expected a shape (..., C, H, W); got {tuple(shape)}")
        return shape


def squeeze2d(factor: int = 2) -> Squeeze2d:
    """A :class:`Squeeze2d`, in the style of Pyro's helper functions.

    :param int factor: f.
    """
    return Squeeze2d(factor)

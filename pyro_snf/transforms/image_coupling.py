"""Affine coupling of images, by a convolutional network."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_snf.caching import TensorMemo
from pyro_snf.options import as_count, as_number, check_device, check_dtype, expect
from pyro_snf.precision import at_least_float32, soft_bound
from pyro_snf.transforms.base import InvertibleTransformModule, check_image

__all__ = ["CouplingNet", "ImageCoupling", "image_coupling"]

# Why not Pyro's AffineCoupling(split_dim, hypernet, dim=-3), whose constraints and log-det shape
# would fit: it flattens the network's input to (..., C·H·W), so that height and width are lost; it
# keeps the latest log-scale with its graph, so it cannot be copied or pickled after training; and
# where it clips log-scales, the gradient is not that of the value.


class _ZeroConv2d(nn.Module):
    r"""A 3 × 3 convolution with the kernel :math:`\theta / \sqrt n`, where n is the number of
    inputs of an output. It starts at 0.

    Adam's first step changes all weights by the learning rate, whatever the size of their
    gradients, and the n changes of an output may all have one sign: there are 4,608 in Glow. With
    the division their sum is :math:`\sqrt n` times the learning rate at most, as it is for
    ``theta`` of the other layers.
    """

    def __init__(self, in_channels: int, out_channels: int, **factory: Any) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make all outputs 0."""
        self.theta.zero_()
        self.bias.zero_()

    def extra_repr(self) -> str:
        return f"{self.theta.shape[1]}, {self.theta.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.theta / math.sqrt(self.theta[0].numel())
        return F.conv2d(x, kernel, self.bias, padding=1)


class CouplingNet(nn.Sequential):
    """The network of Glow's couplings: convolutions 3×3, 1×1 and 3×3, with ReLU between them.

    Zero padding keeps the size of the images. The last convolution starts at 0, and its kernel is
    scaled such that usual learning rates suit it at any width; the other two are torch's, with
    weights from torch's global random stream.

    >>> CouplingNet(2, 4, hidden_channels=8)(torch.ones(5, 2, 6, 6)).shape
    torch.Size([5, 4, 6, 6])

    :param int in_channels: of the input, of shape ``(B, in_channels, H, W)``.
    :param int out_channels: of the output.
    :param int hidden_channels: the width, 512 in Glow.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for numbers of channels below 1 and other dtypes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels = as_count("in_channels", in_channels)
        out_channels = as_count("out_channels", out_channels)
        hidden_channels = as_count("hidden_channels", hidden_channels)
        check_device(device)
        check_dtype(dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(in_channels, hidden_channels, 3, padding=1, **factory),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 1, **factory),
            nn.ReLU(),
            _ZeroConv2d(hidden_channels, out_channels, **factory),
        )


class ImageCoupling(InvertibleTransformModule):
    r"""Affine coupling (Dinh et al., 2017) of images.

    The first half of the channels, :math:`x_1`, shifts and scales the second,

    .. math::
        y_1 = x_1, \qquad y_2 = e^{s(x_1)} \odot x_2 + t(x_1), \qquad
        \binom{t}{r} = \mathrm{network}(x_1), \quad s = \sigma \tanh(r / \sigma), \quad
        \sigma = \log M.

    The scale :math:`e^s` is a sigmoid of r between 1/M and M, and 1 at r = 0. So the inverse never
    divides by less than 1/M, and where the network starts at 0, the map starts as the identity.

    Value, inverse and log-det, :math:`\sum s`, are exact. Each costs one pass through the network;
    the log-det of a cached pair costs none, as T(x) has computed s. Of C channels, the first half
    has ⌊C/2⌋.

    >>> layer = ImageCoupling(3, CouplingNet(1, 4, hidden_channels=8))
    >>> layer(torch.ones(5, 3, 6, 6)).shape
    torch.Size([5, 3, 6, 6])

    :param int num_channels: C ≥ 2. Inputs have shape ``(..., C, H, W)``.
    :param nn.Module network: maps ``(B, ⌊C/2⌋, H, W)`` to ``(B, 2 ⌈C/2⌉, H, W)``, t before r.
    :param float max_scale: M > 1.
    :raises ValueError: for options outside these ranges, for inputs of other shapes or dtypes, and
        for a network that returns another shape.

    References:

    Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using Real NVP. ICLR 2017.
    [arXiv:1605.08803]

    Diederik P. Kingma, Prafulla Dhariwal. Glow: Generative Flow with Invertible 1×1 Convolutions.
    NeurIPS 2018. [arXiv:1807.03039] (Its scale is :math:`\mathrm{sigmoid}(r + 2)`, which is 0.88 at
    the start, and has no lower bound but 0.)
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)

    def __init__(self, num_channels: int, network: nn.Module, *, max_scale: float = 2.0) -> None:
        super().__init__()
        self.num_channels = as_count("num_channels", num_channels, 2)
        expect("network, a module", isinstance(network, nn.Module), network)
        self.network = network
        self.max_scale = as_number("max_scale > 1", max_scale, _can_bound)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, max_scale={self.max_scale}"

    def _call(self, x: Tensor) -> Tensor:
        return self._call_with_memo(x)[0]

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, TensorMemo]:
        first, second, shift, log_scale = self._split(x)
        y = torch.cat([first, second * log_scale.exp() + shift], dim=-3)
        return y, TensorMemo(log_scale)

    def _inverse(self, y: Tensor) -> Tensor:
        first, second, shift, log_scale = self._split(y)
        return torch.cat([first, (second - shift) * torch.exp(-log_scale)], dim=-3)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        memo = self._memo_of(x, y)
        log_scale = self._split(x)[3] if memo is None else memo.handle
        return at_least_float32(log_scale).sum((-3, -2, -1))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both halves of x, or of y; and t and s, of the second half's shape."""
        dtype = next((parameter.dtype for parameter in self.network.parameters()), None)
        check_image(self, x, self.num_channels, dtype)
        first, second = x.tensor_split([self.num_channels // 2], dim=-3)
        output = self.network(first.reshape(-1, *first.shape[-3:]))  # one batch dimension
        channels, *size = second.shape[-3:]
        expected = (x.shape[:-3].numel(), 2 * channels, *size)
        if output.shape != expected:
            raise ValueError(
                f"{self}: expected the network's output to have shape {expected}; "
                f"got {tuple(output.shape)}"
            )
        shift, log_scale = output.chunk(2, dim=-3)
        log_scale = soft_bound(log_scale, math.log(self.max_scale))
        return first, second, shift.reshape(second.shape), log_scale.reshape(second.shape)


def _can_bound(number: float) -> bool:
    return 1 < number < math.inf


def image_coupling(
    num_channels: int,
    *,
    hidden_channels: int = 512,
    max_scale: float = 2.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ImageCoupling:
    """An :class:`ImageCoupling` with Glow's :class:`CouplingNet`, which starts as the identity.

    >>> layer = image_coupling(4, hidden_channels=8)
    >>> torch.equal(layer(torch.ones(5, 4, 6, 6)), torch.ones(5, 4, 6, 6))
    True

    :param int num_channels: C ≥ 2.
    :param int hidden_channels: the network's width.
    :param float max_scale: M > 1, of the scale.
    :param device: of the parameters.
    :param dtype: of the parameters.
    """
    num_channels = as_count("num_channels", num_channels, 2)
    half = num_channels // 2
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    network = CouplingNet(
        half, 2 * (num_channels - half), hidden_channels=hidden_channels, **factory
    )
    return ImageCoupling(num_channels, network, max_scale=max_scale)

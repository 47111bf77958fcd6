"""Ready-made flows, from data to a flat latent.

:func:`tabular` is for the rows of a table; the others are the stacks of Keller et al. (2021) for
images. Each returns a bijection from an event, such as an image ``(C, H, W)``, to a vector of its D
numbers. Its inverse makes a density model, with any base of vectors:

>>> flow = convolutional((1, 8, 8), num_blocks=2)
>>> base = dist.Normal(torch.tensor(0.0), 1.0).expand([64]).to_event(1)
>>> density = dist.TransformedDistribution(base, [flow.inv])
>>> density.log_prob(torch.randn(5, 1, 8, 8)).shape
torch.Size([5])
>>> density.sample((3,)).shape
torch.Size([3, 1, 8, 8])

What makes pixels into unbounded numbers is :class:`pyro_snf.images.LogitTransform`.

T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max Welling.
Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import ReshapeTransform

from pyro_snf.log_dets import Learned
from pyro_snf.options import as_count, as_event_shape, as_image_shape, check_factory, expect
from pyro_snf.transforms.activations import (
    RationalQuadraticSpline,
    SmoothLeakyReLU,
)
from pyro_snf.transforms.actnorm import ActNorm
from pyro_snf.transforms.base import check_input
from pyro_snf.transforms.compose import Compose, ConditionalCompose
from pyro_snf.transforms.convolution import SelfNormalizingConv2d
from pyro_snf.transforms.gaussian_copula import GaussianCopula
from pyro_snf.transforms.image_coupling import image_coupling
from pyro_snf.transforms.linear import SelfNormalizingLinear
from pyro_snf.transforms.multiscale import MultiScale
from pyro_snf.transforms.spline_autoregressive import (
    ConditionalSplineAutoregressive,
    SplineAutoregressive,
)
from pyro_snf.transforms.squeeze import Squeeze2d

__all__ = ["convolutional", "fully_connected", "glow", "tabular"]

ACTIVATIONS = ("smooth_leaky_relu", "spline")

# Up to here, an exact log-determinant of a dense layer costs less than an estimate.
_EXACT_DIM = 64

# What the copula has to gain, in nats, to subtract from a column the ones before it. That turns an
# axis, and bounds, zeros and rounded numbers are not along one any more: ten tables whose columns
# gain less are all as good without it or better, by up to 2.2 nats. But a column that is nearly a
# copy of another is narrower than a bin of a spline. And of tables that gain more on average, two
# of 36 and 40 columns are better off with all of it, by 0.6 nats each.
_MIN_GAIN = 1.0

Activation = str | Callable[[torch.Size], Transform]


def fully_connected(
    event_shape: int | Sequence[int],
    *,
    num_layers: int = 2,
    activation: Activation = "smooth_leaky_relu",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Compose:
    """Dense layers, :class:`~pyro_snf.SelfNormalizingLinear`, with an activation between any two.

    The paper's: ``fully_connected((1, 28, 28))``. The layers start as the identity.

    >>> flow = fully_connected((1, 4, 4), log_det=Learned(reconstruction_weight=2.0))
    >>> flow(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 16])

    :param event_shape: of the data: an image's ``(C, H, W)``, or any other; D for vectors.
    :param int num_layers: of dense layers, at least 1.
    :param activation: ``"smooth_leaky_relu"``, with the slope 0.3; ``"spline"``, a
        :class:`~pyro_snf.RationalQuadraticSpline` with 5 bins on [−10, 10]; or a function that
        makes the activation for events of a given shape.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param options: of the dense layers, such as ``log_det``, of which each layer takes a copy.
    :raises ValueError: for options that are not of these.
    """
    shape = as_event_shape(event_shape)
    num_layers = as_count("num_layers", num_layers)
    _check_activation(activation)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    flat = torch.Size([shape.numel()])
    parts: list[Transform] = [] if shape == flat else [_Flatten(shape)]
    for index in range(num_layers):
        if index > 0:
            parts.append(_make_activation(activation, flat, **factory))
        parts.append(SelfNormalizingLinear(flat[0], **options, **factory))
    return Compose(parts)


def convolutional(
    event_shape: Sequence[int],
    *,
    num_blocks: int = 3,
    layers_per_block: int = 3,
    kernel_size: int | tuple[int, int] = 3,
    activation: Activation = "smooth_leaky_relu",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Compose:
    """Convolutions, :class:`~pyro_snf.SelfNormalizingConv2d`, in blocks, with an activation after
    all but the last, and a :class:`~pyro_snf.Squeeze2d` between blocks.

    The paper's: ``convolutional((1, 28, 28), activation="spline")``, three layers each at 1×28×28,
    4×14×14 and 16×7×7. The layers start as the identity, from which training leads away: no
    gradient vanishes there.

    >>> flow = convolutional((2, 4, 4), num_blocks=2, layers_per_block=1, kernel_size=1)
    >>> [type(part).__name__ for part in flow.parts[:-1]]
    ['SelfNormalizingConv2d', 'SmoothLeakyReLU', 'Squeeze2d', 'SelfNormalizingConv2d']

    :param event_shape: an image's ``(C, H, W)``; 2 divides H and W once for each block but one.
    :param int num_blocks: of blocks, at least 1.
    :param int layers_per_block: of convolutions in each, at least 1.
    :param kernel_size: odd, ``k`` or ``(k_h, k_w)``, no larger than the images of the last block.
    :param activation: as for :func:`fully_connected`.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param options: of the convolutions; see :func:`fully_connected`.
    :raises ValueError: for options that are not of these, and for images that do not fit.
    """
    shape = as_image_shape(event_shape)
    num_blocks = as_count("num_blocks", num_blocks)
    layers_per_block = as_count("layers_per_block", layers_per_block)
    _check_activation(activation)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    parts: list[Transform] = []
    for index in range(num_blocks):
        place = f"block {index + 1} of {num_blocks}"
        if index > 0:
            parts += [_make_activation(activation, shape, **factory), Squeeze2d()]
            shape = _squeezed(shape, place)
        for _ in range(layers_per_block):
            layer = SelfNormalizingConv2d(shape[0], kernel_size, **options, **factory)
            _check_size(layer, shape, place)
            if parts and not isinstance(parts[-1], Squeeze2d):
                parts.append(_make_activation(activation, shape, **factory))
            parts.append(layer)
    return Compose([*parts, _Flatten(shape)])


def glow(
    event_shape: Sequence[int],
    *,
    num_levels: int = 2,
    num_steps: int = 16,
    hidden_channels: int = 512,
    kernel_size: int | tuple[int, int] = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MultiScale:
    """Glow (Kingma and Dhariwal, 2018): levels of a :class:`~pyro_snf.Squeeze2d` and steps of
    :class:`~pyro_snf.ActNorm`, a :class:`~pyro_snf.SelfNormalizingConv2d` and an affine
    :func:`~pyro_snf.image_coupling`. Each level but the last is done with half of its channels.

    The paper's: ``glow((1, 28, 28))``. The convolutions are 1 × 1, as Glow's are, or larger. They
    start as random rotations of the channels, so that each coupling sees and changes other mixtures
    of them. (Couplings always change the second half of the channels: with identities to start
    from, the first half would not be changed before training has mixed them.) The rotations and the
    couplings' hidden layers are of torch's global random stream. ActNorm starts from the first
    batch in training. Adam at 1e-3 and 3e-3 needs no warm-up: the couplings' scales are bounded,
    and the last layers of their networks are scaled by their widths.

    >>> flow = glow((1, 8, 8), num_steps=2, hidden_channels=16)
    >>> flow.latent_shapes
    [torch.Size([2, 4, 4]), torch.Size([8, 2, 2])]

    :param event_shape: an image's ``(C, H, W)``; 2 divides H and W once for each level.
    :param int num_levels: of levels, at least 1.
    :param int num_steps: of a level, at least 1.
    :param int hidden_channels: the width of the couplings' networks.
    :param kernel_size: of the convolutions, odd, ``k`` or ``(k_h, k_w)``.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param options: of the convolutions; see :func:`fully_connected`.
    :raises ValueError: for options that are not of these, and for images that do not fit.

    References:

    Diederik P. Kingma, Prafulla Dhariwal. Glow: Generative Flow with Invertible 1×1 Convolutions.
    NeurIPS 2018. [arXiv:1807.03039]
    """
    shape = as_image_shape(event_shape)
    num_levels = as_count("num_levels", num_levels)
    num_steps = as_count("num_steps", num_steps)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    levels = []
    for index in range(num_levels):
        shape = _squeezed(shape, f"level {index + 1} of {num_levels}")
        channels, *size = shape
        parts: list[Transform] = [Squeeze2d()]
        for _ in range(num_steps):
            mixing = SelfNormalizingConv2d(channels, kernel_size, **options, **factory)
            _check_size(mixing, shape, f"level {index + 1} of {num_levels}")
            _rotate(mixing)
            coupling = image_coupling(channels, hidden_channels=hidden_channels, **factory)
            parts += [ActNorm(channels, **factory), mixing, coupling]
        levels.append(Compose(parts))
        shape = torch.Size([channels // 2, *size])
    return MultiScale(levels, event_shape)


def tabular(
    input_dim: int,
    *,
    num_layers: int = 2,
    hidden_dim: int = 128,
    num_bins: int = 8,
    context_dim: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Compose | ConditionalCompose:
    """A :class:`~pyro_snf.GaussianCopula`, and then layers of a
    :class:`~pyro_snf.SplineAutoregressive` and a dense :class:`~pyro_snf.SelfNormalizingLinear`:
    what to start from for tables of 5 to 100 columns.

    Columns may be in any units. The first batch in training initializes the copula; better,
    ``flow.initialize(data)`` does with all of the data, which :func:`~pyro_snf.fit_density` calls.
    The copula subtracts from a column what is a linear function of the columns before it where that
    makes it, or all columns on average, narrower by a factor of e or more; others stay as they are,
    for bounds and gaps of a column are easiest to fit along its axis. The dense layers after the
    splines start by reversing the order of the features, so that the splines of each feature see
    the features before it, and then those after it.

    >>> flow = tabular(3, hidden_dim=16)
    >>> flow(torch.randn(50, 3)).shape
    torch.Size([50, 3])

    With a context, of which the splines are functions:

    >>> flow = tabular(3, hidden_dim=16, context_dim=2)
    >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> density = dist.ConditionalTransformedDistribution(base, [flow.inv])
    >>> density.condition(torch.randn(50, 2)).log_prob(torch.randn(50, 3)).shape
    torch.Size([50])

    :param int input_dim: D, the number of columns.
    :param int num_layers: of pairs of splines and a dense layer, at least 1.
    :param int hidden_dim: the width of the networks that choose the splines.
    :param int num_bins: of these splines.
    :param int context_dim: the number of features of a context; 0 for none.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param options: of the dense layers; see :func:`fully_connected`. By default
        ``log_det="exact"`` for D up to 64.
    :raises ValueError: for options that are not of these.
    """
    input_dim = as_count("input_dim", input_dim)
    num_layers = as_count("num_layers", num_layers)
    context_dim = as_count("context_dim", context_dim, 0)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    if input_dim <= _EXACT_DIM:
        options = {"log_det": "exact", **options}
    parts: list[Any] = [GaussianCopula(input_dim, min_gain=_MIN_GAIN, **options, **factory)]
    for _ in range(num_layers):
        sizes: dict[str, Any] = {"hidden_dim": hidden_dim, "num_bins": num_bins, **factory}
        parts.append(
            ConditionalSplineAutoregressive(input_dim, context_dim, **sizes)
            if context_dim
            else SplineAutoregressive(input_dim, **sizes)
        )
        mixing = SelfNormalizingLinear(input_dim, **options, **factory)
        if not mixing.theta.is_meta:  # which has no values: they come with a state_dict
            mixing.set_weight(torch.eye(input_dim).flip(0))
        parts.append(mixing)
    return ConditionalCompose(parts) if context_dim else Compose(parts)


class _Flatten(ReshapeTransform):
    """Events as vectors. Torch's own takes events of any shape with as many entries."""

    def __init__(self, event_shape: torch.Size, cache_size: int = 0) -> None:
        super().__init__(event_shape, torch.Size([event_shape.numel()]), cache_size)

    def __repr__(self) -> str:
        return f"Flatten({tuple(self.in_shape)})"

    def _call(self, x: Tensor) -> Tensor:
        check_input(self, x, self.in_shape)
        return super()._call(x)

    def _inverse(self, y: Tensor) -> Tensor:
        check_input(self, y, self.out_shape)
        return super()._inverse(y)

    def with_cache(self, cache_size: int = 1) -> _Flatten:
        return self if cache_size == self._cache_size else _Flatten(self.in_shape, cache_size)


def _check_activation(activation: object) -> None:
    expected = f"activation to be one of {ACTIVATIONS}, or a function"
    if not (isinstance(activation, str) and activation in ACTIVATIONS):
        check_factory(expected, activation)


def _make_activation(
    activation: Activation,
    event_shape: torch.Size,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Transform:
    if callable(activation):
        made = activation(event_shape)
        expect("activation(event_shape), a transform", isinstance(made, Transform), made)
        return made.to(device, dtype) if isinstance(made, nn.Module) else made
    if activation == "spline":
        return RationalQuadraticSpline(event_shape, device=device, dtype=dtype)
    return SmoothLeakyReLU(0.3, device=device, dtype=dtype)


def _check_size(layer: SelfNormalizingConv2d, shape: torch.Size, place: str) -> None:
    if shape[1] < layer.kernel_size[0] or shape[2] < layer.kernel_size[1]:
        raise ValueError(
            f"{place}: expected images no smaller than kernels of {layer.kernel_size}; "
            f"got {tuple(shape)}"
        )


@torch.no_grad()
def _rotate(layer: SelfNormalizingConv2d) -> None:
    """Make a convolution start as a random rotation of the channels, and know its inverse."""
    if layer.theta.is_meta:  # which has no values: they come with a state_dict
        return
    matrix = nn.init.orthogonal_(torch.empty(layer.channels, layer.channels, dtype=torch.float64))
    linear_map = layer.log_det.linear_map
    layer.theta.copy_(linear_map.theta_of(_as_kernel(matrix, layer.theta.shape)))
    if isinstance(layer.log_det, Learned):
        inverse = layer.log_det.theta
        inverse.copy_(linear_map.theta_of(_as_kernel(matrix.mT, inverse.shape)))
    layer.refactorize()


def _as_kernel(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The kernel that multiplies each pixel by a matrix."""
    kernel = matrix.new_zeros(shape)
    kernel[:, :, shape[2] // 2, shape[3] // 2] = matrix
    return kernel


def _squeezed(shape: torch.Size, place: str) -> torch.Size:
    try:
        return Squeeze2d().forward_shape(shape)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error

"""The rivals of the paper's table: layers that are constrained, or costly, for the log-determinant.

Reference implementations, to be compared with in the same flow and the same training:

=================  ===========================================  ================================
``kind``           in the place of                              by
=================  ===========================================  ================================
``"relative"``     :class:`~pyro_snf.SelfNormalizingLinear`     :class:`RelativeGradientLinear`
``"emerging"``     :class:`~pyro_snf.SelfNormalizingConv2d`     :class:`EmergingConv2d`
``"exponential"``  :class:`~pyro_snf.SelfNormalizingConv2d`     :class:`ConvolutionExponential`
``"slogdet"``      either, with another method                  :class:`SlogDet`
=================  ===========================================  ================================

:func:`replace_layers` makes one flow of another. Each class says how it differs from the code of
its authors, and from the version of it that Keller et al. (2021) compared with.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import Transform, constraints
from torch.nn import functional as F

from pyro_snf import (
    Compose,
    LogDetMethod,
    MultiScale,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
)
from pyro_snf.caching import TensorMemo, TensorState, fixed_directions
from pyro_snf.maps import kernels
from pyro_snf.options import as_count, as_odd_size, check_choice, check_device, check_dtype, expect
from pyro_snf.surrogate import with_gradient
from pyro_snf.transforms.base import InvertibleTransformModule, check_image, check_input
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform

__all__ = [
    "KINDS",
    "ConvolutionExponential",
    "EmergingConv2d",
    "RelativeGradientLinear",
    "SlogDet",
    "replace_layers",
]

# Of the kernels that an emerging convolution starts from (Hoogeboom et al., 2019, their code).
_INITIAL_NOISE = 0.02

# Of a convolution exponential, in their code and that of Keller et al. (2021): the largest spectral
# norm, and the terms of the series in training. With them it is cut off at 0.9⁷/7! ≈ 1e-4, and
# outside training at 0.9¹⁴/14! ≈ 3e-12.
_MAX_NORM = 0.9
_NUM_TERMS = 6
_NUM_TERMS_EXACT = 2 * _NUM_TERMS + 1


class RelativeGradientLinear(InvertibleTransformModule):
    r"""A dense layer ``T(x) = W x + b`` trained by relative gradients (Gresele et al., 2020).

    In the place of the gradient G of a loss in W, the backward pass gives

    .. math::
        G\,W^\top W, \qquad \text{of the data} \quad \delta\,(T(x) - b)^\top W, \qquad
        \text{of} \ \log|\det W| \quad W,

    where δ is the gradient in T(x). No matrix is inverted, and no two D × D matrices are
    multiplied: it costs O(BD²) for a batch of B. The gradients in x and b are the true ones.

    *In training*, that is in ``train()`` mode with gradients recorded and a W that requires them,
    the value of ``log|det W|`` is the constant 0, which only carries its gradient. Otherwise value
    and gradients are exact and true, in O(D³). ``T.inv(y)`` solves in O(D³); its gradients are
    always the true ones, so it is T that the data have to pass through.

    In their code the product with WᵀW is on the same side. But there b is one more column of W: its
    own relative gradient is a multiple of b, so 0 at b = 0, and that of the data has T(x) in the
    place of T(x) − b.

    >>> layer = RelativeGradientLinear(3)
    >>> layer(torch.zeros(5, 3)).shape
    torch.Size([5, 3])

    :param int input_dim: D. Inputs have shape ``(..., D)``. The layer starts as the identity.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these, and for other inputs.

    References:

    Luigi Gresele, Giancarlo Fissore, Adrián Javaloy, Bernhard Schölkopf, Aapo Hyvärinen. Relative
    gradient optimization of the Jacobian term in unsupervised deep learning. NeurIPS 2020.
    [arXiv:2006.15090]
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        input_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = as_count("input_dim", input_dim)
        check_device(device)
        check_dtype(dtype)
        self.weight = nn.Parameter(torch.eye(self.input_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.input_dim, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.input_dim}"

    def _call(self, x: Tensor) -> Tensor:
        check_input(self, x, (self.input_dim,), self.weight.dtype)
        if not self._is_training():
            return F.linear(x, self.weight, self.bias)
        return _RelativeProduct.apply(x, self.weight) + self.bias

    def _inverse(self, y: Tensor) -> Tensor:
        check_input(self, y, (self.input_dim,), self.weight.dtype)
        h = (y - self.bias).reshape(-1, self.input_dim)
        return torch.linalg.solve(self.weight, h.mT).mT.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._is_training():
            nothing = self.weight.new_zeros(())
            value = with_gradient(nothing, self.weight, self.weight.detach())
        else:
            value = torch.linalg.slogdet(self.weight).logabsdet
        return value.expand(x.shape[:-1])

    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.weight.requires_grad


class _RelativeProduct(Function):
    """``W x`` for rows x, with the relative gradient in W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        h = x @ weight.mT
        ctx.save_for_backward(h, weight)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h, weight = ctx.saved_tensors
        of_x, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_x = cotangent @ weight
        if ctx.needs_input_grad[1]:
            # (δᵀ x) WᵀW = δᵀ ((x Wᵀ) W), in this order, in which no product costs O(D³).
            size = (-1, len(weight))
            of_weight = cotangent.reshape(size).mT @ (h.reshape(size) @ weight)
        return of_x, of_weight


class _ConvolutionRival(InvertibleTransformModule):
    """A convolution of images of C channels, with zeros beyond the edges, of "same" size.

    Subclasses define their kernels, by ``_make_kernels`` and ``reset_parameters``, ``_call``,
    ``_inverse`` and ``log_abs_det_jacobian``.
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = as_count("channels", channels)
        self.kernel_size = as_odd_size("kernel_size", kernel_size)
        check_device(device)
        check_dtype(dtype)
        self.bias = nn.Parameter(torch.zeros(self.channels, device=device, dtype=dtype))
        self._make_kernels(device=device, dtype=dtype)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"

    def _as_images(self, x: Tensor) -> Tensor:
        """Check an input of shape ``(..., C, H, W)`` and flatten it to ``(B, C, H, W)``."""
        check_image(self, x, self.channels, self.bias.dtype)
        return x.reshape(-1, *x.shape[-3:])

    def _per_image(self, log_det_of_pixel: Tensor, x: Tensor) -> Tensor:
        """The log-determinant of every image, from that of a pixel."""
        return (x.shape[-2] * x.shape[-1] * log_det_of_pixel).expand(x.shape[:-3])


class EmergingConv2d(_ConvolutionRival):
    r"""Two autoregressive convolutions of opposite order (Hoogeboom et al., 2019):

    .. math::
        T(x) = \Pi\, A_2\, \Pi\, A_1\, x + b, \qquad
        \log|\det J| = HW \sum_c \log|a_{1,cc}| + \log|a_{2,cc}|,

    where Π reverses rows, columns and channels. A pixel of :math:`A_i x` is a function of the
    pixels of x that lie neither below nor to the right of it, and its channels c, of the same
    pixel's channels up to c, by :math:`a_{i,cc}`. So each has a triangular matrix, and the kernel
    that emerges from both is of the full ``kernel_size``.

    Value, log-determinant and gradients are exact. ``T.inv(y)`` is exact after H + W − 1 steps of
    an iteration each, which computes what a forward substitution does, for all pixels of a diagonal
    at once; its gradients are exact as well.

    As in their code, the kernels start at the identity and noise of 0.02, only one b is there, and
    the diagonals are free, so they can vanish in principle. The 1 × 1 convolution that comes first
    there, and in Keller et al. (2021), is what :func:`replace_layers` puts before it. The latter
    differ: they do not reverse the channels, so that within a pixel only the 1 × 1 convolution
    leads from later channels to earlier ones, each of the two has a b, and they start from more
    noise, of 1/(2C).

    >>> layer = EmergingConv2d(2, kernel_size=3)
    >>> layer(torch.zeros(5, 2, 8, 8)).shape
    torch.Size([5, 2, 8, 8])

    :param int channels: C. Inputs have shape ``(..., C, H, W)``.
    :param kernel_size: odd, ``k`` or ``(k_h, k_w)``: that of the emerging kernel. Those of the two
        convolutions have half of it and the centre.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these, and for other inputs.

    References:

    Emiel Hoogeboom, Rianne van den Berg, Max Welling. Emerging Convolutions for Generative
    Normalizing Flows. ICML 2019. [arXiv:1901.11137]
    """

    def _make_kernels(self, **factory: Any) -> None:
        size = [length // 2 + 1 for length in self.kernel_size]
        shape = (self.channels, self.channels, *size)
        mask = torch.ones(shape, **factory)
        mask[:, :, -1, -1].tril_()
        self.register_buffer("mask", mask, persistent=False)
        self.first, self.second = (nn.Parameter(torch.empty_like(mask)) for _ in range(2))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity and noise."""
        for kernel in (self.first, self.second):
            nn.init.normal_(kernel, std=_INITIAL_NOISE)
            kernel[:, :, -1, -1].diagonal().add_(1.0)
        self.bias.zero_()

    def _call(self, x: Tensor) -> Tensor:
        first, second = self._kernels()
        h = _convolve_before(self._as_images(x), first)
        h = _convolve_after(h, second)
        return (h + self.bias.view(-1, 1, 1)).reshape(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        first, second = self._kernels()
        h = self._as_images(y) - self.bias.view(-1, 1, 1)
        h = _substitute(h.flip(1, 2, 3), second).flip(1, 2, 3)
        return _substitute(h, first).reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        diagonals = [kernel[:, :, -1, -1].diagonal() for kernel in (self.first, self.second)]
        return self._per_image(torch.cat(diagonals).abs().log().sum(), x)

    def _kernels(self) -> tuple[Tensor, Tensor]:
        return self.first * self.mask, self.second * self.mask


def _convolve_before(images: Tensor, kernel: Tensor) -> Tensor:
    """The convolution whose kernel ends at its pixel, and reaches up and to the left."""
    height, width = kernel.shape[-2:]
    return F.conv2d(F.pad(images, (width - 1, 0, height - 1, 0)), kernel)


def _convolve_after(images: Tensor, kernel: Tensor) -> Tensor:
    """The same with the order of rows, columns and channels reversed."""
    height, width = kernel.shape[-2:]
    return F.conv2d(F.pad(images, (0, width - 1, 0, height - 1)), kernel.flip(0, 1, 2, 3))


def _substitute(images: Tensor, kernel: Tensor) -> Tensor:
    """The x of ``_convolve_before(x, kernel) = images``.

    With B, the lower triangular matrix of a pixel, and N, the rest of the kernel, iterates

        x ← B⁻¹ images − B⁻¹ N x.

    N has only pixels above and to the left, so a pixel in row i and column j is right, for good,
    after i + j + 1 steps: it was computed from pixels that were right.
    """
    size = kernel.shape[1:]
    taps = kernel.flatten(2)
    pixel, rest = taps[..., -1], torch.cat([taps[..., :-1], torch.zeros_like(taps[..., :1])], -1)
    rest = torch.linalg.solve_triangular(pixel, rest.flatten(1), upper=False).view(-1, *size)
    start = torch.linalg.solve_triangular(pixel, images.flatten(2), upper=False).reshape(
        images.shape
    )
    x = start
    for _ in range(images.shape[-2] + images.shape[-1] - 2):
        x = start - _convolve_before(x, rest)
    return x


class ConvolutionExponential(_ConvolutionRival):
    r"""The exponential of a convolution K (Hoogeboom et al., 2020):

    .. math::
        T(x) = e^K x + b, \qquad e^K x = \sum_{i=0}^{n} \frac{K^i x}{i!}, \qquad
        \log|\det J| = \operatorname{tr} K = HW \sum_c k_{cc},

    :math:`k_{cc}` being the centre of the kernel, whose spectral norm is kept at 0.9 at most: it is
    divided by ``max(1, ‖K‖₂ / 0.9)``, the norm being that of the images in training, by one step of
    a power iteration at every call in training.

    The log-determinant is that of the whole series. The series ends after n = 6 terms in training,
    at an error of about 1e-4, and else, and for ``T.inv(y) = e^{−K}(y − b)``, after 13, at one of
    about 1e-12. All gradients are exact ones of the series and the trace, for which the vector of
    the power iteration is a constant.

    These numbers are those of their code and of Keller et al. (2021). There, too, the norm is known
    only as well as the power iteration knows it, from below. They put a 1 × 1 convolution before
    it, which :func:`replace_layers` does here, and a bias for every pixel before and after both, in
    the place of which there is a b for every channel here.

    >>> layer = ConvolutionExponential(2, kernel_size=3)
    >>> layer(torch.zeros(5, 2, 8, 8)).shape
    torch.Size([5, 2, 8, 8])

    :param int channels: C. Inputs have shape ``(..., C, H, W)``.
    :param kernel_size: odd, ``k`` or ``(k_h, k_w)``, of K. The map reaches n times as far.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these, and for other inputs.

    References:

    Emiel Hoogeboom, Victor Garcia Satorras, Jakub M. Tomczak, Max Welling. The Convolution
    Exponential and Generalized Sylvester Flows. NeurIPS 2020. [arXiv:2006.01910]
    """

    #: Of the power iteration: a unit vector, of the shape of the latest images in training.
    direction: Tensor

    def _make_kernels(self, **factory: Any) -> None:
        shape = (self.channels, self.channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        # Of no images yet. Like all else that T depends on, it is saved.
        self.register_buffer("direction", torch.empty(0, **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Near the identity, as in their code: K's spectral norm is about 2/√(C k_h k_w)."""
        nn.init.normal_(self.weight, std=1 / self.weight[0].numel())
        self.bias.zero_()
        self.direction = self.direction.new_empty(0)

    def _call(self, x: Tensor) -> Tensor:
        return self._call_with_memo(x)[0]

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, TensorMemo]:
        images = self._as_images(x)
        in_training = self.training and torch.is_grad_enabled()
        if in_training:
            self._iterate(images.shape[1:])
        kernel = self._kernel(images.shape[1:])
        num_terms = _NUM_TERMS if in_training else _NUM_TERMS_EXACT
        y = _exponential(images, kernel, num_terms) + self.bias.view(-1, 1, 1)
        # The next call has another direction, and so another kernel.
        return y.reshape(x.shape), TensorMemo(kernel)

    def _inverse(self, y: Tensor) -> Tensor:
        images = self._as_images(y)
        h = images - self.bias.view(-1, 1, 1)
        return _exponential(h, -self._kernel(images.shape[1:]), _NUM_TERMS_EXACT).reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        memo = self._memo_of(x, y)
        kernel = self._kernel(x.shape[-3:]) if memo is None else memo.handle
        height, width = self.kernel_size
        return self._per_image(kernel[:, :, height // 2, width // 2].trace(), x)

    def _kernel(self, event_shape: torch.Size) -> Tensor:
        """The kernel of K, whose spectral norm is at most 0.9."""
        direction = self._direction(event_shape) if self.direction.numel() == 0 else self.direction
        # The derivative of a singular value is that of ‖K v‖ for its vector v.
        image = kernels.convolve(direction.unsqueeze(0), self.weight, "zeros")
        norm = torch.linalg.vector_norm(image)
        return self.weight / (norm / _MAX_NORM).clamp(min=1.0)

    @torch.no_grad()
    def _iterate(self, event_shape: torch.Size) -> None:
        """One step of the power iteration, ``v ← KᵀK v / ‖KᵀK v‖``."""
        image = self._direction(event_shape).unsqueeze(0)
        image = kernels.convolve(image, self.weight, "zeros")
        image = kernels.convolve_transposed(image, self.weight, "zeros")
        # A new tensor, as a backward pass may still want the former.
        self.direction = F.normalize(image, dim=(1, 2, 3))[0]

    def _direction(self, event_shape: torch.Size) -> Tensor:
        """The current direction, or the one to start from, for images of a shape."""
        if self.direction.shape == event_shape:
            return self.direction
        weight = self.weight
        (start,) = fixed_directions(1, event_shape.numel(), weight.dtype, weight.device)
        return F.normalize(start, dim=0).view(event_shape)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The images of the saved layer may have been of another size.
        saved = state.get(f"{prefix}direction", self.direction)
        self.direction = self.direction.new_empty(saved.shape)
        super()._load_from_state_dict(state, prefix, *arguments)


def _exponential(images: Tensor, kernel: Tensor, num_terms: int) -> Tensor:
    """``Σ Kⁱ x / i!``, i up to ``num_terms``."""
    total = term = images
    for i in range(1, num_terms + 1):
        term = kernels.convolve(term, kernel / i, "zeros")
        total = total + term
    return total


class SlogDet(LogDetMethod):
    """``torch.linalg.slogdet`` of the D × D matrix, by autograd, in O(D³) with D = C·H·W.

    What there is without this library; "exact" has the same values and gradients for less.

    >>> layer = SelfNormalizingConv2d(1, log_det=SlogDet())
    """

    training_value = "exact"

    def training_log_abs_det(self, theta: Tensor, x: Tensor, state: TensorState) -> Tensor:
        return self.linear_map.exact_log_abs_det(theta, x.shape[1:])


#: The layers in the place of which each kind comes.
KINDS: dict[str, tuple[type[SelfNormalizingTransform], ...]] = {
    "relative": (SelfNormalizingLinear,),
    "emerging": (SelfNormalizingConv2d,),
    "exponential": (SelfNormalizingConv2d,),
    "slogdet": (SelfNormalizingLinear, SelfNormalizingConv2d),
}


def replace_layers(flow: Transform, kind: str) -> Any:
    """A flow with rivals in the place of its self-normalizing layers. It shares all other parts.

    A convolution becomes a 1 × 1 one with an exact log-determinant, and after it the rival of its
    size, as in their authors' code: for several channels the rivals need it, and the scale of a
    convolution exponential is bounded. The 1 × 1 convolution starts as the centre of the kernel
    that it replaces, so that Glow keeps its rotations; the rivals start near the identity. With
    ``"slogdet"`` a layer keeps its parameters.

    >>> from pyro_snf.flows import convolutional
    >>> flow = replace_layers(convolutional((1, 4, 4), num_blocks=1), "emerging")
    >>> flow(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 16])

    :param flow: of :mod:`pyro_snf.flows`: stacks and levels of layers.
    :param str kind: one of :data:`KINDS`.
    :raises ValueError: for another kind; and for a flow with no such layers, with others that are
        self-normalizing, with convolutions of 1 × 1, which an exact method serves best, or with a
        periodic boundary.
    """
    check_choice("kind", kind, tuple(KINDS))
    names = " or ".join(one.__name__ for one in KINDS[kind])
    fits = isinstance(flow, nn.Module) and len(_layers_of(flow)) > 0
    expect(f"a flow with layers {names}, for kind {kind!r}", fits, flow)
    return _replaced(flow, kind)


def _replaced(part: Any, kind: str) -> Any:
    if isinstance(part, MultiScale):
        levels = [_replaced(level, kind) for level in part.levels]
        return MultiScale(levels, part.event_shape).train(part.training)
    if isinstance(part, Compose):
        return Compose([_replaced(one, kind) for one in part.parts]).train(part.training)
    if not isinstance(part, nn.Module) or len(_layers_of(part)) == 0:
        return part
    names = " or ".join(one.__name__ for one in KINDS[kind])
    expect(f"layers {names} in flows of kind {kind!r}", isinstance(part, KINDS[kind]), part)
    return _rival_of(part, kind).train(part.training)


def _layers_of(module: nn.Module) -> list[nn.Module]:
    return [one for one in module.modules() if isinstance(one, SelfNormalizingTransform)]


def _rival_of(layer: Any, kind: str) -> nn.Module:
    factory: dict[str, Any] = {"device": layer.theta.device, "dtype": layer.theta.dtype}
    if kind == "slogdet":
        other = copy.deepcopy(layer)
        other.log_det = SlogDet()
        other.log_det.setup(layer.log_det.linear_map, other.theta.detach())
        other.inverse = "exact"
        return other
    if kind == "relative":
        return RelativeGradientLinear(layer.input_dim, **factory)
    expected = f"convolutions larger than 1 × 1 for kind {kind!r}; log_det='exact' is for those"
    expect(expected, layer.kernel_size != (1, 1), layer)
    expected = f"padding_mode='zeros' for kind {kind!r}"
    expect(expected, layer.padding_mode == "zeros", layer.padding_mode)
    make = EmergingConv2d if kind == "emerging" else ConvolutionExponential
    return Compose([_centre_of(layer, factory), make(layer.channels, layer.kernel_size, **factory)])


@torch.no_grad()
def _centre_of(layer: SelfNormalizingConv2d, factory: dict[str, Any]) -> SelfNormalizingConv2d:
    """A 1 × 1 convolution like the centre of a layer's kernel."""
    centre = SelfNormalizingConv2d(layer.channels, 1, log_det="exact", bias=False, **factory)
    height, width = layer.kernel_size
    weight = layer.weight[:, :, height // 2, width // 2].view_as(centre.theta)
    centre.theta.copy_(centre.log_det.linear_map.theta_of(weight))
    return centre

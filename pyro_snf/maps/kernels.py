"""The convolution with a kernel as a linear map J of images: pure functions of the kernel.

A kernel ``w`` of shape ``(C, C, kh, kw)``, kh and kw odd, maps images ``x`` of shape
``(B, C, H, W)`` to images of the same shape (PyTorch's "convolution", a cross-correlation):

    (J x)[o, p] = Σ_i Σ_a w[o, i, a] x[i, p + a − c],        c = ((kh − 1)/2, (kw − 1)/2),

where p and a are pairs of indices. Beyond the edges x is zero (``padding_mode="zeros"``), or
periodic (``"circular"``).

Layers are parametrized by ``a = δ + θ/√(C kh kw)``, δ being the kernel of the identity. This is the
form of :mod:`pyro_snf.maps.dense`, with the number of inputs of one output in the place of D.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from pyro_snf.tracing import is_traced

__all__ = [
    "PADDING_MODES",
    "convolve",
    "convolve_transposed",
    "flip",
    "kernel_gradient",
    "matrix",
    "multiplicity",
    "near_identity",
    "norm_bound",
    "resize",
    "theta_scale",
]

PADDING_MODES = ("zeros", "circular")


def theta_scale(theta: Tensor) -> float:
    """``∂a/∂θ = 1/√(C kh kw)``."""
    return 1 / math.sqrt(math.prod(theta.shape[1:]))


def near_identity(theta: Tensor) -> Tensor:
    """``a = δ + θ/√(C kh kw)``, of the shape of ``theta``, ``(C, C, kh, kw)``."""
    make = _delta.__wrapped__ if is_traced() else _delta
    return theta_scale(theta) * theta + make(theta.shape, theta.dtype, theta.device)


@lru_cache(maxsize=16)
def _delta(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """δ, the kernel of the identity. Not to be written to."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        delta = torch.zeros(shape, dtype=dtype, device=device)
        delta[:, :, shape[2] // 2, shape[3] // 2] = torch.eye(
            len(delta), dtype=dtype, device=device
        )
        return delta


def _pad(images: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """The images, continued periodically beyond their edges.

    :raises ValueError: if the kernel is larger than an image, so that it would overlap itself.
    """
    if images.shape[-2] < kernel_size[0] or images.shape[-1] < kernel_size[1]:
        raise ValueError(
            f"expected images no smaller than a circular kernel of size {kernel_size}; "
            f"got {tuple(images.shape)}"
        )
    height, width = (size // 2 for size in kernel_size)
    return F.pad(images, (width, width, height, height), mode="circular")


def convolve(
    images: Tensor, kernel: Tensor, padding_mode: str, bias: Tensor | None = None
) -> Tensor:
    """``J x + b`` for every image, shape ``(B, C, H, W)``.

    :param Tensor images: x, shape ``(B, C, H, W)``.
    :param Tensor kernel: w, shape ``(C, C, kh, kw)``.
    :param bias: b, shape ``(C,)``, or None.
    """
    size = (kernel.shape[-2], kernel.shape[-1])
    if padding_mode == "circular":
        return F.conv2d(_pad(images, size), kernel, bias)
    return F.conv2d(images, kernel, bias, padding=(size[0] // 2, size[1] // 2))


def flip(kernel: Tensor) -> Tensor:
    """The kernel of ``Jᵀ``, shape ``(C, C, kh, kw)``: channels exchanged, space mirrored."""
    return kernel.transpose(0, 1).flip(-2, -1)


def convolve_transposed(images: Tensor, kernel: Tensor, padding_mode: str) -> Tensor:
    """``Jᵀ x`` for every image, shape ``(B, C, H, W)``."""
    return convolve(images, flip(kernel), padding_mode)


def kernel_gradient(
    images: Tensor, cotangents: Tensor, kernel_size: tuple[int, int], padding_mode: str
) -> Tensor:
    """``Σ_b ∂⟨v_b, J u_b⟩/∂w``, shape ``(C, C, kh, kw)``.

    ``[o, i, a] = Σ_b Σ_p v_b[o, p] u_b[i, p + a − c]``.

    :param Tensor images: u, shape ``(B, C, H, W)``.
    :param Tensor cotangents: v, of the same shape.
    """
    size = (cotangents.shape[1], images.shape[1], *kernel_size)
    if padding_mode == "circular":
        return conv2d_weight(_pad(images, kernel_size), size, cotangents)
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return conv2d_weight(images, size, cotangents, padding=padding)


@lru_cache(maxsize=64)
def multiplicity(
    kernel_size: tuple[int, int],
    image_size: tuple[int, int],
    padding_mode: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The number of entries of J that equal each entry of a kernel, for one pair of channels.

    Of shape ``(kh, kw)``. With zero padding, an offset of d rows occurs in ``H − |d|`` rows. This
    is the closed form of the paper's ``m``, the convolution of an image of ones with itself.
    """

    def count(kernel: int, image: int) -> Tensor:
        offsets = torch.arange(kernel, dtype=torch.float64) - kernel // 2
        if padding_mode == "circular":
            return torch.full_like(offsets, image)
        return (image - offsets.abs()).clamp_min(0)

    with torch.inference_mode(False):  # an inference tensor could not be used in training
        height, width = map(count, kernel_size, image_size)
        return torch.outer(height, width).to(device, dtype)


def resize(kernel: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """The kernel, cropped or padded with zeros to another odd size around its centre."""
    margins = [(new - old) // 2 for new, old in zip(kernel_size, kernel.shape[-2:], strict=True)]
    return F.pad(kernel, (margins[1], margins[1], margins[0], margins[0]))


def norm_bound(kernel: Tensor) -> Tensor:
    """An upper bound of ``‖J‖₂`` on images of any size, shape ``()``: ``(‖J‖₁ ‖J‖_∞)^½``."""
    size = kernel.abs()
    return (size.sum((0, 2, 3)).max() * size.sum((1, 2, 3)).max()).sqrt()


def matrix(kernel: Tensor, image_size: tuple[int, int], padding_mode: str) -> Tensor:
    """The matrix of J, shape ``(CHW, CHW)``, differentiable in the kernel."""
    dim = kernel.shape[0] * image_size[0] * image_size[1]
    eye = torch.eye(dim, dtype=kernel.dtype, device=kernel.device)
    images = eye.view(dim, kernel.shape[0], *image_size)
    return convolve(images, kernel, padding_mode).reshape(dim, dim).mT

"""The paper's method for a convolution: a kernel ``r`` of its inverse, trained beside ``a``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_snf.conv.kernels import (
    convolve,
    convolve_transposed,
    flip,
    kernel_gradient,
    multiplicity,
    near_identity,
    resize,
    theta_scale,
)
from pyro_snf.learned import LearnedInverse

__all__ = ["LearnedKernel"]


class LearnedKernel(LearnedInverse):
    """``r = δ + φ/√(C qh qw)``, a kernel; events are images. It starts as the identity.

    The trace of a product of two convolutions is a sum over the entries of their kernels, so

        ∂ tr(R A)/∂a = flip(r) ⊙ m,

    m counting how often an entry stands in the matrix A (Keller et al., 2021, appendix). An
    entry of ``a`` outside the window of ``r`` has no partner, and gets 0.

    :param int channels: C.
    :param kernel_size: that of ``r``, ``(qh, qw)``, both odd.
    :param str padding_mode: as in :func:`~pyro_snf.conv.kernels.convolve`.
    :param kwargs: those of :class:`~pyro_snf.learned.LearnedInverse`.
    """

    event_dim = 3

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        *,
        padding_mode: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        shape = (channels, channels, *kernel_size)
        super().__init__(torch.zeros(shape, device=device, dtype=dtype), **kwargs)
        self.padding_mode = padding_mode

    def product(self, theta: Tensor, x: Tensor) -> Tensor:
        return convolve(x, near_identity(theta), self.padding_mode)

    def product_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        return convolve_transposed(x, near_identity(theta), self.padding_mode)

    def product_gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        size = (theta.shape[-2], theta.shape[-1])
        return theta_scale(theta) * kernel_gradient(x, cotangent, size, self.padding_mode)

    def trace_gradient(self, theta: Tensor, other: Tensor, x: Tensor) -> Tensor:
        size = (theta.shape[-2], theta.shape[-1])
        image_size = (x.shape[-2], x.shape[-1])
        count = multiplicity(size, image_size, self.padding_mode, theta.dtype, theta.device)
        return resize(flip(near_identity(other)), size) * (theta_scale(theta) * count)

    def kernel(self) -> Tensor:
        """``r``, shape ``(C, C, qh, qw)``; a constant to autograd."""
        return near_identity(self.theta.detach())

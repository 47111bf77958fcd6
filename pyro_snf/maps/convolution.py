"""The "same" convolution of images as a linear map."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_snf.maps import kernels
from pyro_snf.maps.base import ControlVariate, LinearMap
from pyro_snf.maps.convolution_factors import (
    ConvolutionFactors,
    factorization_flops,
    num_factor_entries,
)
from pyro_snf.maps.convolution_solve import iterative_solver, one_pass_kernel
from pyro_snf.precision import at_least_float32
from pyro_snf.surrogate import Solver

__all__ = ["Convolution"]

# Above this number of operations, which is some seconds on a CPU and gigabytes of memory, A is
# factorized only where an iterative solution fails.
_MAX_FLOPS = 3e11

# The cost of a factorization in training, in products with the probes. One is made every ten or
# twenty steps.
_MAX_COST_IN_PRODUCTS = 400.0

Size = tuple[int, int]


class Convolution(LinearMap):
    """The convolution with the kernel ``a = δ + θ/√(C kh kw)``.

    θ has shape ``(C, C, kh, kw)``, events shape ``(C, H, W)``; see :mod:`pyro_snf.maps.kernels`.

    :param str padding_mode: ``"zeros"`` or ``"circular"``.
    :param inverse_kernel_size: ``(qh, qw)``, both odd, of approximate inverses. With None, a
        parameter of one has the shape of θ, and :meth:`inverse_weight` is 7 × 7 or, if larger, of
        the kernel's size.
    """

    event_dim = 3

    def __init__(self, padding_mode: str, inverse_kernel_size: Size | None = None) -> None:
        self.padding_mode = padding_mode
        self.inverse_kernel_size = inverse_kernel_size

    def weight(self, theta: Tensor) -> Tensor:
        return kernels.near_identity(theta)

    def theta_scale(self, theta: Tensor) -> float:
        return kernels.theta_scale(theta)

    def multiply(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.apply_weight(self.weight(theta), x)

    def multiply_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.apply_weight(self.weight(theta), x, transposed=True)

    def apply_weight(self, weight: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
        product = kernels.convolve_transposed if transposed else kernels.convolve
        return product(x, weight, self.padding_mode)

    def norm_bound(self, theta: Tensor) -> Tensor:
        return kernels.norm_bound(self.weight(theta))

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        size = self.inverse_kernel_size or _default_window(_kernel_size(theta))
        kernel = self.weight(theta.detach())
        return one_pass_kernel(kernel, size, _image_size(event_shape), self.padding_mode)

    def gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        size = _kernel_size(theta)
        gradient = kernels.kernel_gradient(x, cotangent, size, self.padding_mode)
        return self.theta_scale(theta) * gradient

    def trace_gradient(self, theta: Tensor, other: Tensor, event_shape: torch.Size) -> Tensor:
        """``flip(n) ⊙ m``, n being the kernel of N (Keller et al., 2021, appendix).

        The trace of a product of two convolutions is a sum over the entries of their kernels, each
        of which counts as often as it occurs in the matrix of A (m). The gradient of an entry of a
        outside the window of n is 0.
        """
        size = _kernel_size(theta)
        count = kernels.multiplicity(
            size, _image_size(event_shape), self.padding_mode, theta.dtype, theta.device
        )
        partner = kernels.resize(kernels.flip(self.weight(other)), size)
        return partner * (self.theta_scale(theta) * count)

    def factorize(self, theta: Tensor, event_shape: torch.Size) -> ConvolutionFactors:
        kernel = self.weight(theta.detach())
        return ConvolutionFactors(kernel, _image_size(event_shape), self.padding_mode)

    def exact_log_abs_det(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        matrix = self._matrix(theta, event_shape)
        return torch.linalg.slogdet(at_least_float32(matrix)).logabsdet

    def exact_solve(self, theta: Tensor, right_side: Tensor) -> Tensor:
        matrix = self._matrix(theta, right_side.shape[1:])
        return torch.linalg.solve(matrix, right_side.flatten(1).mT).mT.reshape(right_side.shape)

    def affine(self, theta: Tensor, log_scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        # The kernel is scaled, which is smaller than the images.
        kernel = self.scale_rows(self.weight(theta), log_scale.exp())
        return kernels.convolve(x, kernel, self.padding_mode, bias)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        size = self.inverse_kernel_size
        return shape if size is None else torch.Size([*shape[:2], *size])

    def matrix_of(self, theta: Tensor) -> Tensor | None:
        """The matrix of a 1 × 1 kernel, which acts on every pixel."""
        return theta.flatten(1) if _kernel_size(theta) == (1, 1) else None

    def control_variate(
        self, theta: Tensor, event_shape: torch.Size, num_probes: int
    ) -> ControlVariate:
        """A itself, or where its factors cost too much, the same kernel with a periodic boundary.

        In the latter case P differs from A at the edges only.
        """
        if self.padding_mode == "circular" or self.pays_in_training(theta, event_shape, num_probes):
            return super().control_variate(theta, event_shape, num_probes)
        size, image_size = _kernel_size(theta), _image_size(event_shape)
        factors = ConvolutionFactors(self.weight(theta.detach()), image_size, "circular")
        inverse = kernels.flip(factors.inverse_kernel(size))
        count = kernels.multiplicity(
            size, image_size, self.padding_mode, inverse.dtype, inverse.device
        )
        return ControlVariate(factors, inverse * count, is_exact=False)

    def pays_in_training(self, theta: Tensor, event_shape: torch.Size, num_probes: int) -> bool:
        """Whether A's factors cost little enough to be made once in several steps."""
        products = 2 * num_probes * theta.numel() * event_shape[-2] * event_shape[-1]
        return self._flops(theta, event_shape) <= _MAX_COST_IN_PRODUCTS * products

    def is_cheap_to_factorize(self, theta: Tensor, event_shape: torch.Size) -> bool:
        return self._flops(theta, event_shape) <= _MAX_FLOPS

    def num_factor_entries(self, theta: Tensor, event_shape: torch.Size) -> int:
        size, image_size = _kernel_size(theta), _image_size(event_shape)
        return num_factor_entries(size, len(theta), image_size, self.padding_mode)

    def iterative_solver(self, theta: Tensor, event_shape: torch.Size) -> Solver:
        kernel = self.weight(theta.detach())
        return iterative_solver(kernel, _image_size(event_shape), self.padding_mode)

    def _flops(self, theta: Tensor, event_shape: torch.Size) -> float:
        size, image_size = _kernel_size(theta), _image_size(event_shape)
        return factorization_flops(size, len(theta), image_size, self.padding_mode)

    def _matrix(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        return kernels.matrix(self.weight(theta), _image_size(event_shape), self.padding_mode)


def _kernel_size(theta: Tensor) -> Size:
    return (theta.shape[-2], theta.shape[-1])


def _image_size(event_shape: torch.Size) -> Size:
    return (event_shape[-2], event_shape[-1])


def _default_window(size: Size) -> Size:
    """The size of an approximate inverse kernel. That of a 1 × 1 kernel is 1 × 1 itself."""
    return size if size == (1, 1) else (max(7, size[0]), max(7, size[1]))

"""The circular convolution: products of C×C matrices, one for each frequency."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from pyro_snf.maps.kernels import flip
from pyro_snf.precision import at_least_float32

__all__ = ["Circulant", "invert"]


class Circulant:
    """The factors of one circular convolution, computed when they are first needed.

    With a periodic boundary, the Fourier transform makes J block diagonal: for each of the ``H W``
    frequencies f, a matrix of channels

        ŵ(f) = Σ_a w[:, :, a] exp(2πi ⟨f, a − c⟩),

    so ``log|det J| = Σ_f log|det ŵ(f)|``, in O(H W (C³ + C² log H W)). Frequencies f and −f have
    conjugate matrices; about half of them are needed.

    All results but those of :meth:`solve` are in float64, and differentiable in the kernel, if it
    has an autograd graph. They are not finite where J is exactly singular; callers check
    :attr:`condition`.

    :param Tensor kernel: w, shape ``(C, C, kh, kw)``.
    :param image_size: ``(H, W)``.
    """

    def __init__(self, kernel: Tensor, image_size: tuple[int, int]) -> None:
        self.kernel = kernel.double()
        self.image_size = image_size
        self._solver_type = at_least_float32(kernel).dtype.to_complex()

    @cached_property
    def _symbol(self) -> Tensor:
        """ŵ at the frequencies of ``rfft2``, shape ``(H, W // 2 + 1, C, C)``."""
        *channels, height, width = self.kernel.shape
        rows, columns = self.positions((height, width))
        images = self.kernel.new_zeros(*channels, *self.image_size)
        # Accumulated: a kernel larger than the image overlaps itself.
        images = images.index_put(
            (
                torch.arange(channels[0], device=rows.device)[:, None, None, None],
                torch.arange(channels[1], device=rows.device)[:, None, None],
                rows[:, None],
                columns,
            ),
            self.kernel,
            accumulate=True,
        )
        # PyTorch's convolution is a correlation: the conjugate.
        return torch.fft.rfft2(images).conj().permute(2, 3, 0, 1).contiguous()

    @cached_property
    def _inverse(self) -> tuple[Tensor, Tensor]:
        """``ŵ⁻¹`` and ``log|det ŵ|``."""
        return invert(self._symbol)

    @property
    def inverse_symbol(self) -> Tensor:
        """``ŵ⁻¹`` at the frequencies of ``rfft2``, shape ``(H, W // 2 + 1, C, C)``."""
        return self._inverse[0]

    @cached_property
    def weights(self) -> Tensor:
        """How often a column of these frequencies counts, shape ``(W // 2 + 1,)``.

        It stands for its mirror image too, unless that is itself.
        """
        weights = self.kernel.new_full((self.image_size[1] // 2 + 1,), 2)
        weights[:1] = 1  # a slice: a single number would be copied to a GPU, which is waited for
        if self.image_size[1] % 2 == 0:
            weights[-1:] = 1
        return weights

    @property
    def log_abs_det(self) -> Tensor:
        """``log|det J|``, shape ``()``."""
        return (self._inverse[1].sum(0) * self.weights).sum()

    @cached_property
    def _inverse_images(self) -> Tensor:
        """r with ``(J⁻¹ x)[o, p] = Σ_q r[o, i, q] x[i, p + q]``, shape ``(C, C, H, W)``."""
        spectrum = self.inverse_symbol.permute(2, 3, 0, 1).conj()
        return torch.fft.irfft2(spectrum, s=self.image_size)

    def positions(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The rows and columns of a periodic image at a kernel's offsets from its centre."""
        device = self.kernel.device
        rows, columns = (
            (torch.arange(kernel, device=device) - kernel // 2) % image
            for kernel, image in zip(size, self.image_size, strict=True)
        )
        return rows, columns

    def inverse_kernel(self, size: tuple[int, int]) -> Tensor:
        """r with ``J⁻¹ x ≈ convolve(x, r, "circular")``, shape ``(C, C, qh, qw)``.

        A window of the exact inverse, which is as large as the image. Its error is the part of the
        inverse outside of the window.

        :param size: ``(qh, qw)``, both odd, no larger than the image.
        """
        rows, columns = self.positions(size)
        return self._inverse_images[:, :, rows[:, None], columns]

    @cached_property
    def gradient(self) -> Tensor:
        """``∂ log|det J| / ∂w = Tr(J⁻¹ ∂J/∂w)``, shape ``(C, C, kh, kw)``.

        ``∂J/∂w[o, i, a]`` has H W entries of 1, at outputs and inputs that are ``a − c`` apart. All
        entries of J⁻¹ at these places are equal.
        """
        height, width = self.kernel.shape[-2:]
        return flip(self.inverse_kernel((height, width))) * math.prod(self.image_size)

    @cached_property
    @torch.no_grad()
    def condition(self) -> float:
        """An upper bound of ``‖J‖₂ ‖J⁻¹‖₂``, at most C times too large."""
        norms = [torch.linalg.matrix_norm(x).max() for x in (self._symbol, self.inverse_symbol)]
        return (norms[0] * norms[1]).item()

    @cached_property
    @torch.no_grad()
    def _solver_symbol(self) -> Tensor:
        return self.inverse_symbol.to(self._solver_type)

    @torch.no_grad()
    def solve(self, images: Tensor, transposed: bool = False) -> Tensor:
        """``J⁻¹ y`` (or ``J⁻ᵀ y``) for every image y, shape ``(B, C, H, W)``.

        In the kernel's precision, float32 at least: this often serves as a preconditioner.
        """
        inverse = self._solver_symbol.mH if transposed else self._solver_symbol
        # Contiguous: for other layouts, some releases of MKL have no transform.
        spectrum = torch.fft.rfft2(images.to(self._solver_type.to_real()).contiguous())
        if len(self.kernel) == 1:
            spectrum = spectrum * inverse[..., 0, 0]
        else:
            spectrum = (inverse @ spectrum.permute(2, 3, 1, 0)).permute(3, 2, 0, 1)
        return torch.fft.irfft2(spectrum, s=self.image_size).to(images.dtype)


def invert(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``A⁻¹`` and ``log|det A|`` of every matrix; neither is finite if A is singular.

    :param Tensor matrix: A, shape ``(*, b, b)``, real or complex.
    """
    if matrix.shape[-1] == 1:
        return matrix.reciprocal(), matrix[..., 0, 0].abs().log()
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    log_abs_det = lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return torch.linalg.lu_solve(lu, pivots, eye.expand_as(lu)), log_abs_det

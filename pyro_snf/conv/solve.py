"""Solves with a convolution without its factors, which may be too large to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_snf.conv.exact import ConvFactors, factorization_flops
from pyro_snf.conv.kernels import convolve, convolve_transposed
from pyro_snf.krylov import krylov
from pyro_snf.precision import at_least_float32, check_finite
from pyro_snf.probes import probe_generator

__all__ = ["KernelSolver", "KrylovSolver", "is_affordable", "one_pass_kernel"]

# Factors that take more operations than this (some seconds on a CPU, and as many numbers as would
# fill its memory) are made only where nothing else will do.
_MAX_FLOPS = 3e11

# Of a Krylov space before a restart. A restart at least halves the residual, or the factors take
# over.
_MAX_ITERATIONS = 20

# Entries of a one-pass kernel, for each output channel, up to which it is fitted (in less than a
# second), and equations for each of them.
_MAX_UNKNOWNS = 1024
_ROWS_PER_UNKNOWN = 16

# Numbers in the basis of a Krylov space; images are solved for in groups that fit.
_MAX_NUMBERS = 2**27


def is_affordable(
    kernel_size: tuple[int, int], channels: int, image_size: tuple[int, int], padding_mode: str
) -> bool:
    """Whether the exact factors are a matter of some seconds at most."""
    return factorization_flops(kernel_size, channels, image_size, padding_mode) <= _MAX_FLOPS


def one_pass_kernel(
    kernel: Tensor, size: tuple[int, int], image_size: tuple[int, int], padding_mode: str
) -> Tensor:
    """A kernel r with ``J⁻¹ y ≈ r ⋆ y``, shape ``(C, C, qh, qw)``.

    On a torus, a window of the exact inverse. With zeros beyond the edges, the r of least
    squares, which minimizes ``‖r ⋆ (J x) − x‖²`` over white images x: what the reconstruction
    loss of a learned kernel would lead to. For very many entries it is that of the torus too.

    :param Tensor kernel: of J, shape ``(C, C, kh, kw)``.
    :param size: ``(qh, qw)``, both odd; cut to what fits into the image.
    :param image_size: ``(H, W)``.
    :param str padding_mode: as in :func:`~pyro_snf.conv.kernels.convolve`.
    """
    # A window wider than the image would hold the same entries of a torus twice.
    height, width = (
        min(wanted, length - 1 + length % 2)
        for wanted, length in zip(size, image_size, strict=True)
    )
    kernel = at_least_float32(kernel.detach())
    channels, pixels = len(kernel), image_size[0] * image_size[1]
    count = channels * height * width  # of unknowns for each output channel
    if padding_mode == "circular" or kernel[0, 0].numel() == 1 or count > _MAX_UNKNOWNS:
        return ConvFactors(kernel, image_size, "circular").inverse_kernel((height, width))
    check_finite(kernel)
    generator = probe_generator(0, 0, kernel.device)
    shape = (-(-_ROWS_PER_UNKNOWN * count // pixels), channels, *image_size)
    images = torch.randn(shape, generator=generator, device=kernel.device, dtype=kernel.dtype)
    products = convolve(images, kernel, padding_mode)
    patches = F.unfold(products, (height, width), padding=(height // 2, width // 2))
    rows = patches.transpose(1, 2).flatten(0, 1)
    targets = images.flatten(2).transpose(1, 2).flatten(0, 1)
    solution = torch.linalg.lstsq(rows, targets).solution
    return solution.mT.reshape(channels, channels, height, width)


class KernelSolver:
    """``u = r ⋆ h``: as good as the inverse kernel is.

    :param Tensor kernel: r, shape ``(C, C, qh, qw)``.
    :param str padding_mode: as in :func:`~pyro_snf.conv.kernels.convolve`.
    """

    def __init__(self, kernel: Tensor, padding_mode: str) -> None:
        self.kernel = kernel
        self.padding_mode = padding_mode

    @torch.no_grad()
    def __call__(self, images: Tensor, transposed: bool) -> Tensor:
        """``g(h)`` (or ``gᵀ(h)``) for every image h, shape ``(B, C, H, W)``."""
        multiply = convolve_transposed if transposed else convolve
        return multiply(images, self.kernel.to(images.dtype), self.padding_mode)


class KrylovSolver:
    """``J u = h`` to rounding, by Krylov spaces preconditioned on a torus, or by factors of J.

    It keeps the kernel that it was made for: a backward pass solves with that of its forward pass.

    :param Tensor kernel: shape ``(C, C, kh, kw)``; not to be written to afterwards.
    :param image_size: ``(H, W)``.
    :param str padding_mode: as in :func:`~pyro_snf.conv.kernels.convolve`.
    """

    def __init__(self, kernel: Tensor, image_size: tuple[int, int], padding_mode: str) -> None:
        self.kernel = at_least_float32(kernel.detach())
        self.padding_mode = padding_mode
        self.torus = ConvFactors(self.kernel, image_size, "circular")
        self.factors = ConvFactors(self.kernel, image_size, padding_mode)
        # ‖J‖₂² ≤ ‖J‖₁ ‖J‖_∞, and these are sums over the kernel.
        size = self.kernel.abs()
        self.norm = (size.sum((0, 2, 3)).max() * size.sum((1, 2, 3)).max()).sqrt()

    @torch.no_grad()
    def __call__(self, images: Tensor, transposed: bool) -> Tensor:
        """The solutions with J (or ``Jᵀ``) for every image h, shape ``(B, C, H, W)``."""
        group = max(1, _MAX_NUMBERS // (2 * _MAX_ITERATIONS * images[0].numel()))
        parts = [self._solve(part, transposed) for part in images.to(self.kernel).split(group)]
        return torch.cat(parts).to(images.dtype)

    def _solve(self, images: Tensor, transposed: bool) -> Tensor:
        # An image that is not finite has no solution: it passes through, and stops no other.
        finite = torch.isfinite(images).flatten(1).all(1).view(-1, 1, 1, 1)
        images = torch.where(finite, images, 0)
        try:
            solution = self._iterate(images, transposed)
        except torch.linalg.LinAlgError:  # singular on the torus, which J need not be
            solution = None
        if solution is None:
            solution = self.factors.solve(images, transposed)
        return torch.where(finite, solution, torch.nan)

    def _iterate(self, images: Tensor, transposed: bool) -> Tensor | None:
        """The solutions by Krylov spaces; None if they do not get there."""
        multiply = convolve_transposed if transposed else convolve
        # What a backward stable solve leaves of a residual is eps ‖J‖ ‖u‖ at most.
        level = 2 * torch.finfo(images.dtype).eps * self.norm
        solution = torch.zeros_like(images)
        residual = images
        previous = math.inf
        while True:
            space = krylov(
                lambda vectors: multiply(vectors, self.kernel, self.padding_mode),
                lambda vectors: self.torus.solve(vectors, transposed),
                residual,
                tolerance=10 * torch.finfo(images.dtype).eps,
                max_iterations=_MAX_ITERATIONS,
            )
            solution = solution + space.solution
            residual = images - multiply(solution, self.kernel, self.padding_mode)
            allowed = level * torch.linalg.vector_norm(solution, dim=(1, 2, 3))
            length = torch.linalg.vector_norm(residual, dim=(1, 2, 3))
            excess = (length / allowed.clamp_min(torch.finfo(images.dtype).tiny)).max().item()
            if excess <= 1:
                return solution
            if not excess <= previous / 2:
                return None
            previous = excess

"""Inverses of a convolution without its factors: by iteration, and by one pass of a kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_snf.iteration import refine_linear_solution
from pyro_snf.krylov import krylov
from pyro_snf.maps.convolution_factors import ConvolutionFactors
from pyro_snf.maps.kernels import convolve, convolve_transposed, norm_bound
from pyro_snf.precision import at_least_float32, check_finite
from pyro_snf.probes import probe_generator
from pyro_snf.surrogate import Solver

__all__ = ["iterative_solver", "one_pass_kernel"]

# Steps of GMRES before a restart. Each restart at least halves the residual, or the factors are
# used instead.
_KRYLOV_STEPS = 20

# Entries of a one-pass kernel, for each output channel, up to which it is fitted (in less than a
# second), and equations for each of them.
_MAX_UNKNOWNS = 1024
_ROWS_PER_UNKNOWN = 16

# Numbers in the basis of a Krylov space; images are solved for in groups that fit.
_MAX_NUMBERS = 2**27


def one_pass_kernel(
    kernel: Tensor, size: tuple[int, int], image_size: tuple[int, int], padding_mode: str
) -> Tensor:
    """A kernel r with ``J⁻¹ y ≈ r ⋆ y``, shape ``(C, C, qh, qw)``.

    With a periodic boundary, a window of the exact inverse. With zeros beyond the edges, the r of
    least squares, which minimizes ``‖r ⋆ (J x) − x‖²`` over white images x, as the reconstruction
    loss of a learned kernel does. Above 1024 entries for each output channel, the window of the
    periodic inverse serves for both.

    :param Tensor kernel: of J, shape ``(C, C, kh, kw)``.
    :param size: ``(qh, qw)``, both odd; cut to what fits into the image.
    :param image_size: ``(H, W)``.
    :param str padding_mode: as in :func:`~pyro_snf.maps.kernels.convolve`.
    """
    # A window wider than the image would hold the same entries of a periodic image twice.
    height, width = (
        min(wanted, length - 1 + length % 2)
        for wanted, length in zip(size, image_size, strict=True)
    )
    kernel = at_least_float32(kernel.detach())
    channels, pixels = len(kernel), image_size[0] * image_size[1]
    count = channels * height * width  # of unknowns for each output channel
    if padding_mode == "circular" or kernel[0, 0].numel() == 1 or count > _MAX_UNKNOWNS:
        return ConvolutionFactors(kernel, image_size, "circular").inverse_kernel((height, width))
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


def iterative_solver(kernel: Tensor, image_size: tuple[int, int], padding_mode: str) -> Solver:
    """A solver of ``J u = h`` to rounding: restarted GMRES, or the factors of J where it fails.

    The preconditioner is the convolution with a periodic boundary.

    :param Tensor kernel: of J, shape ``(C, C, kh, kw)``; not to be written to afterwards.
    :param image_size: ``(H, W)``.
    :param str padding_mode: as in :func:`~pyro_snf.maps.kernels.convolve`.
    """
    kernel = at_least_float32(kernel.detach())
    preconditioner = ConvolutionFactors(kernel, image_size, "circular")
    factors = ConvolutionFactors(kernel, image_size, padding_mode)
    # A residual of ‖J‖ ‖u‖ eps is often less than rounding leaves.
    norm = 2 * norm_bound(kernel)
    dim = len(kernel) * image_size[0] * image_size[1]
    group = max(1, _MAX_NUMBERS // (2 * _KRYLOV_STEPS * dim))

    def solve_group(images: Tensor, transposed: bool) -> Tensor:
        product = convolve_transposed if transposed else convolve
        multiply = partial(product, kernel=kernel, padding_mode=padding_mode)

        def solve_approximately(images: Tensor) -> Tensor:
            return krylov(
                multiply,
                lambda images: preconditioner.solve(images, transposed),
                images,
                tolerance=10 * torch.finfo(images.dtype).eps,
                max_steps=_KRYLOV_STEPS,
            ).solution

        def solve_exactly(images: Tensor) -> Tensor:
            return factors.solve(images, transposed)

        try:
            return refine_linear_solution(
                multiply, solve_approximately, solve_exactly, images, norm=norm
            )
        except torch.linalg.LinAlgError:  # the preconditioner is singular, which J need not be
            return solve_exactly(images)

    def solve(images: Tensor, transposed: bool) -> Tensor:
        groups = images.to(kernel).split(group)
        return torch.cat([solve_group(part, transposed) for part in groups]).to(images.dtype)

    return solve

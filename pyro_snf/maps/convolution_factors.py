"""Exact log-determinants and inverses of a convolution's matrix J.

J is a D×D matrix with ``D = C H W``. It is not formed:

- ``"circular"``: one C×C matrix for each frequency (:mod:`pyro_snf.maps.circulant`),
  O(H W (C³ + C² log H W));
- ``"zeros"``: a periodic convolution of a larger image, of which J is a part
  (:mod:`pyro_snf.maps.embedded`), O((C W)³) for the shorter side W.

The latter does not pivot, and its backward error is measured. If it is too large, which it is where
the periodic convolution is singular and J is not, J is factorized as a whole with pivoting. That is
exact in all cases, and slow: ``torch.linalg`` up to ``D = 4096``, SciPy's ``splu`` on the CPU
above.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_snf.maps.base import Factors
from pyro_snf.maps.circulant import Circulant
from pyro_snf.maps.embedded import EmbeddedConvolution, embedding_entries, embedding_flops
from pyro_snf.maps.kernels import (
    convolve,
    convolve_transposed,
    kernel_gradient,
    matrix,
    norm_bound,
    resize,
)
from pyro_snf.precision import at_least_float32, check_finite, singular
from pyro_snf.surrogate import first_order_only

__all__ = ["ConvolutionFactors", "factorization_flops", "num_factor_entries"]

# The largest D for a dense factorization where the embedding fails: 128 MiB a matrix, seconds.
_MAX_DENSE = 4096

# ‖J u − h‖ / (‖J‖ ‖u‖) up to which the embedding is as good as if it pivoted: in units of
# float64's eps, and in units of the kernel's own eps, if that is more. Where the periodic
# convolution is nearly singular, the error of the gradient grows with the square of this one; these
# bounds leave some 1e-9, and 1e-7 in float32 (measured).
_BACKWARD_ERROR = 100.0
_BACKWARD_ERROR_OF_KERNEL = 2e-6

# Columns of J⁻ᵀ that are computed at a time.
_CHUNK = 256


class _Method(Protocol):
    """The interface of the algorithms that factorize J."""

    @property
    def log_abs_det(self) -> Tensor: ...

    @property
    def gradient(self) -> Tensor: ...

    def solve(self, images: Tensor, transposed: bool = False) -> Tensor: ...


class ConvolutionFactors(Factors):
    """The factors of one convolution's J.

    They are in float64 for every type of the kernel, so that the results are as accurate as the
    kernel is.

    :param Tensor kernel: w, shape ``(C, C, kh, kw)``; not to be written to afterwards.
    :param image_size: ``(H, W)``.
    :param str padding_mode: as in :func:`~pyro_snf.maps.kernels.convolve`.
    """

    def __init__(self, kernel: Tensor, image_size: tuple[int, int], padding_mode: str) -> None:
        super().__init__(kernel)
        self.image_size = image_size
        self.padding_mode = padding_mode
        self._folded_size = _folded_size((kernel.shape[-2], kernel.shape[-1]), image_size)
        self._copies = math.prod(image_size) // math.prod(self._folded_size)

    def _makers(self) -> list[Callable[[Tensor], _Method]]:
        """The ways to factorize J, in the order in which they are tried."""
        size = self._folded_size
        if self.padding_mode == "circular":
            return [partial(Circulant, image_size=size)]
        pivoted = _Dense if len(self.weight) * math.prod(size) <= _MAX_DENSE else _Sparse
        return [partial(EmbeddedConvolution, image_size=size), partial(pivoted, image_size=size)]

    @cached_property
    @torch.no_grad()
    def _made(self) -> tuple[Callable[[Tensor], _Method], _Method, float]:
        """The constructor of the factors, the factors, and the condition number."""
        kernel = at_least_float32(self.weight)
        eps = torch.finfo(kernel.dtype).eps
        allowed = max(
            _BACKWARD_ERROR * torch.finfo(torch.float64).eps, _BACKWARD_ERROR_OF_KERNEL * eps
        )
        for make in self._makers():
            method = make(kernel)
            error, condition = 0.0, math.nan
            if isinstance(method, Circulant):
                condition = method.condition
            else:
                error, condition = _examine(method, kernel.double(), self._folded_size)
            if error <= allowed:
                break
            check_finite(kernel)  # only here and below: a GPU is waited for once
        if not condition * eps < 1:
            check_finite(kernel)
            raise singular(
                f"the convolution is singular in {kernel.dtype}: its condition number is about "
                f"{math.inf if math.isnan(condition) else condition:.1g}"
            )
        return make, method, condition

    @property
    def _method(self) -> _Method:
        return self._made[1]

    @property
    def condition(self) -> float:
        """An estimate of ``‖J‖₂ ‖J⁻¹‖₂``, of the right order of magnitude."""
        return self._made[2]

    @cached_property
    @torch.no_grad()
    def log_abs_det(self) -> Tensor:
        """``log|det J|``, shape ``()``."""
        return (self._copies * self._method.log_abs_det).to(at_least_float32(self.weight).dtype)

    @cached_property
    @torch.no_grad()
    def gradient(self) -> Tensor:
        """``∂ log|det J| / ∂w``, shape ``(C, C, kh, kw)``."""
        return (self._copies * self._method.gradient).to(at_least_float32(self.weight).dtype)

    @torch.no_grad()
    def solve(self, images: Tensor, transposed: bool = False) -> Tensor:
        """``J⁻¹ y`` (or ``J⁻ᵀ y``) for every image y, shape ``(B, C, H, W)``."""
        return self._by_parts(partial(self._method.solve, transposed=transposed), images)

    @torch.no_grad()
    def precondition(self, right_side: Tensor) -> Tensor:
        method, solve = self._method, self._method.solve
        if isinstance(method, EmbeddedConvolution):
            solve = partial(method.solve, dtype=at_least_float32(self.weight).dtype)
        return self._by_parts(solve, right_side)

    def _by_parts(self, solve: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Rows, columns or pixels that do not interact are solved for as separate images."""
        if self._copies == 1:
            return solve(images)
        batch, channels, height, width = images.shape
        rows, columns = self._folded_size
        shape = (batch, channels, height // rows, rows, width // columns, columns)
        parts = images.reshape(shape).permute(0, 2, 4, 1, 3, 5)
        solutions = solve(parts.reshape(-1, channels, rows, columns))
        return solutions.view(parts.shape).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)

    @torch.no_grad()
    def inverse_kernel(self, size: tuple[int, int]) -> Tensor:
        """:meth:`Circulant.inverse_kernel <pyro_snf.maps.circulant.Circulant.inverse_kernel>`.

        For ``"circular"`` padding only.
        """
        if not isinstance(self._method, Circulant):
            raise ValueError(f"expected padding_mode='circular'; got {self.padding_mode!r}")
        rows, columns = (
            wanted if folded > 1 else 1
            for wanted, folded in zip(size, self._folded_size, strict=True)
        )
        inverse = self._method.inverse_kernel((rows, columns))
        # Rows or columns that do not interact in J do not interact in J⁻¹.
        return resize(inverse, size).to(at_least_float32(self.weight).dtype)

    def differentiable_gradient(self, weight: Tensor) -> Tensor:
        if isinstance(self._method, _Sparse):
            return first_order_only(
                self.gradient,
                weight,
                error=f"no second derivative: for this kernel, log|det J| (D > {_MAX_DENSE}) needs "
                "SciPy's sparse factorization",
            )
        return self._copies * self._made[0](at_least_float32(weight)).gradient


def factorization_flops(
    kernel_size: tuple[int, int], channels: int, image_size: tuple[int, int], padding_mode: str
) -> float:
    """About how many floating-point operations ``log|det J|`` and its gradient take.

    :param kernel_size: ``(kh, kw)``.
    :param int channels: C.
    :param image_size: ``(H, W)``.
    """
    height, width = _folded_size(kernel_size, image_size)
    if padding_mode == "circular":
        # Half of the frequencies, with a complex factorization (8/3 C³) and inverse (8 C³); two
        # Fourier transforms of C² images.
        pixels = height * width
        return pixels / 2 * 32 / 3 * channels**3 + 5 * channels**2 * pixels * math.log2(2 * pixels)
    return embedding_flops(channels, kernel_size, (height, width))


def num_factor_entries(
    kernel_size: tuple[int, int], channels: int, image_size: tuple[int, int], padding_mode: str
) -> int:
    """About how many numbers the factors of J consist of: Fourier transforms, and blocks of S.

    The parameters are those of :func:`factorization_flops`.
    """
    height, width = _folded_size(kernel_size, image_size)
    if padding_mode == "circular":
        return channels**2 * height * width
    return channels**2 * height * width + embedding_entries(channels, kernel_size, (height, width))


def _folded_size(kernel_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """The size of the parts of an image that interact: with a kernel of one row, single rows."""
    height, width = (
        1 if kernel == 1 else image for kernel, image in zip(kernel_size, image_size, strict=True)
    )
    return height, width


def _examine(method: _Method, kernel: Tensor, image_size: tuple[int, int]) -> tuple[float, float]:
    """The solves' backward error, and the condition number by a step of inverse iteration.

    The former is ``‖J u − h‖ / (‖J‖ ‖u‖)``, the larger one of J and Jᵀ, and NaN if no solution is
    finite. The latter is ``‖J‖ ‖J⁻¹‖₂``, with an upper bound of the first factor and a lower bound
    of the second. A condition number that matters is huge, and found at once.
    """
    norm = norm_bound(kernel)
    # A chirp contains all frequencies in about equal measure.
    count = torch.arange(len(kernel) * math.prod(image_size), device=kernel.device)
    probe = torch.cos(0.7 * count.double().square()).view(1, len(kernel), *image_size)
    probe = probe / torch.linalg.vector_norm(probe)
    solution = method.solve(probe)
    length = torch.linalg.vector_norm(solution)
    residual = convolve(solution, kernel, "zeros") - probe
    again = solution / length
    second = method.solve(again, transposed=True)
    second_length = torch.linalg.vector_norm(second)
    second_residual = convolve_transposed(second, kernel, "zeros") - again
    error = torch.maximum(
        torch.linalg.vector_norm(residual) / length,
        torch.linalg.vector_norm(second_residual) / second_length,
    )
    values = torch.stack([error / norm, norm * second_length]).tolist()
    return values[0], values[1]


class _Pivoted(ABC):
    """The whole matrix J of zero padding, factorized with pivoting, in float64.

    :param Tensor kernel: w, shape ``(C, C, kh, kw)``.
    :param image_size: ``(H, W)``.
    """

    def __init__(self, kernel: Tensor, image_size: tuple[int, int]) -> None:
        self.kernel = kernel.double()
        self.image_size = image_size

    @property
    @abstractmethod
    def log_abs_det(self) -> Tensor:
        """``log|det J|``, shape ``()``."""

    @abstractmethod
    def _solve_columns(self, columns: Tensor, transposed: bool) -> Tensor:
        """``J⁻¹ Y`` (or ``J⁻ᵀ Y``), shape ``(D, B)``."""

    def solve(self, images: Tensor, transposed: bool = False) -> Tensor:
        """``J⁻¹ y`` (or ``J⁻ᵀ y``) for every image y, shape ``(B, C, H, W)``."""
        columns = self._solve_columns(images.double().flatten(1).mT, transposed)
        return columns.mT.reshape(images.shape).to(images.dtype)

    @cached_property
    def gradient(self) -> Tensor:
        """``∂ log|det J| / ∂w = Σ_j ⟨J⁻ᵀ e_j, ∂J/∂w e_j⟩``, shape ``(C, C, kh, kw)``."""
        channels, _, height, width = self.kernel.shape
        dim = channels * math.prod(self.image_size)
        gradient = torch.zeros_like(self.kernel)
        for indices in torch.arange(dim, device=self.kernel.device).split(_CHUNK):
            units = F.one_hot(indices, dim).double().view(-1, channels, *self.image_size)
            rows = self.solve(units, transposed=True)
            gradient = gradient + kernel_gradient(units, rows, (height, width), "zeros")
        return gradient


class _Dense(_Pivoted):
    """By ``torch.linalg``: differentiable in the kernel, if that has an autograd graph."""

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix(self.kernel, self.image_size, "zeros"))
        return lu, pivots

    @property
    def log_abs_det(self) -> Tensor:
        return self._factors[0].diagonal().abs().log().sum()

    def _solve_columns(self, columns: Tensor, transposed: bool) -> Tensor:
        return torch.linalg.lu_solve(*self._factors, columns, adjoint=transposed)


class _Sparse(_Pivoted):
    """By SciPy's ``splu``, on the CPU."""

    @cached_property
    def _factors(self) -> Any:
        from scipy import sparse  # type: ignore[import-untyped]
        from scipy.sparse.linalg import splu  # type: ignore[import-untyped]

        def shift(kernel_size: int, image_size: int, index: int) -> Any:
            return sparse.eye(image_size, k=index - kernel_size // 2)

        height, width = self.kernel.shape[-2:]
        terms = [
            sparse.kron(
                self.kernel[:, :, row, column].cpu().numpy(),
                sparse.kron(
                    shift(height, self.image_size[0], row),
                    shift(width, self.image_size[1], column),
                ),
                format="csr",
            )
            for row in range(height)
            for column in range(width)
        ]
        try:
            return splu(sparse.csc_matrix(sum(terms[1:], terms[0])))
        except RuntimeError as error:
            raise singular(f"the convolution is singular: {error}") from error

    @cached_property
    def log_abs_det(self) -> Tensor:
        upper = torch.from_numpy(self._factors.U.diagonal())  # L has a diagonal of ones
        return upper.abs().log().sum().to(self.kernel.device)

    def _solve_columns(self, columns: Tensor, transposed: bool) -> Tensor:
        trans = "T" if transposed else "N"
        solutions = self._factors.solve(columns.cpu().numpy(), trans=trans)
        return torch.from_numpy(solutions).to(columns.device)

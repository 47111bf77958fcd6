"""The convolution with zero padding as a part of a periodic one.

A kernel reaches ``h = (kh − 1)/2`` rows and ``w = (kw − 1)/2`` columns beyond a pixel. Give an
image of H × W pixels a margin M of h rows and w columns, and let the larger image, of
``N = (H + h) (W + w)`` pixels, be periodic. The convolution Π of the larger image is block diagonal
in Fourier space (:mod:`pyro_snf.maps.circulant`), and J is the part of it within the image: where
the margin is zero, nothing comes in from the other side. With ``S = (Π⁻¹)_MM``, the block of the
margin (Jacobi's identity for complementary minors, and the formula of inverse block matrices)::

    det J = det Π · det S,
    J⁻¹   = Π⁻¹ − (Π⁻¹)_·M S⁻¹ (Π⁻¹)_M·    within the image; the rest of the right side is zero.

The margin consists of h rows of W + w pixels, and of the rest of its w columns, n = C H w numbers::

    S = ⎡ R⁻¹  Y   ⎤        K⁻¹ = T − X R Y.
        ⎣ X    T   ⎦

The rows are periodic: a Fourier transform along them makes R block diagonal, with a matrix of
``h C × h C`` numbers for each frequency, and X has ``h C`` columns for each, and Y rows. Only K is
a dense matrix. On squares, with kernels of 3 × 3, 8 (C W)³ operations in large products give value
and gradient. A solution takes two Fourier transforms, and products with X, K and Y.

For the gradient, let e(f) be the plane waves of a frequency f, one for each channel, Π(f) the C × C
matrix of Π, ``Q(f) = e(f)* S⁻¹ e(f)``, and F⁻¹ the inverse Fourier transform. The right side above
is diagonal in Fourier space up to terms that do not contribute to a trace with ∂Π, so that::

    ∂ log|det J|/∂w[o, i, a] = F⁻¹[N Π⁻¹ − Π⁻¹ Q Π⁻¹](a − c)[i, o].

Π may be singular or ill-conditioned where J is not, and nothing is pivoted between the parts. The
caller has to check the backward error (:mod:`pyro_snf.maps.convolution_factors` does). All numbers
are in float64.

Source: B. L. Buzbee, F. W. Dorr, J. A. George, G. H. Golub. The Direct Solution of the Discrete
Poisson Equation on Irregular Regions. SIAM Journal on Numerical Analysis, 1971 (where S is the
"capacitance matrix").
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_snf.maps.circulant import Circulant, invert

__all__ = ["EmbeddedConvolution", "embedding_entries", "embedding_flops"]

Size = tuple[int, int]


class _Margin(NamedTuple):
    """The parts of S, with m frequencies along a row. K's rows are ordered by column, row, channel.

    R, X and Y are those for each frequency.
    """

    rows: Tensor  # R, shape (m, hC, hC)
    down: Tensor  # X, shape (n, m, hC)
    up: Tensor  # Yᵀ, shape (n, m, hC)
    columns: Tensor  # K, shape (n, n), real


class _Solver(NamedTuple):
    """What a solution needs, in one precision; see :meth:`EmbeddedConvolution.solve`."""

    inverse: Tensor  # Π⁻¹, shape (H + h, m, C, C)
    rows: Tensor  # R, shape (m, hC, hC)
    # From waves to the margin's rows and columns, and back.
    at_rows: Tensor  # exp(2πi f y/(H + h))/(H + h), shape (h, H + h)
    of_rows: Tensor  # its inverse, shape (H + h, h)
    at_columns: Tensor  # exp(2πi f x/(W + w))/(W + w), with how often f counts, shape (w, m)
    of_columns: Tensor  # its inverse, shape (m, w)
    down: Tensor  # X with these weights, on real and imaginary parts, shape (n, 2 m hC)
    up: Tensor  # Y, to real and imaginary parts, shape (2 m hC, n)
    columns: Tensor  # K, shape (n, n)


class EmbeddedConvolution:
    """The factors of one zero-padded convolution, made when they are first needed.

    All results are in float64. They are not finite where Π or a part of S is exactly singular.
    Those of all members but :meth:`solve` are differentiable in the kernel, if it has an autograd
    graph.

    :param Tensor kernel: w, shape ``(C, C, kh, kw)``.
    :param image_size: ``(H, W)``.
    """

    def __init__(self, kernel: Tensor, image_size: Size) -> None:
        kernel_size = (kernel.shape[-2], kernel.shape[-1])
        #: Whether rows and columns are exchanged, so that n is less.
        self.by_columns = _is_by_columns(kernel_size, image_size)
        self.kernel = kernel.double().mT if self.by_columns else kernel.double()
        self.height, self.width = image_size[::-1] if self.by_columns else image_size
        self.above, self.beside = (size // 2 for size in self.kernel.shape[-2:])  # h, w
        # Rows of the margin come first, and so do columns.
        self.size = (self.height + self.above, self.width + self.beside)
        self._periodic = Circulant(self.kernel, self.size)
        self._solvers: dict[tuple[bool, torch.dtype], _Solver] = {}

    @cached_property
    def _waves(self) -> Tensor:
        """``exp(2πi f x/(W + w))`` at the margin's columns x, shape ``(w, m)``."""
        device = self.kernel.device
        frequencies = torch.arange(self.size[1] // 2 + 1, device=device)
        columns = torch.arange(self.beside, device=device)
        angles = (2 * math.pi / self.size[1]) * torch.outer(columns, frequencies).double()
        return torch.polar(torch.ones_like(angles), angles)

    @cached_property
    def _offsets(self) -> Tensor:
        """``p − q`` for all rows p and q of the larger image, modulo H + h."""
        rows = torch.arange(self.size[0], device=self.kernel.device)
        return (rows[:, None] - rows) % self.size[0]

    @cached_property
    def _parts(self) -> tuple[_Margin, Tensor]:
        """The parts of S, and ``log|det S|``."""
        above, channels, offsets = self.above, len(self.kernel), self._offsets
        # Π⁻¹ from row q to row p of the larger image, by p − q: shape (H + h, m, C, C).
        inverse = torch.fft.ifft(self._periodic.inverse_symbol, dim=0)
        count, size = inverse.shape[1], above * channels
        within = inverse[offsets[:above, :above]].permute(2, 0, 3, 1, 4)
        rows, row_log_dets = invert(within.reshape(count, size, size))
        # From the margin's rows to its columns, and back; w, H, C, m, h, C.
        waves = self._waves[:, None, None, :, None, None]
        down = waves * inverse[offsets[above:, :above]].permute(0, 3, 2, 1, 4)
        up = waves.conj() * inverse[offsets[:above, above:]].permute(1, 4, 2, 0, 3)
        dense = self.beside * self.height * channels  # n
        down, up = down.reshape(dense, count, size), up.reshape(dense, count, size)
        within = self._between_columns(inverse)[offsets[above:, above:]]
        schur = within.permute(2, 0, 4, 3, 1, 5).reshape(dense, dense)
        if above:
            schur = schur - self._over_frequencies(_times(down, rows), up)
        columns, column_log_det = invert(schur)
        margin = _Margin(rows, down, up, columns)
        return margin, (row_log_dets * self._periodic.weights).sum() + column_log_det

    def _between_columns(self, inverse: Tensor) -> Tensor:
        """Π⁻¹ from column x to column x' of the margin, shape ``(H + h, w, w, C, C)``."""
        phases = self._waves[:, None] * self._waves.conj()
        phases = phases * (self._periodic.weights / self.size[1])
        return torch.einsum("xym,pmoi->pxyoi", phases, inverse).real

    def _over_frequencies(self, left: Tensor, right: Tensor) -> Tensor:
        """``Σ_f A_f B_fᵀ/(W + w)`` over all frequencies, shape ``(n, B)``, real.

        :param Tensor left: A, shape ``(n, m, hC)``.
        :param Tensor right: B, shape ``(B, m, hC)``.
        """
        weights = self._periodic.weights[:, None] / self.size[1]
        return _as_real(left) @ _as_real((right * weights).conj()).mT

    @property
    def log_abs_det(self) -> Tensor:
        """``log|det J|``, shape ``()``."""
        return self._periodic.log_abs_det + self._parts[1]

    @cached_property
    def gradient(self) -> Tensor:
        """``∂ log|det J| / ∂w``, shape ``(C, C, kh, kw)``."""
        inverse = self._periodic.inverse_symbol
        waves = self.size[0] * torch.fft.ifft(self._sums_by_offset(), dim=0)  # Q
        spectrum = math.prod(self.size) * inverse - inverse @ waves @ inverse
        images = torch.fft.irfft2(spectrum, s=self.size, dim=(0, 1))
        rows, columns = self._periodic.positions((2 * self.above + 1, 2 * self.beside + 1))
        gradient = images[rows[:, None], columns].permute(3, 2, 0, 1)
        return gradient.mT if self.by_columns else gradient

    def _sums_by_offset(self) -> Tensor:
        """The blocks of S⁻¹ for a frequency along rows, summed over pairs of rows by their offset.

        ``S⁻¹ = [R + R Y K X R, −R Y K; −K X R, K]``. Shape ``(H + h, m, C, C)``.
        """
        (rows, down, up, columns), _ = self._parts
        above, offsets, count = self.above, self._offsets, len(rows)
        shape = (self.beside, self.height, len(self.kernel))  # of a row or column of K
        # A block from row q to row p counts for the wave's phase at q less that at p.
        phases = self._waves.conj()[:, None] * self._waves
        blocks = columns.view(*shape, *shape).permute(1, 4, 0, 3, 2, 5).flatten(0, 1)
        sums = blocks.new_zeros(self.size[0], *blocks.shape[1:])
        sums = sums.index_add(0, offsets[above:, above:].mT.flatten(), blocks)
        total = torch.einsum("xym,pxyoi->pmoi", phases, sums.to(phases.dtype))
        if not above:
            return total
        down, up = _times(down, rows), _times(up, rows.mT)  # X R and (R Y)ᵀ
        to_rows = _as_complex(columns.mT @ _as_real(up), count)  # (R Y K)ᵀ
        to_columns = _as_complex(columns @ _as_real(down), count)  # K X R
        within = self.size[1] * rows + up.permute(1, 2, 0) @ to_columns.transpose(0, 1)
        waves = self._waves[:, None, None, :, None, None]
        channels = len(self.kernel)
        lines = (*shape, count, above, channels)
        columns_left = (waves.conj() * to_columns.view(lines)).sum(0).permute(0, 3, 2, 1, 4)
        rows_left = (waves * to_rows.view(lines)).sum(0).permute(0, 3, 2, 4, 1)
        within = within.view(count, above, channels, above, channels).permute(1, 3, 0, 2, 4)
        for blocks, pairs in [
            (within, offsets[:above, :above].mT),
            (-columns_left, offsets[:above, above:].mT),
            (-rows_left, offsets[above:, :above]),
        ]:
            total = total.index_add(0, pairs.flatten(), blocks.flatten(0, 1))
        return total

    @torch.no_grad()
    def _solver(self, transposed: bool, dtype: torch.dtype) -> _Solver:
        key = transposed, dtype
        if key not in self._solvers:
            (rows, down, up, columns), _ = self._parts
            inverse = self._periodic.inverse_symbol
            if transposed:
                inverse, rows, columns = inverse.mH, rows.mH, columns.mT
                down, up = up.conj(), down.conj()
            weights = self._periodic.weights / self.size[1]
            frequencies = torch.arange(self.size[0], device=rows.device)
            margin = torch.arange(self.above, device=rows.device)
            angles = (2 * math.pi / self.size[0]) * torch.outer(margin, frequencies).double()
            waves = torch.polar(torch.ones_like(angles), angles)
            parts = (
                inverse,
                rows,
                waves / self.size[0],
                waves.mH,
                self._waves * weights,
                self._waves.mH,
                _as_real((weights[:, None] * down).conj()),
                _as_real(up).mT,
                columns,
            )
            casts = (
                part.to(dtype.to_complex() if part.is_complex() else dtype).resolve_conj()
                for part in parts
            )
            self._solvers[key] = _Solver(*(part.contiguous() for part in casts))
        return self._solvers[key]

    @torch.no_grad()
    def solve(
        self, images: Tensor, transposed: bool = False, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """``J⁻¹ y`` (or ``J⁻ᵀ y``) for every image y, shape ``(B, C, H, W)``.

        With ``t = Π⁻¹ y`` and ``z = S⁻¹ t_M``, the solution is ``Π⁻¹ (y − z)``. In parts,
        ``z_c = K (t_c − X R t_r)`` and ``z_r = R (t_r − Y z_c)``.

        :param dtype: float32 or float64, in which it is computed.
        """
        solver = self._solver(transposed, dtype)
        (height, _), above, channels, batch = self.size, self.above, len(self.kernel), len(images)
        right_side = images.to(dtype).mT if self.by_columns else images.to(dtype)
        padded = F.pad(right_side, (self.beside, 0, above, 0))
        spectrum = torch.fft.rfft2(padded).permute(2, 3, 1, 0).contiguous()  # (H + h, m, C, B)
        count, numbers = spectrum.shape[1], channels * batch
        values = (solver.inverse @ spectrum).view(height, count, numbers)
        rows = solver.at_rows @ values.view(height, -1)
        rows = rows.view(above, count, channels, batch).transpose(0, 1)
        rows = solver.rows @ rows.reshape(count, above * channels, batch)  # R t_r
        if self.beside:
            columns = torch.fft.ifft(solver.at_columns @ values, dim=0).real
            columns = columns[above:].transpose(0, 1).reshape(len(solver.columns), batch)
            parts = torch.view_as_real(rows).transpose(2, 3).reshape(-1, batch)
            columns = solver.columns @ (columns - solver.down @ parts)  # z_c
            parts = (solver.up @ columns).view(count, above * channels, 2, batch)
            rows = rows - solver.rows @ torch.complex(parts[:, :, 0], parts[:, :, 1])  # z_r
            # z is subtracted in Fourier space. Its columns are waves along rows.
            columns = F.pad(columns.view(self.beside, self.height, numbers), (0, 0, above, 0))
            columns = torch.fft.fft(columns, dim=1).transpose(0, 1)
            spectrum -= (solver.of_columns @ columns).view_as(spectrum)
        rows = rows.view(count, above, numbers).transpose(0, 1).reshape(above, count * numbers)
        spectrum -= (solver.of_rows @ rows).view_as(spectrum)
        solution = (solver.inverse @ spectrum).permute(3, 2, 0, 1).contiguous()
        solution = torch.fft.irfft2(solution, s=self.size)[..., above:, self.beside :]
        return (solution.mT if self.by_columns else solution).to(images.dtype).contiguous()


def embedding_flops(channels: int, kernel_size: Size, image_size: Size) -> float:
    """About how many floating-point operations value and gradient take.

    :param int channels: C.
    :param kernel_size: ``(kh, kw)``.
    :param image_size: ``(H, W)``.
    """
    dense, rows, count = _sizes(channels, kernel_size, image_size)
    # Products of K⁻¹'s size, and an inverse of it. Complex inverses, 32/3 a³ for half of the
    # frequencies of a row, and that, a transform and two products for those of the larger image.
    real = 6.0 * dense**2 * rows * count + 2.0 * dense**3
    pixels = math.prod(image_size)
    return real + 16 / 3 * count * rows**3 + 16 * pixels * channels**3


def embedding_entries(channels: int, kernel_size: Size, image_size: Size) -> int:
    """About how many numbers K, X and Y consist of; the parameters are the same."""
    dense, rows, count = _sizes(channels, kernel_size, image_size)
    return dense**2 + 2 * dense * rows * count


def _sizes(channels: int, kernel_size: Size, image_size: Size) -> tuple[int, int, int]:
    """n, h C, and the number of frequencies along a row."""
    if _is_by_columns(kernel_size, image_size):
        kernel_size, image_size = kernel_size[::-1], image_size[::-1]
    above, beside = (size // 2 for size in kernel_size)
    return channels * image_size[0] * beside, above * channels, image_size[1] + beside


def _is_by_columns(kernel_size: Size, image_size: Size) -> bool:
    """Whether the dense matrix is smaller with rows and columns exchanged."""
    return (kernel_size[0] // 2) * image_size[1] < (kernel_size[1] // 2) * image_size[0]


def _times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """A product for each frequency, of shapes ``(n, m, a)`` and ``(m, a, b)``."""
    return (vectors.transpose(0, 1) @ matrices).transpose(0, 1).contiguous()


def _as_real(vectors: Tensor) -> Tensor:
    """Real and imaginary parts, shape ``(n, 2 m a)`` from ``(n, m, a)``."""
    return torch.view_as_real(vectors.resolve_conj()).flatten(1)


def _as_complex(numbers: Tensor, count: int) -> Tensor:
    """The inverse of :func:`_as_real`, shape ``(n, m, a)``.

    :param int count: m.
    """
    return torch.view_as_complex(numbers.unflatten(1, (count, -1, 2)))

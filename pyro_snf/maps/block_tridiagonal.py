"""The convolution with zero padding as a block tridiagonal matrix, by cyclic reduction.

A kernel reaches ``h = (kh − 1)/2`` rows up and down. Grouped into blocks of h rows (with all
channels and columns), an image is a sequence of n blocks, each of which interacts with its two
neighbours only, and all in the same way. So J is block tridiagonal and block Toeplitz, with
n = ⌈H / h⌉ blocks of size b = h C W::

        ⎡ T U      ⎤
    J = ⎢ L T U    ⎥
        ⎢   L T U  ⎥
        ⎣     L T' ⎦

Only the last diagonal block, T', may differ: it is smaller if h does not divide H. The elimination
of every other block, the first, third, fifth, …, leaves a matrix of half as many blocks and of the
same form,

    T ← T − L T⁻¹ U − U T⁻¹ L,     L ← −L T⁻¹ L,     U ← −U T⁻¹ U.

Its last block differs from the others again, because the last remaining block has one neighbour
less. After ⌊log₂ n⌋ + 1 levels of a few b×b products and one inverse, ``log|det J|`` is known. The
same formulas in reverse order give its gradient, and the stored products are a solver. This takes
O(b³ log n) operations, where the elimination of one block after the other takes O(b³ n), and a
dense factorization O(b³ n³). L and U decrease quadratically; the reduction stops at the level at
which they are negligible.

There is no pivoting between the blocks, and a leading block may be singular although J is not. The
caller has to check the backward error (:mod:`pyro_snf.maps.convolution_factors` does). All numbers
are in float64, which costs little more than float32 here, and makes up for the missing pivoting in
all but rare cases.

Source: Roland A. Sweet. A Cyclic Reduction Algorithm for Solving Block Tridiagonal Systems of
Arbitrary Dimension. SIAM Journal on Numerical Analysis, 1977.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BlockTridiagonal", "elimination_flops"]


class _LastBlock(NamedTuple):
    """The factors of the last diagonal block T', shape ``(m, m)``, where it is eliminated."""

    inverse: Tensor  # T'⁻¹, shape (m, m)
    left: Tensor  # U T'⁻¹, shape (b, m)
    right: Tensor  # T'⁻¹ L, shape (m, b)


class _Level(NamedTuple):
    """The factors of one level: n blocks, of which ``n // 2`` remain.

    The blocks 0, 2, 4, … are eliminated; if n is odd, the last block is among them.
    """

    num_blocks: int  # n
    is_toeplitz: bool  # T' is T
    inverse: Tensor  # T⁻¹, shape (b, b)
    left: Tensor  # L T⁻¹ above U T⁻¹, shape (2b, b)
    right: Tensor  # T⁻¹ L beside T⁻¹ U, shape (b, 2b)
    last_block: _LastBlock | None  # None if T' is T, or remains


class _FinalLevel(NamedTuple):
    """The factors of the last level: n blocks that do not interact."""

    num_blocks: int  # n
    inverse: Tensor | None  # T⁻¹, shape (b, b); None if T' is the only block
    last: Tensor | None  # T'⁻¹, shape (m, m); None if T' is T


class _Step(NamedTuple):
    """The factors of one level for a solve. Images are rows, multiplied from the right."""

    num_blocks: int  # n
    forward: Tensor  # shape (b, 3b)
    backward: Tensor  # shape (b, 2b)
    last_forward: Tensor | None  # shape (m, m + b)
    last_backward: Tensor | None  # shape (b, m)


class BlockTridiagonal:
    """The factors of one zero-padded convolution, made when they are first needed.

    All results are in float64. They are not finite where a block is exactly singular. Those of all
    members but :meth:`solve` are differentiable in the kernel, if it has an autograd graph.

    :param Tensor kernel: w, shape ``(C, C, kh, kw)``.
    :param image_size: ``(H, W)``.
    :param bool by_columns: whether blocks consist of columns, not of rows.
    """

    def __init__(self, kernel: Tensor, image_size: tuple[int, int], by_columns: bool) -> None:
        self.by_columns = by_columns
        self.kernel = kernel.double().mT if by_columns else kernel.double()
        self.height, self.width = image_size[::-1] if by_columns else image_size
        self.rows = max(self.kernel.shape[-2] // 2, 1)
        self.num_blocks = math.ceil(self.height / self.rows)
        # T' consists of the first m rows and columns of T.
        last_rows = self.height - (self.num_blocks - 1) * self.rows
        self.last_size = last_rows * len(kernel) * self.width

    @cached_property
    def _layout(self) -> _Layout:
        return _Layout.of(self.kernel, self.rows, self.width)

    @cached_property
    def _elimination(self) -> tuple[Tensor, list[_Level], _FinalLevel]:
        return _eliminate(self._layout.blocks(self.kernel), self.num_blocks, self.last_size)

    @property
    def log_abs_det(self) -> Tensor:
        """``log|det J|``, shape ``()``."""
        return self._elimination[0]

    @cached_property
    def gradient(self) -> Tensor:
        """``∂ log|det J| / ∂w``, shape ``(C, C, kh, kw)``."""
        _, levels, final = self._elimination
        size = self.rows * len(self.kernel) * self.width
        gradient = self._layout.kernel_gradient(_differentiate(levels, final, size))
        return gradient.mT if self.by_columns else gradient

    @cached_property
    @torch.no_grad()
    def _steps(self) -> list[_Step]:
        return [_step(level) for level in self._elimination[1]]

    @cached_property
    @torch.no_grad()
    def _transposed_steps(self) -> list[_Step]:
        return [_transposed_step(level) for level in self._elimination[1]]

    @torch.no_grad()
    def solve(self, images: Tensor, transposed: bool = False) -> Tensor:
        """``J⁻¹ y`` (or ``J⁻ᵀ y``) for every image y, shape ``(B, C, H, W)``."""
        steps = self._transposed_steps if transposed else self._steps
        if self.by_columns:
            images = images.mT
        # An image is n blocks of h rows. Rows of zeros fill the last block.
        lines = images.double().transpose(1, 2)
        num_missing = self.num_blocks * self.rows - self.height
        lines = F.pad(lines, (0, 0, 0, 0, 0, num_missing)) if num_missing else lines
        blocks = lines.reshape(len(images), self.num_blocks, -1)
        if not num_missing:  # else they are a copy already
            blocks = blocks.clone(memory_format=torch.contiguous_format)
        _solve(blocks, steps, self._elimination[2], transposed)
        lines = blocks.view(len(images), -1, *lines.shape[2:])[:, : self.height]
        solution = lines.transpose(1, 2)
        return (solution.mT if self.by_columns else solution).to(images.dtype).contiguous()


def elimination_flops(
    channels: int, kernel_size: tuple[int, int], image_size: tuple[int, int]
) -> float:
    """About how many floating-point operations value and gradient take, with blocks of rows.

    :param int channels: C.
    :param kernel_size: ``(kh, kw)``.
    :param image_size: ``(H, W)``.
    """
    rows = max(kernel_size[0] // 2, 1)
    num_blocks = math.ceil(image_size[0] / rows)
    size = min(rows, image_size[0]) * channels * image_size[1]
    # An inverse with its determinant takes 8/3 b³ operations. The products of a level take 16 b³
    # forward and 20 b³ backward, and up to 13 b³ more for T'.
    return (num_blocks.bit_length() - 1) * 45.0 * size**3 + 8 / 3 * size**3


def _toeplitz(
    kernel_size: int, rows: int, columns: int, offset: int, device: torch.device
) -> Tensor:
    """``[a, r, s] = 1`` where ``s − r + offset = a``, else 0: shape ``(kernel, rows, columns)``."""
    entries, row, column = (
        torch.arange(size, device=device) for size in (kernel_size, rows, columns)
    )
    return (column - row[:, None] + offset == entries[:, None, None]).double()


class _Layout(NamedTuple):
    """The linear map from a kernel to the blocks ``[L T U]``, shape ``(b, 3b)``, and its adjoint.

    The rows of a block are ordered by row, channel and column of the image.
    """

    vertical: Tensor  # shape (3h², kh)
    horizontal: Tensor  # shape (kw, W²)
    shape: tuple[int, ...]  # (C, C, h, 3h, W, W)

    @classmethod
    def of(cls, kernel: Tensor, rows: int, width: int) -> _Layout:
        channels, _, kernel_height, kernel_width = kernel.shape
        device = kernel.device
        # The columns of L belong to the h rows of the image above those of T.
        vertical = _toeplitz(kernel_height, rows, 3 * rows, kernel_height // 2 - rows, device)
        horizontal = _toeplitz(kernel_width, width, width, kernel_width // 2, device)
        return cls(
            vertical.flatten(1).mT,
            horizontal.flatten(1),
            (channels, channels, rows, 3 * rows, width, width),
        )

    def blocks(self, kernel: Tensor) -> Tensor:
        """``[L T U]``, shape ``(b, 3b)``."""
        entries = self.vertical @ (kernel @ self.horizontal)
        blocks = entries.view(self.shape).permute(2, 0, 4, 3, 1, 5)
        return blocks.reshape(self.shape[2] * self.shape[0] * self.shape[4], -1)

    def kernel_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient in the kernel, from that in ``[L T U]``."""
        channels, _, rows, all_rows, width, _ = self.shape
        blocks = gradient.view(rows, channels, width, all_rows, channels, width)
        entries = blocks.permute(1, 4, 0, 3, 2, 5).reshape(channels, channels, -1, width**2)
        return (self.vertical.mT @ entries) @ self.horizontal.mT


def _invert(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``A⁻¹`` and ``log|det A|``; neither is finite if A is singular."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.lu_solve(lu, pivots, eye), lu.diagonal().abs().log().sum()


def _is_negligible(lower: Tensor, upper: Tensor, diagonal: Tensor) -> bool:
    """Whether L and U are smaller than the rounding errors of T.

    The log-determinant depends on the product of both, which is of the order eps². Its gradient
    depends on the product of one of them with one of the previous level, of the order eps^1.5. Both
    are far below rounding.
    """
    if diagonal.is_cuda:  # the remaining levels take less time than to wait for the answer
        return False
    coupling = torch.maximum(lower.detach().abs().max(), upper.detach().abs().max())
    return bool(coupling <= torch.finfo(diagonal.dtype).eps * diagonal.detach().abs().max())


def _eliminate(
    blocks: Tensor, num_blocks: int, last_size: int
) -> tuple[Tensor, list[_Level], _FinalLevel]:
    """``log|det J|``, and the factors for its gradient and for solves.

    :param Tensor blocks: ``[L T U]``, shape ``(b, 3b)``.
    :param int num_blocks: n.
    :param int last_size: m. T' is ``T[:m, :m]``, with the first m rows of L and columns of U.
    """
    size = len(blocks)
    lower, diagonal, upper = blocks.chunk(3, dim=1)
    last = None if last_size == size else diagonal[:last_size, :last_size]  # None: T' is T
    value = blocks.new_zeros(())
    levels: list[_Level] = []
    while num_blocks > 1 and not (levels and _is_negligible(lower, upper, diagonal)):
        inverse, log_det = _invert(diagonal)
        row = torch.cat([lower, upper], dim=1)
        left = torch.cat([lower, upper]) @ inverse
        products = left @ row  # L T⁻¹ L, L T⁻¹ U; U T⁻¹ L, U T⁻¹ U
        lower_upper = products[:size, size:]
        reduced = diagonal - lower_upper - products[size:, :size]
        is_toeplitz = last is None
        last_block: _LastBlock | None = None
        value = value + num_blocks // 2 * log_det
        if num_blocks % 2 == 0:
            # The last block remains. Only its left neighbour is eliminated.
            last_size = size if last is None else len(last)
            last = (diagonal if last is None else last) - lower_upper[:last_size, :last_size]
        elif last is None:
            value = value + log_det
        else:
            # The last block is eliminated. It is the right neighbour of the last that remains.
            last_inverse, last_log_det = _invert(last)
            value = value + last_log_det
            last_block = _LastBlock(
                last_inverse,
                upper[:, : len(last)] @ last_inverse,
                last_inverse @ lower[: len(last)],
            )
            last = diagonal - lower_upper - last_block.left @ lower[: len(last)]
        levels.append(_Level(num_blocks, is_toeplitz, inverse, left, inverse @ row, last_block))
        lower, diagonal, upper = -products[:size, :size], reduced, -products[size:, size:]
        num_blocks //= 2
    final = _FinalLevel(num_blocks, None, None)
    if num_blocks > 1 or last is None:
        inverse, log_det = _invert(diagonal)
        value = value + (num_blocks - (last is not None)) * log_det
        final = final._replace(inverse=inverse)
    if last is not None:
        inverse, log_det = _invert(last)
        value = value + log_det
        final = final._replace(last=inverse)
    return value, levels, final


def _differentiate(levels: list[_Level], final: _FinalLevel, size: int) -> Tensor:
    """The gradient of ``log|det J|`` in ``[L T U]``, shape ``(b, 3b)``.

    By the chain rule, from the last level to the first. With M = [L; U] one above the other,
    N = [L U] side by side, and K = M T⁻¹ N,

        dK = dM T⁻¹N + M T⁻¹ dN − M T⁻¹ dT T⁻¹N,

    so a gradient K̄ in K is ``M̄ = K̄ (T⁻¹N)ᵀ`` in M, ``N̄ = (M T⁻¹)ᵀ K̄`` in N and
    ``−(M T⁻¹)ᵀ M̄`` in T.
    """
    # The gradients in L, T, U of a level, and in its T'; None where T' is T.
    known = final.inverse if final.inverse is not None else final.last
    assert known is not None
    lower = upper = diagonal = known.new_zeros(size, size)
    last = None if final.last is None else final.last.mT
    if final.inverse is not None:
        diagonal = (final.num_blocks - (last is not None)) * final.inverse.mT
    for level in reversed(levels):
        # L T⁻¹ U is subtracted from T and from T'.
        lower_upper = diagonal if last is None else diagonal + _embed(last, size)
        products = -torch.cat(
            [torch.cat([lower, lower_upper], dim=1), torch.cat([diagonal, upper], dim=1)]
        )
        column = products @ level.right.mT  # M̄
        row = level.left.mT @ products  # N̄
        lower = column[:size] + row[:, :size]
        upper = column[size:] + row[:, size:]
        # The eliminated blocks T; an eliminated T' is not counted.
        count = level.num_blocks // 2 if level.last_block else (level.num_blocks + 1) // 2
        diagonal = diagonal + count * level.inverse.mT - level.left.mT @ column
        if last is not None and (level.is_toeplitz or level.last_block):
            diagonal = diagonal + last  # the next level's T' was computed from T
        if level.last_block is not None:
            # The same formulas for U T'⁻¹ L, with the first m columns of U and rows of L.
            assert last is not None
            inverse, left, right = level.last_block
            num_missing = size - len(inverse)
            column, row = last @ right.mT, left.mT @ last
            upper = upper - F.pad(column, (0, num_missing))
            lower = lower - F.pad(row, (0, 0, 0, num_missing))
            last = inverse.mT + left.mT @ column
        elif level.is_toeplitz:
            last = None
    if last is not None:
        diagonal = diagonal + _embed(last, size)
    return torch.cat([lower, diagonal, upper], dim=1)


def _embed(block: Tensor, size: int) -> Tensor:
    """The block, continued by zeros below and to the right to ``(size, size)``."""
    num_missing = size - len(block)
    return F.pad(block, (0, num_missing, 0, num_missing))


def _step(level: _Level) -> _Step:
    """The factors for J: ``T⁻¹``, ``L T⁻¹``, ``U T⁻¹`` forward, ``T⁻¹ L``, ``T⁻¹ U`` backward."""
    last_forward = last_backward = None
    if level.last_block is not None:
        last_forward = torch.cat([level.last_block.inverse, level.last_block.left]).mT
        last_backward = level.last_block.right.mT
    return _Step(
        level.num_blocks,
        torch.cat([level.inverse, level.left]).mT,
        torch.cat(level.right.chunk(2, dim=1)).mT,
        last_forward,
        last_backward,
    )


def _transposed_step(level: _Level) -> _Step:
    """The factors for Jᵀ.

    Its blocks are Uᵀ, Tᵀ, Lᵀ in the place of L, T, U, so that ``L T⁻¹`` becomes ``(T⁻¹ U)ᵀ``, and
    so on.
    """
    last_forward = last_backward = None
    if level.last_block is not None:
        last_forward = torch.cat([level.last_block.inverse, level.last_block.right], dim=1)
        last_backward = level.last_block.left
    return _Step(
        level.num_blocks,
        torch.cat([level.inverse, *level.right.chunk(2, dim=1)[::-1]], dim=1),
        torch.cat(level.left.chunk(2)[::-1], dim=1),
        last_forward,
        last_backward,
    )


def _solve(blocks: Tensor, steps: list[_Step], final: _FinalLevel, transposed: bool) -> None:
    """Overwrite the right-hand sides, shape ``(B, n, b)``, with the solutions.

    If m < b, the last block ends with zeros, before and after.
    """
    size = blocks.shape[-1]
    stack = []
    for step in steps:
        last_block = step.last_forward
        stop = step.num_blocks if last_block is None else step.num_blocks - 1
        eliminated, remaining = blocks[:, 0:stop:2], blocks[:, 1::2]
        # h ← T⁻¹ h in eliminated blocks; h ← h − L T⁻¹ h_left − U T⁻¹ h_right in the others.
        products = eliminated @ step.forward
        eliminated.copy_(products[..., :size])
        remaining -= products[:, : step.num_blocks // 2, size : 2 * size]
        remaining[:, : eliminated.shape[1] - 1] -= products[:, 1:, 2 * size :]
        if last_block is not None:
            products = blocks[:, -1, : len(last_block)] @ last_block
            blocks[:, -1, : len(last_block)] = products[:, : len(last_block)]
            blocks[:, -1, len(last_block) :] = 0
            remaining[:, -1] -= products[:, len(last_block) :]
        stack.append((blocks, eliminated, remaining))
        blocks = remaining
    _solve_final(blocks, final, transposed)
    for step, (blocks, eliminated, remaining) in zip(reversed(steps), reversed(stack), strict=True):
        # x = T⁻¹ h − T⁻¹ L x_left − T⁻¹ U x_right in eliminated blocks.
        products = remaining @ step.backward
        eliminated[:, 1:] -= products[:, : eliminated.shape[1] - 1, :size]
        eliminated[:, : step.num_blocks // 2] -= products[..., size:]
        if step.last_backward is not None:
            last_size = step.last_backward.shape[1]
            blocks[:, -1, :last_size] -= remaining[:, -1] @ step.last_backward


def _solve_final(blocks: Tensor, final: _FinalLevel, transposed: bool) -> None:
    """The same for blocks that do not interact."""
    if final.inverse is not None:
        inverse = final.inverse if transposed else final.inverse.mT
        regular = blocks if final.last is None else blocks[:, :-1]
        regular.copy_(regular @ inverse)
    if final.last is not None:
        inverse = final.last if transposed else final.last.mT
        last = blocks[:, -1, : len(inverse)]
        last.copy_(last @ inverse)
        blocks[:, -1, len(inverse) :] = 0

"""The zero-padded convolution as a block tridiagonal matrix, eliminated by cyclic reduction.

A kernel reaches ``h = (kh − 1)/2`` rows up and down. Grouped into blocks of h rows (times all
channels and columns), an image is a sequence of n blocks in which only neighbours interact, and
every block interacts in the same way: J is block tridiagonal and block Toeplitz,
with n = ⌈H / h⌉ blocks of size b = h C W in a column::

        ⎡ T U      ⎤
    J = ⎢ L T U    ⎥
        ⎢   L T U  ⎥
        ⎣     L T' ⎦

Only the last block, T', may differ: it is shorter if h does not divide H. To eliminate every other
block, the first, third, fifth, …, leaves a matrix of half as many blocks and of the same form,

    T ← T − L T⁻¹ U − U T⁻¹ L,     L ← −L T⁻¹ L,     U ← −U T⁻¹ U,

whose last block still differs from the others (the last one that stays has lost its right
neighbour, or none). So ⌊log₂ n⌋ + 1 levels of a few b×b products and one inverse give ``log|det
J|``, the same formulas backwards its gradient, and the kept products a solver:
O(b³ log n) instead of the O(b³ n) of eliminating block after block, and the O(b³ n³) of a dense
factorization. Where L and U shrink to nothing, which they do quadratically, the levels end early.

There is no pivoting between the blocks: a leading block may be singular although J is not. Whether
that did harm is for the caller to check (:mod:`pyro_snf.conv.exact` does). All is in float64: that
costs little more than float32 here, and makes up for the pivoting in all but rare cases.

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


class _Ending(NamedTuple):
    """The last block of a level, T' of shape ``(m, m)``, where it is eliminated and not T."""

    inverse: Tensor  # T'⁻¹, shape (m, m)
    left: Tensor  # U T'⁻¹, shape (b, m)
    right: Tensor  # T'⁻¹ L, shape (m, b)


class _Level(NamedTuple):
    """What the elimination of every other block leaves behind.

    ``n // 2`` blocks stay, as many are eliminated, and if n is odd, so is the last one.
    """

    number: int  # n
    uniform: bool  # the last block is T
    inverse: Tensor  # T⁻¹, shape (b, b)
    left: Tensor  # L T⁻¹ above U T⁻¹, shape (2b, b)
    right: Tensor  # T⁻¹ L beside T⁻¹ U, shape (b, 2b)
    ending: _Ending | None


class _Rest(NamedTuple):
    """The last level: n blocks without neighbours, the last of them T' or, if None, also T."""

    number: int
    inverse: Tensor | None  # T⁻¹, shape (b, b); None if there is only T'
    last: Tensor | None  # T'⁻¹, shape (m, m)


class _Step(NamedTuple):
    """A level's factors for a solve, for images as rows: to multiply from the right."""

    level: _Level
    forward: Tensor  # shape (b, 3b)
    backward: Tensor  # shape (b, 2b)
    last_forward: Tensor | None  # shape (m, m + b)
    last_backward: Tensor | None  # shape (b, m)


class BlockTridiagonal:
    """The factors of one zero-padded convolution, made when they are first needed.

    All results are in float64, not finite where a block is exactly singular, and differentiable
    in the kernel if that has an autograd graph (all but :meth:`solve`).

    :param Tensor kernel: w, shape ``(C, C, kh, kw)``.
    :param image_size: ``(H, W)``.
    :param bool by_columns: whether rows and columns are exchanged.
    """

    def __init__(self, kernel: Tensor, image_size: tuple[int, int], by_columns: bool) -> None:
        self.by_columns = by_columns
        self.kernel = kernel.double().mT if by_columns else kernel.double()
        self.height, self.width = image_size[::-1] if by_columns else image_size
        self.rows = max(self.kernel.shape[-2] // 2, 1)
        self.number = math.ceil(self.height / self.rows)
        # The last block: its first m rows and columns are there, of b.
        self.last_size = (self.height - (self.number - 1) * self.rows) * len(kernel) * self.width

    @cached_property
    def _layout(self) -> _Layout:
        return _Layout.of(self.kernel, self.rows, self.width)

    @cached_property
    def _elimination(self) -> tuple[Tensor, list[_Level], _Rest]:
        return _eliminate(self._layout.blocks(self.kernel), self.number, self.last_size)

    @property
    def log_abs_det(self) -> Tensor:
        """``log|det J|``, shape ``()``."""
        return self._elimination[0]

    @cached_property
    def kernel_gradient(self) -> Tensor:
        """``∂ log|det J| / ∂w``, shape ``(C, C, kh, kw)``."""
        _, levels, rest = self._elimination
        size = self.rows * len(self.kernel) * self.width
        gradient = self._layout.kernel_gradient(_differentiate(levels, rest, size))
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
        # An image as a row of n blocks of h rows; the last one ends with rows of zeros if short.
        lines = images.double().transpose(1, 2)
        missing = self.number * self.rows - self.height
        lines = F.pad(lines, (0, 0, 0, 0, 0, missing)) if missing else lines
        blocks = lines.reshape(len(images), self.number, -1)
        if blocks.data_ptr() == images.data_ptr():
            blocks = blocks.clone(memory_format=torch.contiguous_format)
        _solve(blocks, steps, self._elimination[2], transposed)
        lines = blocks.view(len(images), -1, *lines.shape[2:])[:, : self.height]
        solution = lines.transpose(1, 2)
        return (solution.mT if self.by_columns else solution).to(images.dtype).contiguous()


def elimination_flops(
    channels: int, kernel_size: tuple[int, int], image_size: tuple[int, int]
) -> float:
    """About how many floating-point operations value and gradient take, with blocks of rows."""
    rows = max(kernel_size[0] // 2, 1)
    number = math.ceil(image_size[0] / rows)
    size = min(rows, image_size[0]) * channels * image_size[1]
    # An inverse and its determinant: 8/3 b³. The products of a level: 16 b³ forward and 20 b³
    # backward; with the short or otherwise different last block: up to 13 b³ more.
    return (number.bit_length() - 1) * 45.0 * size**3 + 8 / 3 * size**3


def _toeplitz(kernel_size: int, rows: int, columns: int, offset: int) -> Tensor:
    """``[a, r, s] = 1`` where ``s − r + offset = a``, else 0: shape ``(kernel, rows, columns)``."""
    offsets = torch.arange(columns) - torch.arange(rows)[:, None] + offset
    return (offsets == torch.arange(kernel_size)[:, None, None]).double()


class _Layout(NamedTuple):
    """Where the kernel's entries stand in ``[L T U]``, shape ``(b, 3b)``: a linear map and its Aᵀ.

    The rows of a block are ordered by row, channel and column of the image.
    """

    vertical: Tensor  # shape (3h², kh)
    horizontal: Tensor  # shape (kw, W²)
    shape: tuple[int, ...]  # (C, C, h, 3h, W, W)

    @classmethod
    def of(cls, kernel: Tensor, rows: int, width: int) -> _Layout:
        channels, _, kernel_height, kernel_width = kernel.shape
        # L's columns are h rows above those of T.
        vertical = _toeplitz(kernel_height, rows, 3 * rows, kernel_height // 2 - rows)
        horizontal = _toeplitz(kernel_width, width, width, kernel_width // 2)
        return cls(
            vertical.flatten(1).mT.to(kernel.device),
            horizontal.flatten(1).to(kernel.device),
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


def _negligible(lower: Tensor, upper: Tensor, diagonal: Tensor) -> bool:
    """Whether L and U are below the rounding of T.

    The log-determinant depends on their product, eps², and its gradient on one of them times one of
    the previous level's, some eps^1.5: both far below rounding.
    """
    coupling = torch.maximum(lower.detach().abs().max(), upper.detach().abs().max())
    return bool(coupling <= torch.finfo(diagonal.dtype).eps * diagonal.detach().abs().max())


def _eliminate(blocks: Tensor, number: int, last_size: int) -> tuple[Tensor, list[_Level], _Rest]:
    """``log|det J|`` and what its gradient and the solves need.

    :param Tensor blocks: ``[L T U]``, shape ``(b, 3b)``.
    :param int number: n.
    :param int last_size: m; the last block is ``T[:m, :m]``, and so are its neighbours cut.
    """
    size = len(blocks)
    lower, diagonal, upper = blocks.chunk(3, dim=1)
    last = None if last_size == size else diagonal[:last_size, :last_size]  # None: it is T
    value = blocks.new_zeros(())
    levels: list[_Level] = []
    while number > 1 and not (levels and _negligible(lower, upper, diagonal)):
        inverse, log_det = _invert(diagonal)
        both = torch.cat([lower, upper], dim=1)
        left = torch.cat([lower, upper]) @ inverse
        products = left @ both
        low_up = products[:size, size:]
        reduced = diagonal - low_up - products[size:, :size]
        uniform = last is None
        ending: _Ending | None = None
        value = value + number // 2 * log_det
        if number % 2 == 0:
            # The last block stays, and has no right neighbour to lose.
            last_size = size if last is None else len(last)
            last = (diagonal if last is None else last) - low_up[:last_size, :last_size]
        elif last is None:
            value = value + log_det
        else:
            # The last block goes; the one before it loses the usual left neighbour, and this.
            last_inverse, last_log_det = _invert(last)
            value = value + last_log_det
            ending = _Ending(
                last_inverse,
                upper[:, : len(last)] @ last_inverse,
                last_inverse @ lower[: len(last)],
            )
            last = diagonal - low_up - ending.left @ lower[: len(last)]
        levels.append(_Level(number, uniform, inverse, left, inverse @ both, ending))
        lower, diagonal, upper = -products[:size, :size], reduced, -products[size:, size:]
        number //= 2
    rest = _Rest(number, None, None)
    if number > 1 or last is None:
        inverse, log_det = _invert(diagonal)
        value = value + (number - (last is not None)) * log_det
        rest = rest._replace(inverse=inverse)
    if last is not None:
        inverse, log_det = _invert(last)
        value = value + log_det
        rest = rest._replace(last=inverse)
    return value, levels, rest


def _differentiate(levels: list[_Level], rest: _Rest, size: int) -> Tensor:
    """The gradient of ``log|det J|`` in ``[L T U]``, shape ``(b, 3b)``.

    It is the sum of the blocks of J⁻ᵀ on the three diagonals; from level to level by the chain
    rule. With M = [L; U] one above the other, N = [L U] side by side and K = M T⁻¹ N,

        dK = dM T⁻¹N + M T⁻¹ dN − M T⁻¹ dT T⁻¹N,

    so a gradient K̄ in K is ``K̄ (T⁻¹N)ᵀ`` in M, ``(M T⁻¹)ᵀ K̄`` in N and minus both in T.
    """
    # Of the level's L, T, U, and of its T' where that is not T.
    some = rest.inverse if rest.inverse is not None else rest.last
    assert some is not None
    lower = upper = diagonal = some.new_zeros(size, size)
    last = None if rest.last is None else rest.last.mT
    if rest.inverse is not None:
        diagonal = (rest.number - (last is not None)) * rest.inverse.mT
    for level in reversed(levels):
        low_up = diagonal
        if last is not None:
            missing = size - len(last)
            low_up = diagonal + F.pad(last, (0, missing, 0, missing))
        products = -torch.cat(
            [torch.cat([lower, low_up], dim=1), torch.cat([diagonal, upper], dim=1)]
        )
        above = products @ level.right.mT
        beside = level.left.mT @ products
        lower = above[:size] + beside[:, :size]
        upper = above[size:] + beside[:, size:]
        # The last one counts as another T if it is eliminated and T.
        count = level.number // 2 if level.ending else (level.number + 1) // 2
        diagonal = diagonal + count * level.inverse.mT - level.left.mT @ above
        if last is not None and (level.uniform or level.ending):
            diagonal = diagonal + last  # the reduced T' was made from T
        if level.ending is not None:
            # d(U T'⁻¹ L), as above, for the first m columns of U and rows of L
            assert last is not None
            inverse, left, right = level.ending
            missing = size - len(inverse)
            above, beside = last @ right.mT, left.mT @ last
            upper = upper - F.pad(above, (0, missing))
            lower = lower - F.pad(beside, (0, 0, 0, missing))
            last = inverse.mT + left.mT @ above
        elif level.uniform:
            last = None
    if last is not None:
        missing = size - len(last)
        diagonal = diagonal + F.pad(last, (0, missing, 0, missing))
    return torch.cat([lower, diagonal, upper], dim=1)


def _step(level: _Level) -> _Step:
    """The factors for J: ``T⁻¹``, ``L T⁻¹``, ``U T⁻¹`` forward, ``T⁻¹ L``, ``T⁻¹ U`` backward."""
    last_forward = last_backward = None
    if level.ending is not None:
        last_forward = torch.cat([level.ending.inverse, level.ending.left]).mT
        last_backward = level.ending.right.mT
    return _Step(
        level,
        torch.cat([level.inverse, level.left]).mT,
        torch.cat(level.right.chunk(2, dim=1)).mT,
        last_forward,
        last_backward,
    )


def _transposed_step(level: _Level) -> _Step:
    """Those for Jᵀ, which has Uᵀ, Tᵀ, Lᵀ for L, T, U: ``L T⁻¹`` is ``(T⁻¹ U)ᵀ``, and so on."""
    last_forward = last_backward = None
    if level.ending is not None:
        last_forward = torch.cat([level.ending.inverse, level.ending.right], dim=1)
        last_backward = level.ending.left
    return _Step(
        level,
        torch.cat([level.inverse, *level.right.chunk(2, dim=1)[::-1]], dim=1),
        torch.cat(level.left.chunk(2)[::-1], dim=1),
        last_forward,
        last_backward,
    )


def _solve(blocks: Tensor, steps: list[_Step], rest: _Rest, transposed: bool) -> None:
    """Overwrite the right-hand sides, shape ``(B, n, b)``, with the solutions.

    A last block that is short ends with entries that are not there: zeros, before and after.
    """
    size = blocks.shape[-1]
    stack = []
    for step in steps:
        number, ending = step.level.number, step.last_forward
        gone = blocks[:, 0 : number if ending is None else number - 1 : 2]
        kept = blocks[:, 1::2]
        # h_gone ← T⁻¹ h_gone,   h_kept ← h_kept − L T⁻¹ h_left − U T⁻¹ h_right
        products = gone @ step.forward
        gone.copy_(products[..., :size])
        kept -= products[:, : number // 2, size : 2 * size]
        kept[:, : gone.shape[1] - 1] -= products[:, 1:, 2 * size :]
        if ending is not None:
            products = blocks[:, -1, : len(ending)] @ ending
            blocks[:, -1, : len(ending)] = products[:, : len(ending)]
            blocks[:, -1, len(ending) :] = 0
            kept[:, -1] -= products[:, len(ending) :]
        stack.append((blocks, gone, kept))
        blocks = kept
    _solve_rest(blocks, rest, transposed)
    for step, (blocks, gone, kept) in zip(reversed(steps), reversed(stack), strict=True):
        # x_gone = T⁻¹ h_gone − T⁻¹ L x_left − T⁻¹ U x_right
        products = kept @ step.backward
        gone[:, 1:] -= products[:, : gone.shape[1] - 1, :size]
        gone[:, : step.level.number // 2] -= products[..., size:]
        if step.last_backward is not None:
            last_size = step.last_backward.shape[1]
            blocks[:, -1, :last_size] -= kept[:, -1] @ step.last_backward


def _solve_rest(blocks: Tensor, rest: _Rest, transposed: bool) -> None:
    """The same for blocks without neighbours."""
    if rest.inverse is not None:
        inverse = rest.inverse if transposed else rest.inverse.mT
        some = blocks if rest.last is None else blocks[:, :-1]
        some.copy_(some @ inverse)
    if rest.last is not None:
        inverse = rest.last if transposed else rest.last.mT
        last = blocks[:, -1, : len(inverse)]
        last.copy_(last @ inverse)
        blocks[:, -1, len(inverse) :] = 0

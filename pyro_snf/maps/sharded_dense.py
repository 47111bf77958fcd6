"""The dense matrix ``A = I + Θ/√D`` whose rows lie on the ranks of a process group.

Θ, its gradient and matrices like them are DTensors, ``Shard(0)`` on a mesh of one dimension: each
of P ranks has D/P rows, and none ever has D × D numbers. Events, probes and all other tensors are
plain ones, the same on all ranks. Three products, each of a thin matrix, are all that needs
communication or a gradient, and the gradient of each consists of the other two. For rows x and l:

    x Mᵀ   columns of the result come from rows of M: local, then all-gather of (B, D)
    x M    a sum over the rows of M: local, then all-reduce of (B, D)
    lᵀ x   rows of the result come from columns of l: local

All ranks get the same bits from these collectives, so that they take the same decisions.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, Replicate, Shard

from pyro_snf.caching import fingerprint_of
from pyro_snf.iteration import refine_linear_solution
from pyro_snf.maps.base import Factors
from pyro_snf.maps.dense import Dense, check_condition, norm_of_inverse
from pyro_snf.maps.sharded_inverse import inverse_transposed
from pyro_snf.precision import at_least_float32, singular, without_autocast

__all__ = ["ShardedDense", "ShardedInverse"]


def _group_of(matrix: Tensor) -> dist.ProcessGroup:
    """The process group whose ranks have the rows of a DTensor."""
    return cast(DTensor, matrix).device_mesh.get_group()


@torch.no_grad()
def _rows_of(matrix: Tensor) -> Tensor:
    """This rank's rows of a DTensor, shape ``(D/P, D)``, which share its memory."""
    return cast(DTensor, matrix).to_local()


def _like(rows: Tensor, matrix: Tensor) -> DTensor:
    """A DTensor from this rank's rows, with the layout of another one."""
    mesh = cast(DTensor, matrix).device_mesh
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)


def _range_of(matrix: Tensor) -> slice:
    """The indices of this rank's rows."""
    size = len(_rows_of(matrix))
    first = size * dist.get_rank(_group_of(matrix))
    return slice(first, first + size)


def _summed(tensor: Tensor, matrix: Tensor) -> Tensor:
    """A tensor's sum over the ranks, in place."""
    dist.all_reduce(tensor, group=_group_of(matrix))
    return tensor


@fingerprint_of.register
def _fingerprint_of_shards(tensor: DTensor) -> Tensor:
    if tensor.placements != (Shard(0),) or len(tensor) % tensor.device_mesh.size() != 0:
        return fingerprint_of(tensor.full_tensor())  # not one of shard, but of fully_shard, say
    return _gathered(fingerprint_of(_rows_of(tensor)), tensor)


def _gathered(pieces: Tensor, matrix: Tensor) -> Tensor:
    """The pieces of all ranks, one after the other along the first dimension."""
    group = _group_of(matrix)
    num_ranks = dist.get_world_size(group)
    whole = pieces.new_empty(len(pieces) * num_ranks, *pieces.shape[1:])
    dist.all_gather(list(whole.chunk(num_ranks)), pieces.contiguous(), group=group)
    return whole


class _Product(Function):
    """``x Mᵀ`` for rows x, shape ``(B, D)``, or one of shape ``(D,)``."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, x)
        rows = _rows_of(matrix)
        with without_autocast(rows.device):
            return _gathered(rows @ x.to(rows.dtype).t(), matrix).t().contiguous()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrix, x = ctx.saved_tensors
        for_matrix, for_x = ctx.needs_input_grad
        return (
            _OuterProduct.apply(cotangent, x, matrix) if for_matrix else None,
            _TransposedProduct.apply(matrix, cotangent) if for_x else None,
        )


class _TransposedProduct(Function):
    """``x M`` for rows x, shape ``(B, D)``, or one of shape ``(D,)``."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, x)
        rows = _rows_of(matrix)
        with without_autocast(rows.device):
            return _summed(x[..., _range_of(matrix)].to(rows.dtype) @ rows, matrix)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrix, x = ctx.saved_tensors
        for_matrix, for_x = ctx.needs_input_grad
        return (
            _OuterProduct.apply(x, cotangent, matrix) if for_matrix else None,
            _Product.apply(matrix, cotangent) if for_x else None,
        )


class _OuterProduct(Function):
    """``lᵀ r`` for rows l and r, shape ``(B, D)``, in the layout of a matrix, a constant here."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        dtype = matrix.dtype
        with without_autocast(left.device):
            product = left[:, _range_of(matrix)].to(dtype).mT @ right.to(dtype)
        return _like(product, matrix)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        left, right = ctx.saved_tensors
        for_left, for_right, _ = ctx.needs_input_grad
        return (
            _Product.apply(cotangent, right) if for_left else None,
            _TransposedProduct.apply(cotangent, left) if for_right else None,
            None,
        )


class ShardedDense(Dense):
    """:class:`~pyro_snf.maps.dense.Dense` for a Θ of shape ``(D, D)`` that is a DTensor."""

    def identity(self, theta: Tensor) -> Tensor:
        rows = torch.zeros_like(_rows_of(theta))
        rows[:, _range_of(theta)].fill_diagonal_(1)
        return _like(rows, theta)

    def multiply(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.add(x, _Product.apply(theta, x), alpha=self.theta_scale(theta))

    def multiply_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.add(x, _TransposedProduct.apply(theta, x), alpha=self.theta_scale(theta))

    def apply_weight(self, weight: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
        if cast(DTensor, weight).placements[0] != Shard(0):  # R, of which Rᵀ is kept by rows
            weight, transposed = weight.mT, not transposed
        return (_TransposedProduct if transposed else _Product).apply(weight, x)

    def scale_rows(self, weight: Tensor, factors: Tensor) -> Tensor:
        mesh = cast(DTensor, weight).device_mesh
        replicated = DTensor.from_local(factors, mesh, [Replicate()], run_check=False)
        return super().scale_rows(weight, replicated)

    def gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        return _OuterProduct.apply(cotangent * self.theta_scale(theta), x, theta)

    @torch.no_grad()
    def add_product(self, matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> None:
        super().add_product(_rows_of(matrix), left[:, _range_of(matrix)], right, alpha)
        increment_version(matrix)  # which has not seen what its shards did

    @torch.no_grad()
    def inner(self, matrix: Tensor, other: Tensor) -> Tensor:
        return _summed(super().inner(_rows_of(matrix), _rows_of(other)), matrix)

    @torch.no_grad()
    def trace(self, matrix: Tensor) -> Tensor:
        return _summed(super().trace(_rows_of(matrix)[:, _range_of(matrix)]), matrix)

    def norm_bound(self, theta: Tensor) -> Tensor:
        return _norm_bound(self.weight(theta))

    def factorize(self, theta: Tensor, event_shape: torch.Size) -> ShardedInverse:
        return ShardedInverse(self.weight(theta.detach()))


class ShardedInverse(Factors):
    """The inverse of a matrix A, a DTensor, in the place of factors: O(D³/P) on each rank."""

    @cached_property
    @torch.no_grad()
    def _unchecked(self) -> tuple[Tensor, Tensor]:
        """``A⁻ᵀ`` and ``log|det A|``."""
        rows = at_least_float32(_rows_of(self.weight))
        num_infinite = _summed((~torch.isfinite(rows)).sum(), self.weight)
        if num_infinite > 0:
            raise singular("the weight has NaN or infinite entries")
        inverse_rows, log_abs_det = inverse_transposed(rows, _group_of(self.weight))
        return _like(inverse_rows, self.weight), log_abs_det.to(rows.dtype)

    @cached_property
    @torch.no_grad()
    def condition(self) -> float:
        """``‖A‖ ‖A⁻¹‖₂``, the latter from below, by power iteration on ``A⁻ᵀA⁻¹``: O(D²/P)."""
        return (_norm_bound(self.weight) * norm_of_inverse(self._multiply, self.weight)).item()

    def _multiply(self, h: Tensor, transposed: bool) -> Tensor:
        """The computed ``A⁻¹ h`` (or ``A⁻ᵀ h``) for rows h."""
        inverse_t, _ = self._unchecked
        return _SHARDED_DENSE.apply_weight(inverse_t, h, transposed=not transposed)

    @cached_property
    def _checked(self) -> tuple[Tensor, Tensor]:
        inverse_t, log_abs_det = self._unchecked
        check_condition(self.condition, inverse_t.dtype)
        return inverse_t, log_abs_det

    @property
    def log_abs_det(self) -> Tensor:
        return self._checked[1]

    @property
    def gradient(self) -> Tensor:
        """``A⁻ᵀ``, shape ``(D, D)``, a DTensor like A."""
        return self._checked[0]

    @torch.no_grad()
    def solve(self, right_side: Tensor, transposed: bool = False) -> Tensor:
        """See :class:`~pyro_snf.maps.base.Factors`: by products with A⁻¹, refined to rounding."""
        inverse_t, _ = self._checked
        weight = self.weight.to(inverse_t.dtype)

        def approximate(h: Tensor) -> Tensor:
            return self._multiply(h, transposed)

        return refine_linear_solution(
            lambda x: _SHARDED_DENSE.apply_weight(weight, x, transposed),
            approximate,
            approximate,  # there is nothing more exact than the best of the refined solutions
            right_side.to(inverse_t.dtype),
            norm=_norm_bound(weight),
        ).to(right_side.dtype)

    def differentiable_gradient(self, weight: Tensor) -> Tensor:
        raise RuntimeError("a sharded log-determinant has no second derivative")


_SHARDED_DENSE = ShardedDense()


def _norm_bound(matrix: Tensor) -> Tensor:
    """An upper bound of ``‖A‖₂``, shape ``()``: ``(‖A‖₁ ‖A‖_∞)^½``."""
    rows = at_least_float32(_rows_of(matrix)).abs()
    largest_row = rows.sum(1).max()
    dist.all_reduce(largest_row, dist.ReduceOp.MAX, group=_group_of(matrix))
    return (largest_row * _summed(rows.sum(0), matrix).max()).sqrt()

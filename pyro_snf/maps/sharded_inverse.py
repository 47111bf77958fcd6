"""The inverse and the determinant of a matrix whose rows lie on the ranks of a process group.

Blocked Gauss–Jordan elimination with partial pivoting, in place, on the transpose ``N = Aᵀ``. A
rank has some rows of A, that is whole *columns* of N, so that the search for pivots in a column
concerns that rank alone. For the next b columns K of N, which the *panel* C consists of:

1. Their rank factorizes C with partial pivoting among the rows that have not been pivots, and
   broadcasts C and the exchanges of rows. Every rank makes these exchanges in its columns.
2. With ``D = C[K]``, the b pivots' rows, every rank does for its columns J of N

       N[K, J] ← D⁻¹ N[K, J],      N[I, J] ← N[I, J] − C[I] N[K, J]  in all other rows I,

   and the panel's rank puts columns of the identity in the place of C beforehand, from which the
   same two products make columns of the inverse.
3. ``det N`` is the product of all ``det D``, up to its sign.

After all panels, N has become ``(PN)⁻¹``, P being the exchanges: ``N⁻¹ = (PN)⁻¹ P``. Blocks are
exchanged between the ranks so that each has the rows of ``A⁻ᵀ = N⁻¹`` that it has of A.

All ranks are busy to the end, unlike with LU factors: each makes ``2D³/P`` operations, in all as
many as LU factors and an inverse from them take. A rank receives ``D²`` numbers in panels, and
needs memory for ``2D²/P`` numbers and a panel's ``bD``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_snf.precision import singular

__all__ = ["inverse_transposed"]

# Columns of a panel. From 72 on, an H100 spends more time on a panel's products in float32 than on
# reading and writing N; and a panel is to stay small next to D/P rows.
_PANEL_WIDTH = 128


@torch.no_grad()
def inverse_transposed(rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """``A⁻ᵀ`` and ``log|det A|``; to be called by all ranks of the group.

    :param Tensor rows: this rank's rows of A, shape ``(D/P, D)``, in the order of the ranks.
    :return: this rank's rows of ``A⁻ᵀ``, shape ``(D/P, D)``, and ``log|det A|`` in float64, shape
        ``()``, which is the same on all ranks.
    :raises torch.linalg.LinAlgError: on all ranks, if a pivot is zero.
    """
    work = rows.clone(memory_format=torch.contiguous_format)  # columns of N, as rows
    size, dim = work.shape
    order = torch.arange(dim, device=work.device)  # the row of N that is now the i-th
    log_abs_det = torch.zeros((), dtype=torch.float64, device=work.device)
    for owner in range(dist.get_world_size(group)):
        for start in range(0, size, _PANEL_WIDTH):
            columns = slice(start, min(start + _PANEL_WIDTH, size))
            panel, moved = _next_panel(work, columns, owner, group)
            if moved:
                to, origin = list(moved), list(moved.values())
                for rows_of_n in (panel.mT, work, order):
                    rows_of_n[..., to] = rows_of_n[..., origin]
            first = owner * size + start
            pivots = slice(first, first + panel.shape[1])
            if dist.get_rank(group) == owner:
                work[columns] = 0
                work[columns, pivots].fill_diagonal_(1)
            log_abs_det += _eliminate(work, panel, pivots)
    return _exchange(work, order, group), log_abs_det


def _next_panel(
    work: Tensor, columns: slice, owner: int, group: dist.ProcessGroup
) -> tuple[Tensor, dict[int, int]]:
    """The panel C, shape ``(D, b)``, and for each row that its pivots move the row it comes from.

    :param columns: those of the panel among the columns of its rank.
    :param owner: that rank.
    """
    size, dim = work.shape
    width = columns.stop - columns.start
    first = owner * size + columns.start
    if dist.get_rank(group) == owner:
        panel = work[columns].mT.clone(memory_format=torch.contiguous_format)
        pivots = torch.linalg.lu_factor_ex(panel[first:]).pivots
    else:
        panel = work.new_empty(dim, width)
        pivots = torch.empty(width, dtype=torch.int32, device=work.device)
    source = dist.get_global_rank(group, owner)
    dist.broadcast(panel, source, group=group)
    dist.broadcast(pivots, source, group=group)
    moved: dict[int, int] = {}
    for here, pivot in enumerate(pivots.tolist(), first):
        there = first + pivot - 1  # LAPACK counts from 1
        if here != there:
            moved[here], moved[there] = moved.get(there, there), moved.get(here, here)
    return panel, moved


def _eliminate(work: Tensor, panel: Tensor, pivots: slice) -> Tensor:
    """Step 2 of the module's text; ``log|det D|``. The panel is written to."""
    # All ranks have the same numbers here, and meet a zero pivot together.
    lu, exchanges, info = torch.linalg.lu_factor_ex(panel[pivots])
    if info != 0:
        raise singular(
            f"the weight is singular: pivot {pivots.start + int(info)} of its elimination is zero"
        )
    pivot_rows = torch.linalg.lu_solve(lu, exchanges, work[:, pivots].mT)
    panel[pivots] = 0
    work.addmm_(pivot_rows.mT, panel.mT, alpha=-1)
    work[:, pivots] = pivot_rows.mT
    return lu.diagonal().abs().double().log().sum()


def _exchange(work: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From columns of ``(PN)⁻¹``, as rows, to rows of ``(PN)⁻¹ P``.

    Pairs of ranks exchange blocks of ``(D/P)²`` numbers: in turn s, those whose ranks add up to s.
    """
    size, rank, num_ranks = len(work), dist.get_rank(group), dist.get_world_size(group)
    result = torch.empty_like(work)
    for turn in range(num_ranks):
        partner = (turn - rank) % num_ranks
        columns = slice(partner * size, (partner + 1) * size)
        block = work[:, columns].contiguous()
        if partner != rank:
            received, peer = torch.empty_like(block), dist.get_global_rank(group, partner)
            operations = [
                dist.P2POp(dist.isend, block, peer, group),
                dist.P2POp(dist.irecv, received, peer, group),
            ]
            for request in dist.batch_isend_irecv(operations):
                request.wait()
            block = received
        result[:, order[columns]] = block.mT
    return result

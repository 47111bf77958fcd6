"""What processes that train one model together have to agree on.

Each process sees its own part of the data. What a layer learns from data outside of gradients, such
as the mean of a first batch, is combined over the processes (:func:`column_moments`,
:func:`mean_over_processes`), so that all of them hold the same numbers: those that one process
would have from all of the data. What averages over the data, such as the probes of a pair of
networks, is drawn by each process anew (:func:`process_rank`).

With no process group, or a group of one process, the functions do nothing.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as torch_distributed

from pyro_snf.precision import at_least_float32

__all__ = [
    "ColumnMoments",
    "check_one_process",
    "column_moments",
    "gather",
    "is_dtensor",
    "mean_over_processes",
    "num_processes",
    "process_rank",
    "set_data_group",
]

# A group of torch.distributed; None for its default group.
_data_group: Any = None


def set_data_group(group: Any) -> None:
    """Say which processes see different parts of the data, where that is not all of them.

    Processes that hold parts of one layer (tensor parallelism) see the same data. They have to draw
    the same probes, so they must not be in one data group:

    .. code-block:: python

       mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "tensor"))
       pyro_snf.processes.set_data_group(mesh["data"].get_group())

    Processes that train models of their own are groups of one:
    ``set_data_group(torch.distributed.new_subgroups(1)[0])``.

    :param group: a process group of ``torch.distributed``, this process being in it; None for the
        default group, as at first.
    """
    global _data_group
    _data_group = group


def num_processes() -> int:
    """The number of processes in the data group; 1 where ``torch.distributed`` is not in use."""
    if not (torch_distributed.is_available() and torch_distributed.is_initialized()):
        return 1
    return torch_distributed.get_world_size(_data_group)


def process_rank() -> int:
    """The rank of this process in the data group; 0 where ``torch.distributed`` is not in use."""
    return 0 if num_processes() == 1 else torch_distributed.get_rank(_data_group)


def check_one_process(name: str) -> None:
    """Raise a RuntimeError if there are several processes.

    :param str name: of what is for one, for the error.
    """
    count = num_processes()
    if count > 1:
        raise RuntimeError(
            f"expected one process for {name}; got {count}: wrap Trace_ELBO()(model, guide) in "
            "DistributedDataParallel; or, if each process is to train a guide of its own, call "
            "pyro_snf.processes.set_data_group(torch.distributed.new_subgroups(1)[0])"
        )


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, shape ``(num_processes, *shape)``, in the order of their ranks.

    What is computed from the result is the same in all processes to the last digit.

    :param Tensor tensor: of the same shape and dtype in all processes.
    """
    count = num_processes()
    if count == 1:
        return tensor.detach().unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(count)]
    torch_distributed.all_gather(parts, tensor.detach().contiguous(), group=_data_group)
    return torch.stack(parts)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over all processes, each of the same weight, as ``DistributedDataParallel`` has it.

    :param Tensor tensor: of the same shape and dtype in all processes.
    """
    return gather(tensor).mean(0)


def is_dtensor(value: object) -> bool:
    """Whether a value is a ``DTensor``, such as the shards that ``fully_shard`` makes."""
    # The module takes long to import. Where there is a DTensor, it has been.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class ColumnMoments(NamedTuple):
    """Of the columns of a sample."""

    mean: Tensor
    """Shape ``(C,)``."""
    deviation: Tensor
    """The standard deviation, shape ``(C,)``; exactly 0 for a column of equal values."""


@torch.no_grad()
def column_moments(columns: Tensor) -> ColumnMoments:
    """Mean and standard deviation of each column, over the rows of all processes.

    The moments of parts are combined by the formula of Chan, Golub and LeVeque (1983),

        μ = Σᵢ wᵢ μᵢ,      σ² = Σᵢ wᵢ (σᵢ² + (μᵢ − μ)²),      wᵢ = nᵢ / Σⱼ nⱼ,

    in which no large numbers cancel, as they do in E[x²] − μ². All means are relative to the first
    row of all: those of rows far from zero would be rounded by more than they differ.

    :param Tensor columns: the rows of this process, shape ``(N, C)``; N may differ.
    """
    columns = at_least_float32(columns)
    origin = gather(columns[0])[0]
    variance, mean = torch.var_mean(columns - origin, 0, correction=0)
    counts, means, variances = gather(
        torch.stack([torch.full_like(mean, len(columns)), mean, variance])
    ).unbind(1)
    weights = counts / counts.sum(0)
    mean = (weights * means).sum(0)
    deviation = (weights * (variances + (means - mean).square())).sum(0).sqrt()
    return ColumnMoments(origin + mean, deviation)

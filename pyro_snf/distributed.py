"""Layers whose matrices are larger than the memory of one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty

from pyro_snf.log_dets import Exact, Refined
from pyro_snf.maps.sharded_dense import ShardedDense
from pyro_snf.options import expect
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = ["shard"]


@torch.no_grad()
def shard(layer: SelfNormalizingLinear, mesh: DeviceMesh) -> SelfNormalizingLinear:
    r"""Distribute the matrices of a layer over the ranks of a mesh, in place, by rows.

    Θ, its gradient, its optimizer state and the tracked inverse R become DTensors with D/P rows on
    each of P ranks. No rank makes a D × D matrix from here on, neither in a training step nor in a
    refactorization nor in ``eval()``. What the layer computes stays the same, up to rounding. The
    rest of a flow is replicated: **all ranks call it with the same inputs**, as they do if they
    draw batches and samples from equal seeds. A refactorization, and a log-determinant in
    ``eval()``, take O(D³/P) operations and ``3D²/P`` numbers of memory on each rank.

    A layer that no device could hold is made with ``device="meta"``, without memory, and starts on
    the mesh as it would have started elsewhere. Of any other layer, that of the mesh's first rank
    is distributed. Make optimizers afterwards, for Θ is another parameter then.

    >>> torch.distributed.init_process_group(  # of one process; torchrun starts more
    ...     "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    ... )
    >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))
    >>> layer = shard(SelfNormalizingLinear(4096, device="meta"), mesh)
    >>> layer.theta.placements
    (Shard(dim=0),)
    >>> torch.distributed.destroy_process_group()

    :param SelfNormalizingLinear layer: with ``log_det="refined"`` or ``"exact"``.
    :param DeviceMesh mesh: of one dimension. Of a mesh with more, pass one of its dimensions,
        ``mesh["tensor"]``; the layer is replicated over the others.
    :return: the layer.
    :raises ValueError: for other layers, and unless D is a multiple of the number of ranks.
    :raises RuntimeError: where a log-determinant is differentiated twice.
    """
    method: Any = getattr(layer, "log_det", None)
    fits = isinstance(layer, SelfNormalizingLinear) and isinstance(method, Refined | Exact)
    expect("a SelfNormalizingLinear with log_det 'refined' or 'exact'", fits, layer)
    theta, num_ranks = layer.theta, mesh.size()
    expect("a layer that is not sharded", not isinstance(theta, DTensor), layer)
    expect("a mesh of one dimension", mesh.ndim == 1, mesh)
    is_multiple = layer.input_dim % num_ranks == 0
    expect(f"input_dim, a multiple of the {num_ranks} ranks", is_multiple, layer.input_dim)
    devices = (mesh.device_type, "meta")
    expect(f"a layer on {' or '.join(devices)}", theta.device.type in devices, theta.device)

    if theta.is_meta:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter is theta:
                memory: Tensor = empty(
                    theta.shape, dtype=theta.dtype, device_mesh=mesh, placements=[Shard(0)]
                )
            else:
                memory = torch.empty_like(parameter, device=mesh.device_type)
            setattr(layer, name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
        layer.reset_parameters()
        method.setup(ShardedDense(), layer.theta.detach())
        _replicate(state := dict(method.named_buffers()), mesh.get_group())
        method.load_state_dict(state, strict=False)  # the seed of probes
    else:
        state = {
            name: distribute_tensor(value, mesh, [Shard(0)])
            if value.shape == theta.shape
            else value
            for name, value in layer.state_dict().items()
        }
        method.setup(ShardedDense(), state["theta"])
        _replicate(state, mesh.get_group())
        layer.load_state_dict(state, assign=True)
    layer.clear_cache()
    return layer


def _replicate(state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Give all ranks what the first has, apart from DTensors."""
    # Through the CPU: extra state lies there, and each rank has a device of its own.
    plain = [{name: one.cpu() for name, one in state.items() if not isinstance(one, DTensor)}]
    dist.broadcast_object_list(plain, dist.get_global_rank(group, 0), group=group)
    for name, value in plain[0].items():
        state[name] = value.to(state[name].device)

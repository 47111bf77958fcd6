"""Numbers between the host and a GPU, which runs behind: the host waits for it as rarely as may be.

A GPU executes operations some time after the host has asked for them. Where the host needs a number
(to decide something, or to factorize a small matrix, which a CPU does faster), it waits until all
operations are done, and the GPU is idle until the host asks for more. So a computation collects
what it has to know, and reads it at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["read", "send"]


def read(*tensors: Tensor) -> list[Tensor]:
    """Copies of some tensors on the CPU, in float64. A GPU is waited for once."""
    parts = [one.detach().double().flatten() for one in tensors]
    numbers = torch.cat(parts).cpu().split([len(part) for part in parts])
    return [part.view(one.shape) for part, one in zip(numbers, tensors, strict=True)]


def send(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device and in the dtype of another one. A GPU is not waited for.

    :param Tensor tensor: on the CPU, or on that device.
    """
    tensor = tensor.to(like.dtype)
    if tensor.is_cuda or not like.is_cuda:
        return tensor.to(like.device)
    return tensor.pin_memory().to(like.device, non_blocking=True)

"""Numbers that need more digits than a half-precision layer has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["at_least_float32", "keep_float32"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or a half-precision one (bfloat16, float16) in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def keep_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module._apply`` does to each tensor, without a cast to half precision.

    For buffers that ``layer.bfloat16()`` must move with the layer, but not round.
    """

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype in (torch.bfloat16, torch.float16):
            return tensor.to(moved.device)
        return moved

    return apply

"""Numbers that need more digits than a half-precision layer has, and those that are none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["at_least_float32", "check_finite", "keep_float32", "without_autocast"]

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or a half-precision one (bfloat16, float16) in float32."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()


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


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which no operation is cast to half precision; free where none would be."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NO_CONTEXT


def check_finite(weight: Tensor) -> None:
    """Raise unless all entries are finite.

    :raises torch.linalg.LinAlgError: if one is NaN or infinite.
    """
    if not torch.isfinite(weight).all():
        raise torch.linalg.LinAlgError("the weight has NaN or infinite entries")

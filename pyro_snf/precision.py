"""Numerical precision: half-precision casts, autocast, soft bounds, checks for NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "check_finite",
    "keep_float32",
    "singular",
    "soft_bound",
    "without_autocast",
    "zero_if_finite",
]

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or a half-precision one (bfloat16, float16) in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def keep_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that ``Module._apply`` applies to each tensor, without casts to half precision.

    For buffers that ``layer.bfloat16()`` must move with the layer, but must not round.
    """

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        is_rounded = moved.dtype in (torch.bfloat16, torch.float16)
        return tensor.to(moved.device) if is_rounded else moved

    return apply


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast is off for a device; it costs nothing where it was off before."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NO_CONTEXT


def soft_bound(x: Tensor, bound: float) -> Tensor:
    """``b tanh(x / b)``, which is about x near 0 and lies in (−b, b).

    :param Tensor x: any shape.
    :param float bound: b > 0.
    """
    return bound * torch.tanh(x / bound)


def singular(problem: str) -> torch.linalg.LinAlgError:
    """The error of a map that is singular or not finite, with what helps against it.

    :param str problem: what is the case.
    """
    return torch.linalg.LinAlgError(
        f"{problem}. Where training led to it: scale the data (or begin the flow with ActNorm), "
        "lower the learning rate, or use float64"
    )


def check_finite(weight: Tensor) -> None:
    """Raise unless all entries are finite.

    :raises torch.linalg.LinAlgError: if one is NaN or infinite.
    """
    if not torch.isfinite(weight).all():
        raise singular("the weight has NaN or infinite entries")


def zero_if_finite(weight: Tensor) -> Tensor:
    """0, shape ``()``, in float32 at least; on a GPU, which is not waited for, NaN unless finite.

    :raises torch.linalg.LinAlgError: elsewhere, if an entry is NaN or infinite.
    """
    # The sum is as good a test as a look at every entry, for which isfinite makes copies.
    total = weight.detach().sum(dtype=torch.promote_types(weight.dtype, torch.float32))
    if not weight.is_cuda and not math.isfinite(total.item()):
        check_finite(weight)  # else the sum has overflowed
        return torch.zeros_like(total)
    return total * 0

"""What transforms of images ask of their input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_snf.transforms.base import check_input

__all__ = ["check_image"]


def check_image(
    transform: Transform,
    x: Tensor,
    num_channels: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise a ValueError unless ``x`` is a floating, non-empty batch of images.

    :param Transform transform: named in the error.
    :param Tensor x: the input, of shape ``(..., C, H, W)``.
    :param num_channels: C; None if any will do.
    :param dtype: the type to expect, outside autocast; None if any will do.
    """
    if not isinstance(x, Tensor):
        check_input(transform, x, ())  # raises
    if x.dim() < 3 or num_channels not in (None, x.shape[-3]):
        channels = "C" if num_channels is None else num_channels
        raise ValueError(
            f"{transform}: expected a non-empty tensor of shape (..., {channels}, H, W); "
            f"got {tuple(x.shape)}"
        )
    check_input(transform, x, tuple(x.shape[-3:]), dtype)

"""Checks of what users pass: a ValueError, "expected …; got …", at the earliest point."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "as_event_shape",
    "as_image_shape",
    "check_count",
    "check_floating",
    "expect",
    "is_count",
]


def expect(expected: str, fits: bool, got: object) -> None:
    """Raise a ValueError unless an option fits.

    :param str expected: its name, and what it may be.
    """
    if not fits:
        raise ValueError(f"expected {expected}; got {got!r}")


def is_count(value: object, minimum: int = 1) -> bool:
    """Whether a value is an integer, at least ``minimum``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Raise a ValueError unless ``value`` is an integer, at least ``minimum``.

    :param str name: of the option, for the error.
    """
    expect(f"{name}, an integer >= {minimum}", is_count(value, minimum), value)


def check_floating(dtype: torch.dtype | None) -> None:
    """Raise a ValueError unless ``dtype`` is floating, or None for torch's default."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"expected a floating-point dtype; got {dtype}")


def as_event_shape(shape: int | Sequence[int]) -> torch.Size:
    """A shape given by its sizes, or by an integer if it has but one.

    :raises ValueError: unless it has at least one size, and all are integers from 1.
    """
    sizes = (shape,) if isinstance(shape, int) else shape
    is_shape = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    expect("event_shape, integers >= 1", is_shape and all(map(is_count, sizes)), shape)
    return torch.Size(sizes)


def as_image_shape(shape: Sequence[int]) -> torch.Size:
    """The shape (C, H, W) of an image.

    :raises ValueError: unless it is three integers from 1.
    """
    is_shape = isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) == 3
    expect("event_shape (C, H, W), integers >= 1", is_shape and all(map(is_count, shape)), shape)
    return torch.Size(shape)

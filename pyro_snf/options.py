"""Checks of options: a ValueError, "expected …; got …", at the earliest point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

__all__ = [
    "as_count",
    "as_event_shape",
    "as_image_shape",
    "as_number",
    "as_positive",
    "as_seed",
    "check_choice",
    "check_dtype",
    "check_flag",
    "expect",
    "is_count",
]


# Parameters can be of these types; torch computes next to nothing in smaller ones.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expect(expected: str, fits: bool, got: object) -> None:
    """Raise a ValueError unless an option fits.

    :param str expected: the option's name, and what it may be.
    """
    if not fits:
        raise ValueError(f"expected {expected}; got {got!r}")


def is_count(value: object, minimum: int = 1) -> bool:
    """Whether a value is an integer, of Python or NumPy, and at least ``minimum``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def as_count(name: str, value: Any, minimum: int = 1) -> int:
    """An integer, as a Python ``int``.

    :param str name: of the option, for the error.
    :raises ValueError: unless it is an integer, at least ``minimum``.
    """
    expect(f"{name}, an integer >= {minimum}", is_count(value, minimum), value)
    return int(value)


def as_seed(value: Any) -> int | None:
    """A seed for :class:`~pyro_snf.probes.ProbeStream`, as a Python ``int``, or None.

    :raises ValueError: unless it is None, or an integer in [0, 2⁶³).
    """
    fits = value is None or (is_count(value, 0) and value < 2**63)
    expect("seed, an integer in [0, 2**63), or None", fits, value)
    return None if value is None else int(value)


def as_number(expected: str, value: Any, fits: Callable[[float], bool]) -> float:
    """A real number, as a Python ``float``.

    :param str expected: the option's name, and what it may be.
    :param fits: whether a number may be it; False for NaN.
    :raises ValueError: unless it is a real number that fits.
    """
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer that is too large
            number = float(value)
    expect(expected, fits(number), value)
    return number


def as_positive(name: str, value: Any) -> float:
    """A positive, finite number, as a Python ``float``.

    :param str name: of the option, for the error.
    :raises ValueError: unless it is one.
    """
    return as_number(f"{name} > 0", value, lambda number: 0 < number < math.inf)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of some strings."""
    fits = isinstance(value, str) and value in choices
    expect(f"{name} to be one of {tuple(choices)}", fits, value)


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is True or False."""
    expect(f"{name} to be True or False", isinstance(value, bool | np.bool_), value)


def check_dtype(dtype: object) -> None:
    """Raise a ValueError unless ``dtype`` is a floating-point one, or None for torch's default."""
    fits = dtype is None or dtype in _DTYPES
    expect("dtype, a floating-point torch.dtype or None", fits, dtype)


def as_event_shape(shape: Any) -> torch.Size:
    """A shape given by its sizes, or by an integer if it has but one.

    :raises ValueError: unless it has at least one size, and all are integers from 1.
    """
    sizes = (shape,) if is_count(shape) else shape
    expect("event_shape, integers >= 1", _are_counts(sizes) and len(sizes) > 0, shape)
    return torch.Size(map(int, sizes))


def as_image_shape(shape: Any) -> torch.Size:
    """The shape (C, H, W) of an image.

    :raises ValueError: unless it is three integers from 1.
    """
    fits = _are_counts(shape) and len(shape) == 3
    expect("event_shape (C, H, W), integers >= 1", fits, shape)
    return torch.Size(map(int, shape))


def _are_counts(sizes: object) -> bool:
    return isinstance(sizes, Sequence) and not isinstance(sizes, str) and all(map(is_count, sizes))

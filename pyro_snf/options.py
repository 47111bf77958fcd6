"""Checks of options: a ValueError, "expected …; got …", at the earliest point."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Transform

__all__ = [
    "are_counts",
    "as_count",
    "as_event_shape",
    "as_image_shape",
    "as_list",
    "as_number",
    "as_odd_size",
    "as_positive",
    "as_pyro_seed",
    "as_seed",
    "check_cache_size",
    "check_choice",
    "check_context",
    "check_device",
    "check_dtype",
    "check_factory",
    "check_flag",
    "expect",
    "has_values",
    "is_count",
    "is_dense",
    "shown",
]


# The longest text of a value in an error.
_MAX_LENGTH = 300

# Torch's sizes are below it, and so are seeds.
_TOO_LARGE = 2**63

# Parameters can be of these types; torch computes next to nothing in smaller ones.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expect(expected: str, fits: bool, got: object) -> None:
    """Raise a ValueError unless an option fits.

    :param str expected: the option's name, and what it may be.
    """
    if not fits:
        raise ValueError(f"expected {expected}; got {shown(got)}")


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor: not a sparse or a nested one."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def has_values(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor that has numbers, which one on "meta" has not."""
    return is_dense(value) and not value.is_meta


def shown(value: object) -> str:
    """The repr of a value for an error, cut short; of some values there is none."""
    try:
        text = repr(value)
    except Exception:  # of an integer of 5,000 digits, and of what a user has written
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


def _as_integer(value: object) -> int | None:
    """A Python ``int``; None for what is no integer of Python or NumPy."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        with suppress(TypeError):  # NumPy calls its time spans integers
            return operator.index(value)
    return None


def is_count(value: object, minimum: int = 1) -> bool:
    """Whether a value is an integer, of Python or NumPy, at least ``minimum``, below 2⁶³."""
    number = _as_integer(value)
    return number is not None and minimum <= number < _TOO_LARGE


def as_count(name: str, value: Any, minimum: int = 1) -> int:
    """An integer, as a Python ``int``.

    :param str name: of the option, for the error.
    :raises ValueError: unless it is an integer, at least ``minimum``, below 2⁶³.
    """
    number = _as_integer(value)
    bound = "" if number is None or number < _TOO_LARGE else " and < 2**63"
    expect(f"{name}, an integer >= {minimum}{bound}", is_count(value, minimum), value)
    return int(value)


def as_seed(value: Any) -> int | None:
    """A seed for :class:`~pyro_snf.probes.ProbeStream`, as a Python ``int``, or None.

    :raises ValueError: unless it is None, or an integer in [0, 2⁶³).
    """
    fits = value is None or is_count(value, 0)
    expect("seed, an integer in [0, 2**63), or None", fits, value)
    return None if value is None else int(value)


def as_pyro_seed(value: Any) -> int | None:
    """A seed for ``pyro.set_rng_seed``, as a Python ``int``, or None.

    :raises ValueError: unless it is None, or an integer in [0, 2³²): NumPy takes no larger ones.
    """
    fits = value is None or (is_count(value, 0) and value < 2**32)
    expect("seed, an integer in [0, 2**32), or None", fits, value)
    return None if value is None else int(value)


def as_number(expected: str, value: Any, fits: Callable[[float], bool]) -> float:
    """A real number, as a Python ``float``.

    :param str expected: the option's name, and what it may be.
    :param fits: whether a number may be it; False for NaN.
    :raises ValueError: unless it is a real number that fits.
    """
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        # Integers and fractions that are too large, and NumPy's time spans, which are no numbers.
        with suppress(OverflowError, TypeError):
            number = float(value)
    expect(expected, fits(number), value)
    return number


def as_list(expected: str, value: Any) -> list[Any]:
    """The items of a list, or of anything else that has items.

    :param str expected: the option's name, and what it may be.
    :raises ValueError: for what has none.
    """
    items = None
    with suppress(TypeError):
        items = list(value)
    expect(expected, items is not None, value)
    return items or []


def as_positive(name: str, value: Any) -> float:
    """A positive, finite number, as a Python ``float``.

    :param str name: of the option, for the error.
    :raises ValueError: unless it is one.
    """
    return as_number(f"{name} > 0", value, lambda number: 0 < number < math.inf)


def check_cache_size(value: object) -> None:
    """Raise a ValueError unless ``value`` is 0 or 1."""
    expect("cache_size 0 or 1", is_count(value, 0) and value in (0, 1), value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of some strings."""
    fits = isinstance(value, str) and value in choices
    expect(f"{name} to be one of {tuple(choices)}", fits, value)


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is True or False."""
    expect(f"{name} to be True or False", isinstance(value, bool | np.bool_), value)


def check_dtype(dtype: object) -> None:
    """Raise a ValueError unless ``dtype`` is a floating-point one, or None for torch's default."""
    fits = dtype is None or (isinstance(dtype, torch.dtype) and dtype in _DTYPES)
    expect("dtype, a floating-point torch.dtype or None", fits, dtype)


def check_device(device: object) -> None:
    """Raise a ValueError unless ``device`` is a device, the name of one, or None for torch's
    default. Whether this machine has it, is for torch to say."""
    fits = device is None or isinstance(device, torch.device)
    if isinstance(device, str):
        with suppress(RuntimeError):
            torch.device(device)
            fits = True
    expect("device, a torch.device, the name of one, or None", fits, device)


def check_context(
    context: Any, dtype: torch.dtype | None, *, event_dim: int = 1, features: int | None = None
) -> None:
    """Raise a ValueError unless ``context`` is a floating, non-empty batch of contexts.

    :param dtype: the type to expect, outside autocast; None if any will do.
    :param int event_dim: the number of dimensions of a context.
    :param features: the size of the last one; None if any will do.
    """
    if not is_dense(context) or not context.is_floating_point():
        got = f"{context.dtype}" if isinstance(context, Tensor) else type(context).__name__
        if isinstance(context, Tensor) and not is_dense(context):
            got += ", nested" if context.is_nested else f", {context.layout}"
        raise ValueError(f"expected a floating-point context; got {got}")
    fits = context.dim() >= event_dim and features in (None, *context.shape[-1:])
    if not fits or context.numel() == 0:
        shape = (
            f"at least {event_dim} dimensions" if features is None else f"shape (..., {features})"
        )
        raise ValueError(f"expected a non-empty context of {shape}; got {tuple(context.shape)}")
    if dtype not in (None, context.dtype) and not torch.is_autocast_enabled(context.device.type):
        raise ValueError(f"expected a context of dtype {dtype}; got {context.dtype}")


def check_factory(expected: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is a function or a class that makes something.

    :param str expected: the option's name, and what it makes.
    """
    # Easily mistaken for one, because they can be called: one of what it is to make.
    is_made = isinstance(value, nn.Module | Transform)
    expect(expected, callable(value) and not is_made, value)


def as_event_shape(shape: Any) -> torch.Size:
    """A shape given by its sizes, or by an integer if it has but one.

    :raises ValueError: unless it has at least one size, and all are integers from 1.
    """
    sizes = (shape,) if is_count(shape) else shape
    expect("event_shape, integers >= 1", are_counts(sizes) and len(sizes) > 0, shape)
    return torch.Size(map(int, sizes))


def as_image_shape(shape: Any) -> torch.Size:
    """The shape (C, H, W) of an image.

    :raises ValueError: unless it is three integers from 1.
    """
    fits = are_counts(shape) and len(shape) == 3
    expect("event_shape (C, H, W), integers >= 1", fits, shape)
    return torch.Size(map(int, shape))


def as_odd_size(name: str, size: Any) -> tuple[int, int]:
    """The height and the width of a kernel, of which one number stands for both.

    :raises ValueError: unless they are odd integers from 1.
    """
    pair = (size, size) if is_count(size) else size
    fits = isinstance(pair, tuple | list) and len(pair) == 2
    fits = fits and all(is_count(length) and length % 2 == 1 for length in pair)
    expect(f"{name}, one or two odd integers >= 1", fits, size)
    return (int(pair[0]), int(pair[1]))


def are_counts(sizes: object) -> bool:
    """Whether a value is a list or another sequence, perhaps empty, of integers from 1."""
    is_text = isinstance(sizes, str | bytes)
    return isinstance(sizes, Sequence) and not is_text and all(map(is_count, sizes))

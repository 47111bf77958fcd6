"""Plain Python values in the ``state_dict`` of a module, as a tensor.

They are JSON in a tensor of bytes, so that everything that saves tensors saves them: safetensors,
``torch.load(weights_only=True)``, ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_snf.options import as_count, expect

__all__ = ["SavedCheck", "SavesAttributes", "saved_count", "saved_number", "saved_record"]

#: Checks a value to be saved or loaded: ``check(name, value)`` returns it, as the attribute is to
#: have it, or raises a ValueError that begins with "expected", and the name.
SavedCheck = Callable[[str, Any], Any]

# The version of the tensor's contents.
_FORMAT = 1

# The tensor's length is a multiple of this one. torch.distributed.checkpoint loads in place, into
# the state of another model, whose tensors need to be as long: numbers of more digits are not to
# change the length.
_NUM_BYTES = 512

# torch's own key for what get_extra_state returns.
_KEY = "_extra_state"

#: The check of a count, an integer from 0.
saved_count: SavedCheck = partial(as_count, minimum=0)


def saved_number(name: str, value: Any) -> float:
    """The check of a number; it may be NaN or infinite."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    expect(f"{name}, a number", fits, value)
    return float(value)


def saved_record(checks: Mapping[str, SavedCheck]) -> SavedCheck:
    """The check of a dictionary with exactly these names, by the check of each."""

    def check(name: str, value: Any) -> dict[str, Any]:
        expect(f"{name}, a dictionary", isinstance(value, dict), value)
        fits = value.keys() == checks.keys()
        expect(f"{name} to have the keys {sorted(checks)}", fits, sorted(value))
        return {key: check(f"{name}.{key}", value[key]) for key, check in checks.items()}

    return check


class ExtraStateError(RuntimeError):
    """An extra state that cannot be loaded."""


class _NamesDiffer(ExtraStateError):
    """Attributes are missing or unexpected."""

    def __init__(self, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
        super().__init__(f"expected {sorted(expected)}; got {sorted(got)}")
        self.missing = [name for name in expected if name not in got]
        self.unexpected = [name for name in got if name not in expected]


class SavesAttributes(nn.Module):
    """A module that saves some of its attributes, plain values, with its ``state_dict``.

    A class names them in :attr:`saved_attributes`, each with the check of its values. What is not
    an attribute, such as the state of another object, is made one by a property with a setter.
    Values are what JSON has: numbers, strings, None, lists (which tuples become), dictionaries.
    """

    #: The names of the attributes, and the checks of their values.
    saved_attributes: ClassVar[Mapping[str, SavedCheck]] = {}

    def get_extra_state(self) -> Tensor:
        """The values, in a tensor of bytes on the CPU.

        :raises ValueError: for an attribute that does not pass its check.
        """
        values = {
            name: check(name, getattr(self, name)) for name, check in self.saved_attributes.items()
        }
        return _encode({"format": _FORMAT, "values": values})

    def set_extra_state(self, state: Any) -> None:
        """Load what :meth:`get_extra_state` returned; nothing of it, if a value is not valid.

        :raises RuntimeError: if the state is not valid; and, once what fits is loaded, if values
            are missing or unexpected.
        """
        values = _decode(state)
        checks = self.saved_attributes
        known = [name for name in checks if name in values]
        try:
            valid = {name: checks[name](name, values[name]) for name in known}
        except ValueError as error:
            raise ExtraStateError(str(error)) from None
        for name, value in valid.items():
            setattr(self, name, value)
        if values.keys() != checks.keys():
            raise _NamesDiffer(checks, values)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # An error becomes one of those that load_state_dict lists, with the key and the class. A
        # name is treated as a key is: with strict=False it may be missing or unexpected.
        lists, key = (missing_keys, unexpected_keys, error_msgs), f"{prefix}{_KEY}"
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        except _NamesDiffer as error:
            missing_keys += [f"{key}.{name}" for name in error.missing]
            unexpected_keys += [f"{key}.{name}" for name in error.unexpected]
        except ExtraStateError as error:
            error_msgs.append(f"{key} of {type(self).__name__}: {error}")


def _encode(value: dict[str, Any]) -> Tensor:
    """JSON in UTF-8, filled up with spaces."""
    data = json.dumps(value, separators=(",", ":")).encode()
    data += b" " * (-len(data) % _NUM_BYTES)
    return torch.tensor(list(data), dtype=torch.uint8, device="cpu")


def _decode(state: Any) -> dict[str, Any]:
    """The values.

    :raises ExtraStateError: if there are none of this format.
    """
    if not isinstance(state, Tensor):
        raise ExtraStateError(f"expected a tensor; got {type(state).__name__}")
    if state.dtype != torch.uint8 or state.dim() != 1 or state.is_meta:
        raise ExtraStateError(
            f"expected a tensor of bytes, torch.uint8 and one-dimensional; got {state.dtype} of "
            f"shape {tuple(state.shape)} on device {state.device}"
        )
    try:
        content = json.loads(bytes(state.tolist()))
    except (ValueError, RecursionError) as error:  # no UTF-8, or no JSON
        raise ExtraStateError(f"expected JSON; got {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != _FORMAT:
        raise ExtraStateError(
            f"expected format {_FORMAT}; got {found!r}, of another version of pyro-snf"
        )
    values = content.get("values")
    if not isinstance(values, dict):
        raise ExtraStateError(f"expected 'values', a dictionary; got {values!r}")
    return values

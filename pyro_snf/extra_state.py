"""Python numbers in the ``state_dict`` of a module."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

__all__ = ["SavesAttributes"]


class SavesAttributes(nn.Module):
    """A module that saves some of its attributes, Python numbers, with its ``state_dict``."""

    #: The names of the attributes.
    saved_attributes: ClassVar[tuple[str, ...]] = ()

    def get_extra_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.saved_attributes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if not state:  # that of another kind of module, loaded with strict=False
            return
        for name in self.saved_attributes:
            if name not in state:
                raise RuntimeError(
                    f"expected the state of {type(self).__name__} to have {name!r}; "
                    f"got {sorted(state)}"
                )
            setattr(self, name, state[name])

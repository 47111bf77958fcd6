"""Remembering what is expensive, and forgetting it as soon as it is no longer true."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pyro_snf.precision import at_least_float32

__all__ = ["PairCache", "ParameterCache", "ParameterState"]

Value = TypeVar("Value")

# The fractional parts of multiples of the golden ratio: distinct, spread evenly over [0, 1).
_GOLDEN_RATIO = 0.6180339887498949


def _version(tensor: Tensor) -> int:
    """The in-place counter of autograd; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


@lru_cache(maxsize=16)
def _column_weights(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Distinct numbers in ``[0.5, 1.5)``, shape ``(length,)``."""
    with torch.inference_mode(False):  # for use outside it too
        counts = torch.arange(1, length + 1, device=device, dtype=dtype)
        return counts.mul_(_GOLDEN_RATIO).frac_().add_(0.5)


def _fingerprint(tensor: Tensor) -> Tensor:
    """A copy of a vector; of a matrix, a fixed combination of its columns. O(numel) to compute.

    The combination weighs every column differently, so permuted rows or columns show too. What it
    cannot see is a change below the rounding of a row sum.
    """
    tensor = tensor.detach()
    if tensor.dim() < 2:
        return tensor.clone()
    tensor = at_least_float32(tensor)  # else the products would round away small changes
    with torch.autocast(tensor.device.type, enabled=False):  # which would do the same
        return tensor @ _column_weights(tensor.shape[-1], tensor.dtype, tensor.device)


class ParameterState:
    """What some tensors were at one moment, to be compared with what they are now.

    Autograd's version counter alone is not enough: writing to ``parameter.data``, as Pyro's own
    ``ClippedAdam`` does at every step, leaves it where it was. So the contents are compared too.

    :param tensors: the tensors, none of them sparse.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._versions = [_version(tensor) for tensor in tensors]
        # A trace (torch.jit) records operations on tensors, and would record the comparison's
        # outcome as a constant. Within one trace nobody writes to parameters.
        self._fingerprints = (
            None if torch.jit.is_tracing() else [_fingerprint(tensor) for tensor in tensors]
        )

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors are still (or again) what they were. NaNs never are."""
        if [_version(tensor) for tensor in tensors] != self._versions:
            return False
        if self._fingerprints is None or torch.jit.is_tracing():
            return self._fingerprints is None and torch.jit.is_tracing()
        return all(
            now.device == then.device and now.dtype == then.dtype and torch.equal(now, then)
            for now, then in zip(map(_fingerprint, tensors), self._fingerprints, strict=True)
        )


class ParameterCache(Generic[Value]):
    """One value that is computed from parameters, kept until one of them changes.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._state: ParameterState | None = None
        self._value: Value | None = None

    def get(self, parameters: Sequence[Tensor], compute: Callable[[], Value]) -> Value:
        """The kept value if the parameters are what they were, else ``compute()``, kept."""
        if self._value is None or self._state is None or not self._state.holds(parameters):
            self._value = compute()
            self._state = ParameterState(parameters)
        return self._value

    def __reduce__(self) -> tuple[type[ParameterCache[Value]], tuple[()]]:
        return type(self), ()


class PairCache:
    """The last pair ``(x, y = T(x))``, for as long as it is true.

    A pair dies when a parameter changes, when ``x`` or ``y`` is written to in place, and when the
    graph between them would be another one now: gradients are recorded and were not (a pair from
    under ``no_grad`` has no graph), or ``x``, ``y`` or a parameter requires a gradient and did not;
    and the other way round; likewise with autocast and inference mode. And it dies when a backward
    pass uses its graph up. Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None
        self._conditions: list[object] = []
        self._state: ParameterState | None = None

    def store(
        self, x: Tensor, y: Tensor, parameters: Sequence[Tensor], *, computed: Tensor
    ) -> None:
        """Keep a pair.

        :param Tensor computed: the one of the two that was computed from the other.
        """
        self._pair = (x, y)
        self._conditions = self._current_conditions(parameters)
        self._state = ParameterState(parameters)
        if computed.grad_fn is not None and not torch.jit.is_tracing():
            # Weakly: a strong reference in the graph would keep this cache, which keeps the graph.
            cache = weakref.ref(self)
            computed.register_hook(lambda gradient: _clear_if_alive(cache))

    def y_of(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
        """The ``y`` that belongs to this very tensor ``x``, or None."""
        if self._pair is not None and self._pair[0] is x and self._is_valid(parameters):
            return self._pair[1]
        return None

    def x_of(self, y: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
        """The ``x`` that belongs to this very tensor ``y``, or None."""
        if self._pair is not None and self._pair[1] is y and self._is_valid(parameters):
            return self._pair[0]
        return None

    def _is_valid(self, parameters: Sequence[Tensor]) -> bool:
        assert self._pair is not None
        assert self._state is not None
        if self._current_conditions(parameters) != self._conditions:
            return False
        return self._state.holds(parameters)

    def _current_conditions(self, parameters: Sequence[Tensor]) -> list[object]:
        assert self._pair is not None
        return [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(self._pair[0].device.type),
            *[_version(tensor) for tensor in self._pair],
            *[tensor.requires_grad for tensor in (*self._pair, *parameters)],
        ]

    def __reduce__(self) -> tuple[type[PairCache], tuple[()]]:
        return type(self), ()


def _clear_if_alive(reference: weakref.ref[PairCache]) -> None:
    cache = reference()
    if cache is not None:
        cache.clear()
